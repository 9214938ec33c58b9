"""The registry of groups: a private folder for each, with its socket, key, logs and a description."""

import json
import os
import secrets
import shutil
import stat
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config import CONFIG
from ..errors import GroupUnavailable
from .ownership import OwnerLock, is_held

NAME = "cogvideox-xdit"
LONGEST_SOCKET = 107
"""Longest path of a Unix socket, in bytes."""


def roots() -> list[Path]:
    """Returns the folders that may hold the user's groups, the preferred one first. None is created."""
    if CONFIG.runtime_dir:
        return [Path(CONFIG.runtime_dir).absolute() / NAME]
    private, own = os.environ.get("XDG_RUNTIME_DIR"), f"{NAME}-{os.getuid()}"
    found = [Path(private).absolute() / NAME] if private else []
    for base in (os.environ.get("TMPDIR"), "/tmp", "/var/tmp", "/dev/shm"):
        if base:
            found.append(Path(base).absolute() / own)
    return list(dict.fromkeys(found))


def make_root(root: Path) -> None:
    """Creates a folder for groups that only this user can enter.

    Raises:
        OSError: with the reason why it cannot be used.
    """
    if len(os.fsencode(root / "group-12345678" / "socket")) > LONGEST_SOCKET:
        raise OSError(None, "its path is too long for a Unix socket")
    root.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not is_own(root):
        raise OSError(None, "it belongs to another user")
    root.chmod(0o700)


def is_own(root: Path) -> bool:
    """Whether a folder belongs to this user. In a shared folder such as /tmp another user may have created one of that name."""
    try:
        found = root.lstat()
    except OSError:
        return False
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid()


def entries(prefix: str) -> list[Path]:
    """Returns the entries of the user's folders whose names start with ``prefix``, oldest first. Any may vanish."""
    found = []
    for root in filter(is_own, roots()):
        with suppress(OSError):
            for path in list(root.glob(f"{prefix}-*")):
                with suppress(OSError):
                    found.append((path.stat().st_mtime, path))
    return [path for _, path in sorted(found)]


@dataclass(frozen=True)
class GroupAddress:
    """One group's folder."""

    folder: Path

    @classmethod
    def create(cls, root: Path, description: dict[str, Any]) -> "GroupAddress":
        """Creates a folder with a new key.

        Args:
            root: from :func:`make_root`.
            description: for :meth:`describe`.
        Raises:
            OSError: when the folder cannot be written.
        """
        address = cls(Path(tempfile.mkdtemp(prefix="group-", dir=root)))
        try:
            address.key_file.touch(mode=0o600)
            address.key_file.write_bytes(secrets.token_bytes(32))
            address._write({**description, "owner": os.getpid()})
        except OSError:
            address.remove()
            raise
        return address

    def add(self, **description: Any) -> None:
        """Adds fields to the description, or replaces them."""
        self._write({**self.describe(), **description})

    def _write(self, description: dict[str, Any]) -> None:
        written = self.folder / "group.json.partial"
        written.write_text(json.dumps(description))
        written.rename(self.folder / "group.json")  # atomic, as other processes may read it at any moment

    @property
    def socket(self) -> str:
        """Path of the Unix socket."""
        return str(self.folder / "socket")

    @property
    def key_file(self) -> Path:
        """File of the key that both sides must prove to know; only its user can read it."""
        return self.folder / "key"

    @property
    def key(self) -> bytes:
        return self.key_file.read_bytes()

    @property
    def logs(self) -> Path:
        """Folder of the ranks' logs."""
        return self.folder / "logs"

    def describe(self) -> dict[str, Any]:
        """Returns the fields from :meth:`create` and :meth:`add`, and ``owner``, the process ID of the group's owner.

        Raises:
            OSError, ValueError: when the folder is gone, or not that of a group.
        """
        return dict(json.loads((self.folder / "group.json").read_text()))

    def remove(self) -> None:
        """Removes the folder and its contents."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def last_lines(self, count: int = 20) -> str:
        """Returns the last ``count`` lines of each log."""
        parts: list[str] = []
        try:
            first_rank = self.describe()["first_rank"]
            logs = [(f"rank {first_rank + int(path.parent.name)} {path.stem}", path) for path in self.logs.rglob("std*.log")]
            for name, path in [*sorted(logs), ("launcher", self.folder / "launcher.log")]:
                lines = path.read_text(errors="replace").splitlines()[-count:]
                parts += [f"--- {name}", *lines] if lines else []
        except (OSError, ValueError):  # removed, maybe while they were read
            parts.append(f"(logs in {self.folder} were removed)")
        return "\n".join(parts)


@dataclass(frozen=True)
class Home:
    """The folder in which an owner keeps its groups, and the lock that proves that it is alive."""

    root: Path
    lock: OwnerLock
    note: str | None
    """A line for the user if a preferred folder could not be used."""

    @classmethod
    def open(cls) -> "Home":
        """Opens the first usable folder.

        Raises:
            GroupUnavailable: when there is none, naming all that were tried.
        """
        failed: list[str] = []
        for root in roots():
            try:
                make_root(root)
                lock = OwnerLock(root)
            except OSError as error:
                failed.append(f"{root} ({error.strerror or error})")
                continue
            return cls(root, lock, f"the group's files are in {root}, as {failed[0]} cannot be used" if failed else None)
        raise GroupUnavailable(
            f"no folder for the group's socket: {', '.join(failed)}; set XDIT_RUNTIME_DIR to a folder that you can write to"
        )

    def is_usable(self) -> bool:
        """Whether it still exists, and :meth:`open` could still choose it."""
        return self.lock.is_in_place() and self.root in roots()


def described() -> Iterator[tuple[GroupAddress, dict[str, Any]]]:
    """Yields all groups' folders with their descriptions, oldest first. Folders that vanish meanwhile are left out."""
    if sys.platform == "win32":
        return
    for path in entries("group"):
        try:
            yield GroupAddress(path), GroupAddress(path).describe()
        except (OSError, ValueError):
            continue


def is_owned(description: dict[str, Any]) -> bool:
    """Whether the owner of a group is alive. A group of a version without locks has none."""
    return "lock" in description and is_held(Path(description["lock"]))


def running() -> dict[GroupAddress, dict[str, Any]]:
    """Returns the user's groups whose owner is alive, oldest first, with their descriptions."""
    return {address: description for address, description in described() if is_owned(description)}


def shared(plan: str, devices: str) -> list[GroupAddress]:
    """Returns the running groups that ``serve`` keeps for a plan on these devices."""
    wanted = {"shared": True, "plan": plan, "devices": devices}
    return [address for address, description in running().items() if wanted.items() <= description.items()]


def remove_stale() -> None:
    """Removes folders and locks that a crash has left."""
    for address, description in described():
        if "lock" in description and not is_owned(description):
            address.remove()
    for lock in entries("owner"):
        if not is_held(lock):
            with suppress(OSError):  # already gone, or its folder is read-only now
                lock.unlink()
