"""Small pictures of what a step takes for the clean video, made by the VAE between steps, for who waits.

A VAE makes of few latents, each by itself, what it makes of them in a video, smaller: so colours are right whatever the VAE is.
"""

import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from einops import rearrange

from ...config import CONFIG
from ...errors import Cancelled, first_line
from ..stopping import GoOn, stoppable
from .codec import brightness, stops

MOMENTS = 4
"""Of a video, in two rows; those of fewer latent frames in one."""
CELLS = 32
"""Rows and columns of a moment's latent at most; of a larger one so many are put together as are needed."""
PictureListener = Callable[[torch.Tensor], None]
"""Told of a picture: ``[height, width, 3]``, uint8, on the CPU."""


def why_none(error: Exception) -> str:
    """The note where no picture could be made."""
    reason = "there is no memory for them" if isinstance(error, torch.OutOfMemoryError) else first_line(error)
    return f"no previews: {reason}"


def moments(frames: int) -> list[int]:
    """Places of some frames, the first and the last among them."""
    count = min(frames, MOMENTS)
    return [round(place * (frames - 1) / max(count - 1, 1)) for place in range(count)]


@torch.inference_mode()
def picture(vae, latent: torch.Tensor) -> torch.Tensor:
    """Some moments of a video side by side.

    Args:
        vae: that does not tile.
        latent: unscaled, ``[frames, channels, height/8, width/8]``.
    Returns:
        ``[height, width, 3]``, uint8, on the latent's device.
    """
    places = moments(len(latent))
    together = -(-max(latent.shape[-2:]) // CELLS)
    small = F.avg_pool2d(torch.stack([latent[place] for place in places]).float(), together)
    # One after the other, as all at once need more memory.
    pixels = torch.cat([vae.decode(one[:, :, None].to(vae.dtype)).sample[:, :, -1] for one in small.split(1)])
    rows = 2 if len(places) == MOMENTS else 1
    joined = rearrange(pixels, "(rows columns) colours height width -> (rows height) (columns width) colours", rows=rows)
    return (brightness(joined) * 255).to(torch.uint8)


class Previews:
    """The pictures of one job.

    On a GPU the next step runs already when one is told of, so a picture is shown with a later step than it was asked for: nobody
    waits for the device.

    Args:
        vae: see :func:`picture`.
        scaling: that latents were multiplied by.
        skipped: latent frames of padding at the beginning.
        show: called with each picture.
        go_on: asked while a picture is made; when it says no, that picture is left.
    """

    def __init__(self, vae, *, scaling: float, skipped: int, show: PictureListener, go_on: GoOn):
        self._vae, self._scaling, self._skipped, self._show, self._go_on = vae, scaling, skipped, show, go_on
        self._last = float("-inf")
        self._coming: tuple[torch.Tensor, torch.cuda.Event] | None = None
        self.note: str | None = None
        """Why there are no more."""

    def look(self, clean: torch.Tensor) -> None:
        """Shows what is ready, and has another picture made when it is time.

        Args:
            clean: what a step predicts, scaled: ``[batch, frames, channels, height/8, width/8]``. The first video is shown.
        """
        if self._coming and self._coming[1].query():
            self._show(self._coming[0])
            self._coming = None
        if self.note or self._coming or time.monotonic() - self._last < CONFIG.preview_seconds:
            return
        self._last = time.monotonic()
        try:
            with stoppable(stops(self._vae), self._go_on, "a picture was made"):
                made = picture(self._vae, clean[0, self._skipped :] / self._scaling)
            if made.is_cuda:
                there = torch.empty(made.shape, dtype=made.dtype, pin_memory=True).copy_(made, non_blocking=True)
                self._coming = there, torch.cuda.current_stream(made.device).record_event()
        except Cancelled:  # the caller, too, asks whether to go on
            return
        except Exception as error:  # whatever it is, the video can do without
            self.note = why_none(error)
            self._vae.to("cpu")
            return
        if not made.is_cuda:
            self._show(made.cpu())
