"""One rank of xDiT's own CogVideoX pipeline, as its example calls it: started by :func:`.bench_pipelines.xdit`."""

import json
import os
import sys
from pathlib import Path

import torch

from ..cogvideox.checkpoint.checkpoint import Checkpoint
from ..parallel import xdit
from ..plan import Plan
from .bench_pipelines import load_job, pipeline_of, timed


def main() -> None:
    """Times the job in a folder and leaves the row there."""
    folder, plan, kind, repeat = Path(sys.argv[1]), Plan.parse(sys.argv[2]), sys.argv[3], int(sys.argv[4])
    rank = int(os.environ["LOCAL_RANK"])
    job = load_job(folder)
    checkpoint = Checkpoint.of(job.model)
    if kind == "cuda":
        device = torch.device("cuda", rank)
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
        xdit.import_whole_without_gpu()
    from xfuser import xFuserArgs, xFuserCogVideoXPipeline

    arguments = xFuserArgs(
        model=str(checkpoint.path),
        use_cfg_parallel=plan.cfg == 2,
        ulysses_degree=plan.ulysses,
        ring_degree=plan.ring,
    )
    config, _ = arguments.create_config()
    pipeline = xFuserCogVideoXPipeline(pipeline_of(checkpoint, job, device), config)
    row, _ = timed(pipeline, job, checkpoint, device, repeat)
    if rank == 0:
        (folder / "row.json").write_text(json.dumps(row))
    torch.distributed.barrier()
    os._exit(0)


if __name__ == "__main__":
    main()
