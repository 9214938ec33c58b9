"""Weights sharded over ranks that other degrees use, by torch's FSDP2: a block is gathered while the one before it runs.

Only the blocks are sharded, which are nearly all of the weights. Compiled blocks are no special case: they are gathered by hooks
around what is compiled.
"""

import torch
from packaging.version import Version
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from ..errors import RequestError
from ..plan import Plan

OLDEST = Version("2.7")
"""The first torch whose FSDP2 leaves weights whole that it is told to."""


def fsdp_mesh(plan: Plan, device: torch.device) -> DeviceMesh:
    """The ranks that have the same weights and share them with this one.

    xfuser's own group for this is of neighbours, which with ``tensor`` have different weights.

    Raises:
        RequestError: where torch is too old.
    """
    if Version(torch.__version__) < OLDEST:
        raise RequestError(
            f"plan '{plan}': fsdp needs torch {OLDEST} or newer, this is {torch.__version__}; use tensor instead"
        )
    others = plan.world_size // (plan.fsdp * plan.tensor)
    mesh = init_device_mesh(device.type, (others, plan.fsdp, plan.tensor), mesh_dim_names=("others", "fsdp", "tensor"))
    return mesh["fsdp"]


def spread(transformer, mesh: DeviceMesh) -> None:
    """Has a transformer keep this rank's rows of its blocks' weights and gather the others when a block is about to run."""
    from torch.distributed.fsdp import fully_shard

    whole = {*transformer.parameters()} - {*transformer.transformer_blocks.parameters()}
    for block in transformer.transformer_blocks:
        fully_shard(block, mesh=mesh, reshard_after_forward=True)
    fully_shard(transformer, mesh=mesh, ignored_params=whole)  # the root, whose streams all blocks use
    blocks = list(transformer.transformer_blocks)
    for block, following in zip(blocks, blocks[1:]):
        block.set_modules_to_forward_prefetch([following])
