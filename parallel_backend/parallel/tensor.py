"""Model parallelism: a rank has some heads and hidden features of every block, and what ranks make of them is added.

What a rank has is cut by :class:`parallel_backend.cogvideox.shards.Shard`; the forward is the one of all plans.
"""

import torch
import torch.distributed as dist

from ..cogvideox.shards import BY_COLUMNS


@torch.library.custom_op("cogvideox_xdit::sum_over_ranks", mutates_args=())
def sum_over_ranks(partial: torch.Tensor, group: str) -> torch.Tensor:
    """The sum of a tensor over a process group, by its name; one operation to a compiler, so that a block stays one graph."""
    total = partial.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=dist.distributed_c10d._resolve_process_group(group))
    return total


@sum_over_ranks.register_fake
def _(partial, group):
    return torch.empty_like(partial, memory_format=torch.contiguous_format)


def add_products(transformer, group: dist.ProcessGroup) -> None:
    """Adds what the ranks of a group make of their columns; one rank's bias comes with it, the others have zeros."""
    name = group.group_name

    def add(module, args, product):
        return sum_over_ranks(product, name)

    for block in transformer.transformer_blocks:
        for layer in BY_COLUMNS:
            block.get_submodule(layer).register_forward_hook(add)
