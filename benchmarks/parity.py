"""Does every plan give `single`'s video? ``python -m benchmarks.parity [PLAN …]`` prints the table.

Small 5b-like and 1.5-5b-like models with random weights in float32, sizes that nothing divides, batches, guidance on, off and dynamic;
by itself all plans of eight processes that differ in kind. A decode too, in strips. Pipelines all through their warm-up.
"""

import argparse
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from parallel_backend.cli.bench_table import text_states
from parallel_backend.cogvideox.checkpoint.checkpoint import Checkpoint
from parallel_backend.devices import Devices
from parallel_backend.executor.base import Executor
from parallel_backend.executor.group import GroupExecutor
from parallel_backend.executor.local import LocalExecutor
from parallel_backend.jobs import DecodeJob, SampleJob, empty_latent
from parallel_backend.model import Model
from parallel_backend.plan import Plan

from .random_weights import build

EIGHT = (
    "ulysses4-ring2", "ring8", "cfg2-ulysses4", "cfg2-ulysses2-ring2", "tensor4-ring2", "cfg2-tensor2-ulysses2", "cfg2-ulysses4-fsdp8",
    "cfg2-pipefusion4", "cfg2-ulysses2-pipefusion2",
)  # fmt: skip
STEPS = 4
CASES = (
    ("5b", (96, 64, 17), {}),
    ("5b", (80, 48, 13), {"batch": 3, "seed": 11}),
    ("5b", (112, 80, 9), {"cfg": 1.0, "seed": 5}),
    ("5b", (96, 64, 17), {"dynamic_cfg": True, "scheduler": "ddim", "cfg": 9.5}),
    ("1.5-5b", (80, 48, 13), {"seed": 2}),
)


def jobs(folder: Path) -> Iterator[SampleJob]:
    """All cases."""
    for like, (width, height, frames), settings in CASES:
        path = folder / like
        if not path.exists():
            build(path, like=like, layers=8)
        positive, negative = text_states(Checkpoint.open(path))
        settings = dict(settings)
        latent = empty_latent(width=width, height=height, frames=frames, batch=settings.pop("batch", 1))
        yield SampleJob(
            Model(str(path), dtype="fp32"), positive, latent, negative, steps=STEPS, pipefusion_warmup=STEPS, **settings
        )


def decode_of(job: SampleJob, executor: Executor, latent: torch.Tensor) -> torch.Tensor:
    """The frames of a latent."""
    return executor.decode(DecodeJob(job.model, latent)).tensor


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("plans", nargs="*", default=EIGHT)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        local = LocalExecutor(torch.device("cpu"))
        cases = list(jobs(Path(folder)))
        expected = [local.sample(job).tensor for job in cases]
        frames = decode_of(cases[0], local, expected[0])
        print("| plan | processes | largest difference of a latent | of decoded frames | s |")
        print("|---|---|---|---|---|")
        for plan in map(Plan.parse, asked.plans):
            began = time.perf_counter()
            group = GroupExecutor(plan, Devices("cpu", tuple(range(plan.world_size))))
            try:
                worst = max(float((group.sample(job).tensor - tensor).abs().max()) for job, tensor in zip(cases, expected))
                decoded = float((decode_of(cases[0], group, expected[0]) - frames).abs().max())
            finally:
                group.close()
            seconds = time.perf_counter() - began
            print(f"| `{plan}` | {plan.world_size} | {worst:.1e} | {decoded:.1e} | {seconds:.0f} |", flush=True)


if __name__ == "__main__":
    main()
