"""What Ray adds to a video: `python -m benchmarks.overhead`, from the repository's root.

Whole videos, sampled and decoded, by two replicas on this machine's own devices and by two on a Ray cluster of this machine alone, which the
command starts. Both stay warm, and take turns at going first. On two processes on the CPU and a small model, unless ``--devices`` and
``--model`` say otherwise; for a pair of GPUs::

    python -m benchmarks.random_weights --like 5b --full-size --device cuda --text-layers 1 --output FOLDER
    python -m benchmarks.overhead --model FOLDER --devices 0,1 --size 720x480x49 --steps 50
"""

import argparse
import os
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from pathlib import Path
from secrets import token_hex
from statistics import median

import torch

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_AUTH_TOKEN", token_hex(32))  # else Ray writes one into the home folder
os.environ.setdefault("RAY_worker_niceness", "0")  # Ray's default is 15, which counts where other work needs the cores too

import ray

from parallel_backend.cogvideox.checkpoint.checkpoint import Checkpoint
from parallel_backend.devices import Devices
from parallel_backend.executor.base import Executor
from parallel_backend.executor.factory import open_executor
from parallel_backend.jobs import DecodeJob, Result, SampleJob
from parallel_backend.plan import Plan

from .cluster import differs
from .random_weights import build
from .soak import job_of

LOCAL, ON_RAY = "this machine's devices", "Ray"
STORE = 4 * 2**30
"""Bytes of the object store. Frames of 49x480x720 are 203 MB."""
WARM_STEPS = 4


@contextmanager
def cluster_of_this_machine(devices: Devices) -> Iterator[Devices]:
    """A Ray cluster of one node with these devices, which this process is connected to within."""
    cpus, gpus = (devices.count, 0) if devices.kind == "cpu" else (os.cpu_count(), devices.count)
    quiet = {"include_dashboard": False, "log_to_driver": False, "logging_level": "WARNING"}
    ray.init(num_cpus=cpus, num_gpus=gpus, object_store_memory=STORE, **quiet)
    try:
        yield Devices.parse(f"ray:{devices.count}")
    finally:
        ray.shutdown()


class Timed:
    """Videos that an executor has made.

    Args:
        executor: with two replicas or more.
        jobs: the videos of a round.
    """

    def __init__(self, executor: Executor, jobs: list[SampleJob]):
        self.executor, self.jobs = executor, jobs
        self.seconds: list[float] = []
        """Of each round, divided by its videos."""
        self.sampling: list[float] = []
        self.decoding: list[float] = []
        """What the groups report of each video."""
        self.frames: dict[int, torch.Tensor] = {}
        self.notes: set[str] = set()

    def warm_up(self) -> None:
        """Makes a video on every replica, so that each has its weights and kernels."""
        self.executor.start()
        while not all(replica.is_ready() for replica in self.executor.replicas):
            time.sleep(0.1)

        def make_one(replica: Executor) -> None:
            replica.decode(self.decode(0, replica.sample(replace(self.jobs[0], steps=WARM_STEPS))))

        with ThreadPoolExecutor(len(self.executor.replicas)) as threads:
            list(threads.map(make_one, self.executor.replicas))

    def round(self) -> None:
        """Makes the videos of a round."""
        began = time.perf_counter()
        self.executor.make_all(self.jobs, self.decode, self.keep)
        self.seconds.append((time.perf_counter() - began) / len(self.jobs))

    def decode(self, number: int, sampled: Result) -> DecodeJob:
        """Returns the decoding job of a sampled video."""
        return DecodeJob(self.jobs[number].model, sampled.tensor)

    def keep(self, number: int, sampled: Result, decoded: Result) -> None:
        """Keeps the frames of a finished video."""
        self.frames[number] = decoded.tensor
        self.sampling.append(sampled.report.run_seconds)
        self.decoding.append(decoded.report.run_seconds)
        self.notes |= {*sampled.report.notes, *decoded.report.notes}


def compare(local: Timed, on_ray: Timed, *, rounds: int, seconds: float) -> None:
    """Prints the table.

    Args:
        local, on_ray: warm.
        rounds: of each, at most.
        seconds: after which no round begins.
    """
    began = time.monotonic()
    for number in range(rounds):
        if time.monotonic() - began > seconds:
            break
        for timed in (local, on_ray) if number % 2 == 0 else (on_ray, local):
            timed.round()
    print("| replicas on | seconds a video, median | all rounds | a replica samples, s | decodes, s |\n|---|---|---|---|---|")
    for name, timed in ((LOCAL, local), (ON_RAY, on_ray)):
        every = ", ".join(f"{each:.3f}" for each in timed.seconds)
        parts = f"{median(timed.sampling):.3f} | {median(timed.decoding):.3f}"
        print(f"| {name} | {median(timed.seconds):.3f} | {every} | {parts} |")
    worst = max(differs(local.frames[number], on_ray.frames[number]) for number in local.frames)
    before, after = median(local.seconds), median(on_ray.seconds)
    print(
        f"\nRay adds {after - before:+.3f} s to a video: {after / before - 1:+.2%}; largest difference of a frame: {worst:.1e}"
    )
    for note in sorted(local.notes | on_ray.notes):
        print(note)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a checkpoint's folder (default: a small one with random weights)")
    parser.add_argument("--devices", default="cpu:2")
    parser.add_argument("--plan", default="replicas2")
    parser.add_argument("--size", default="96x64x17", help="width, height and frames")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--videos", type=int, default=4, help="of a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3600, help="after which no round begins")
    args = parser.parse_args()
    plan, devices = Plan.parse(args.plan), Devices.parse(args.devices)
    size = tuple(map(int, args.size.split("x")))
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        checkpoint = Checkpoint.open(args.model or build(Path(folder) / "5b", like="5b"))
        jobs = [job_of(checkpoint, size=size, steps=args.steps, seed=seed) for seed in range(args.videos)]
        there = stack.enter_context(cluster_of_this_machine(devices))
        timed = [Timed(stack.enter_context(closing(open_executor(plan, where))), jobs) for where in (devices, there)]
        for each in timed:
            each.warm_up()
        print(f"{args.plan}, {args.size}, {args.steps} steps, {args.videos} videos a round\n", flush=True)
        compare(*timed, rounds=args.rounds, seconds=args.seconds)


if __name__ == "__main__":
    main()
