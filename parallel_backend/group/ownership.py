"""Proof that the process which keeps a group is alive: a file lock that the kernel drops with its holder.

A process number proves nothing: numbers are used again after a restart, and differ between containers. A POSIX record lock belongs to
a process, not to a descriptor, so a forked child that inherits the file does not hold its parent's lock.
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
    """A locked file in a folder, for as long as this process lives or until :meth:`close`.

    Closing any descriptor of a file drops the process's locks on it, so this process must never open the file a second time.

    Raises:
        OSError: where the folder, or its file system, has no room for it or no locks.
    """

    def __init__(self, folder: Path):
        # Whoever sweeps the folder looks at names without a dot, and finds this one already locked.
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
        """Whether others still find the file: nothing has swept it away."""
        return is_own(self.path)

    def close(self) -> None:
        """Gives the lock up."""
        with suppress(OSError):  # it was swept away, or its folder is read-only now
            self.path.unlink()
        os.close(self._descriptor)


def is_own(path: Path) -> bool:
    """Whether this very process holds the lock of that path. A forked child has the parent's descriptor but another number."""
    if path.name.split("-")[1:2] != [str(os.getpid())]:
        return False
    place = os.path.realpath(path)  # a folder on the way to it may be a link
    for descriptor in os.listdir("/proc/self/fd"):
        try:
            if os.readlink(f"/proc/self/fd/{descriptor}") == place:
                return True
        except OSError:  # closed by another thread
            continue
    return False


def is_held(path: Path) -> bool:
    """Whether a living process holds the lock of that path."""
    return OwnerWatch(path).is_alive()


class OwnerWatch:
    """Looks at an owner's lock, even after its file was swept away.

    Args:
        path: of the lock.
    """

    def __init__(self, path: Path):
        self._path = path
        self._is_own = is_own(path)
        self._file = None
        if not self._is_own:
            try:
                self._file = open(path, "rb")  # noqa: SIM115 - open as long as this object is
            except OSError:
                pass

    def is_alive(self) -> bool:
        """Whether the owner lives."""
        if self._is_own:
            return is_own(self._path)
        if self._file is None:
            return False
        try:  # others that look take a shared lock too, so they do not see each other
            fcntl.lockf(self._file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            return True
        fcntl.lockf(self._file, fcntl.LOCK_UN)
        return False
