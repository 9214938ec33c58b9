"""Two hosts on one machine: network namespaces with a cable between them, or two loopback addresses without permission."""

import os
import signal
import socket
import subprocess
import sys
import warnings
from contextlib import suppress
from pathlib import Path

import psutil

from parallel_backend.group.registry import GroupAddress, running

from ..conftest import PATIENCE, REPO, wait_until

SILENT_SECONDS = 10.0
"""The timeout after which a host counts as gone in the tests. On a loaded machine a process may hang for seconds."""


class Network:
    """Namespaces named after this process, so that test runs do not collide. :meth:`close` removes them."""

    def __init__(self):
        self.names = [f"xdit{os.getpid()}{letter}" for letter in "ab"]
        self.addresses = ["10.213.77.1", "10.213.77.2"]
        self.is_real = True
        """Whether the hosts are namespaces."""
        try:
            self._lay()
        except (OSError, subprocess.CalledProcessError) as error:
            self.close()
            self.is_real = False
            self.addresses = ["127.0.0.2", "127.0.0.1"]  # a connection to the first comes from the second
            reason = getattr(error, "stderr", "") or str(error)
            warnings.warn(f"no network namespaces here ({reason.strip()}): two hosts are two loopback addresses", stacklevel=2)

    def _lay(self) -> None:
        first, second = self.names
        for name in self.names:
            ip("netns", "add", name)
        ip("link", "add", "cable", "netns", first, "type", "veth", "peer", "name", "cable", "netns", second)
        subprocess.run([*self.inside(0), "true"], check=True, capture_output=True, text=True, timeout=60)
        for name, address in zip(self.names, self.addresses):
            ip("-n", name, "address", "add", f"{address}/24", "dev", "cable")
            for device in ("lo", "cable"):
                ip("-n", name, "link", "set", device, "up")

    def inside(self, host: int) -> list[str]:
        """Returns the start of a command that runs on a host."""
        return ["ip", "netns", "exec", self.names[host]] if self.is_real else []

    def free_port(self) -> int:
        """Returns a free port of the first host. In a namespace all are free."""
        if self.is_real:
            return 29500
        with socket.create_server((self.addresses[0], 0)) as probe:
            return probe.getsockname()[1]

    def cut(self, other: psutil.Process) -> None:
        """Unplugs the cable. Without namespaces it stops the process that holds the other host's connection."""
        if self.is_real:
            ip("-n", self.names[1], "link", "set", "cable", "down")
        else:
            other.send_signal(signal.SIGSTOP)

    def mend(self, other: psutil.Process) -> None:
        """Undoes :meth:`cut`."""
        if self.is_real:
            ip("-n", self.names[1], "link", "set", "cable", "up")
        else:
            other.send_signal(signal.SIGCONT)

    def close(self) -> None:
        """Removes the namespaces, and the cable with them."""
        for name in self.names:
            with suppress(OSError, subprocess.CalledProcessError):
                ip("netns", "delete", name)


def ip(*words: str) -> None:
    """Runs the command ``ip``."""
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True, timeout=60)


class TwoHosts:
    """``serve`` on two hosts, each with its own folders, as a user of two machines starts it.

    Args:
        root: for the hosts' folders.
    """

    def __init__(self, root: Path):
        self.network = Network()
        self.folders = [root / "first", root / "second"]
        for folder in self.folders:
            folder.mkdir()
        self.rendezvous = f"{self.network.addresses[0]}:{self.network.free_port()}"
        self.served: list[subprocess.Popen | None] = [None, None]

    def serve(self, host: int, *options: str) -> subprocess.Popen:
        """Starts ``serve`` on a host. Its output goes to ``serve.log`` in the host's folder."""
        words = ["serve", "--devices", "cpu", "--nnodes", "2", "--node-rank", str(host), "--rendezvous", self.rendezvous]
        environment = {"XDG_RUNTIME_DIR": str(self.folders[host]), "XDIT_SILENT_SECONDS": str(SILENT_SECONDS)}
        with (self.folders[host] / "serve.log").open("ab") as log:
            self.served[host] = subprocess.Popen(
                [*self.network.inside(host), sys.executable, "-m", "parallel_backend", *words, *options],
                cwd=REPO, env={**os.environ, **environment}, stdout=log, stderr=log,
            )  # fmt: skip
        return self.served[host]

    def said(self, host: int) -> str:
        """Returns the output of ``serve`` on a host."""
        return (self.folders[host] / "serve.log").read_text()

    def processes(self, host: int) -> list[psutil.Process]:
        """Returns a host's workers and their parent, the supervisor."""
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                is_part = process.name().startswith(("xdit rank", "xdit supervisor"))
                if is_part and process.environ().get("XDG_RUNTIME_DIR") == str(self.folders[host]):
                    found.append(process)
        return found

    def supervisor(self, host: int) -> psutil.Process:
        """Returns the parent of a host's ranks."""
        (found,) = (process for process in self.processes(host) if process.name() == "xdit supervisor")
        return found

    def address(self) -> GroupAddress:
        """Waits for the folder that the first host's ``serve`` makes. Returns the group's address."""
        assert wait_until(lambda: running() or self.served[0].poll() is not None, PATIENCE) and running(), self.said(0)
        return next(iter(running()))

    def close(self) -> None:
        """Kills all processes and removes the network."""
        for process in filter(None, self.served):
            process.kill()
            process.wait()
        for host in (0, 1):
            wait_until(lambda host=host: not self.processes(host), PATIENCE)
            for process in self.processes(host):
                process.kill()
        self.network.close()
