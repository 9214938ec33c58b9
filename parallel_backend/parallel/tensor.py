"""Model parallelism: a rank has some heads and hidden features of every block, and what ranks make of them is added.

What a rank has is cut by :class:`parallel_backend.cogvideox.shards.Shard`; the forward is the one of all plans.
"""

import torch
import torch.distributed as dist

from ..cogvideox.shards import BY_COLUMNS, MODULATION


@torch.library.custom_op("cogvideox_xdit::sum_over_ranks", mutates_args=())
def sum_over_ranks(partial: torch.Tensor, group: str) -> torch.Tensor:
    """The sum of a tensor over a process group, by its name; one operation to a compiler, so that a block stays one graph."""
    total = partial.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=dist.distributed_c10d._resolve_process_group(group))
    return total


@sum_over_ranks.register_fake
def _(partial, group):
    return torch.empty_like(partial, memory_format=torch.contiguous_format)


@torch.library.custom_op("cogvideox_xdit::join_over_ranks", mutates_args=())
def join_over_ranks(part: torch.Tensor, size: int, group: str) -> torch.Tensor:
    """The features ``[batch, features / size]`` of all ranks of a group, side by side."""
    parts = [torch.empty_like(part, memory_format=torch.contiguous_format) for _ in range(size)]
    dist.all_gather(parts, part.contiguous(), group=dist.distributed_c10d._resolve_process_group(group))
    return torch.cat(parts, dim=1)


@join_over_ranks.register_fake
def _(part, size, group):
    return part.new_empty(part.shape[0], part.shape[1] * size)


def join_products(transformer, group: dist.ProcessGroup) -> None:
    """Adds what the ranks of a group make of their columns, of which one rank's has the bias; joins what they make of rows of
    the modulation. What they make of rows else, heads and hidden features, stays where it is."""
    name, size = group.group_name, group.size()

    def add(module, args, product):
        return sum_over_ranks(product, name)

    def join(module, args, product):
        return join_over_ranks(product, size, name)

    for block in transformer.transformer_blocks:
        for layer in BY_COLUMNS:
            block.get_submodule(layer).register_forward_hook(add)
        for layer in MODULATION:
            block.get_submodule(layer).register_forward_hook(join)
