"""The page to try a run: what it answers, to whom, and that nothing stays behind.

What needs Gradio, or a browser, is skipped where there is none.
"""

import asyncio
import contextlib
import dataclasses
import http.client
import importlib.util
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import types

import browser
import numpy as np
from PIL import Image
import pytest
from tiny_runs import CLASSES, make_run

from insvp_jax import run as run_lib
from insvp_jax.data import decode
from insvp_jax.run import load_run
from insvp_jax.tools import demo, demo_server

EVIL = "<img src=x onerror=document.title='evil'>${document.title='evil'}{{this}}"
MAX_BYTES = 2**20


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
  """A run with image prompts and one without; a class name is a program."""
  meta = {"class_names": ["ant", EVIL, "$cat$"]}
  block = {"backbone_kwargs": {"depth": 1}}
  first, *_ = make_run(tmp_path_factory.mktemp("insvp"), meta=meta, **block)
  second, *_ = make_run(tmp_path_factory.mktemp("linear"), "linear", **block)
  loaded = [load_run(first), load_run(second)]
  return dict(zip(demo.titles(["one", "two"], loaded), loaded, strict=True))


def png(height=20, width=30):
  pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
  buffer = io.BytesIO()
  Image.fromarray(pixels).save(buffer, "PNG")
  return buffer.getvalue(), pixels


def sent(folder, data, name="photo.png"):
  """Puts a file where Gradio puts uploads; returns what it says of it."""
  path = folder / "digest" / name
  path.parent.mkdir(exist_ok=True)
  path.write_bytes(data)
  return {"path": str(path), "orig_name": name, "size": len(data)}


def test_an_image_is_answered_by_each_run_and_removed(runs, tmp_path):
  data, pixels = png()
  responder = demo.Responder(runs, tmp_path, top=2)
  upload = sent(tmp_path, data, "a<b>.png")
  field, line, *shown = responder(upload)
  assert field is None and line == "a&lt;b&gt;.png"
  for run, classes, pictures in zip(
    runs.values(), shown[::2], shown[1::2], strict=True
  ):
    expected = dict(zip(run.class_names, run.predict(pixels)[0], strict=True))
    assert classes == {name: pytest.approx(expected[name]) for name in classes}
    assert list(classes.values()) == sorted(expected.values(), reverse=True)[:2]
    # Image prompts are InsVP's.
    assert ("the prompts" in pictures) == (run.meta["method"] == "insvp")
    assert "Grad-CAM for" in pictures
  assert list(tmp_path.iterdir()) == []


def test_the_picture_of_the_prompts_is_that_of_visualize(runs, monkeypatch):
  _, pixels = png()
  drawn = []
  original = demo.visualize.prompt_figure
  monkeypatch.setattr(
    demo.visualize, "prompt_figure", lambda *args: drawn.append(args) or original(*args)
  )
  run = next(iter(runs.values()))
  answered = demo.answer(run, pixels)
  assert [title.split(" for ")[0] for title, _ in answered.pictures] == [
    "the prompts",
    "Grad-CAM",
  ]
  for _, picture in answered.pictures:
    with Image.open(io.BytesIO(picture)) as image:
      assert image.format == "PNG" and min(image.size) > 100
  assert drawn[0][0] is run


@pytest.mark.parametrize(
  "data, message",
  [
    (b"", "is empty"),
    (b"no image", "is not an image of a known format"),
    (png()[0][:100], "does not decode"),
    (png(40, 50)[0], "suspiciously many pixels"),
    (png()[0] + bytes(9000), "expected at most 0.0"),
  ],
)
def test_a_bad_image_is_a_line_on_the_page(runs, tmp_path, monkeypatch, data, message):
  monkeypatch.setattr(decode, "MAX_PIXELS", 1999)
  run = next(iter(runs.values()))
  options = dataclasses.replace(run.decode_options, max_bytes=8000)
  small = types.SimpleNamespace(decode_options=options)
  responder = demo.Responder({"one": small}, tmp_path)
  field, line, *shown = responder(sent(tmp_path, data, "<b>.png"))
  assert (field, shown) == (None, [None, ""])
  assert 'role="alert"' in line and message in line and "&lt;b&gt;.png" in line
  assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("path", ["{secret}", "{folder}/../secret.png", "", 3, "a\0b"])
def test_no_other_file_is_read_or_removed(runs, tmp_path, path):
  folder, secret = tmp_path / "uploads", tmp_path / "secret.png"
  folder.mkdir()
  secret.write_bytes(png()[0])
  if isinstance(path, str):
    path = path.format(secret=secret, folder=folder)
  line = demo.Responder(runs, folder)({"path": path})[1]
  assert "no image came" in line
  assert secret.exists()
  # Nor by a link.
  (folder / "link.png").symlink_to(secret)
  assert (
    "no image came"
    in demo.Responder(runs, folder)({"path": str(folder / "link.png")})[1]
  )
  assert "no image came" in demo.Responder(runs, folder)(None)[1]


