"""How the page of `demo` is served: to whom, what it lets in, what it leaves behind.

Gradio is made for apps that are shared. What this page does without is turned off here,
and what cannot be turned off is not let through: endpoints that fetch addresses, run
ffmpeg on what is sent, or serve files.
"""

from collections.abc import Awaitable, Callable, Iterator, MutableMapping
import contextlib
import ipaddress
import os
from pathlib import Path
import re
import shutil
import signal
import socket
import sys
import tempfile
import time
from typing import Any, NoReturn
import urllib.parse

# What the page is made of, and what it asks for to answer an image.
_PATHS = {
  "GET": r"/|/(assets|static)/.*|/(theme\.css|favicon\.ico|manifest\.json|config)"
  r"|/gradio_api/(info|upload_progress|queue/data|startup-events|heartbeat/\w+)",
  "POST": r"/gradio_api/(upload|queue/join|cancel|reset)/?",
}
_UPLOAD = "/gradio_api/upload"
# Bytes: of a request that is no image, and of what surrounds one.
_MOST_AROUND = 2**16
# Seconds. An upload that has not been answered by then was interrupted.
_ABANDONED = 900
# The page's scripts stand in it and make functions; nothing may come from elsewhere.
_POLICY = (
  "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; "
  "style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; "
  "font-src 'self' data:; frame-ancestors 'none'; form-action 'none'; base-uri 'self'"
)
_HEADERS = {
  "content-security-policy": _POLICY,
  "referrer-policy": "no-referrer",
  "x-content-type-options": "nosniff",
  "cache-control": "no-store",
}
Message = MutableMapping[str, Any]


def check_gradio() -> None:
  """Checks that Gradio is installed, without importing it.

  Raises:
    ValueError: it is not; the message says how to install it.
  """
  import importlib.util

  if not importlib.util.find_spec("gradio"):
    raise ValueError("the page needs Gradio: pip install 'insvp_jax[demo]'")


def imported() -> Any:
  """Returns the module gradio, told to send nothing about its use."""
  os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
  os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
  import gradio

  return gradio


@contextlib.contextmanager
def upload_folder() -> Iterator[Path]:
  """Yields the folder that uploads go to, which others cannot read; removes it."""
  before = os.environ.get("GRADIO_TEMP_DIR")
  with tempfile.TemporaryDirectory(prefix="insvp_demo_") as folder:
    os.environ["GRADIO_TEMP_DIR"] = folder
    try:
      yield Path(folder)
    finally:
      os.environ.pop("GRADIO_TEMP_DIR")
      if before is not None:
        os.environ["GRADIO_TEMP_DIR"] = before


def remove_old(folder: Path, seconds: float | int = _ABANDONED) -> None:
  """Removes what interrupted uploads have left in a folder for longer than this."""
  for entry in folder.iterdir():
    # Another request may remove it at the same time.
    with contextlib.suppress(OSError):
      if time.time() - entry.stat().st_mtime > seconds:
        if entry.is_dir():
          shutil.rmtree(entry)
        else:
          entry.unlink()


def only_uploads(field: Any) -> None:
  """Has a field for files fetch and copy nothing: it takes paths as they are sent.

  Whoever reads them has to see that they are of the folder of uploads.

  Raises:
    AttributeError: this version of Gradio fetches them by another name.
  """

  async def keep(path: str) -> str:
    return path

  # Where Gradio gets hold of what a request names.
  name = "async_move_resource_to_block_cache"
  getattr(field, name)
  setattr(field, name, keep)


