"""The only module that imports xfuser; initialises it on GPUs, or on CPUs with gloo although xfuser expects a GPU.

Tested with xfuser 0.7.0. xfuser keeps its groups in module globals, which are not used outside this package.
"""

import sys
import types
from collections.abc import Callable
from importlib.util import find_spec

import torch

from ..plan import Plan

PACKAGES = ("xfuser.model_executor", "xfuser.model_executor.layers")
"""Packages of xfuser that, like ``xfuser``, import all of its pipelines and layers."""


def import_parts(device: torch.device) -> None:
    """Imports the parts of xfuser that ranks need.

    Stand-ins take the place of packages whose own imports take 11 s on a machine with an H100. Parts of xfuser ask for the
    GPU and decide which groups to build while they are imported, so without a GPU ``xfuser.envs`` comes first and is changed.
    """
    if "xfuser" in sys.modules:
        return
    stand_in("xfuser")
    import xfuser.envs  # noqa: F401 - before the others

    if device.type == "cpu":
        do_without_gpu()
    for name in PACKAGES:
        stand_in(name)
    import xfuser.core.distributed  # noqa: F401 - before USP, which imports it in a circle


def import_whole_without_gpu() -> None:
    """Imports all of xfuser on a machine without a GPU, as its own pipelines need it."""
    stand_in("xfuser")
    do_without_gpu()
    del sys.modules["xfuser"]
    usp_module()


def do_without_gpu() -> None:
    """Changes ``xfuser.envs`` so that xfuser runs on CPUs with gloo."""
    import xfuser.envs as envs

    envs.get_device_version = lambda: None
    envs._is_cuda = lambda: False
    envs.get_device = lambda local_rank: torch.device("cpu")
    envs.get_torch_distributed_backend = lambda: "gloo"
    envs.PACKAGES_CHECKER.packages_info["has_long_ctx_attn"] = True


def stand_in(name: str) -> None:
    """Puts an empty package in the place of one of xfuser's. Its modules can be imported, and its own imports are left out."""
    spec = find_spec(name)
    if spec is None:
        raise ImportError(f"xfuser has no {name}; install xfuser 0.7 again")
    package = types.ModuleType(name)
    package.__path__, package.__spec__ = list(spec.submodule_search_locations), spec
    sys.modules[name] = package


def usp(functions: dict[str, Callable]) -> Callable:
    """Returns xfuser's attention over a ring, USP. Other plans do not need the modules that it imports.

    Args:
        functions: attention functions for it to choose from, by the name of their backend.
    """
    from xfuser.core.distributed.attention_backend import ATTENTION_FUNCTION_REGISTRY

    ATTENTION_FUNCTION_REGISTRY.update(functions)
    return usp_module().USP


def usp_module() -> types.ModuleType:
    """Imports xfuser's module of USP, with the groups that it leaves out without a GPU."""
    import xfuser.model_executor.layers.usp as found
    from yunchang.globals import PROCESS_GROUP

    found.PROCESS_GROUP = PROCESS_GROUP
    return found


def initialise(plan: Plan, *, rank: int, device: torch.device) -> None:
    """Joins the default process group and creates xDiT's groups for a plan.

    Args:
        plan: its degrees multiply to the world size in the environment.
        rank: global rank.
        device: ``cpu`` or the rank's GPU.
    """
    import_parts(device)
    from xfuser.core.distributed import init_distributed_environment, initialize_model_parallel, runtime_state

    backend = "gloo" if device.type == "cpu" else "nccl"
    gpu = device.index or 0  # xfuser uses the local rank as the GPU's index
    init_distributed_environment(rank=rank, local_rank=gpu, world_size=plan.world_size, backend=backend)
    initialize_model_parallel(
        classifier_free_guidance_degree=plan.cfg,
        sequence_parallel_degree=plan.sequence,
        ulysses_degree=plan.ulysses,
        ring_degree=plan.ring,
        tensor_parallel_degree=plan.tensor,
        pipeline_parallel_degree=plan.pipefusion,
        backend=backend,
    )
    if plan.tensor > 1 and plan.sequence > 1:
        _regroup_sequences(plan, rank)
    # All that USP reads of the runtime state; the real one requires a full xDiT engine configuration.
    runtime_state._RUNTIME = types.SimpleNamespace(
        attention_backend=None,
        fp8_comms=None,
        runtime_config=types.SimpleNamespace(use_spargeattn_head_balance=False),
    )


def _regroup_sequences(plan: Plan, rank: int) -> None:
    """Recreates the Ulysses and ring groups for plans with tensor parallelism.

    xfuser's sequence ranks are then ``tensor`` apart, but yunchang's groups are of neighbouring ranks.
    """
    from xfuser.core.distributed import get_sp_group
    from yunchang.globals import PROCESS_GROUP

    for first in range(plan.world_size // plan.sequence):
        half, tensor_rank = divmod(first, plan.tensor)
        ranks = [tensor_rank + plan.tensor * (place + plan.sequence * half) for place in range(plan.sequence)]
        ulysses = [ranks[start : start + plan.ulysses] for start in range(0, plan.sequence, plan.ulysses)]
        ring = [ranks[place :: plan.ulysses] for place in range(plan.ulysses)]
        for name, members in [*(("ulysses", part) for part in ulysses), *(("ring", part) for part in ring)]:
            group = torch.distributed.new_group(members)  # every rank must create every group
            if rank in members:
                setattr(PROCESS_GROUP, f"{name.upper()}_PG", group)
                setattr(get_sp_group(), f"{name}_group", group)


def cfg_group():
    """Returns the ranks with the two guidance halves of the same tokens: an xfuser GroupCoordinator."""
    from xfuser.core.distributed import get_cfg_group

    return get_cfg_group()


def joined_group(plan: Plan, device: torch.device):
    """Creates the groups of ranks with the same part of the weights, over both guidance halves and in the order of their chunks.

    A collective of all ranks.

    Args:
        plan: without PipeFusion.
        device: ``cpu`` or the rank's GPU.
    Returns:
        This rank's, an xfuser GroupCoordinator.
    """
    from xfuser.core.distributed.group_coordinator import GroupCoordinator

    groups = [list(range(first, plan.world_size, plan.tensor)) for first in range(plan.tensor)]
    return GroupCoordinator(groups, device.index or 0, "gloo" if device.type == "cpu" else "nccl")


def sequence_group():
    """Returns the ranks that share one sequence, in the order of their chunks: an xfuser GroupCoordinator."""
    from xfuser.core.distributed import get_sp_group

    return get_sp_group()


def pipeline_group():
    """Returns the ranks with the blocks of the same tokens, in the order of the blocks: an xfuser PipelineGroupCoordinator."""
    from xfuser.core.distributed import get_pp_group

    return get_pp_group()


def tensor_group():
    """Returns the ranks that share the heads and hidden features of the same tokens: an xfuser GroupCoordinator."""
    from xfuser.core.distributed.parallel_state import get_tp_group

    return get_tp_group()