def test_bugs_are_no_bad_images(runs, tmp_path, monkeypatch):
  def broken(*args):
    raise ZeroDivisionError

  monkeypatch.setattr(demo, "answer", broken)
  with pytest.raises(ZeroDivisionError):
    demo.Responder(runs, tmp_path)(sent(tmp_path, png()[0]))
  assert list(tmp_path.iterdir()) == []


def test_16_bit_images_that_become_dark_are_said_so_once_and_for_each(runs, tmp_path):
  buffer = io.BytesIO()
  Image.fromarray(np.full((8, 8), 4000, np.uint16)).save(buffer, "PNG")
  title, run = list(runs.items())[-1]
  responder = demo.Responder({title: run}, tmp_path)
  for _ in range(2):
    line = responder(sent(tmp_path, buffer.getvalue()))[1]
    assert line.count("no value of the 1 16-bit images") == 1


def test_too_little_memory_is_a_line_on_the_page(runs, tmp_path, monkeypatch):
  def large(*args):
    raise RuntimeError("RESOURCE_EXHAUSTED: 1 TiB")

  monkeypatch.setattr(demo, "answer", large)
  line = demo.Responder(runs, tmp_path)(sent(tmp_path, png()[0]))[1]
  assert "No answer: there is too little memory for it." in line


def test_interrupted_uploads_are_removed_after_a_while(tmp_path):
  (tmp_path / "new").write_bytes(b"x")
  (tmp_path / "folder").mkdir()
  demo_server.remove_old(tmp_path)
  assert len(list(tmp_path.iterdir())) == 2
  demo_server.remove_old(tmp_path, seconds=-1)
  assert list(tmp_path.iterdir()) == []


# Who is let in.


def request(method="GET", path="/", **headers):
  headers = {"host": "127.0.0.1:7860", **headers}
  pairs = [(k.replace("_", "-").encode(), v.encode()) for k, v in headers.items()]
  return {"type": "http", "method": method, "path": path, "headers": pairs}


UPLOAD = "/gradio_api/upload"


@pytest.mark.parametrize(
  "status, scope",
  [
    (None, request()),
    (None, request("HEAD", host="localhost")),
    (None, request(host="[::1]:80", path="/assets/a.js")),
    (None, request("POST", UPLOAD, content_length=str(MAX_BYTES))),
    (None, request("POST", UPLOAD, content_length="1", origin="http://127.0.0.1:7860")),
    # A name of elsewhere that leads here, and a page of elsewhere.
    (403, request(host="evil.example:7860")),
    (403, request(host="")),
    (403, request("POST", UPLOAD, content_length="1", origin="http://evil.example")),
    (403, request("POST", UPLOAD, content_length="1", origin="null")),
    (411, request("POST", UPLOAD)),
    (411, request("POST", UPLOAD, content_length="-1")),
    (413, request("POST", UPLOAD, content_length=str(MAX_BYTES + 2**17))),
    (413, request("POST", "/gradio_api/queue/join", content_length=str(2**17))),
    # What Gradio has, too.
    (404, request(path="/gradio_api/file=/etc/passwd")),
    (404, request(path="/gradio_api/file=http://127.0.0.1/")),
    (404, request(path="/gradio_api/proxy=http://127.0.0.1/")),
    (404, request("POST", "/gradio_api/process_recording", content_length="1")),
    (404, request("POST", "/gradio_api/component_server", content_length="1")),
    (404, request("POST", "/login", content_length="1")),
    (404, request("DELETE")),
    (404, {"type": "websocket", "path": "/", "headers": []}),
  ],
)
def test_only_what_the_page_needs_is_let_through(status, scope):
  guard = demo_server.Guard(
    None, frozenset({"localhost", "127.0.0.1", "::1"}), MAX_BYTES
  )
  refusal = guard.refusal(scope)
  assert (refusal and refusal[0]) == status


def test_a_page_for_others_is_reached_by_any_name():
  guard = demo_server.Guard(None, None, MAX_BYTES)
  assert guard.refusal(request(host="box.example")) is None
  assert all(map(demo_server.is_own, ("127.0.0.1", "::1", "localhost")))
  assert not any(map(demo_server.is_own, ("192.0.2.1", "::", "box.example")))


