"""The owner's side of the fork server: starts it once, and asks it for the supervisors of groups."""

import json
import os
import re
import signal
import socket
import subprocess
import tempfile
import threading
import time
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any, ClassVar

from ..config import CONFIG
from ..errors import GroupUnavailable
from .preflight import group_environment, group_python
from .start_request import StartRequest

READ_AT_IMPORT = re.compile(
    "(XDIT|XFUSER|XDG|HF|HUGGINGFACE|TRANSFORMERS|DIFFUSERS|TORCH|PYTORCH|TRITON|CUDA|OMP|GOMP|KMP|MKL|OPENBLAS|LD)_.*"
    "|PYTHON.*|PATH|HOME|TMPDIR"
)
"""Variables that modules may read while they are imported: if one changes, the imports are done again."""
SET_LATER = {"TRITON_CACHE_DIR", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS"}
"""Of these, the ones that are read later."""


class SupervisorProcess:
    """A group's supervisor, as its owner sees it.

    Args:
        server: the fork server that has been asked for it.
        connection: to the supervisor.
    """

    def __init__(self, server: "ForkServerProcess", connection: socket.socket):
        self.server = server
        self.reports: dict[str, Any] = {}
        """Reported so far: ``supervisor``, its process ID; ``exit``, why the group ended; ``failure``, what it failed with itself;
        ``status``, its exit status."""
        self._connection = connection
        self._ended = threading.Event()
        threading.Thread(target=self._read, name="group reports", daemon=True).start()

    def _read(self) -> None:
        with suppress(OSError), self._connection.makefile("rb") as lines:
            for line in lines:
                self.reports.update(json.loads(line))
                if "status" in self.reports:
                    break
        self._ended.set()

    @property
    def pid(self) -> int | None:
        """The process ID; None while the fork server still imports."""
        return self.reports.get("supervisor")

    def poll(self) -> int | None:
        """Returns the exit status, or None if it runs; that of the fork server if it ended with that."""
        if not self._ended.is_set():
            return None
        return self.reports["status"] if "status" in self.reports else self.server.end()

    def has_ended_well(self) -> bool:
        """Whether it ended as it should. A fork server that ends first is no such end, whatever its status."""
        return self.poll() == 0 and "status" in self.reports

    def wait(self, seconds: float | None = None) -> int:
        """Waits for the end and returns the exit status.

        Raises:
            TimeoutError: after ``seconds``.
        """
        if not self._ended.wait(seconds):
            raise TimeoutError(f"the supervisor has not ended within {seconds:g} s")
        return self.poll()

    def ask_to_leave(self) -> None:
        """Asks it to end the group. Closing the socket is not enough: a forked child of this process may hold it open."""
        with suppress(OSError):  # it has ended
            self._connection.shutdown(socket.SHUT_WR)

    def terminate(self) -> None:
        """Sends SIGTERM; its ranks end with it."""
        self._signal(signal.SIGTERM)

    def kill(self) -> None:
        """Sends SIGKILL to it and its ranks."""
        self._signal(signal.SIGKILL)

    def _signal(self, number: int) -> None:
        if self.pid is None:
            self.ask_to_leave()
        elif not self._ended.is_set():
            with suppress(ProcessLookupError):
                os.killpg(self.pid, number)


class ForkServerProcess:
    """A fork server that this process has started. It ends with this process, or with :meth:`close` once its groups have ended.

    Args:
        python: the interpreter.
        environment: its variables.
    Raises:
        GroupUnavailable: when the interpreter cannot be started.
    """

    _kept: ClassVar["ForkServerProcess | None"] = None
    _lock: ClassVar[threading.Lock] = threading.Lock()

    @classmethod
    def get(cls, kind: str) -> "ForkServerProcess":
        """Returns the fork server of this process, started if necessary. It begins to import at once.

        Args:
            kind: of the devices, ``cuda`` or ``cpu``.
        Raises:
            GroupUnavailable: when the interpreter cannot be started.
        """
        python, environment = group_python(), group_environment(kind)
        with cls._lock:
            kept = cls._kept if cls._kept is not None and cls._kept.owner == os.getpid() else None  # not a parent's
            if kept is None or kept.key != key_of(python, environment) or kept.process.poll() is not None:
                if kept is not None:
                    kept.close()  # its groups go on
                cls._kept = cls(python, environment)
            return cls._kept

    def __init__(self, python: str, environment: dict[str, str]):
        self.key = key_of(python, environment)
        self.owner = os.getpid()
        self._control, theirs = socket.socketpair()
        self._log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - read as long as this object is used
        self._started = time.monotonic()
        self._said_hello = False
        command = [python, "-m", "parallel_backend.group.fork_server"]
        try:
            self.process = subprocess.Popen(
                command, stdin=theirs, stdout=self._log, stderr=self._log, env=environment, start_new_session=True
            )
        except OSError as error:
            self._control.close()
            raise GroupUnavailable(f"{python} cannot be started: {error.strerror}; correct XDIT_PYTHON") from error
        finally:
            theirs.close()

    def fork(self, request: StartRequest, log: Path) -> SupervisorProcess:
        """Asks for a supervisor. Returns at once; the supervisor starts when the imports are done.

        Args:
            request: for the supervisor.
            log: file that its output goes to.
        """
        ours, theirs = socket.socketpair()
        with theirs, log.open("wb") as output:
            ours.sendall(json.dumps(asdict(request)).encode() + b"\n")
            with suppress(OSError):  # it has ended, and the connection's end shows that
                socket.send_fds(self._control, [b"."], [theirs.fileno(), output.fileno()])
        return SupervisorProcess(self, ours)

    def is_mute(self) -> bool:
        """Whether the interpreter runs but has not reported within ``hello_seconds``, so it cannot run the pack."""
        if not self._said_hello:
            with suppress(OSError):  # nothing yet, or it has ended
                self._said_hello = bool(self._control.recv(1, socket.MSG_DONTWAIT))
        late = time.monotonic() - self._started > CONFIG.hello_seconds
        return not self._said_hello and late and self.process.poll() is None

    def end(self) -> int:
        """Waits for the fork server to end, kills it if it does not, and returns its exit status."""
        try:
            return self.process.wait(CONFIG.stop_seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait()

    def last_lines(self, count: int = 20) -> str:
        """Returns the end of what it printed."""
        size = os.fstat(self._log.fileno()).st_size
        text = os.pread(self._log.fileno(), 2**16, max(0, size - 2**16)).decode(errors="replace")
        return "\n".join(text.rstrip().splitlines()[-count:])

    def close(self) -> None:
        """Lets it end once its groups have ended."""
        self._control.close()


def key_of(python: str, environment: dict[str, str]) -> tuple[str, dict[str, str]]:
    """Returns what the imports depend on: the interpreter, and the variables that modules may read while they are imported."""
    return python, {
        name: value for name, value in environment.items() if name not in SET_LATER and READ_AT_IMPORT.fullmatch(name)
    }
