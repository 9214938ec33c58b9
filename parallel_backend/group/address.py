"""Where a group is found: a private folder with its socket, key, logs and a description of itself."""

import json
import os
import secrets
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any


def runtime_root() -> Path:
    """The person's own folder of groups, 0700.

    Raises:
        PermissionError: when somebody else owns it.
    """
    base = os.environ.get("XDG_RUNTIME_DIR")
    root = Path(base) / "cogvideox-xdit" if base else Path(tempfile.gettempdir()) / f"cogvideox-xdit-{os.getuid()}"
    root.mkdir(mode=0o700, parents=True, exist_ok=True)
    if root.stat().st_uid != os.getuid():
        raise PermissionError(f"{root} belongs to another user; remove it, or set XDG_RUNTIME_DIR")
    root.chmod(0o700)
    return root


def is_alive(pid: int) -> bool:
    """Whether a process of this number exists and is not a zombie."""
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except ProcessLookupError:
        return False
    except (PermissionError, OSError):
        return True


@dataclass(frozen=True)
class GroupAddress:
    """One group's folder."""

    folder: Path

    @classmethod
    def create(cls, description: dict[str, Any]) -> "GroupAddress":
        """A new folder with a new key; ``description`` is what :meth:`describe` gives back."""
        remove_stale()
        address = cls(Path(tempfile.mkdtemp(prefix="group-", dir=runtime_root())))
        address.key_file.touch(mode=0o600)
        address.key_file.write_bytes(secrets.token_bytes(32))
        address._write({**description, "owner": os.getpid()})
        return address

    def add(self, **description: Any) -> None:
        """Adds to the description, or replaces some of it."""
        self._write({**self.describe(), **description})

    def _write(self, description: dict[str, Any]) -> None:
        written = self.folder / "group.json.partial"
        written.write_text(json.dumps(description))
        written.rename(self.folder / "group.json")  # others read it at any moment

    @property
    def socket(self) -> str:
        """Path of the Unix socket."""
        return str(self.folder / "socket")

    @property
    def key_file(self) -> Path:
        """File of the key that both sides prove to know; readable by its owner alone."""
        return self.folder / "key"

    @property
    def key(self) -> bytes:
        """The key."""
        return self.key_file.read_bytes()

    @property
    def logs(self) -> Path:
        """Folder of every rank's output."""
        return self.folder / "logs"

    def error_file(self, rank: int) -> Path:
        """Where a rank leaves its last words."""
        return self.folder / f"error-{rank}.json"

    def pulse_file(self, rank: int) -> Path:
        """Where a rank says what it does; see :mod:`.pulse`."""
        return self.folder / f"pulse-{rank}.json"

    @property
    def cause_file(self) -> Path:
        """Where the agent says why it ended the group: ``cause`` and ``behind`` of a :class:`.death.Death`."""
        return self.folder / "cause"

    def describe(self) -> dict[str, Any]:
        """What :meth:`create` and :meth:`add` were given, and ``owner``: the process that the group goes with."""
        return json.loads((self.folder / "group.json").read_text())

    def remove(self) -> None:
        """Removes the folder with all that is in it."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def last_lines(self, count: int = 20) -> str:
        """The end of every rank's log, one after the other."""
        parts, first_rank = [], self.describe()["first_rank"]
        for path in sorted(self.logs.rglob("std*.log")):
            lines = path.read_text(errors="replace").splitlines()[-count:]
            if lines:
                parts += [f"--- rank {first_rank + int(path.parent.name)} {path.stem}", *lines]
        return "\n".join(parts)


def running() -> list[GroupAddress]:
    """The person's groups whose owner lives, oldest first."""
    folders = [path for path in runtime_root().glob("group-*") if (path / "group.json").exists()]
    addresses = [GroupAddress(path) for path in sorted(folders, key=lambda path: path.stat().st_mtime)]
    return [address for address in addresses if is_alive(address.describe()["owner"])]


def shared(plan: str, devices: str) -> list[GroupAddress]:
    """The running groups that ``serve`` keeps for a plan on these devices."""
    wanted = {"shared": True, "plan": plan, "devices": devices}
    return [address for address in running() if wanted.items() <= address.describe().items()]


def remove_stale() -> None:
    """Removes folders that a crash left behind."""
    for path in runtime_root().glob("group-*"):
        description = path / "group.json"
        if description.exists() and not is_alive(json.loads(description.read_text())["owner"]):
            GroupAddress(path).remove()
