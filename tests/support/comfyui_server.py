"""Starts a real ComfyUI for tests.

Nothing is written to the ComfyUI tree: models, input, output, custom_nodes and user are in a temporary base folder.
"""

import json
import logging
import os
import queue
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
import uuid
from contextlib import suppress
from pathlib import Path

from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection, connect

logger = logging.getLogger(__name__)

REPO = Path(__file__).resolve().parents[2]
PACK_NAME = "ComfyUI-CogVideoX-xDiT"
MARKER = "XDIT_TEST_SERVER"  # every process that the server starts inherits it, so all can be found
LAST_EVENTS = {"execution_success", "execution_error", "execution_interrupted"}


def find_comfyui() -> Path | None:
    """Returns the ComfyUI folder ($COMFYUI_PATH, else ~/comfy/ComfyUI), or None if there is none."""
    path = Path(os.environ.get("COMFYUI_PATH") or "~/comfy/ComfyUI").expanduser()
    return path if (path / "main.py").is_file() else None


def find_python(comfyui: Path) -> str:
    """Returns the interpreter of a ComfyUI ($COMFYUI_PYTHON, else a venv next to or inside the folder, else ours)."""
    places = [comfyui.parent / "venv", comfyui / ".venv", comfyui / "venv"]
    found = [str(place / "bin" / "python") for place in places if (place / "bin" / "python").exists()]
    return os.environ.get("COMFYUI_PYTHON") or (found[0] if found else sys.executable)


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def read_message(message: str | bytes) -> dict:
    """Returns a websocket message as {"type", "data"}. A preview image has type "preview", a node's text has type "text"."""
    if isinstance(message, str):
        return json.loads(message)
    event, size = struct.unpack("!II", message[:8])
    if event == 4:  # image with metadata
        return {"type": "preview", "data": {**json.loads(message[8:8 + size]), "image": message[8 + size:]}}
    if event == 3:  # the length of a node's id, the id, and the text
        return {"type": "text", "data": {"node": message[8:8 + size].decode(), "text": message[8 + size:].decode()}}
    return {"type": "preview" if event == 1 else f"binary {event}", "data": {"image": message[8:]}}


