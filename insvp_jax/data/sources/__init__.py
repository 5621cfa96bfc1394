"""Where images come from: one module with a function `load` for each kind of source.

| module | reads |
|---|---|
| `image_folder` | one's own images: a folder or .zip of classes, or a CSV of labels |
| `memory` | one's own images, given in Python |
| `vtab_folder` | VTAB-1k as NOAH's script lays it out: images and train800.txt, ... |
| `fgvc_folder` | FGVC: images and VPT's train.json, val.json and test.json |
| `gtsrb` | German traffic signs as torchvision unpacks them |
| `tfds` | every other task of the table: TFRecords that TFDS prepared |
| `cifar_npz` | CIFAR-10 as JPEG bytes in .npz files |
| `digits` | scikit-learn's handwritten digits |
"""
