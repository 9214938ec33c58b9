"""Downloads a published model for the node that loads it."""

import threading
import time
from contextvars import copy_context
from pathlib import Path

import comfy.utils

from ...parallel_backend.cogvideox.checkpoint import catalogue
from ...parallel_backend.cogvideox.checkpoint.download import GB, Download, download, prepare
from ...parallel_backend.cogvideox.checkpoint.hubs import HUBS
from ...parallel_backend.config import CONFIG
from ...parallel_backend.errors import Cancelled
from . import lines, runtime
from .model_folders import MODEL_FOLDERS, NotDownloaded, find_model, roots_of
from .progress import EVENT_SECONDS

OFF = "off"
SOURCES = (OFF, *HUBS)
"""What the node can be asked to do: nothing, or to download from a hub."""

downloaded: set[str] = set()
"""The names of the models that were downloaded since ComfyUI started."""


class Progress:
    """Shows in a node how much of a download is there, and stops the download if the user cancels it.

    Args:
        size: bytes of all files.
        node_id: the node.
    """

    def __init__(self, size: int, node_id: str | None):
        self._size, self._node_id = size, node_id
        self._bar = comfy.utils.ProgressBar(size, node_id)
        self._is_stopped = threading.Event()
        self._begin: tuple[int, float] | None = None
        """The bytes that were there when the first chunk had come, and when."""
        self._shown = 0.0

    def __call__(self, done: int) -> None:
        """Shows the bytes that are there.

        Raises:
            Cancelled: if the user has cancelled the workflow.
        """
        if self._is_stopped.is_set() or not runtime.is_wanted():
            raise Cancelled
        self._bar.update_absolute(done)
        now = time.monotonic()
        self._begin = self._begin or (done, now)
        if now - self._shown >= EVENT_SECONDS:
            self._shown = now
            lines.show_for_now(self._line(done, now), self._node_id)

    def stop(self) -> None:
        """Stops the download before it writes anything more."""
        self._is_stopped.set()

    def _line(self, done: int, now: float) -> str:
        """Returns what is there in words, and how long the rest is going to take."""
        before, since = self._begin
        there = f"downloading: {done / GB:.1f} of {self._size / GB:.1f} GB"
        if done <= before or now <= since:
            return there
        speed = (done - before) / (now - since)
        return f"{there}, {speed / 1e6:.1f} MB/s, {(self._size - done) / speed / 60:.0f} min left"


def download_in_thread(wanted: Download, progress: Progress) -> None:
    """Downloads what is missing, and can be cancelled while the hub does not answer. Raises as :func:`.download` does.

    Args:
        wanted: see :func:`.download`.
        progress: stops the thread with the next bytes that come, if the user cancels.
    """
    failures: list[BaseException] = []

    def work() -> None:
        try:
            download(wanted, progress)
        except BaseException as error:  # raised again in the caller's thread
            failures.append(error)

    thread = threading.Thread(target=copy_context().run, args=(work,), name="download", daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(CONFIG.poll_seconds)
        if not runtime.is_wanted():
            progress.stop()
            raise Cancelled
    if failures:
        raise failures[0]


def find_or_download(name: str, source: str, node_id: str | None) -> Path:
    """Returns the folder or file of a model, which is downloaded first if it is not here.

    Args:
        name: as in the list of the node.
        source: one of SOURCES. A model that is here is never downloaded.
        node_id: the node that shows what is done.
    Raises:
        RequestError: for a name that is not in the list; for a model that is not here, if ``source`` is ``off``.
        Failure: if the hub does not answer, a file is not what the hub says it is, or the disk is full.
        InterruptProcessingException: ComfyUI's own, when the user cancelled.
    """
    try:
        return find_model(name)
    except NotDownloaded as missing:
        if source == OFF:
            raise
        model = catalogue.MODELS[missing.short]
    folder = roots_of(MODEL_FOLDERS[0])[0] / model.folder
    wanted = prepare(HUBS[source](), model.repository, folder)
    runtime.say(f"downloading {wanted.describe()}", node_id)
    with runtime.interruptible():
        download_in_thread(wanted, Progress(wanted.size, node_id))
    downloaded.add(name)
    runtime.say(f"downloaded into {MODEL_FOLDERS[0]}/{model.folder}, and checked", node_id)
    return folder
