"""Writes files in a thread of its own, while what comes next is made."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor


class Writer:
    """Calls what it is given, one after the other. Leaving it waits for all of that.

    One waits at most while another is written: who brings a third waits too, so that what is to be written does not fill memory.

    Raises:
        Exception: from :meth:`add` or at the end, the first that a call raised; calls after it are left out.
    """

    def __init__(self):
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="writer")
        self._room = threading.Semaphore(2)
        self._error: Exception | None = None

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, kind, error, traceback) -> None:
        self._thread.shutdown()
        if kind is None and self._error:
            raise self._error

    def add(self, write: Callable[[], None]) -> None:
        """Has something written; may be called in any thread."""
        self._room.acquire()
        if self._error:
            self._room.release()
            raise self._error
        self._thread.submit(self._write, write)

    def _write(self, write: Callable[[], None]) -> None:
        try:
            if self._error is None:
                write()
        except Exception as error:  # raised again in the thread of whoever comes next
            self._error = error
        finally:
            self._room.release()
