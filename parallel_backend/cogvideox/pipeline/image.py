"""Resizes images to the size of a video."""

import torch
import torch.nn.functional as F

from ...errors import RequestError

MOST_LOST = 256
"""Largest allowed ratio of the resized image's area to the cropped area; the resized image takes memory first."""


def cover(pixels: torch.Tensor, *, width: int, height: int) -> torch.Tensor:
    """Resizes ``[frames, rows, columns, channels]`` in 0..1 to cover a size, keeping the aspect ratio, and crops at the centre.

    Args:
        pixels: channels after the third are dropped.
        width, height: in pixels.
    Raises:
        RequestError: if the aspect ratios differ so much that nearly all of the image would be cropped.
    """
    rows, columns = pixels.shape[1:3]
    if (columns, rows) == (width, height):
        return pixels[..., :3]
    scale = max(width / columns, height / rows)
    size = max(height, round(rows * scale)), max(width, round(columns * scale))
    if size[0] * size[1] > MOST_LOST * width * height:
        raise RequestError(
            f"an image of {columns}x{rows} cannot be resized to {width}x{height} without cropping nearly all of it; crop it first"
        )
    video = pixels[..., :3].movedim(-1, 1).float()
    video = F.interpolate(video, size, mode="bicubic", antialias=True).clamp(0, 1)
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    return video[:, :, top : top + height, left : left + width].movedim(1, -1).contiguous()
