"""Pictures of any size to the size of a video."""

import torch
import torch.nn.functional as F

from ...errors import RequestError

MOST_LOST = 256
"""How many times a picture may be larger than the size that it is cropped to: each pixel takes memory first."""


def cover(pixels: torch.Tensor, *, width: int, height: int) -> torch.Tensor:
    """Resizes ``[frames, rows, columns, colours]`` in 0..1 to cover a size, its shape kept, and crops it at the centre.

    Raises:
        RequestError: for a picture so narrow or flat that nearly all of it would be lost.
    """
    rows, columns = pixels.shape[1:3]
    if (columns, rows) == (width, height):
        return pixels[..., :3]
    scale = max(width / columns, height / rows)
    size = max(height, round(rows * scale)), max(width, round(columns * scale))
    if size[0] * size[1] > MOST_LOST * width * height:
        raise RequestError(
            f"a picture of {columns}x{rows} cannot be brought to {width}x{height} without losing nearly all of it; crop it first"
        )
    video = pixels[..., :3].movedim(-1, 1).float()
    video = F.interpolate(video, size, mode="bicubic", antialias=True).clamp(0, 1)
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    return video[:, :, top : top + height, left : left + width].movedim(1, -1).contiguous()
