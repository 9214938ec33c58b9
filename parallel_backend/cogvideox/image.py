"""Pictures of any size to the size of a video."""

import torch
import torch.nn.functional as F


def cover(pixels: torch.Tensor, *, width: int, height: int) -> torch.Tensor:
    """Resizes ``[frames, rows, columns, colours]`` in 0..1 to cover a size, its shape kept, and crops it at the centre."""
    rows, columns = pixels.shape[1:3]
    if (columns, rows) == (width, height):
        return pixels[..., :3]
    scale = max(width / columns, height / rows)
    size = max(height, round(rows * scale)), max(width, round(columns * scale))
    video = pixels[..., :3].movedim(-1, 1).float()
    video = F.interpolate(video, size, mode="bicubic", antialias=True).clamp(0, 1)
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    return video[:, :, top : top + height, left : left + width].movedim(1, -1).contiguous()
