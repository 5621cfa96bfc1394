"""Two real processes: each reads its own share of a stream, together every example."""

import json

import jax
from joined_processes import run_together
import numpy as np

PROCESS = """
import json
import jax
jax.config.update("jax_num_cpu_devices", 2)
import numpy as np
from insvp_jax.distributed import mesh as mesh_lib, processes
assert processes.initialize_distributed() is True
from insvp_jax.data import StreamSplit, pipeline, preprocess

read = []

def open_(requests, whole):
  for request in requests:
    read.extend(request.tolist())
    yield np.stack([np.full((12, 12, 3), i, np.uint8) for i in request])

labels = np.arange(21, dtype=np.int32) % 5
split = StreamSplit(labels, 12, "", open_, square=True)
sharding = mesh_lib.batch_sharding(mesh_lib.create_mesh())
preset = preprocess.Preset("p", *[preprocess.HALF] * 2, "tf1", margin=1.5, flip=True)
found = {"train": [], "eval": []}
batches = pipeline.train_batches(
  split, batch_size=8, seed=3, preset=preset, image_size=8, sharding=sharding
)
for batch, _ in zip(batches, range(4)):
  assert batch["images"].shape == (8, 8, 8, 3)
  local = [np.asarray(s.data)[:, 0, 0, 0] for s in batch["images"].addressable_shards]
  found["train"].append(np.concatenate(local).tolist())
batches.close()
found["read"], read = read, []
total = 0
for batch in pipeline.eval_batches(split, batch_size=8, sharding=sharding):
  images, masks = (batch[n].addressable_shards for n in ("images", "mask"))
  for image, mask in zip(images, masks):
    real = np.asarray(mask.data) > 0
    found["eval"] += np.asarray(image.data)[real][:, 0, 0, 0].tolist()
  total += float(jax.jit(lambda m: m.sum())(batch["mask"]))
found["total"] = total
print(json.dumps(found))
"""


def test_two_processes_read_disjoint_shares_that_make_up_every_epoch():
  first, second = map(json.loads, run_together(PROCESS))
  # Two batches of 8 are an epoch of 21: each example at most once, by one process.
  for epoch in (0, 2):
    numbers = sum(
      (f["train"][epoch] + f["train"][epoch + 1] for f in (first, second)), []
    )
    assert len(set(numbers)) == 16
  # Nobody reads what another process trains on (the look-ahead is bounded).
  for mine in (first, second):
    trained = sum(mine["train"], [])
    assert len(trained) == 16
    assert mine["read"][:16] == trained and len(mine["read"]) <= 20
  assert sorted(first["eval"] + second["eval"]) == list(range(21))
  assert first["total"] == second["total"] == 21
  # The same rows as one process would have: the documented order.
  key = jax.random.fold_in(jax.random.key(3), 0)
  order = np.asarray(jax.random.permutation(key, 21))
  assert first["train"][0] == order[:4].tolist()
  assert second["train"][0] == order[4:8].tolist()
