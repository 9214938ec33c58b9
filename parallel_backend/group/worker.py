"""One rank of a group, in a process that the :mod:`.supervisor` has forked."""

import faulthandler
import logging
import os
import signal
from functools import partial

from ..config import CONFIG
from .heartbeat import Board, HeartbeatWriter
from .registry import GroupAddress

logger = logging.getLogger(__name__)


def join(address: GroupAddress, plan: str, kind: str, heart: HeartbeatWriter):
    """Joins the group and returns its loop. The imports have been done by the fork server; one that failed there fails here."""
    import torch

    from ..cogvideox.attention import choice
    from ..cogvideox.attention.function import Kind
    from ..cogvideox.attention.torch_attention import HEAD_DIM
    from ..cogvideox.kernels import probe
    from ..devices import visible_index
    from ..parallel.group_rank import GroupRankContext
    from ..plan import Plan
    from ..planner import hardware
    from .job_loop import JobLoop

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))  # the variable was read when torch was imported
    rank, local_rank = int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"])
    device = torch.device("cpu") if kind == "cpu" else torch.device("cuda", visible_index(local_rank))
    hardware.limit_memory(device)
    heart.beat("joining the group", CONFIG.join_seconds)
    context = GroupRankContext(Plan.parse(plan), device=device, rank=rank)
    heart.beat(
        "exchanging data for the first time (if links between GPUs are broken, NCCL_P2P_DISABLE=1 helps)",
        CONFIG.exchange_seconds,
    )
    link = context.probe()
    logger.info("the ranks exchange %.2g GB/s, and a number in %.0f us", link.bandwidth / 1e9, link.latency * 1e6)
    if rank == 0:
        remember(link, device)
    if device.type == "cuda":  # only now, as two threads must not import the same modules
        probe.in_background(partial(choice.prepare, Kind(device, torch.bfloat16, HEAD_DIM)))
    return JobLoop(context, address, heart, link)


def remember(link, device) -> None:
    """Stores the measured link between all GPUs of one machine for the planner. Links on a CPU depend on its load."""
    import torch

    from ..devices import Devices
    from ..planner import hardware, hardware_cache

    count = torch.cuda.device_count()
    if device.type == "cpu" or count < 2 or int(os.environ["WORLD_SIZE"]) != count:
        return
    kind = hardware.kind_of([torch.cuda.get_device_name(index) for index in range(count)])
    hardware_cache.keep_link(kind, Devices("cuda", tuple(range(count))).names, link)


def run(address: GroupAddress, plan: str, kind: str, board: Board) -> None:
    """Joins the group and runs jobs until a request stops it.

    Args:
        address: of the group.
        plan: of the group.
        kind: of the devices, ``cuda`` or ``cpu``.
        board: for the heartbeats of this machine's ranks.
    """
    faulthandler.register(signal.SIGUSR1)
    logging.basicConfig(level=logging.INFO, format=f"%(asctime)s rank {os.environ['RANK']} %(name)s: %(message)s", force=True)
    heart = HeartbeatWriter(board, int(os.environ["LOCAL_RANK"]))
    join(address, plan, kind, heart).run_forever()
