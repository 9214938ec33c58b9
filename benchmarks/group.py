"""What a group costs besides the work itself: `python -m benchmarks.group`, from the repository's root.

Seconds until it answers, and what the group adds to the work of a warm job's steps: sending the request and the
result, reporting each step, agreeing to go on. On CPU processes and the small model, unless ``--model``, ``--devices`` and ``--plan``
say otherwise.

``--starts`` times the first step of a group, with and without compiled kernels; the second group finds those of the first on disk.

``--life`` times the life of a group of two: its start before and after the imports, a job that loses rank 0, a change of plan, and what
it leaves on the GPUs while it is idle.
"""

import argparse
import os
import signal
import time
from dataclasses import replace
from statistics import median

import torch

from parallel_backend.cli.bench_table import text_states
from parallel_backend.cogvideox.checkpoint import bundled
from parallel_backend.cogvideox.checkpoint.checkpoint import Checkpoint
from parallel_backend.devices import Devices
from parallel_backend.executor.group import GroupExecutor
from parallel_backend.jobs import SampleJob
from parallel_backend.model import Model
from parallel_backend.plan import Plan
from parallel_backend.system.nvml import free_bytes

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


class Timed:
    """A sampling job as its caller sees it.

    Args:
        executor: runs the job.
        job: the job.
        kill_at: kills rank 0 once this many steps are done; None kills nothing.
    """

    def __init__(self, executor: GroupExecutor, job: SampleJob, kill_at: int | None = None):
        began, self.calls, self.first = time.perf_counter(), 0, 0.0
        is_killed = False

        def on_step(step: int, steps: int) -> None:
            nonlocal is_killed
            self.calls += 1
            self.first = self.first or time.perf_counter() - began
            if step == kill_at and not is_killed:
                is_killed = True
                os.kill(executor.address.describe()["ranks"][0], signal.SIGKILL)

        self.report = executor.sample(job, on_step=on_step).report
        self.seconds = time.perf_counter() - began
        self.step_seconds = median(self.report.step_seconds)


def life(job: SampleJob, plans: tuple[Plan, Plan], devices: Devices, times: int) -> None:
    """Prints the table of a group's life, medians of ``times`` rounds; only the first start of all has the imports in it.

    Args:
        job: of each round.
        plans: the group's, and the one that it changes to.
        devices: two.
        times: rounds.
    """
    before = used_bytes(devices)
    found: dict[str, list[float]] = {}

    def note(name: str, value: float) -> None:
        found.setdefault(name, []).append(value)

    executor = GroupExecutor(plans[0], devices)
    try:
        note("answers, imports not done, s", start(executor))
        executor.close()
        for _ in range(times):
            executor = GroupExecutor(plans[0], devices)
            note("answers, imports done, s", start(executor))
            first = Timed(executor, job)
            note("first step of a new group, s", first.first)
            note("first step: of that, loading, s", first.report.load_seconds)
            note("step, s", first.step_seconds)
            calm, hurt = Timed(executor, job), Timed(executor, job, kill_at=3)
            lost = hurt.calls - calm.calls
            note(
                "rank 0 killed at step 3: longer, without the steps lost, s",
                hurt.seconds - calm.seconds - lost * calm.step_seconds,
            )
            note("rank 0 killed: of that, loading, s", hurt.report.load_seconds)
            executor.free()
            note("left on a GPU after Unload models, GB", (used_bytes(devices) - before) / 1e9)
            executor.sample(replace(job, steps=1))
            executor.close()
            executor = GroupExecutor(plans[1], devices)
            other = Timed(executor, job)
            beyond = other.first - other.report.load_seconds - other.step_seconds
            note(f"{plans[0]} to {plans[1]}: first step without loading and a step's own time, s", beyond)
            executor.close()
    finally:
        executor.close()
    print("| measure | median | all |\n|---|---|---|")
    for name, values in found.items():
        print(f"| {name} | {median(values):.2f} | {', '.join(f'{value:.2f}' for value in values)} |", flush=True)


def used_bytes(devices: Devices) -> float:
    """Returns the bytes in use on the fullest of the GPUs, by any process; 0 on the CPU."""
    if devices.kind == "cpu":
        return 0.0
    time.sleep(1.0)  # the driver frees a dead process's memory a moment later
    return max(torch.cuda.get_device_properties(device).total_memory - free_bytes(device) for device in devices.torch_devices)


def added(job: SampleJob, plans: list[Plan], devices: Devices | None, jobs: int) -> None:
    """Prints the table of what a group adds to a job, the median of all ``jobs`` but the first."""
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
    parser.add_argument("--life", action="store_true")
    parser.add_argument("--model", default=bundled.DEMO)
    parser.add_argument("--plan", type=Plan.parse, help="one of all that are measured otherwise")
    parser.add_argument("--devices", type=Devices.parse)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--jobs", type=int, default=20, help="the first of which is left out")
    parser.add_argument("--rounds", type=int, default=3, help="of --life")
    asked = parser.parse_args()
    plans = [asked.plan] if asked.plan else [Plan.parse(plan) for plan in PLANS]
    job = job_of(Checkpoint.open(bundled.find(asked.model)))
    if asked.life:
        life(
            replace(job, steps=asked.steps),
            (plans[0], Plan.parse("ulysses2")),
            asked.devices or Devices.parse("cpu:2"),
            asked.rounds,
        )
    elif asked.starts:
        starts(job, plans[0], asked.devices or Devices.parse("cpu:2"))
    else:
        added(replace(job, steps=asked.steps), plans, asked.devices, asked.jobs)


if __name__ == "__main__":
    main()
