"""Weights sharded over ranks by torch's FSDP2: a block's weights are gathered while the previous block runs.

Only the blocks are sharded, which have nearly all of the weights. Compiled blocks need no special case: hooks around the
compiled code gather them.
"""

from collections.abc import Collection

import torch
from packaging.version import Version
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from ..errors import RequestError
from ..plan import Plan

OLDEST = Version("2.7")
"""The first torch whose FSDP2 supports ``ignored_params``."""
SEVERAL_DTYPES, INTEGERS = Version("2.8"), Version("2.12")
"""The first torch whose FSDP2 shards weights of several dtypes, as in FP8, and integers (pytorch's pull requests 154103 and 178075)."""


def fsdp_mesh(plan: Plan, device: torch.device) -> DeviceMesh:
    """Creates the device mesh of the ranks that shard the same weights.

    xfuser's own group for this consists of neighbouring ranks, which with tensor parallelism have different weights.

    Raises:
        RequestError: if torch is too old.
    """
    if Version(torch.__version__) < OLDEST:
        raise RequestError(
            f"plan '{plan}': fsdp needs torch {OLDEST} or newer, this is {torch.__version__}; use tensor instead"
        )
    others = plan.world_size // (plan.fsdp * plan.tensor)
    mesh = init_device_mesh(device.type, (others, plan.fsdp, plan.tensor), mesh_dim_names=("others", "fsdp", "tensor"))
    return mesh["fsdp"]


def check_dtypes(dtypes: Collection[torch.dtype]) -> None:
    """Raises RequestError if this torch is too old to shard weights of these dtypes together."""
    whole = any(not dtype.is_floating_point for dtype in dtypes)
    needed = INTEGERS if whole else SEVERAL_DTYPES if len(dtypes) > 1 else OLDEST
    if Version(torch.__version__) < needed:
        raise RequestError(
            f"fsdp needs torch {needed} or newer for weights in {'int8' if whole else 'FP8'}, this is {torch.__version__}; "
            "use quantize off, or tensor instead of fsdp"
        )


def shard_blocks(transformer, mesh: DeviceMesh) -> None:
    """Shards the blocks' weights of a transformer, with prefetching of the next block.

    Raises:
        RequestError: if torch is too old for weights that are quantised.
    """
    from torch.distributed.fsdp import fully_shard

    check_dtypes({weight.dtype for weight in transformer.transformer_blocks.parameters()})
    whole = {*transformer.parameters()} - {*transformer.transformer_blocks.parameters()}
    for block in transformer.transformer_blocks:
        fully_shard(block, mesh=mesh, reshard_after_forward=True)
    fully_shard(transformer, mesh=mesh, ignored_params=whole)  # the root provides the streams of all blocks
    blocks = list(transformer.transformer_blocks)
    for block, following in zip(blocks, blocks[1:]):
        block.set_modules_to_forward_prefetch([following])