class ComfyUIServer:
    """`with ComfyUIServer() as server:` runs ComfyUI on a free port. At the end no process of it may be left.

    Args:
        base: the base folder (models/, input/, output/ …); by default a temporary one, which is removed at the end.
        pack: the folder to link into custom_nodes; None for ComfyUI alone.
        args: further command line arguments.
        env: further environment variables.
        comfyui: the ComfyUI folder; by default that of find_comfyui.
        start_timeout: seconds to wait for its first answer.
        cpu: whether it uses no GPU.
    Raises:
        RuntimeError: if it does not start. The message is one line; the end of its log is logged.
    """

    def __init__(self, base=None, *, pack: Path | None = REPO, args=(), env=None, comfyui: Path | None = None,
                 start_timeout: float = 240.0, cpu: bool = True):
        self.comfyui = comfyui or find_comfyui()
        if self.comfyui is None:
            raise RuntimeError("no ComfyUI found: set COMFYUI_PATH")
        self.temporary = base is None
        self.base = Path(base or tempfile.mkdtemp(prefix="comfyui-test-"))
        self.pack, self.env, self.start_timeout = pack, dict(env or {}), start_timeout
        self.args = [*(["--cpu"] if cpu else []), *args]
        self.port, self.client_id, self.marker = free_port(), uuid.uuid4().hex, uuid.uuid4().hex
        self.url = f"http://127.0.0.1:{self.port}"
        self.log_path = self.base / "server.log"
        self.process, self.socket, self.messages = None, None, queue.Queue()

    def __enter__(self) -> "ComfyUIServer":
        for name in ("custom_nodes", "models", "input", "output", "temp", "user"):
            (self.base / name).mkdir(parents=True, exist_ok=True)
        link = self.base / "custom_nodes" / PACK_NAME
        if self.pack and not link.exists():
            link.symlink_to(self.pack, target_is_directory=True)
        command = [find_python(self.comfyui), str(self.comfyui / "main.py"), "--listen", "127.0.0.1",
                   "--port", str(self.port), "--base-directory", str(self.base), "--disable-auto-launch",
                   "--database-url", f"sqlite:///{self.base}/user/comfyui.db", "--disable-api-nodes", "--dont-print-server",
                   *self.args]
        with open(self.log_path, "ab") as log:
            self.process = subprocess.Popen(command, cwd=self.base, stdout=log, stderr=subprocess.STDOUT,
                                            stdin=subprocess.DEVNULL, start_new_session=True, preexec_fn=heed_ctrl_c,
                                            env={**os.environ, "PYTHONUNBUFFERED": "1", **self.env, MARKER: self.marker})
        try:
            self._wait_until_up()
            address = f"ws://127.0.0.1:{self.port}/ws?clientId={self.client_id}"
            self.socket = connect(address, max_size=None, open_timeout=60, ping_interval=None)
            self.socket.send(json.dumps({"type": "feature_flags", "data": {"supports_preview_metadata": True}}))
            threading.Thread(target=self._read, args=(self.socket,), daemon=True).start()
        except BaseException:
            self.stop(check=False)
            raise
        return self

    def __exit__(self, kind, error, trace) -> None:
        self.stop(check=kind is None)

    def _wait_until_up(self) -> None:
        deadline = time.monotonic() + self.start_timeout
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise self._broken(f"ended with status {self.process.returncode} while starting")
            try:
                self.system_stats()
                return
            except OSError:
                time.sleep(0.25)
        raise self._broken(f"did not answer within {self.start_timeout:.0f} s")

    def _broken(self, how: str) -> RuntimeError:
        last = next((line for line in reversed(self.log().splitlines()) if line.strip()), "it said nothing")
        logger.error("%s", self.log_tail())
        return RuntimeError(f"the ComfyUI at {self.comfyui} {how}: {last.strip()}")

    def _read(self, websocket: ClientConnection) -> None:
        try:
            while True:
                self.messages.put(read_message(websocket.recv()))
        except (ConnectionClosed, OSError):  # by the server or by us
            self.messages.put(None)

    def request(self, path: str, body: dict | None = None, timeout: float = 60.0):
        """Sends GET, or POST if there is a body. Returns the JSON answer, None if it is empty.

        Raises RuntimeError for an HTTP error.
        """
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=timeout) as answer:
                text = answer.read()
        except urllib.error.HTTPError as error:
            raise RuntimeError(f"{path} answered {error.code}: {error.read().decode(errors='replace')}") from error
        return json.loads(text) if text else None

    def object_info(self, node: str | None = None) -> dict:
        return self.request("/object_info" + (f"/{node}" if node else ""))

    def system_stats(self) -> dict:
        return self.request("/system_stats")

    def queue(self, prompt: dict, workflow: dict | None = None, **extra) -> str:
        """Queues a prompt in API format. Returns its id. Raises RuntimeError, with ComfyUI's message, if it is not valid."""
        extra |= {"extra_pnginfo": {"workflow": workflow}} if workflow else {}
        return self.request("/prompt", {"prompt": prompt, "client_id": self.client_id, "extra_data": extra})["prompt_id"]

    def events(self, prompt_id: str, timeout: float = 300.0):
        """Yields this prompt's messages ({"type", "data"}) up to its success, error or interruption.

        Messages of other prompts are dropped. Raises TimeoutError after `timeout` seconds, RuntimeError if the server died.
        """
        deadline = time.monotonic() + timeout
        while True:
            try:
                message = self.messages.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                raise TimeoutError(f"prompt {prompt_id} did not end within {timeout:.0f} s\n{self.log_tail()}") from None
            if message is None:
                raise RuntimeError(f"ComfyUI closed the connection\n{self.log_tail()}")
            if message["data"].get("prompt_id", prompt_id if message["type"] in ("preview", "text") else None) != prompt_id:
                continue
            yield message
            if message["type"] in LAST_EVENTS:
                return

    def run(self, prompt: dict, timeout: float = 300.0, workflow: dict | None = None) -> dict:
        """Queues a prompt and waits. Returns its history entry. Raises RuntimeError with the node's message if it failed."""
        prompt_id = self.queue(prompt, workflow)
        last = list(self.events(prompt_id, timeout))[-1]
        if last["type"] != "execution_success":
            data = last["data"]
            raise RuntimeError(f"{last['type']} in node {data.get('node_id')} ({data.get('node_type')}): "
                               f"{data.get('exception_message', '')}\n{''.join(data.get('traceback', []))}{self.log_tail()}")
        return self.history(prompt_id)

    def history(self, prompt_id: str, timeout: float = 10.0) -> dict:
        """Waits for the prompt's history entry, which is written after the last event. Raises TimeoutError if there is none."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            entry = self.request(f"/history/{prompt_id}").get(prompt_id)
            if entry:
                return entry
            time.sleep(0.05)
        raise TimeoutError(f"no history of prompt {prompt_id} after {timeout:.0f} s")

    def interrupt(self, prompt_id: str | None = None) -> None:
        self.request("/interrupt", {"prompt_id": prompt_id} if prompt_id else {})

    def free(self, unload_models: bool = True, free_memory: bool = False) -> None:
        """Does what "Unload models" in the menu does. ComfyUI's worker thread carries it out soon after."""
        self.request("/free", {"unload_models": unload_models, "free_memory": free_memory})

    def output_files(self) -> list[Path]:
        return sorted(path for path in (self.base / "output").rglob("*") if path.is_file())

    def log(self) -> str:
        return self.log_path.read_text(errors="replace")

    def log_tail(self, lines: int = 60) -> str:
        return "--- end of the server's log ---\n" + "\n".join(self.log().splitlines()[-lines:])

    def processes(self) -> list[int]:
        """Returns the ids of the server's process and all its descendants, found by an environment variable."""
        wanted, found = f"{MARKER}={self.marker}".encode(), []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                zombie = (folder / "stat").read_bytes().rpartition(b")")[2].split()[0] == b"Z"  # a name is cut off inside a character
                if not zombie and wanted in (folder / "environ").read_bytes().split(b"\0"):
                    found.append(int(folder.name))
            except OSError:  # it has ended, or is not ours
                continue
        return sorted(found)

    def wait_for_processes(self, count: int, timeout: float = 120.0) -> list[int]:
        """Waits until at most `count` processes are left, or the timeout. Returns those that are left."""
        deadline = time.monotonic() + timeout
        while len(left := self.processes()) > count and time.monotonic() < deadline:
            time.sleep(0.1)
        return left

    def kill(self) -> None:
        """Kills only ComfyUI's own process, like a crash. The processes that it started have to notice this."""
        self.process.kill()
        self.process.wait()

    def stop(self, check: bool = True, grace: float = 120.0) -> None:
        """Stops ComfyUI as Ctrl-C does, waits for everything that it started, and kills what is left.

        Raises RuntimeError if something had to be killed and `check` is set.
        """
        if self.socket is not None:
            self.socket.close()
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
            try:
                self.process.wait(grace)
            except subprocess.TimeoutExpired:
                logger.warning("ComfyUI did not stop within %.0f s of Ctrl-C", grace)
        left = self.wait_for_processes(0, grace)
        names = [f"{pid}: {describe(pid)}" for pid in left]
        for pid in left:
            with suppress(ProcessLookupError):  # it has just ended
                os.kill(pid, signal.SIGKILL)
        self.process.wait()
        remaining = self.wait_for_processes(0, 10.0)
        tail = self.log_tail()
        if self.temporary:
            shutil.rmtree(self.base, ignore_errors=True)
        if remaining:
            raise RuntimeError(f"processes {remaining} could not be killed\n{tail}")
        if left and check:
            raise RuntimeError("ComfyUI left processes behind (now killed):\n" + "\n".join(names) + f"\n{tail}")


def heed_ctrl_c() -> None:
    """Restores SIGINT, which stops ComfyUI. If a background shell ignores it, its commands inherit that."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def describe(pid: int) -> str:
    """Returns a process's command line, or an empty text if it has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")[:200]
    except OSError:
        return ""
