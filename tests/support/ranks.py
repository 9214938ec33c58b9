"""A rank that runs the same jobs under several plans of one world size, because starting a group takes longer than its jobs.

``python -m torch.distributed.run --standalone --nproc-per-node=N tests/support/ranks.py FOLDER PLAN …`` reads
``FOLDER/*.job`` and writes ``FOLDER/PLAN.pt``: the result of each job on rank 0, and the bytes of weights that each rank held
after it.
"""

import os
import sys
from pathlib import Path

import torch

from parallel_backend.engine.engine import Engine
from parallel_backend.group.codec import decode
from parallel_backend.group.job_fields import join_fields
from parallel_backend.parallel.group_rank import GroupRankContext
from parallel_backend.plan import Plan
from tests.support import rounded_attention


def main() -> None:
    """Runs the command of the module's docstring."""
    rounded_attention.register()
    folder, plans = Path(sys.argv[1]), sys.argv[2:]
    rank = int(os.environ["RANK"])
    messages = [decode(path.read_bytes()) for path in sorted(folder.glob("*.job"))]
    jobs = [join_fields(message.kind, message.plain, message.tensors) for message in messages]
    for plan in plans:
        engine = Engine(GroupRankContext(Plan.parse(plan), device=torch.device("cpu"), rank=rank))
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
    os._exit(0)


if __name__ == "__main__":
    main()
