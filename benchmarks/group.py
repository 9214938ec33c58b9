"""What a group costs beside the work itself: `python -m benchmarks.group`, from the repository's root.

Seconds until it answers, and what the group adds to the work of a warm job's steps: sending the request and the
result, reporting each step, agreeing to go on. On CPU processes and the small model, unless ``--model``, ``--devices`` and ``--plan``
say otherwise.

``--starts`` says instead how long a person waits for a group's first step, with and without compiled kernels; the second group
finds those of the first on disk.
"""

import argparse
import time
from dataclasses import replace
from statistics import median

from parallel_backend.cogvideox.checkpoint import bundled
from parallel_backend.cogvideox.checkpoint.checkpoint import Checkpoint
from parallel_backend.devices import Devices
from parallel_backend.executor.group import GroupExecutor
from parallel_backend.jobs import SampleJob
from parallel_backend.model import Model
from parallel_backend.plan import Plan

from .table import text_states

PLANS = ("cfg2", "ulysses2", "ring2", "cfg2-ulysses2")
STARTS = (("compiled", "on"), ("compiled again", "on"), ("torch's own", "off"))


def job_of(checkpoint: Checkpoint) -> SampleJob:
    """A job at the checkpoint's own size."""
    positive, negative = text_states(checkpoint)
    return SampleJob(Model(str(checkpoint.path)), positive, checkpoint.empty_latent(), negative)


def start(executor: GroupExecutor) -> float:
    """Starts a group. Returns the seconds until it answers."""
    started = time.perf_counter()
    executor.start()
    executor.status()
    return time.perf_counter() - started


def starts(job: SampleJob, plan: Plan, devices: Devices) -> None:
    """Prints the table of first steps; what a first step has more than the median of three later ones is its kernels'."""
    print("| kernels | answers after, s | then loads, s | first step, s | a later step, s | notes |")
    print("|---|---|---|---|---|---|")
    for name, compile in STARTS:
        executor = GroupExecutor(plan, devices)
        try:
            answers = start(executor)
            report = executor.sample(replace(job, steps=4, model=replace(job.model, compile=compile))).report
        finally:
            executor.close()
        first, *later = report.step_seconds
        print(
            f"| {name} | {answers:.1f} | {report.load_seconds:.1f} | {first:.2f} | {median(later):.2f} | {'; '.join(report.notes)} |",
            flush=True,
        )


def added(job: SampleJob, plans: list[Plan], devices: Devices | None, jobs: int) -> None:
    """Prints the table of what a group adds to a job, the median of so many but for the first."""
    print("| plan | processes | answers after, s | first job loads, s | later jobs load, s | added to the steps, ms |")
    print("|---|---|---|---|---|---|")
    for plan in plans:
        executor = GroupExecutor(plan, devices or Devices("cpu", tuple(range(plan.world_size))))
        try:
            answers = start(executor)
            loads, seconds = [], []
            for seed in range(jobs):
                started = time.perf_counter()
                report = executor.sample(replace(job, seed=seed)).report
                seconds.append(time.perf_counter() - started - sum(report.step_seconds))
                loads.append(report.load_seconds)
        finally:
            executor.close()
        print(
            f"| {plan} | {plan.world_size} | {answers:.1f} | {loads[0]:.2f} | {median(loads[1:]):.3f} | "
            f"{median(seconds[1:]) * 1e3:.0f} |",
            flush=True,
        )


def main() -> None:
    """Prints one of the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--starts", action="store_true")
    parser.add_argument("--model", default=bundled.DEMO)
    parser.add_argument("--plan", type=Plan.parse, help="one of all that are measured otherwise")
    parser.add_argument("--devices", type=Devices.parse)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--jobs", type=int, default=20, help="the first of which is left out")
    asked = parser.parse_args()
    plans = [asked.plan] if asked.plan else [Plan.parse(plan) for plan in PLANS]
    job = job_of(Checkpoint.open(bundled.find(asked.model)))
    if asked.starts:
        starts(job, plans[0], asked.devices or Devices.parse("cpu:2"))
    else:
        added(replace(job, steps=asked.steps), plans, asked.devices, asked.jobs)


if __name__ == "__main__":
    main()
