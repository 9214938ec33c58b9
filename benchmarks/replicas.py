"""How evenly unequal replicas are kept busy: `python -m benchmarks.replicas`, from the repository's root.

Twelve prompts over two replicas in processes of their own. A video of few steps is made, and then slept until a fast or a slow
GPU's time is over, the slow one's three times the fast one's: so that the figure is of how videos are dealt out, and not of what
else this machine does. The best possible split is of whole videos: the smallest time, over all ways to deal them out, in which
both replicas are done, with the mean seconds that each took in truth.

With `--kill` the slow replica's process gets SIGKILL half-way, and no group can start again: the fast one makes the rest. With `--ray` each
replica is on a node of its own of a Ray cluster.
"""

import argparse
import time
from contextlib import closing, nullcontext
from dataclasses import replace
from statistics import mean

import psutil

from parallel_backend.cli.bench_table import text_states
from parallel_backend.cogvideox.checkpoint import bundled
from parallel_backend.cogvideox.checkpoint.checkpoint import Checkpoint
from parallel_backend.devices import Devices
from parallel_backend.executor.factory import open_executor
from parallel_backend.group import preflight
from parallel_backend.jobs import SampleJob
from parallel_backend.model import Model
from parallel_backend.plan import Plan

TIMES = 3
"""As long as the other replica takes."""


def timed(replica, *, at_least: float) -> list[float]:
    """Makes a replica take at least so long for a video. Notes the seconds of each."""
    run, seconds = replica.run, []

    def slowed(job, *others):
        started = time.perf_counter()
        result = run(job, *others)
        time.sleep(max(0.0, started + at_least - time.perf_counter()))
        seconds.append(time.perf_counter() - started)
        return result

    replica.run = slowed
    return seconds


def best_split(videos: int, first: float, second: float) -> float:
    """Seconds of the best way to deal out so many videos to two replicas that take so long for one."""
    return min(max(mine * first, (videos - mine) * second) for mine in range(videos + 1))


def lose(replica) -> None:
    """Kills a replica's process for good."""
    preflight.CONFIG = replace(preflight.CONFIG, python="/bin/false")
    for process in map(psutil.Process, replica.address.describe()["ranks"]):
        process.kill()


def cluster_of_two():
    """A Ray cluster of two nodes; Ray is optional, and imported here."""
    from .cluster import cluster_of

    return cluster_of(1, 1)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--videos", type=int, default=12)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=4.0, help="that a video takes on the fast replica")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--kill", action="store_true", help="lose the slow replica half-way")
    how.add_argument("--ray", action="store_true", help="on a Ray cluster of two nodes")
    args = parser.parse_args()
    checkpoint = Checkpoint.open(bundled.find(bundled.DEMO))
    positive, negative = text_states(checkpoint)
    latent = checkpoint.empty_latent()
    job = SampleJob(Model(str(checkpoint.path)), positive, latent, negative, steps=args.steps)
    jobs = [replace(job, positive=positive * (1 + place / 100), seed=place) for place in range(args.videos)]
    cluster = cluster_of_two() if args.ray else nullcontext()
    with cluster, closing(open_executor(Plan(replicas=2), Devices("cpu", (0, 1), on_ray=args.ray))) as executor:
        executor.start()
        while not all(replica.is_ready() for replica in executor.replicas):
            time.sleep(0.1)
        for replica in executor.replicas:
            replica.sample(job)  # both are warm
        fast, slow = (timed(replica, at_least=args.seconds * times) for replica, times in zip(executor.replicas, (1, TIMES)))
        hurt = []

        def kill_once(step: int, steps: int) -> None:
            if args.kill and step >= steps / 2 and not hurt:
                hurt.append(step)
                lose(executor.replicas[1])

        started = time.perf_counter()
        results = executor.sample_all(jobs, on_step=kill_once)
        total = time.perf_counter() - started
        assert len(results) == args.videos and all(result.tensor.isfinite().all() for result in results)
    each = mean(fast), mean(slow)
    best = best_split(args.videos, *each)
    for note in dict.fromkeys(note for result in results for note in result.report.notes):
        print(note)
    print("| videos | fast replica: videos, s each | slow replica: videos, s each | total, s | best split, s | over it |")
    print("|---|---|---|---|---|---|")
    print(
        f"| {args.videos} | {len(fast)}, {each[0]:.2f} | {len(slow)}, {each[1]:.2f} | {total:.1f} | {best:.1f} | "
        f"{total / best - 1:+.0%} |"
    )


if __name__ == "__main__":
    main()
