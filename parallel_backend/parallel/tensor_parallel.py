"""Tensor parallelism: each rank has some heads and hidden features of every block, and partial outputs are summed.

Weights are cut by :class:`parallel_backend.cogvideox.checkpoint.shards.Shard`.
"""

import torch
import torch.distributed as dist

from ..cogvideox.checkpoint.shards import BY_COLUMNS, MODULATION


def join_products(transformer, group: dist.ProcessGroup) -> None:
    """Adds the collectives of tensor parallelism to a transformer.

    Outputs of layers that are split by input are summed; one rank's has the bias. Outputs of the modulation layers are
    gathered. Other layers that are split by output, for heads and hidden features, need no communication.
    """

    def add(module, args, product):
        total = product.contiguous()  # safe to reduce in place: the layer has just created it
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
