"""A page in headless Chromium, driven over its DevTools protocol. Needs Debian's chromium or another one on the PATH."""

import base64
import itertools
import json
import shutil
import subprocess
import time
import urllib.request
from pathlib import Path

from websockets.sync.client import connect

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--remote-debugging-port=0",
    "--window-size=1600,1000",
)


def find_chromium() -> str | None:
    """Returns the path of Chromium or Chrome, or None if there is none."""
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Page:
    """`with Page(url, folder) as page:` opens a page; the browser ends with it.

    Args:
        url: what to open.
        folder: a new folder for the browser's profile.
        timeout: seconds that each wait may take.
    """

    def __init__(self, url: str, folder: Path, timeout: float = 120.0):
        self._url, self._folder, self._timeout = url, folder, timeout
        self._ids = itertools.count(1)

    def __enter__(self) -> "Page":
        command = [find_chromium(), *FLAGS, f"--user-data-dir={self._folder}", "about:blank"]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            port_file = self._folder / "DevToolsActivePort"
            self._until(lambda: port_file.exists() and len(port_file.read_text().splitlines()) > 1, "Chromium did not start")
            port = port_file.read_text().splitlines()[0]
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/json") as answer:
                (address,) = [target["webSocketDebuggerUrl"] for target in json.load(answer) if target["type"] == "page"]
            self._socket = connect(address, max_size=None, ping_interval=None)
            self.open(self._url)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error) -> None:
        self._process.terminate()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:  # now and then a browser does not leave when it is asked to
            self._process.kill()
            self._process.wait()

    def open(self, url: str) -> None:
        """Opens another address, or the same one again."""
        self._send("Page.navigate", url=url)

    def run(self, script: str):
        """Returns the value of a JavaScript expression, awaited if it is a promise. Raises RuntimeError if it throws."""
        answer = self._send("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in answer:
            details = answer["exceptionDetails"]
            raise RuntimeError(details.get("exception", {}).get("description") or details["text"])
        return answer["result"].get("value")

    def wait(self, script: str) -> None:
        """Waits until an expression is true. Raises TimeoutError."""

        def is_true() -> bool:
            try:
                return self.run(f"!!({script})")  # an element has no value that could be sent
            except RuntimeError:  # what it uses is not there yet
                return False

        self._until(is_true, f"this did not become true: {script}")

    def click(self, script: str) -> None:
        """Clicks on the place ``[x, y]`` in the window that a JavaScript expression gives, as with a mouse."""
        x, y = self.run(script)
        for event, buttons in (("mouseMoved", 0), ("mousePressed", 1), ("mouseReleased", 0)):
            self._send("Input.dispatchMouseEvent", type=event, x=x, y=y, button="left", buttons=buttons, clickCount=1)

    def type(self, text: str) -> None:
        """Types a text in the place of what the focused field has, and presses Enter."""
        self.run("document.activeElement.select()")
        self._send("Input.insertText", text=text)
        for event in ("keyDown", "keyUp"):
            self._send("Input.dispatchKeyEvent", type=event, key="Enter", code="Enter", windowsVirtualKeyCode=13, text="\r")

    def screenshot(self, path: Path) -> None:
        """Writes what the window shows as PNG."""
        path.write_bytes(base64.b64decode(self._send("Page.captureScreenshot")["data"]))

    def _until(self, condition, failure: str):
        deadline = time.monotonic() + self._timeout
        while not (value := condition()):
            if time.monotonic() > deadline:
                raise TimeoutError(failure)
            time.sleep(0.1)
        return value

    def _send(self, method: str, **params) -> dict:
        number = next(self._ids)
        self._socket.send(json.dumps({"id": number, "method": method, "params": params}))
        while (message := json.loads(self._socket.recv(self._timeout))).get("id") != number:
            pass
        if "error" in message:
            raise RuntimeError(f"{method}: {message['error']['message']}")
        return message["result"]
