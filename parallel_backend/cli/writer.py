"""Writes files in another thread, while the next video is made."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor


class Writer:
    """Runs write calls one after the other in one thread. Leaving the context waits for all of them.

    At most one call waits while another runs. :meth:`add` blocks before a third, so that videos do not fill memory.

    Raises:
        Exception: the first that a call raised, from :meth:`add` or at the end. Later calls are skipped.
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
        """Queues a write call. Any thread may call this."""
        self._room.acquire()
        if self._error:
            self._room.release()
            raise self._error
        self._thread.submit(self._write, write)

    def _write(self, write: Callable[[], None]) -> None:
        try:
            if self._error is None:
                write()
        except Exception as error:  # raised again in the caller's thread
            self._error = error
        finally:
            self._room.release()
