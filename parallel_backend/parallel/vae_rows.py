"""VAE parallelism: ranks share the rows of an image while a VAE decodes or encodes it.

Every rank has a strip of rows. Convolutions get their neighbours' border rows, and norms the statistics of all rows. So the
result equals that of one rank, without seams to blend.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from ..cogvideox.vae.layers import Layers, Whole


class Strips(Whole):
    """A division of rows among the ranks of the default process group.

    Args:
        rank, size: of this process, and of the group.
        rows: of the latent; at least ``size``. Strips differ by at most one row.
    """

    border = 1

    def __init__(self, rank: int, size: int, rows: int):
        self.rank, self.size = rank, size
        self.counts = [rows // size + (index < rows % size) for index in range(size)]
        self._weights: torch.Tensor | None = None

    def mine(self, states: torch.Tensor, dim: int) -> torch.Tensor:
        """Returns this rank's strip of a tensor whose size in ``dim`` is a multiple of the latent's rows."""
        scale = states.shape[dim] // sum(self.counts)
        return states.narrow(dim, sum(self.counts[: self.rank]) * scale, self.counts[self.rank] * scale)

    def join(self, strip: torch.Tensor, dim: int) -> torch.Tensor:
        """Gathers all strips on rank 0; the other ranks get an empty tensor."""
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

    def fill(self, states: torch.Tensor, *, above: int, below: int) -> None:
        """Fills border rows with the neighbours' nearest rows; with zeros at the image's edges. See :meth:`Whole.fill`."""
        row = (*states.shape[:-2], states.shape[-1])
        top, bottom, transfers = states.new_zeros(row), states.new_zeros(row), []
        first, last = states[..., above, :], states[..., -1 - below, :]
        if self.rank > 0:
            if below:
                transfers.append(dist.P2POp(dist.isend, first.contiguous(), self.rank - 1))
            if above:
                transfers.append(dist.P2POp(dist.irecv, top, self.rank - 1))
        if self.rank < self.size - 1:
            if above:
                transfers.append(dist.P2POp(dist.isend, last.contiguous(), self.rank + 1))
            if below:
                transfers.append(dist.P2POp(dist.irecv, bottom, self.rank + 1))
        for transfer in dist.batch_isend_irecv(transfers) if transfers else ():
            transfer.wait()
        if above:
            states[..., 0, :] = top
        if below:
            states[..., -1, :] = bottom

    def moments(self, mean: torch.Tensor, variance: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Combines the moments of all strips. See :meth:`Whole.moments`."""
        own = torch.stack([mean, variance])
        parts = own.new_empty(self.size * len(own), *own.shape[1:])
        dist.all_gather_into_tensor(parts, own)
        means, variances = parts.unflatten(0, (self.size, 2)).unbind(1)
        weights = self._weights_on(own.device)
        mean = (weights * means).sum(0)
        return mean, (weights * (variances + (means - mean).square())).sum(0)

    def _weights_on(self, device: torch.device) -> torch.Tensor:
        """Returns each strip's fraction of the rows. Cached on the device, as a copy per norm would synchronize."""
        if self._weights is None:
            self._weights = torch.tensor(self.counts, dtype=torch.float32, device=device)[:, None, None] / sum(self.counts)
        return self._weights


@contextmanager
def shared(layers: Layers, strips: Strips) -> Iterator[None]:
    """Within the context, a VAE with these layers decodes and encodes strips. All ranks must enter it together."""
    layers.rows = strips
    try:
        yield
    finally:
        layers.rows = Whole()
