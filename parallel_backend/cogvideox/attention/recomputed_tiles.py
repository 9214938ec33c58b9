"""Tiles of queries that the attention kernels could not compute without a running maximum: recomputes and counts them."""

from functools import cache

import torch

TOO_OFTEN = 0.05
"""Fraction of the work that may be recomputed. At this fraction, a running maximum is as fast (7.6 ms to 6.85, NOTES), and
the user is notified."""


class Pieces:
    """Counts the tiles of 64 queries of a head that the kernels computed on a device, and how many of them were recomputed."""

    def __init__(self, device: torch.device):
        on_gpu = device.type == "cuda"
        with torch.inference_mode(False):
            self.twice = torch.zeros(1, dtype=torch.int32, device=device)
            self._seen = torch.zeros(1, dtype=torch.int32, pin_memory=on_gpu)
        self.all = self._asked = 0
        self._copied = torch.cuda.Event() if on_gpu else None
        self.needs_maximum = False
        """Whether recomputation was so frequent that a kernel with a running maximum is faster. It stays set."""

    def look(self) -> None:
        """Updates :attr:`needs_maximum` from an earlier count, without synchronizing with the device."""
        if self._copied and not self._copied.query():
            return
        self.needs_maximum |= self._seen.item() > TOO_OFTEN * self._asked
        self._seen.copy_(self.twice, non_blocking=True)
        self._asked = self.all
        if self._copied:
            self._copied.record()

    def share_of_twice(self) -> float:
        """Returns the fraction of tiles that were recomputed, and resets the counts."""
        share = self.twice.item() / max(self.all, 1)
        self.twice.zero_()
        self._seen.zero_()
        self.all = 0
        return share


pieces_on = cache(Pieces)
"""By device."""


def recompute(query, key, value, result, log_sums, failed: torch.Tensor) -> None:
    """Recomputes the tiles that have ``failed`` rows with a running maximum, and counts them.

    Args:
        query, key, value, result, log_sums: of the first kernel.
        failed: number of failed rows of each tile, ``[batch * heads * tiles]``.
    """
    from ..kernels import attention_hopper as own

    batch, tokens, heads, features = query.shape
    pieces = pieces_on(query.device)
    pieces.all += len(failed)
    own.careful_kernel[(len(failed) // (batch * heads), heads, batch)](
        query, key, value, result, log_sums, failed, pieces.twice, tokens, key.shape[1], heads,
        *query.stride()[:2], *key.stride()[:2], *value.stride()[:2],
        FEATURES=features, ROWS=own.ROWS.value, KEYS=64, num_warps=4,
    )  # fmt: skip
