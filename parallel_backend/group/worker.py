"""One rank of a group: ``python -m parallel_backend.group.worker FOLDER PLAN KIND`` under ``torch.distributed.run``."""

import ctypes
import faulthandler
import logging
import os
import signal
import sys
import traceback
from functools import partial
from pathlib import Path

from ..config import CONFIG
from .heartbeat import Board, HeartbeatWriter
from .supervisor import HOST, SUPERVISOR

logger = logging.getLogger(__name__)


def die_with_supervisor() -> None:
    """Has the kernel kill this process when its parent ends, however that happens."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != int(os.environ[SUPERVISOR]):  # it has already ended
        os._exit(1)


def join(folder: Path, plan: str, kind: str, heart: HeartbeatWriter):
    """Joins the group and returns its loop. Imports torch and xDiT here, which takes seconds and may fail."""
    import torch

    from ..cogvideox import offload
    from ..cogvideox.kernels import probe
    from ..cogvideox.transformer import attention
    from ..devices import visible_index
    from ..parallel.group_rank import GroupRankContext
    from ..plan import Plan
    from ..planner import hardware
    from .job_loop import JobLoop
    from .registry import GroupAddress

    rank, local_rank = int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"])
    device = torch.device("cpu") if kind == "cpu" else torch.device("cuda", visible_index(local_rank))
    if device.type == "cuda" and hardware.memory_limit() is not None:
        offload.allow(device, hardware.allowed(torch.cuda.get_device_properties(device).total_memory))
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
        probe.beside(partial(attention.prepare, device, torch.bfloat16, attention.HEAD_DIM))
    return JobLoop(context, GroupAddress(folder), heart, link)


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


def main() -> None:
    """Joins the group and runs jobs until a request stops it."""
    die_with_supervisor()
    faulthandler.register(signal.SIGUSR1)
    folder, plan, kind = sys.argv[1:]
    logging.basicConfig(level=logging.INFO, format=f"%(asctime)s rank {os.environ['RANK']} %(name)s: %(message)s", force=True)
    heart = HeartbeatWriter(Board.of(os.environ), int(os.environ["LOCAL_RANK"]))
    try:
        loop = join(Path(folder), plan, kind, heart)
    except Exception as error:
        words = {"error": type(error).__name__, "message": str(error), "traceback": traceback.format_exc()}
        heart.leave({**words, "host": os.environ.get(HOST), "waited": 0.0})
        raise
    loop.run_forever()
    os._exit(0)  # skips the shutdown of process groups, whose threads may hang


if __name__ == "__main__":
    main()
