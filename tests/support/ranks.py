"""Ranks that run the same jobs under several plans, because starting a group for each takes longer than its jobs.

``python -m tests.support.ranks FOLDER PLAN …``, from the repository's root, reads ``FOLDER/*.job`` and writes ``FOLDER/PLAN.pt``: the
result of each job on rank 0, and the bytes of weights that each rank held after it. One process imports, and the ranks are forked from it.
"""

import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterable
from itertools import groupby
from pathlib import Path

import torch
from torch.distributed import TCPStore

from parallel_backend.engine.engine import Engine
from parallel_backend.group.codec import Message, decode, encode
from parallel_backend.group.fork_server import preload
from parallel_backend.group.job_fields import join_fields, split_fields
from parallel_backend.jobs import Job
from parallel_backend.parallel.group_rank import GroupRankContext
from parallel_backend.plan import Plan
from parallel_backend.system.processes import end_with
from tests.support import rounded_attention

REPO = Path(__file__).resolve().parents[2]


def fork_ranks(count: int, run: Callable[[int], None]) -> None:
    """Imports what ranks need, and runs something on so many, each in its own process. Call it before torch computes anything here.

    Args:
        count: the world size.
        run: called with the rank.
    Raises:
        SystemExit: when a rank failed. The others end with this process.
    """
    preload()
    parent = os.getpid()
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    ranks = set()
    for rank in range(count):
        pid = os.fork()
        if pid == 0:
            os.environ.update(RANK=str(rank), WORLD_SIZE=str(count), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(count))
            os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(store.port), TORCHELASTIC_USE_AGENT_STORE="True")
            status = 1
            try:
                end_with(parent)
                run(rank)
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(status)
        ranks.add(pid)
    while ranks:
        pid, status = os.wait()
        ranks.remove(pid)
        if status:
            sys.exit(f"a rank of {count} ended with status {os.waitstatus_to_exitcode(status)}")


def run_plans(folder: Path, plans: Iterable[Plan], rank: int) -> None:
    """Runs the jobs of a folder under plans of one world size, on one rank."""
    messages = [decode(path.read_bytes()) for path in sorted(folder.glob("*.job"))]
    jobs = [join_fields(message.kind, message.plain, message.tensors) for message in messages]
    for plan in plans:
        engine = Engine(GroupRankContext(plan, device=torch.device("cpu"), rank=rank))
        engine.context.probe()
        made, held = [], []
        for job in jobs:
            made.append(engine.run(job).tensor)
            held.append(engine.context.collect(engine.status()["weights"]["transformer"]))
        if rank == 0:
            torch.save((made, held), folder / f"{plan}.pt")
        engine.free()
        from xfuser.core.distributed.parallel_state import destroy_model_parallel

        destroy_model_parallel()


def results_of(
    folder: Path, jobs: Iterable[Job], plans: Iterable[str]
) -> dict[str, tuple[list[torch.Tensor], list[list[int]]]]:
    """Runs jobs under plans in processes of their own.

    Args:
        folder: an empty one.
        jobs: to run.
        plans: of any world sizes; those of one size follow each other.
    Returns:
        By plan, the result of each job, and the bytes of weights that each rank held then.
    """
    plans = list(plans)
    for number, job in enumerate(jobs):
        (folder / f"{number:02}.job").write_bytes(encode(Message(job.kind, *split_fields(job))))
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.support.ranks", str(folder), *plans]
    done = subprocess.run(command, cwd=REPO, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return {plan: torch.load(folder / f"{plan}.pt") for plan in plans}


def main() -> None:
    """Runs the command of the module's docstring."""
    rounded_attention.register()
    folder, plans = Path(sys.argv[1]), map(Plan.parse, sys.argv[2:])
    for size, alike in groupby(plans, key=lambda plan: plan.world_size):
        alike = list(alike)
        fork_ranks(size, lambda rank: run_plans(folder, alike, rank))  # noqa: B023 - it has ended before the next


if __name__ == "__main__":
    main()
