"""Proof that the owner of a group is alive: a file lock that the kernel releases when the process ends.

A process ID proves nothing: IDs are reused after a restart and differ between containers. A POSIX record lock belongs to a
process, not to a descriptor, so a forked child that inherits the file does not hold its parent's lock.
"""

import os
import tempfile
from contextlib import suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows, where no group can start
    fcntl = None


class OwnerLock:
    """A locked file in a folder, until :meth:`close` or the end of this process.

    Closing any descriptor of a file releases the process's locks on it, so this process must never open the file a second time.

    Raises:
        OSError: when the file cannot be created, or the file system has no locks.
    """

    def __init__(self, folder: Path):
        # Processes that remove stale files skip names with a dot, so they see the file only once it is locked.
        self._descriptor, hidden = tempfile.mkstemp(prefix=".owner-", dir=folder)
        try:
            fcntl.lockf(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self.path = folder / f"owner-{os.getpid()}-{hidden[-8:]}"
            os.rename(hidden, self.path)
        except OSError:
            os.close(self._descriptor)
            Path(hidden).unlink(missing_ok=True)
            raise

    def is_in_place(self) -> bool:
        """Whether the file is still there for other processes."""
        return is_own(self.path)

    def close(self) -> None:
        """Releases the lock."""
        with suppress(OSError):  # it was removed, or its folder is read-only now
            self.path.unlink()
        os.close(self._descriptor)


def is_own(path: Path) -> bool:
    """Whether this process holds the lock of a path. A forked child has the parent's descriptor but another process ID."""
    if path.name.split("-")[1:2] != [str(os.getpid())]:
        return False
    place = os.path.realpath(path)  # the path may contain a link
    for descriptor in os.listdir("/proc/self/fd"):
        try:
            if os.readlink(f"/proc/self/fd/{descriptor}") == place:
                return True
        except OSError:  # closed by another thread
            continue
    return False


def is_held(path: Path) -> bool:
    """Whether any process holds the lock of a path."""
    return OwnerWatch(path).is_alive()


class OwnerWatch:
    """Watches an owner's lock, even after its file was removed.

    Args:
        path: of the lock.
    """

    def __init__(self, path: Path):
        self._path = path
        self._is_own = is_own(path)
        self._file = None
        if not self._is_own:
            try:
                self._file = open(path, "rb")  # noqa: SIM115 - open as long as this object lives
            except OSError:
                pass

    def is_alive(self) -> bool:
        """Whether the owner is alive."""
        if self._is_own:
            return is_own(self._path)
        if self._file is None:
            return False
        try:  # a shared lock, so that watchers do not take each other for the owner
            fcntl.lockf(self._file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            return True
        fcntl.lockf(self._file, fcntl.LOCK_UN)
        return False
