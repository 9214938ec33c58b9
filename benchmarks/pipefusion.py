"""How far a pipeline's videos are from ``single``'s, and whether they still do what they are told: ``python -m
benchmarks.pipefusion``, from the repository's root, writes ``benchmarks/results/pipefusion.md``.

The demo model on CPU processes, held-out captions, one job of a batch for all of them, so that plans have the same noise. With
``--keep`` the file's rows of other plans and schedulers stay.
"""

import argparse
import time
from dataclasses import replace
from pathlib import Path
from statistics import mean, median

import torch

from parallel_backend.cli.bench_table import distance
from parallel_backend.cogvideox.checkpoint import bundled
from parallel_backend.cogvideox.checkpoint.checkpoint import Checkpoint
from parallel_backend.cogvideox.pipeline.text import TextEncoder
from parallel_backend.devices import Devices
from parallel_backend.executor.base import Executor
from parallel_backend.executor.factory import open_executor
from parallel_backend.executor.local import LocalExecutor
from parallel_backend.jobs import DecodeJob, SampleJob, empty_latent
from parallel_backend.model import Model
from parallel_backend.plan import Plan
from parallel_backend.planner.work import patches
from tests.support.measures import Verdict, judge
from training.scenes import Scene

from .obedience import cases

RESULTS = Path(__file__).parent / "results" / "pipefusion.md"
HEAD = (
    "| scheduler | plan | patches | warm-up | latents, mean | median | most | right answers | points |\n" + "|---" * 9 + "|\n"
)


def points(executor: Executor, model: Model, latent: torch.Tensor, scenes: list[Scene]) -> tuple[float, int]:
    """Share in percent of what is right in a batch's videos: colours, shapes, motion and background; and how many that are."""
    verdicts: list[Verdict] = []
    for number, scene in enumerate(scenes):
        verdicts.append(judge(executor.decode(DecodeJob(model, latent[number : number + 1])).tensor[0], scene))
    right = [getattr(verdict, name) for verdict in verdicts for name in ("colour", "shape", "motion", "background")]
    return 100 * sum(right) / len(right), sum(right)


def rows(args: argparse.Namespace, scheduler: str):
    """The rows of one scheduler, as they are found."""
    checkpoint = Checkpoint.open(bundled.find(bundled.DEMO))
    encoder = TextEncoder(checkpoint, device=torch.device("cpu"), dtype=torch.float32)
    scenes, captions = zip(*cases(args.count))
    positive = torch.cat([encoder.encode([encoder.tokenize(caption)]) for caption in captions])
    negative = encoder.encode([encoder.tokenize("")])
    width, height, frames = checkpoint.default_size
    latent = empty_latent(width=width, height=height, frames=frames, batch=args.count)
    job = SampleJob(
        Model(str(checkpoint.path)), positive, latent, negative, seed=args.seed, steps=args.steps, scheduler=scheduler
    )
    tokens = checkpoint.tokens(*latent.shape[2:]) + checkpoint.text_tokens
    local = LocalExecutor(torch.device("cpu"))
    expected = local.sample(job).tensor
    best, right = points(local, job.model, expected, scenes)
    of = 4 * args.count
    yield f"| {scheduler} | `single` | – | – | 0 | 0 | 0 | {right} of {of} | |"
    for text in args.plans.split(","):
        plan = Plan.parse(text)
        executor = open_executor(plan, Devices("cpu", tuple(range(plan.world_size))))
        try:
            for warmup in map(int, args.warm_ups.split(",")):
                found = executor.sample(replace(job, pipefusion_warmup=warmup)).tensor
                far = [distance(one, other) for one, other in zip(found, expected)]
                share, right = points(local, job.model, found, scenes)
                count = patches(tokens, plan.pipefusion, plan.ulysses)
                yield (
                    f"| {scheduler} | `{plan}` | {count} | {warmup} | {mean(far):.3f} | {median(far):.3f} | {max(far):.3f} | "
                    f"{right} of {of} | {share - best:+.1f} |"
                )
        finally:
            executor.close()


def name_of(row: str) -> tuple[str, ...]:
    """What a row is of: scheduler, plan, patches, warm-up."""
    return tuple(row.split(" | ")[:4])


def order(name: tuple[str, ...]) -> tuple:
    """Schedulers apart, ``single`` first."""
    return name[0], "single" not in name[1], name[1:]


def page(args: argparse.Namespace, found: dict[tuple[str, ...], str]) -> str:
    """The whole file."""
    return (
        "# A pipeline's videos beside `single`'s\n\n"
        f"`python -m benchmarks.pipefusion`: the demo model in float32, {args.count} captions it never saw, {args.steps} steps, "
        f"cfg {SampleJob.cfg:g}. Latents: the relative difference to `single`'s, over the captions. Right answers: colours, shapes, "
        "motion and background of every video, as `benchmarks/obedience.py` measures them; points: of their share in percent, "
        f"one answer being {25 / args.count:.1f}.\n\n"
        + HEAD
        + "\n".join(found[name] for name in sorted(found, key=order))
        + "\n"
    )


def main() -> None:
    """The command of the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=60, help="of captions, from the first")
    parser.add_argument("--plans", default="pipefusion2,pipefusion4")
    parser.add_argument("--warm-ups", default="1,2,4")
    parser.add_argument("--schedulers", default="dpm,ddim")
    parser.add_argument("--steps", type=int, default=SampleJob.steps)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--keep", action="store_true", help="rows that are not measured now, of a run with the same other options"
    )
    args = parser.parse_args()
    started = time.perf_counter()
    kept = RESULTS.read_text().partition(HEAD)[2].splitlines() if args.keep else []
    found = {name_of(row): row for row in kept}
    for scheduler in args.schedulers.split(","):
        for row in rows(args, scheduler):
            found[name_of(row)] = row
            print(row, flush=True)
            RESULTS.write_text(page(args, found))  # after every row: a run that is cut off has what it has
    print(f"{time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
