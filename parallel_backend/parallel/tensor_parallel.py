"""Model parallelism: a rank has some heads and hidden features of every block, and what ranks make of them is added.

What a rank has is cut by :class:`parallel_backend.cogvideox.checkpoint.shards.Shard`; the forward is the one of all plans.
"""

import torch
import torch.distributed as dist

from ..cogvideox.checkpoint.shards import BY_COLUMNS, MODULATION


def join_products(transformer, group: dist.ProcessGroup) -> None:
    """Adds what the ranks of a group make of their columns, of which one rank's has the bias; joins what they make of rows of
    the modulation. What they make of rows else, heads and hidden features, stays where it is."""

    def add(module, args, product):
        total = product.contiguous()  # nobody else's: the layer has just made it
        dist.all_reduce(total, group=group)
        return total

    def join(module, args, product):
        parts = [torch.empty_like(product) for _ in range(group.size())]
        dist.all_gather(parts, product.contiguous(), group=group)
        return torch.cat(parts, dim=1)

    for block in transformer.transformer_blocks:
        for layer in BY_COLUMNS:
            block.get_submodule(layer).register_forward_hook(add)
        for layer in MODULATION:
            block.get_submodule(layer).register_forward_hook(join)
