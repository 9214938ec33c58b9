"""A VAE's operations between its convolutions, in torch: statistics of a norm, its application, sums.

:mod:`.vae_triton` has the same operations for GPUs, each in one pass over memory.

A convolution's bias is added by the operation after it, which saves a pass over memory.
"""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn

MOST = 2**30
"""Maximum elements of a convolution's input; larger ones are split, as cuDNN uses 32-bit indices."""


def frame_indices(frames: int, latent_frames: int) -> list[int]:
    """Returns for each frame the index of the latent frame that it was made from.

    If there is an odd number of several frames, the first one has its own latent frame.
    """
    first = frames % 2 if frames > 1 else 0
    times = (frames - first) // (latent_frames - first)
    return [0] * first + [first + index // times for index in range(frames - first)]


def square_views(states: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """Views ``[…, height, width]`` as ``[…, rows, n, columns, n]``."""
    return states.unflatten(-1, (columns, -1)).unflatten(-3, (rows, -1))


def per_channel(values: torch.Tensor) -> torch.Tensor:
    """Appends dimensions to ``[…, channels]`` to broadcast over frames, rows and columns."""
    return values[..., None, None, None]


def convolve(convolution: nn.Conv3d, states: torch.Tensor, border: int, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Convolves ``[batch, channels, frames, height, width]``, of which ``border`` rows at each end replace padding."""
    depth, padding = convolution.kernel_size[0] - 1, (0, convolution.padding[1] - border, convolution.padding[2])
    frames = states.shape[2] - depth
    parts = min(frames, states.numel() // MOST + 1)
    cuts = pairwise(frames * part // parts for part in range(parts + 1))
    results = [convolve_part(states[:, :, start : end + depth], convolution.weight, bias, padding) for start, end in cuts]
    return results[0] if parts == 1 else torch.cat(results, dim=2)


def convolve_part(
    states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, padding: tuple[int, ...]
) -> torch.Tensor:
    """Runs a 3D convolution.

    For a small input of one video on a CPU torch uses a function of its own, which takes ten times as long as oneDNN's.
    """
    if states.device.type == "cpu" and states.dtype == torch.float32 and torch.backends.mkldnn.is_available():
        one = (1, 1, 1)
        return torch.mkldnn_convolution(states, weight, bias, padding, one, one, 1)
    return F.conv3d(states, weight, bias, padding=padding)


def normalised(states, bias, mean, variance, norm: nn.GroupNorm, gain, offset) -> torch.Tensor:
    """Normalises states with known moments, applies gain and offset, and SiLU, in float32.

    Args:
        states: ``[batch, channels, frames, height, width]``, without the ``bias`` ``[channels]``, which may be None.
        bias: added to the states.
        mean, variance: ``[batch, groups]``, with the bias.
        norm: for its weights.
        gain, offset: ``[batch, channels, frames, rows, columns]`` at the latent's resolution, or None.
    """
    mean, scale = (
        values[..., None].expand(-1, -1, norm.num_channels // norm.num_groups).flatten(1)
        for values in (mean, (variance + norm.eps).rsqrt())
    )
    scale = scale * norm.weight.float()
    shift = norm.bias.float() - (mean if bias is None else mean - bias.float()) * scale
    states = states.float() * per_channel(scale) + per_channel(shift)
    if gain is not None:  # each value applies to a square of pixels
        squares = square_views(states, *gain.shape[3:])
        squares = squares * gain[..., :, None, :, None] + offset[..., :, None, :, None]
        states = squares.flatten(5, 6).flatten(3, 4)
    return F.silu(states)


class TorchVaeOps:
    """The operations in torch, one frame at a time: float32 copies of all frames would be the largest tensors."""

    def moments(self, states: torch.Tensor, bias: torch.Tensor | None, groups: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns mean and variance ``[batch, groups]``, float32, of states plus bias.

        Args:
            states: ``[batch, channels, frames, height, width]``.
            bias: ``[channels]`` or None.
            groups: of channels.
        """
        found = [frame_moments(frame, bias, groups) for frame in states.split(1, dim=2)]
        means, variances = (torch.stack(part) for part in zip(*found))
        mean = means.mean(0)
        return mean, variances.mean(0) + (means - mean).square().mean(0)

    def normalise(self, states, bias, mean, variance, norm, gain, offset, out) -> None:
        """Writes :func:`normalised` to ``out``; ``gain`` and ``offset`` have the latent's frames."""
        indices = range(states.shape[2]) if gain is None else frame_indices(states.shape[2], gain.shape[2])
        for frame, index in enumerate(indices):
            conditions = (None if part is None else part[:, :, index : index + 1] for part in (gain, offset))
            at = slice(frame, frame + 1)
            out[:, :, at] = normalised(states[:, :, at], bias, mean, variance, norm, *conditions)

    def enlarge(self, states: torch.Tensor, out: torch.Tensor) -> None:
        """Upsamples states to the size of ``out`` by repeating frames, rows and columns."""
        for frame, index in enumerate(frame_indices(out.shape[2], states.shape[2])):
            square_views(out[:, :, frame], *states.shape[3:]).copy_(states[:, :, index, :, None, :, None])

    def add(self, states: torch.Tensor, bias: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
        """Returns the sum of a convolution's output, its bias and other states; may overwrite the first."""
        return states.add_(per_channel(bias)).add_(others)


def frame_moments(states: torch.Tensor, bias: torch.Tensor | None, groups: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Computes :meth:`TorchVaeOps.moments` via a float32 copy."""
    states = states.float() if bias is None else states.float() + per_channel(bias.float())
    variance, mean = torch.var_mean(states.unflatten(1, (groups, -1)), dim=(2, 3, 4, 5), correction=0)
    return mean, variance
