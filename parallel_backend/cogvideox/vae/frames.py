"""Hands over the frames of a video while the next ones are decoded."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from einops import rearrange

from ..checkpoint.compression import SPATIAL, frames_of

STAGED_BYTES = 2**25
"""Size of the pinned buffer for copying frames from a GPU, which torch caches for the next video."""
FramesListener = Callable[[int, int, torch.Tensor], None]
"""Receives decoded frames: the number of their video in the batch, the number of the first one, and the frames
``[frames, height, width, 3]``, float32 in 0..1 on the CPU. It may be called in another thread, but by one at a time. If memory runs
out, the video begins again with frame 0."""


def brightness(video: torch.Tensor) -> torch.Tensor:
    """Converts values in -1..1 to float32 in 0..1."""
    return (video.float() / 2 + 0.5).clamp_(0, 1)


class Assembly:
    """Puts the frames of a decoding job together.

    Args:
        latent: of the job.
        on_frames: receives the frames in turn, as parts of the whole, so that it may keep them.
    """

    def __init__(self, latent: torch.Tensor, on_frames: FramesListener | None = None):
        batch, _, frames, height, width = latent.shape
        self._shape = batch, frames_of(frames), height * SPATIAL, width * SPATIAL, 3
        self._on_frames = on_frames
        self.videos: torch.Tensor | None = None
        """``[batch, frames, height, width, 3]``; None before the first frames."""

    def add(self, video: int, start: int, frames: torch.Tensor) -> None:
        """Adds frames; see :data:`FramesListener`. They may change afterwards."""
        if self.videos is None:
            self.videos = torch.empty(self._shape)
        part = self.videos[video, start : start + len(frames)]
        part.copy_(frames)
        if self._on_frames:
            self._on_frames(video, start, part)


class FrameCopier:
    """Copies decoded frames to the CPU, on CUDA in a thread while the next ones are decoded. Leaving the context waits for all.

    Args:
        device: of the frames.
        on_frames: receives them. They change afterwards.
    """

    def __init__(self, device: torch.device, on_frames: FramesListener):
        self._on_frames = on_frames
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._thread = ThreadPoolExecutor(1, "frames") if self._stream else None
        self._copying: list[Future] = []
        self._staged: torch.Tensor | None = None
        self._video, self._start = -1, 0

    def __enter__(self) -> "FrameCopier":
        return self

    def __exit__(self, kind, error, traceback) -> None:
        if self._thread:
            self._thread.shutdown(cancel_futures=kind is not None)
        if kind is None:
            for copy in self._copying:
                copy.result()

    def begin(self, skipped: int) -> None:
        """Begins the next video, whose first frames are skipped."""
        self._video += 1
        self._start = -skipped

    def add(self, decoded: torch.Tensor) -> None:
        """Copies the next frames ``[1, 3, frames, height, width]`` in -1..1; none if they have no rows, as on all ranks but rank 0."""
        frames = rearrange(decoded, "1 colours frames height width -> frames height width colours")[max(0, -self._start) :]
        at = self._video, max(0, self._start)
        self._start += decoded.shape[2]
        if not frames.numel():
            return
        if self._thread is None:
            self._on_frames(*at, brightness(frames).cpu())
            return
        ready = torch.cuda.current_stream(frames.device).record_event()
        self._copying.append(self._thread.submit(self._copy, *at, frames, ready))

    @torch.inference_mode()
    def _copy(self, video: int, start: int, frames: torch.Tensor, ready: torch.cuda.Event) -> None:
        some = max(STAGED_BYTES // (frames[0].numel() * torch.float32.itemsize), 1)
        if self._staged is None or self._staged.shape[1:] != frames.shape[1:]:
            self._staged = torch.empty((some, *frames.shape[1:]), pin_memory=True)
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(ready)
            for part in frames.split(some):
                self._on_frames(video, start, self._staged[: len(part)].copy_(brightness(part)))
                start += len(part)
