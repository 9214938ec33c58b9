"""Previews: small images of the predicted clean video, decoded by the VAE between steps.

A few latent frames, each decoded separately and at a smaller size, look as in the video. So colours are right for any VAE.
"""

import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from einops import rearrange

from ...config import CONFIG
from ...errors import Cancelled, reason_of
from ..stopping import GoOn, stoppable
from .codec import stops
from .frames import brightness

MOMENTS = 4
"""Maximum number of frames in a preview, in two rows; fewer frames are in one row."""
CELLS = 32
"""Maximum rows and columns of each latent frame in a preview; larger latents are average-pooled."""
PictureListener = Callable[[torch.Tensor], None]
"""Receives a preview ``[height, width, 3]``, uint8, on the CPU."""


def why_none(error: Exception) -> str:
    """Returns the note for a preview that failed."""
    reason = "there is not enough memory" if isinstance(error, torch.OutOfMemoryError) else reason_of(error)
    return f"no previews: {reason}"


def moments(frames: int) -> list[int]:
    """Returns evenly spaced frame indices, including the first and the last."""
    count = min(frames, MOMENTS)
    return [round(place * (frames - 1) / max(count - 1, 1)) for place in range(count)]


@torch.inference_mode()
def picture(vae, latent: torch.Tensor) -> torch.Tensor:
    """Decodes some frames of a video into one image.

    Args:
        vae: without tiling.
        latent: unscaled, ``[frames, channels, height/8, width/8]``.
    Returns:
        ``[height, width, 3]``, uint8, on the latent's device.
    """
    places = moments(len(latent))
    together = -(-max(latent.shape[-2:]) // CELLS)
    small = F.avg_pool2d(torch.stack([latent[place] for place in places]).float(), together)
    # One frame at a time takes less memory.
    pixels = torch.cat([vae.decode(one[:, :, None].to(vae.dtype)).sample[:, :, -1] for one in small.split(1)])
    rows = 2 if len(places) == MOMENTS else 1
    joined = rearrange(pixels, "(rows columns) colours height width -> (rows height) (columns width) colours", rows=rows)
    return (brightness(joined) * 255).to(torch.uint8)


class Previews:
    """The previews of one job.

    On a GPU, a preview is shown at a later step than the one that it was decoded from, so that nothing waits for the device. The
    last step always has one, and waits for it: that is the finished video.

    Args:
        vae: see :func:`picture`.
        scaling: factor that latents were multiplied by.
        skipped: number of padding frames at the start of the latent.
        show: called with each preview.
        go_on: called while a preview is decoded; False cancels it.
    """

    def __init__(self, vae, *, scaling: float, skipped: int, show: PictureListener, go_on: GoOn):
        self._vae, self._scaling, self._skipped, self._show, self._go_on = vae, scaling, skipped, show, go_on
        self._last = float("-inf")
        self._coming: tuple[torch.Tensor, torch.cuda.Event] | None = None
        self.note: str | None = None
        """Why there are no more previews; None if there are."""

    def look(self, latent: torch.Tensor, *, is_last: bool = False) -> None:
        """Shows a completed preview and, if it is time, starts another one.

        Args:
            latent: what a step takes for the clean one, scaled: ``[batch, frames, channels, height/8, width/8]``. The first video
                is shown.
            is_last: whether the latent is the job's result.
        """
        if is_last:
            self._coming = None
        elif self._coming and self._coming[1].query():
            self._show(self._coming[0])
            self._coming = None
        is_time = is_last or time.monotonic() - self._last >= CONFIG.preview_seconds
        if self.note or self._coming or not is_time:
            return
        self._last = time.monotonic()
        try:
            with stoppable(stops(self._vae), self._go_on, "a picture was made"):
                made = picture(self._vae, latent[0, self._skipped :] / self._scaling)
            if made.is_cuda and not is_last:
                there = torch.empty(made.shape, dtype=made.dtype, pin_memory=True).copy_(made, non_blocking=True)
                self._coming = there, torch.cuda.current_stream(made.device).record_event()
                return
        except Cancelled:  # the caller checks for cancellation as well
            return
        except Exception as error:  # a failed preview must not fail the job
            self.note = why_none(error)
            self._vae.to("cpu")
            return
        self._show(made.cpu())