class Guard:
  """An ASGI app around another: lets through what the page needs, and nothing else."""

  def __init__(self, app: Any, hosts: frozenset[str] | None, max_bytes: int):
    """Wraps an app.

    Args:
      app: the ASGI app.
      hosts: names that requests may give this machine; None for any. A page elsewhere
        whose name leads here gives another.
      max_bytes: of an image.
    """
    self._app, self._hosts, self._max_bytes = app, hosts, max_bytes

  async def __call__(
    self,
    scope: Message,
    receive: Callable[[], Awaitable[Message]],
    send: Callable[[Message], Awaitable[None]],
  ) -> None:
    """Answers a request, or passes it on."""
    if scope["type"] == "lifespan":
      await self._app(scope, receive, send)
      return

    async def send_guarded(message: Message) -> None:
      if message["type"] == "http.response.start":
        ours = [(name.encode(), text.encode()) for name, text in _HEADERS.items()]
        kept = [h for h in message["headers"] if h[0].decode().lower() not in _HEADERS]
        message = {**message, "headers": [*kept, *ours]}
      await send(message)

    refusal = self.refusal(scope)
    if refusal is None:
      await self._app(scope, receive, send_guarded)
      return
    status, text = refusal
    headers = [(b"content-type", b"text/plain; charset=utf-8")]
    start = {"type": "http.response.start", "status": status, "headers": headers}
    await send_guarded(start)
    await send({"type": "http.response.body", "body": f"{text}\n".encode()})

  def refusal(self, scope: Message) -> tuple[int, str] | None:
    """Returns (status, why) of a request that is not let through; None of others."""
    if scope["type"] != "http":
      return 404, "there is nothing here"
    headers = {name.lower(): text.decode("latin-1") for name, text in scope["headers"]}
    host = headers.get(b"host", "")
    if self._hosts is not None and _without_port(host) not in self._hosts:
      return 403, "this page is for the machine that it runs on"
    method = "GET" if scope["method"] == "HEAD" else scope["method"]
    if not re.fullmatch(_PATHS.get(method, "(?!)"), scope["path"]):
      return 404, "there is nothing here"
    if method == "GET":
      return None
    origin = headers.get(b"origin")
    if origin is not None and urllib.parse.urlsplit(origin).netloc != host:
      return 403, "another page may not send here"
    length = headers.get(b"content-length", "")
    if not re.fullmatch("[0-9]{1,15}", length):
      return 411, "the request does not say how long it is"
    most = self._max_bytes if scope["path"].rstrip("/") == _UPLOAD else 0
    if int(length) > most + _MOST_AROUND:
      return 413, f"the image is larger than {most / 2**20:g} MiB"
    return None


def _without_port(host: str) -> str:
  """Returns "localhost" for "localhost:7860", "::1" for "[::1]:7860"."""
  name = re.sub(":[0-9]*$", "", host).lower()
  return name[1:-1] if name.startswith("[") and name.endswith("]") else name


def is_own(host: str) -> bool:
  """Returns whether an address reaches nobody but programs of this machine."""
  with contextlib.suppress(ValueError):
    return ipaddress.ip_address(host).is_loopback
  return host == "localhost"


def create_app(page: Any, host: str, max_bytes: int) -> Guard:
  """Returns the ASGI app that serves a page.

  Args:
    page: a `gradio.Blocks`.
    host: the address that it is served at.
    max_bytes: of an image.
  """
  import fastapi

  gradio = imported()
  app = fastapi.FastAPI(openapi_url=None)
  gradio.mount_gradio_app(
    app,
    page,
    path="/",
    # Whatever the environment says.
    root_path="",
    footer_links=[],
    run_history=False,
    enable_monitoring=False,
    ssr_mode=False,
    mcp_server=False,
    pwa=False,
    max_file_size=max_bytes,
    # What goes wrong is on the terminal; the page says what its user can mend.
    show_error=False,
  )
  own = frozenset({"localhost", "127.0.0.1", "::1", host.lower()})
  return Guard(app, own if is_own(host) else None, max_bytes)


@contextlib.contextmanager
def listen(host: str, port: int) -> Iterator[socket.socket]:
  """Yields a socket that listens at an address.

  Raises:
    ValueError: the port is none.
    OSError: the address cannot be used, e.g. since another program does.
  """
  if not 0 <= port <= 65535:
    raise ValueError(f"--port is {port}, expected 0 to 65535; 0 is any free one.")
  try:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.create_server((host, port), family=family)
  except OSError as error:
    raise OSError(
      f"the page cannot be served at {host}, port {port}: {error.strerror or error}. "
      "Choose another --port, or 0 for any free one, or another --host."
    ) from error
  with listening:
    yield listening


def serve(app: Guard, listening: socket.socket) -> None:
  """Serves an app until Ctrl-C or SIGTERM."""
  import uvicorn

  host, port = listening.getsockname()[:2]
  shown = f"[{host}]" if ":" in host else host
  config = uvicorn.Config(
    app,
    log_level="warning",
    access_log=False,
    server_header=False,
    # An open page holds a connection.
    timeout_graceful_shutdown=1,
  )

  def end(signum: int, frame: object) -> NoReturn:
    # Raised, so that the folder of uploads is removed.
    del frame
    sys.exit(0 if signum == signal.SIGINT else 128 + signum)

  # The server handles both while it runs, and passes them on when it has ended.
  for signum in (signal.SIGINT, signal.SIGTERM):
    signal.signal(signum, end)
  print(f"the page is at http://{shown}:{port}; Ctrl-C ends it", flush=True)
  if not is_own(host):
    print(
      "note: everyone who reaches this machine can use the page; it has no password",
      file=sys.stderr,
      flush=True,
    )
  uvicorn.Server(config).run(sockets=[listening])
