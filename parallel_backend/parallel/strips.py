"""The rows of a picture spread over ranks while a VAE decodes or encodes it.

Every rank has a strip of rows. Convolutions see their neighbours' nearest rows and norms the statistics of all rows, so the
result is that of one rank: there is no seam to blend.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import MethodType

import torch
import torch.distributed as dist
from torch import nn


class Strips:
    """A division of rows among the ranks of the default process group.

    Args:
        rank, size: of this process.
        rows: of the latent; at least ``size``. Strips differ by at most one.
    """

    def __init__(self, rank: int, size: int, rows: int):
        self.rank, self.size = rank, size
        self.counts = [rows // size + (index < rows % size) for index in range(size)]
        self.weights = torch.tensor([count / rows for count in self.counts])

    def mine(self, states: torch.Tensor, dim: int) -> torch.Tensor:
        """This rank's strip of something with whole multiples of the latent's rows in ``dim``."""
        scale = states.shape[dim] // sum(self.counts)
        return states.narrow(dim, sum(self.counts[: self.rank]) * scale, self.counts[self.rank] * scale)

    def join(self, strip: torch.Tensor, dim: int) -> torch.Tensor:
        """All strips, on rank 0; the others get nothing to speak of."""
        scale = strip.shape[dim] // self.counts[self.rank]
        shape = list(strip.shape)
        shape[dim] = self.counts[0] * scale  # the largest
        padded = strip.new_zeros(shape)
        padded.narrow(dim, 0, strip.shape[dim]).copy_(strip)
        found = [torch.empty_like(padded) for _ in range(self.size)] if self.rank == 0 else None
        dist.gather(padded, found, dst=0)
        if found is None:
            return strip.narrow(dim, 0, 0)
        return torch.cat([part.narrow(dim, 0, count * scale) for part, count in zip(found, self.counts)], dim=dim)

    def with_neighbours(self, states: torch.Tensor, *, above: int, below: int) -> torch.Tensor:
        """Rows ``[..., height, width]`` with so many (0 or 1) of the strips above and below; zeros at the picture's edge."""
        row = (*states.shape[:-2], 1, states.shape[-1])
        top, bottom, transfers = states.new_zeros(row), states.new_zeros(row), []
        if self.rank > 0:
            if below:
                transfers.append(dist.P2POp(dist.isend, states[..., :1, :].contiguous(), self.rank - 1))
            if above:
                transfers.append(dist.P2POp(dist.irecv, top, self.rank - 1))
        if self.rank < self.size - 1:
            if above:
                transfers.append(dist.P2POp(dist.isend, states[..., -1:, :].contiguous(), self.rank + 1))
            if below:
                transfers.append(dist.P2POp(dist.irecv, bottom, self.rank + 1))
        for transfer in dist.batch_isend_irecv(transfers) if transfers else ():
            transfer.wait()
        return torch.cat([*[top] * above, states, *[bottom] * below], dim=-2)

    def moments(self, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and variance over all but the first two dimensions of ``[batch, groups, frames, …]``, all strips together."""
        # Frame by frame, or the float32 copy would be the largest tensor of all.
        variance, mean = (
            torch.stack(part, dim=-1)
            for part in zip(*(torch.var_mean(frame.float().flatten(2), dim=2, correction=0) for frame in states.unbind(2)))
        )
        own = torch.stack([mean, variance])
        parts = own.new_empty(self.size * len(own), *own.shape[1:])
        dist.all_gather_into_tensor(parts, own)
        weights = self.weights.to(own.device)[:, None, None, None] / states.shape[2]
        means, variances = parts.unflatten(0, (self.size, 2)).unbind(1)
        mean = (weights * means).sum((0, 3))
        return mean, (weights * (variances + (means - mean[..., None]) ** 2)).sum((0, 3))


def group_norm(strips: Strips, norm: nn.GroupNorm, states: torch.Tensor) -> torch.Tensor:
    """What ``norm`` makes of this rank's strip ``[batch, channels, frames, height, width]`` of a whole picture."""
    grouped = states.unflatten(1, (norm.num_groups, -1)).transpose(2, 3)  # frames third
    mean, variance = strips.moments(grouped)
    each = norm.num_channels // norm.num_groups
    mean, scale = (value.repeat_interleave(each, dim=1) for value in (mean, (variance + norm.eps).rsqrt()))
    scale = scale * norm.weight.float()
    shift = norm.bias.float() - mean * scale
    result = torch.empty_like(states)
    for index, frame in enumerate(states.unbind(2)):
        result[:, :, index] = frame * scale[..., None, None] + shift[..., None, None]
    return result


def neighbours_hook(strips: Strips, convolution: nn.Conv2d | nn.Conv3d) -> Callable:
    """A pre-hook that gives a convolution the rows it would see in the whole picture."""
    if convolution.stride[-2] == 1:
        return lambda module, args: (strips.with_neighbours(args[0], above=1, below=1),)
    # A convolution that halves is given one row of zeros at the end: the next strip's first row stands there.
    return lambda module, args: (strips.with_neighbours(args[0][..., :-1, :], above=0, below=1),)


@contextmanager
def shared(vae, strips: Strips) -> Iterator[None]:
    """Within, ``vae`` decodes and encodes strips; all ranks must do the same. Layers are diffusers' ``AutoencoderKLCogVideoX``'s."""
    hooks, paddings, norms = [], [], []
    for module in vae.modules():
        if isinstance(module, (nn.Conv2d, nn.Conv3d)) and module.kernel_size[-2] > 1:
            hooks.append(module.register_forward_pre_hook(neighbours_hook(strips, module)))
            paddings.append((module, module.padding))
            module.padding = (*module.padding[:-2], 0, module.padding[-1])
        elif isinstance(module, nn.GroupNorm):
            norms.append(module)
            module.forward = MethodType(lambda norm, states: group_norm(strips, norm, states), module)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for module, padding in paddings:
            module.padding = padding
        for module in norms:
            del module.forward
