"""Where a step's time goes on every rank of a plan: kernels, gaps, clocks and power.

``python -m benchmarks.kernels CHECKPOINT [--plans cfg2,ulysses2] [--precisions lossless,fp8-all]`` runs each plan in processes of
its own, at the checkpoint's own size: once to warm up, once for the seconds of a step, its clocks and its power, and once under the
profiler. All figures but the last three columns are of the steps between the first and the last of the profiled run.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.distributed.elastic.utils.distributed import get_free_port
from torch.profiler import ProfilerActivity, profile

from parallel_backend.cli.bench_options import chosen_precisions, in_precision
from parallel_backend.cogvideox.checkpoint import bundled
from parallel_backend.cogvideox.checkpoint.checkpoint import Checkpoint
from parallel_backend.engine.engine import Engine
from parallel_backend.parallel.group_rank import GroupRankContext
from parallel_backend.parallel.rank import RankContext
from parallel_backend.plan import Plan

from .group import job_of

KINDS = {
    "attention": r"optimistic_kernel|fp8_kernel|careful_kernel|sdpa|flash|fmha|sage|attn|attention",
    "rounding in passes of its own": r"quantize",
    "values in FP8": r"survey_kernel|settle_kernel|transpose_kernel",
    "products": r"gemm|nvjet|cutlass|splitK|cublas|xmma",
    "norms": r"token_kernel",
    "heads": r"head_kernel",
    "swaps": r"swap_kernel",
    "NCCL": r"nccl",
    "flags": r"signal|barrier",
    "copies": r"^Mem(cpy|set)",
}
"""Kinds of kernels, by a pattern of their names in any case; the first that is found counts. What is left is ``rest``."""
WAITS = ("NCCL", "flags", "copies")
"""Kinds that need no processor, or wait on one."""
SAMPLED_MS = 50
GAPS = 6
"""Pairs of kernels with the longest gaps between them that are printed."""


@dataclass(frozen=True)
class Span:
    """One kernel on the device."""

    name: str
    begin: float
    """Seconds, like ``end``."""
    end: float

    @property
    def seconds(self) -> float:
        """Its duration."""
        return self.end - self.begin

    @property
    def kind(self) -> str:
        """The first of ``KINDS`` that its name has."""
        return next((kind for kind, pattern in KINDS.items() if re.search(pattern, self.name, re.IGNORECASE)), "rest")


def spans_of(profiled: profile) -> list[Span]:
    """Returns a profile's kernels in the order in which they begin."""
    found = [
        Span(event.name, event.time_range.start / 1e6, event.time_range.end / 1e6)
        for event in profiled.events()
        if event.device_type == DeviceType.CUDA
    ]
    return sorted(found, key=lambda span: span.begin)


def steady(spans: Sequence[Span], steps: int) -> tuple[list[Span], Span]:
    """Returns the kernels from the second step's first attention to the last step's, and the latter."""
    attending = [span for span in spans if span.kind == "attention"]
    each, left = divmod(len(attending), steps)
    if left or not each:
        raise ValueError(f"{len(attending)} kernels of attention in {steps} steps")
    first, last = attending[each], attending[-each]
    return [span for span in spans if first.begin <= span.begin < last.begin], last


def gaps(spans: Iterable[Span]) -> Iterator[tuple[str, str, float]]:
    """Yields the pairs of kernels between which no kernel computes, and the seconds."""
    before = None
    for span in spans:
        if before and span.begin > before.end:
            yield before.name, span.name, span.begin - before.end
        if before is None or span.end > before.end:
            before = span


def figures(spans: Sequence[Span], steps: int) -> dict[str, Any]:
    """Returns seconds a step of each kind of kernel, without any, and by the kernels around the longest gaps."""
    found, last = steady(spans, steps)
    counted = steps - 2
    kinds, names, between = Counter(), Counter(), Counter()
    for span in found:
        kinds[span.kind] += span.seconds / counted
        names[span.name] += span.seconds / counted
    computing = [span for span in found if span.kind not in WAITS]
    for before, after, seconds in gaps([*computing, last]):
        between[f"{before[:48]} -> {after[:48]}"] += seconds / counted
    return {
        "profiled_step": (last.begin - found[0].begin) / counted,
        "kinds": dict(kinds),
        "names": dict(names.most_common(16)),
        "gap": sum(between.values()),
        "gaps": dict(between.most_common(GAPS)),
    }


