"""The fork server: imports once what every rank needs, and forks supervisors: ``python -m parallel_backend.group.fork_server``.

The owner is its parent. It asks for a supervisor over standard input, a Unix socket, with one byte and two file descriptors: the
supervisor's connection to the owner, and its log. The supervisor reads its :class:`.start_request.StartRequest` from the connection. When it
ends, the fork server writes its exit status to the connection.

CUDA must stay untouched here: a process that is forked from one that has started CUDA cannot use it.
"""

import gc
import importlib
import json
import os
import select
import signal
import socket
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import NoReturn

from ..system.modules import has_module
from ..system.processes import described, end_with, flush, leave, log_error, set_name

HELLO = b"."
"""Sent to the owner before the imports: the interpreter can run the pack."""
WITHOUT_CUDA = {"PYTORCH_NVML_BASED_CUDA_CHECK": "1"}
"""Has ``torch.cuda.is_available`` ask NVML, which leaves CUDA untouched."""
MODULES = (
    "torch",
    "torch.distributed.fsdp",
    "parallel_backend.group.supervisor",
    "parallel_backend.group.worker",
    "parallel_backend.group.job_loop",
    "parallel_backend.parallel.group_rank",
    "diffusers.models.transformers.cogvideox_transformer_3d",
    "diffusers.models.autoencoders.autoencoder_kl_cogvideox",
    "diffusers.schedulers.scheduling_ddim_cogvideox",
    "diffusers.schedulers.scheduling_dpm_cogvideox",
)
"""What a rank imports before its first step, xfuser aside: parts of xfuser touch CUDA while they are imported."""
KERNELS = (
    "parallel_backend.cogvideox.kernels.block_triton",
    "parallel_backend.cogvideox.kernels.vae_triton",
    "parallel_backend.cogvideox.kernels.attention_hopper",
)
"""The same, if Triton is installed."""
UNUSED = ("peft", "transformers")
"""What diffusers imports if it is installed, and no rank uses: the owner encodes text, and LoRAs are merged without PEFT."""


@contextmanager
def absent(names: Iterable[str]) -> Iterator[None]:
    """Has imports find none of these packages, which may be installed. Those that are imported already stay."""
    hidden = [name for name in names if name not in sys.modules]
    sys.modules.update(dict.fromkeys(hidden))  # None: Python's own mark of a module that cannot be imported
    try:
        yield
    finally:
        for name in hidden:
            del sys.modules[name]


def preload() -> None:
    """Imports the modules. An error is only logged: the rank that needs the module meets it again and reports it."""
    os.environ.update(WITHOUT_CUDA)
    gc.disable()  # collections take a quarter of the time, and find nothing
    with absent(UNUSED):
        for name in (*MODULES, *(KERNELS if has_module("triton") else ())):
            try:
                importlib.import_module(name)
            except Exception as error:
                log_error(error)
    for name in WITHOUT_CUDA:
        del os.environ[name]
    gc.enable()
    gc.freeze()  # a collection in a rank would otherwise copy the pages of all these objects


class ForkServer:
    """Forks supervisors on request, and reports their exit status.

    Args:
        control: the socket to the owner.
        inherited: names of the environment variables that were set before the imports.
    """

    def __init__(self, control: socket.socket, inherited: frozenset[str]):
        self._control = control
        self._inherited = inherited
        self._owner = os.getppid()
        self._connections: dict[int, socket.socket] = {}
        """Of the supervisors that run, by process ID."""
        self._woken, wakes = os.pipe()
        for descriptor in (self._woken, wakes):
            os.set_blocking(descriptor, False)
        signal.set_wakeup_fd(wakes)
        signal.signal(signal.SIGCHLD, lambda *_: None)

    def run(self) -> None:
        """Serves the owner until it closes the socket or ends, and then waits for the last supervisor."""
        is_open = True
        while is_open or self._connections:
            ready, _, _ = select.select([self._woken, *([self._control] if is_open else [])], [], [], 1.0)
            if self._woken in ready:
                os.read(self._woken, 4096)
            self._reap()
            if self._control in ready:
                is_open = self._take_request()
            is_open = is_open and os.getppid() == self._owner

    def _take_request(self) -> bool:
        """Forks a supervisor. Returns whether the owner still has its end of the socket open."""
        try:
            byte, descriptors, _, _ = socket.recv_fds(self._control, 1, 2)
        except ConnectionResetError:  # it was closed before the owner had read HELLO
            return False
        if not byte:
            return False
        connection, log = socket.socket(fileno=descriptors[0]), descriptors[1]
        flush()  # or the child would print it again
        parent = os.getpid()
        pid = os.fork()
        if pid == 0:
            self._become_supervisor(parent, connection, log)
        os.close(log)
        self._connections[pid] = connection
        return True

    def _become_supervisor(self, parent: int, connection: socket.socket, log: int) -> NoReturn:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        status = 1
        try:
            os.setsid()  # Ctrl-C must reach only the owner, which then stops the group
            for descriptor in (1, 2):
                os.dup2(log, descriptor)
            for each in (self._control, *self._connections.values()):
                each.close()
            os.close(log)
            added = {name: value for name, value in os.environ.items() if name not in self._inherited}
            status = self._supervise(parent, connection, added)
        except BaseException as error:
            log_error(error)
            failure = {**described(error), "host": None, "waited": 0.0}
            with suppress(OSError):  # the owner has closed its end
                connection.sendall(json.dumps({"failure": failure}).encode() + b"\n")
        finally:
            leave(status)

    def _supervise(self, parent: int, connection: socket.socket, added: dict[str, str]) -> int:
        from .start_request import StartRequest
        from .supervisor import Supervisor

        end_with(parent)
        set_name("xdit supervisor")
        line = connection.makefile("rb").readline()
        if not line:  # the owner no longer wants it
            return 0
        request = StartRequest(**json.loads(line))
        os.environ.clear()
        os.environ.update({**added, **request.environment})
        return Supervisor(request, connection).run()

    def _reap(self) -> None:
        """Reports the exit status of supervisors that have ended."""
        while self._connections:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                return
            with self._connections.pop(pid) as connection:
                try:
                    connection.sendall(json.dumps({"status": os.waitstatus_to_exitcode(status)}).encode() + b"\n")
                except OSError:  # the owner has closed its end
                    continue


def main() -> None:
    """Imports the modules and serves the owner."""
    control = socket.socket(fileno=os.dup(0))
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    control.sendall(HELLO)
    set_name("xdit forkserver")
    inherited = frozenset(os.environ)
    preload()
    ForkServer(control, inherited).run()


if __name__ == "__main__":
    main()