@pytest.mark.parametrize("path, status", [("/", 200), ("/none", 404)])
def test_answers_say_that_nothing_comes_from_elsewhere(path, status):
  async def app(scope, receive, send):
    headers = [(b"cache-control", b"public"), (b"x", b"y")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": b""})

  messages = []

  async def send(message):
    messages.append(message)

  guard = demo_server.Guard(app, frozenset({"127.0.0.1"}), MAX_BYTES)
  asyncio.run(guard(request(path=path), None, send))
  headers = dict(messages[0]["headers"])
  assert messages[0]["status"] == status
  assert headers[b"cache-control"] == b"no-store"
  assert headers[b"content-security-policy"].startswith(b"default-src 'self'; ")


# The command.


@pytest.mark.parametrize(
  "flags, message",
  [
    (["--top=0"], "--top is 0"),
    (["--port=70000"], "--port is 70000"),
    (["--host=203.0.113.1"], "the page cannot be served at 203.0.113.1"),
    (["--run=x"] * 4, "there are 5 runs, expected at most 4"),
    ([], "nowhere"),
  ],
)
def test_bad_flags_are_one_line(flags, message, capsys, monkeypatch):
  monkeypatch.setattr(demo_server, "check_gradio", lambda: None)
  assert demo.main(["--run=nowhere", "--port=0", *flags]) == 2
  error = capsys.readouterr().err
  assert message in error and error.count("\n") == 1


def test_a_port_in_use_is_one_line(capsys, monkeypatch):
  monkeypatch.setattr(demo_server, "check_gradio", lambda: None)
  with demo_server.listen("127.0.0.1", 0) as taken:
    port = taken.getsockname()[1]
    assert demo.main(["--run=nowhere", f"--port={port}"]) == 2
  assert "Choose another --port" in capsys.readouterr().err


def test_without_gradio_the_command_says_what_to_install(capsys, monkeypatch):
  found = importlib.util.find_spec
  monkeypatch.setattr(
    importlib.util, "find_spec", lambda name: None if name == "gradio" else found(name)
  )
  assert demo.main(["--run=nowhere"]) == 2
  assert capsys.readouterr().err == (
    "insvp_jax: the page needs Gradio: pip install 'insvp_jax[demo]'\n"
  )


def test_check_answers_an_image_and_ends(runs, capsys, monkeypatch):
  by_path = {str(run.workdir): run for run in runs.values()}
  monkeypatch.setattr(run_lib, "load_run", lambda path, backbone: by_path[path])
  monkeypatch.setattr(demo_server, "check_gradio", lambda: None)
  monkeypatch.setattr(demo, "build", lambda responder: responder)
  monkeypatch.setattr(
    demo_server, "create_app", lambda page, host, limit: (page, limit)
  )
  # Started, it would not end.
  monkeypatch.setattr(demo_server, "serve", None)
  flags = [f"--run={path}" for path in by_path]
  assert demo.main([*flags, "--port=0", "--check"]) == 0
  lines = capsys.readouterr().out.splitlines()
  for line, path, method in zip(lines, by_path, ("insvp", "linear"), strict=True):
    assert line.startswith(f"{path}, {method}, test accuracy 50.00%: ready, e.g. ")


def test_a_field_fetches_no_addresses():
  field = types.SimpleNamespace(async_move_resource_to_block_cache=None)
  demo_server.only_uploads(field)
  keep = field.async_move_resource_to_block_cache
  for path in ("/tmp/photo.png", "https://example.com/x.png"):
    assert asyncio.run(keep(path)) == path
  # Another version of Gradio may have another name for it.
  with pytest.raises(AttributeError):
    demo_server.only_uploads(types.SimpleNamespace())


# The page itself: in a process of its own, as Gradio leaves loops of events open.


class Served:
  """The page under way.

  Attributes:
    address: of the page.
    folder: what the process writes to in place of /tmp.
  """

  def __init__(self, address, folder):
    self.address, self.folder = address, folder

  def ask(self, path, data=None, length=None, **headers):
    """Returns (status, body); with a `length` nothing but the headers is sent."""
    host, port = self.address.removeprefix("http://").split(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=60)
    with contextlib.closing(connection):
      headers = {name.replace("_", "-"): text for name, text in headers.items()}
      if length is not None:
        headers["content-length"] = str(length)
      method = "GET" if data is None and length is None else "POST"
      connection.request(method, path, data, headers)
      answer = connection.getresponse()
      return answer.status, answer.read().decode()

  def upload(self, data, name="photo.png"):
    head = f'Content-Disposition: form-data; name="files"; filename="{name}"'
    body = f"--x\r\n{head}\r\n\r\n".encode() + data + b"\r\n--x--\r\n"
    kind = "multipart/form-data; boundary=x"
    return self.ask(UPLOAD, body, content_type=kind)

  def submit(self, value):
    """Returns what the page is told after it has handed in a file."""
    _, config = self.ask("/config")
    (event,) = [e for e in json.loads(config)["dependencies"] if e["targets"]]
    body = {"data": [value], "fn_index": event["id"], "session_hash": "abc"}
    status, text = self.ask(
      "/gradio_api/queue/join",
      json.dumps(body).encode(),
      content_type="application/json",
    )
    assert status == 200, text
    _, events = self.ask("/gradio_api/queue/data?session_hash=abc")
    lines = [line[5:] for line in events.splitlines() if line.startswith("data:")]
    told = map(json.loads, lines)
    return next(each for each in told if each["msg"] == "process_completed")

  def kept(self):
    """Returns the files that are left of uploads."""
    return [path for path in self.folder.rglob("*") if path.is_file()]


@pytest.fixture(scope="module")
def served(runs, root, tmp_path_factory):
  if not importlib.util.find_spec("gradio"):
    pytest.skip("Gradio, of the extra demo, is not installed")
  folder = tmp_path_factory.mktemp("tmp")
  flags = [f"--run={run.workdir}" for run in runs.values()]
  process = subprocess.Popen(
    [sys.executable, "-m", "insvp_jax.tools.demo", *flags, "--port=0"],
    cwd=root,
    env={**os.environ, "TMPDIR": str(folder)},
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )
  try:
    lines = [process.stdout.readline() for _ in range(3)]
    found = re.fullmatch("the page is at (.*); Ctrl-C ends it\n", lines[-1])
    assert found, (lines, process.kill(), process.stderr.read())
    yield Served(found[1], folder)
  finally:
    process.terminate()
    _, errors = process.communicate(timeout=60)
  assert process.returncode == 128 + signal.SIGTERM
  assert "Traceback" not in errors
  assert list(folder.glob("insvp_demo_*")) == []


def test_the_page_answers_by_the_api_of_gradio(served):
  status, text = served.upload(png()[0])
  assert status == 200 and len(served.kept()) == 1
  value = {"path": json.loads(text)[0], "meta": {"_type": "gradio.FileData"}}
  told = served.submit({**value, "orig_name": "photo.png"})
  assert told["success"], told
  field, line, classes, _, others, _ = told["output"]["data"]
  assert (field, line) == (None, "photo.png")
  assert {each["label"] for each in classes["confidences"]} == {"ant", EVIL, "$cat$"}
  assert {each["label"] for each in others["confidences"]} == set(CLASSES)
  assert served.kept() == []


def test_the_page_refuses_what_it_does_without(served):
  for path in ("https://example.com/x.png", "http://127.0.0.1/x.png"):
    told = served.submit({"path": path, "meta": {"_type": "gradio.FileData"}})
    assert "no image came" in told["output"]["data"][1]
  # Too large by what it says, and by a little.
  assert served.ask(UPLOAD, length=2**40)[0] == 413
  limit = decode.MAX_FILE_MB * 2**20
  assert served.ask(UPLOAD, length=limit + 2**16 + 1)[0] == 413
  assert served.ask("/gradio_api/file=/etc/passwd")[0] == 404
  assert served.ask("/", Host="evil.example")[0] == 403
  assert served.kept() == []


@pytest.mark.skipif(browser.find() is None, reason="there is no Chromium on the path")
@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")
def test_a_person_with_a_browser_sees_answers_and_errors(served, tmp_path):
  files = {"photo.png": png()[0], "a<b>.png": b"no image"}
  for name, data in files.items():
    (tmp_path / name).write_bytes(data)
  field = "#image input[type=file]"
  with browser.open_page(browser.find()) as page:
    page.call("Page.navigate", url=served.address)
    page.wait_for(f"document.querySelector('{field}') !== null")
    page.choose_file(field, tmp_path / "photo.png")
    page.wait_for("document.querySelectorAll('[alt^=Grad-CAM]').length == 2")
    shown = page.evaluate("document.body.innerText")
    # Names are text, whatever they hold.
    assert "photo.png" in shown and EVIL in shown and "$cat$" in shown
    assert page.evaluate("document.title") == "insvp_jax"
    widths = "[...document.querySelectorAll('[alt]')].map(x => x.naturalWidth)"
    assert min(page.evaluate(widths)) > 100
    page.choose_file(field, tmp_path / "a<b>.png")
    line = "document.querySelector('#line [role=alert]')"
    page.wait_for(f"{line} !== null")
    assert page.evaluate(f"{line}.innerText").startswith("No answer: a<b>.png is not")
    requested = page.requested()
    errors = [
      event
      for event in page.events
      if event.get("method") == "Runtime.exceptionThrown"
      or event.get("params", {}).get("entry", {}).get("source") == "security"
    ]
  assert len(requested) > 10 and not errors
  assert all(url.startswith((f"{served.address}/", "data:")) for url in requested)
  assert served.kept() == []