def run_rank(rank: int, asked: dict[str, Any]) -> None:
    """Runs all precisions on one rank and writes its figures."""
    plan = Plan.parse(asked["plan"])
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(plan.world_size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(asked["port"])}
    device = torch.device("cpu") if asked["cpu"] else torch.device("cuda", rank)
    if plan.world_size > 1:
        context = GroupRankContext(plan, device=device, rank=rank)
        context.probe()
    else:
        context = RankContext(device)
    engine, found = Engine(context), []
    base = job_of(Checkpoint.open(asked["checkpoint"]))
    for precision in asked["precisions"]:
        job = replace(base, model=in_precision(base.model, precision), steps=2)
        engine.run(job)
        job = replace(job, steps=asked["steps"])
        began = time.time()
        report = engine.run(job).report
        ended = time.time()
        with profile(activities=[ProfilerActivity.CPU if asked["cpu"] else ProfilerActivity.CUDA]) as profiled:
            engine.run(replace(job, steps=asked["profiled"]))
        row = {"plan": str(plan), "precision": precision, "rank": rank, "step": median(report.step_seconds[1:])}
        row |= {"began": began, "ended": ended, "notes": list(report.notes)}
        if not asked["cpu"]:
            row |= figures(spans_of(profiled), asked["profiled"])
        found.append(row)
    Path(asked["folder"], f"rank{rank}.json").write_text(json.dumps(found))


@contextmanager
def sampled(is_cpu: bool) -> Iterator[list[tuple[float, int, float, float]]]:
    """Samples the GPUs' clocks and power by ``nvidia-smi``: time, GPU, MHz, W."""
    samples: list[tuple[float, int, float, float]] = []
    if is_cpu:
        yield samples
        return
    query = "--query-gpu=index,clocks.sm,power.draw.instant"
    words = ["nvidia-smi", query, "--format=csv,noheader,nounits", "-lms", str(SAMPLED_MS)]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)

    def read() -> None:
        for line in process.stdout:
            gpu, clock, power = line.split(",")
            samples.append((time.time(), int(gpu), float(clock), float(power)))

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    try:
        yield samples
    finally:
        process.kill()
        process.wait()
        thread.join()


def rows_of(asked: argparse.Namespace, plan: Plan) -> list[dict[str, Any]]:
    """Runs a plan in processes of its own and returns the figures of its ranks."""
    with tempfile.TemporaryDirectory() as folder, sampled(asked.cpu) as samples:
        about = {
            "plan": str(plan), "cpu": asked.cpu, "port": get_free_port(), "checkpoint": asked.checkpoint, "folder": folder,
            "precisions": chosen_precisions(asked.precisions), "steps": asked.steps, "profiled": asked.profiled,
        }  # fmt: skip
        torch.multiprocessing.spawn(run_rank, (about,), nprocs=plan.world_size)
        rows = [row for rank in range(plan.world_size) for row in json.loads(Path(folder, f"rank{rank}.json").read_text())]
    for row in rows:
        mine = [
            (clock, power) for at, gpu, clock, power in samples if gpu == row["rank"] and row["began"] + 1 < at < row["ended"]
        ]
        row["clock"], row["power"] = ([mean(column) for column in zip(*mine)] or [None, None])[:2]
    return rows


def table(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Yields the lines of the table, in ms a step, and below it each rank's longest gaps."""
    kinds = [kind for kind in (*KINDS, "rest") if any(row.get("kinds", {}).get(kind) for row in rows)]
    head = ["plan", "precision", "rank", "profiled step", *kinds, "nothing computes", "step", "MHz", "W"]
    yield f"| {' | '.join(head)} |"
    yield "|" + "---|" * len(head)
    for row in rows:
        times = [
            row.get("profiled_step"),
            *(row.get("kinds", {}).get(kind, 0.0) for kind in kinds),
            row.get("gap"),
            row["step"],
        ]
        words = ["–" if each is None else f"{each * 1e3:.1f}" for each in times]
        words += ["–" if each is None else f"{each:.0f}" for each in (row["clock"], row["power"])]
        yield f"| `{row['plan']}` | {row['precision']} | {row['rank']} | {' | '.join(words)} |"
    for row in rows:
        yield f"{row['plan']} {row['precision']} rank {row['rank']}:"
        for between, seconds in row.get("gaps", {}).items():
            yield f"    {seconds * 1e3:7.2f} ms {between}"


def main() -> None:
    """Prints the table of each plan when it is done."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=bundled.find)
    parser.add_argument("--plans", default="cfg2,ulysses2")
    parser.add_argument("--precisions", default="lossless,fp8-all")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--profiled", type=int, default=6, help="steps under the profiler")
    parser.add_argument("--cpu", action="store_true", help="tries the command itself")
    parser.add_argument("--output", type=Path)
    asked = parser.parse_args()
    asked.checkpoint, rows = str(asked.checkpoint), []
    for plan in map(Plan.parse, asked.plans.split(",")):
        found = rows_of(asked, plan)
        rows += found
        print(*table(found), sep="\n", flush=True)
        if asked.output:
            asked.output.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    sys.exit(main())
