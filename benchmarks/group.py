"""What a group costs beside the work itself: `python -m benchmarks.group`, from the repository's root.

Seconds until it answers, and what the group adds to the work of a warm job's ten steps: sending the request and the
result, reporting each step, agreeing to go on. On CPU processes and the small model.
"""

import time
from statistics import median

from parallel_backend import models
from parallel_backend.bench.table import text_states
from parallel_backend.cogvideox.checkpoint import Checkpoint
from parallel_backend.devices import Devices
from parallel_backend.group.client import GroupExecutor
from parallel_backend.jobs import Model, SampleJob, empty_latent
from parallel_backend.plans import Plan

JOBS = 20


def main() -> None:
    """Prints the table."""
    checkpoint = Checkpoint.open(models.find(models.DEMO))
    positive, negative = text_states(checkpoint)
    latent = empty_latent(**dict(zip(("width", "height", "frames"), checkpoint.default_size)))
    print("| plan | processes | answers after, s | first job loads, s | later jobs load, s | added to the steps, ms |")
    print("|---|---|---|---|---|---|")
    for plan in map(Plan.parse, ("cfg2", "ulysses2", "ring2", "cfg2-ulysses2")):
        executor = GroupExecutor(plan, Devices("cpu", tuple(range(plan.world_size))))
        try:
            started = time.perf_counter()
            executor.start()
            executor.status()
            answers = time.perf_counter() - started
            loads, added = [], []
            for seed in range(JOBS):
                job = SampleJob(Model(str(checkpoint.path)), positive, latent, negative, seed=seed, steps=10)
                started = time.perf_counter()
                report = executor.sample(job).report
                added.append(time.perf_counter() - started - sum(report.step_seconds))
                loads.append(report.load_seconds)
        finally:
            executor.close()
        print(
            f"| {plan} | {plan.world_size} | {answers:.1f} | {loads[0]:.2f} | {median(loads[1:]):.3f} | "
            f"{median(added[1:]) * 1e3:.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
