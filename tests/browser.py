"""A headless Chromium that a test drives through a pipe, where there is one."""

from collections.abc import Iterator
import contextlib
import json
import os
from pathlib import Path
import select
import shutil
import signal
import subprocess
import tempfile
import time
from typing import Any

BINARIES = (
  "chromium",
  "chromium-browser",
  "google-chrome",
  "google-chrome-stable",
  "chromium-headless-shell",
)
# Chromium reads commands from the first and writes answers to the second.
_READS, _WRITES = 3, 4


def find() -> str | None:
  """Returns the browser: $INSVP_BROWSER, or one on the path; None where none is."""
  named = os.environ.get("INSVP_BROWSER")
  return named or next(filter(None, map(shutil.which, BINARIES)), None)


class Page:
  """A page of a browser, in the terms of the Chrome DevTools protocol.

  Attributes:
    events: all that the browser has told, in its order.
  """

  def __init__(self, commands: int, answers: int, seconds: float):
    """Takes the ends of the pipes; everything has to happen within `seconds`."""
    self.events: list[dict[str, Any]] = []
    self._commands, self._answers = commands, answers
    self._deadline = time.monotonic() + seconds
    self._unread, self._number, self._session = b"", 0, {}
    target = self.call("Target.createTarget", url="about:blank")
    attached = self.call(
      "Target.attachToTarget", targetId=target["targetId"], flatten=True
    )
    self._session = {"sessionId": attached["sessionId"]}
    for domain in ("Page", "Runtime", "Network", "Log"):
      self.call(f"{domain}.enable")

  def call(self, method: str, **params: Any) -> dict[str, Any]:
    """Sends a command and returns its result."""
    self._number += 1
    message = {"id": self._number, "method": method, "params": params, **self._session}
    os.write(self._commands, json.dumps(message).encode() + b"\0")
    while True:
      answer = self._read()
      if answer.get("id") != self._number:
        self.events.append(answer)
        continue
      assert "error" not in answer, (method, answer)
      return answer["result"]

  def evaluate(self, script: str) -> Any:
    """Returns the value of an expression in the page."""
    done = self.call("Runtime.evaluate", expression=script, returnByValue=True)
    assert "exceptionDetails" not in done, done
    return done["result"].get("value")

  def wait_for(self, script: str) -> Any:
    """Returns the value of an expression as soon as it is true."""
    while not (value := self.evaluate(script)):
      assert time.monotonic() < self._deadline, f"waited in vain for {script}"
      time.sleep(0.05)
    return value

  def choose_file(self, selector: str, path: Path) -> None:
    """Chooses a file in an input, as a person would."""
    root = self.call("DOM.getDocument")["root"]["nodeId"]
    node = self.call("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
    self.call("DOM.setFileInputFiles", files=[str(path)], nodeId=node)

  def screenshot(self) -> str:
    """Returns a picture of the whole page, PNG in base64."""
    return self.call("Page.captureScreenshot", captureBeyondViewport=True)["data"]

  def requested(self) -> list[str]:
    """Returns the addresses that the page has requested."""
    return [
      event["params"]["request"]["url"]
      for event in self.events
      if event.get("method") == "Network.requestWillBeSent"
    ]

  def _read(self) -> dict[str, Any]:
    while b"\0" not in self._unread:
      left = max(0.0, self._deadline - time.monotonic())
      assert select.select([self._answers], [], [], left)[0], "the browser is silent"
      chunk = os.read(self._answers, 2**20)
      assert chunk, "the browser has ended"
      self._unread += chunk
    message, _, self._unread = self._unread.partition(b"\0")
    return json.loads(message)


@contextlib.contextmanager
def open_page(program: str, seconds: float = 90.0) -> Iterator[Page]:
  """Yields a page of a browser that ends with the with block.

  Args:
    program: from `find`.
    seconds: after so many the test fails.
  """
  reads, commands = os.pipe()
  answers, writes = os.pipe()

  with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
    for end in (commands, answers):
      stack.callback(os.close, end)
    process = subprocess.Popen(
      [
        # Not by a function that runs in the child: JAX's threads are in the way.
        *("bash", "-c", f'exec "$@" {_READS}<&{reads} {_WRITES}>&{writes}', "bash"),
        program,
        *("--headless", "--remote-debugging-pipe", "--no-first-run", "--disable-gpu"),
        # Tests may run as root, where there is no sandbox, and open their own page.
        *("--no-sandbox", "--disable-dev-shm-usage", "--disable-background-networking"),
        *(
          "--disable-component-update",
          "--disable-extensions",
          "--window-size=1100,900",
        ),
        f"--user-data-dir={folder}/profile",
      ],
      pass_fds=(reads, writes),
      stdin=subprocess.DEVNULL,
      stdout=subprocess.DEVNULL,
      stderr=subprocess.DEVNULL,
      env={**os.environ, "HOME": folder},
      start_new_session=True,
    )
    for end in (reads, writes):
      os.close(end)
    try:
      yield Page(commands, answers, seconds)
    finally:
      with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
      process.wait()
