"""The table of speed: ours, diffusers and xDiT's own pipeline side by side in one run on one, two, four or eight GPUs.

``python -m benchmarks.gpus OUTPUT.json --gpus 2 [--seconds 540]`` makes full-size checkpoints with random weights, measures, and
writes all rows to one file after every measurement. What the time does not suffice for is left out, and said; the next call in the
same ``--work`` folder goes on there. What needs one GPU is measured on several at a time, where there are.
``--small`` tries the script itself on the CPU.
"""

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

LEAST_SECONDS = 30
"""In less than this nothing is begun."""
OURS = "--diffusers none"
SMALL = "--width 64 --height 48 --frames 9"


@dataclass(frozen=True)
class Command:
    """One command of a phase."""

    gpu: int | None
    """Its number, or None for all."""
    name: str
    words: str
    """With places for ``{work}``, ``{whole}`` and ``{size}``."""
    environment: dict[str, str] = field(default_factory=dict)


def build(like: str, gpu: int = 0) -> Command:
    """Makes a checkpoint."""
    words = f"-m benchmarks.random_weights --like {like} --output {{work}}/{like} {{whole}}"
    return Command(gpu, f"build {like}", words)


def bench(model: str, options: str, gpu: int | None = None, **environment: str) -> Command:
    """Measures rows of a model."""
    words = f"-m parallel_backend bench --model {{work}}/{model} {options} {{size}}"
    return Command(gpu, f"{model} {options}", words, environment)


def of_5b(plan: str, gpu: int | None = None) -> list[Command]:
    """Of 5b what is asked of the plan that matters most: each precision, then fifty steps in a row."""
    return [
        bench("5b", f"--plans {plan} --precisions lossless,fp8-all --decode {OURS} {STEPS}", gpu),
        bench("5b", f"--plans {plan} --precisions lossless,fp8-all,{CACHES} --steps 50 --warmup-steps 2 --decode {OURS}", gpu),
    ]


Phase = tuple[list[Command], ...]
"""Lists of commands, each one after the other; the lists at the same time."""
STEPS = "--steps 4 --reference {work}/5b.latent"
FEW = "--steps 2 --warmup-steps 1"
CACHES = "fp8-all+cache1,fp8-all+cache1.3"
ERRORS = bench("5b", f"--plans single --precisions eager,lossless,fp8-all --float32 --steps 2 {OURS}", 0)
LOW_MEMORY = f"--plans single --decode --tiling on --offload group {FEW} {OURS}"
ONE: tuple[Phase, ...] = (
    ([build("5b"), build("2b")],),
    ([bench("5b", f"--plans single --precisions lossless,fp8,fp8-all --decode {OURS} {STEPS}", 0)],),
    ([bench("5b", "--plans none --diffusers eager,compiled --decode --steps 4", 0)],),
    ([bench("2b", "--plans single --precisions lossless,fp8-all --steps 4", 0)],),
    ([of_5b("single", 0)[1]],),
    ([ERRORS],),
    ([bench("5b", LOW_MEMORY, 0)],),
    ([build("1.5-5b"), bench("1.5-5b", f"--plans single --precisions lossless,fp8-all --diffusers eager {FEW}", 0)],),
)
TWO: tuple[Phase, ...] = (
    ([build("5b")], [build("2b", 1)]),
    (
        [
            bench("5b", f"--plans single --precisions lossless,fp8,fp8-all --decode {OURS} {STEPS}", 0),
            bench("2b", f"--plans single --precisions lossless --steps 4 {OURS}", 0),
        ],
        [
            bench("5b", "--plans none --diffusers eager,compiled --decode --steps 4", 1),
            bench("2b", "--plans none --diffusers eager --steps 4", 1),
        ],
    ),
    (of_5b("cfg2"),),
    ([bench("5b", f"--plans ulysses2 --precisions lossless,fp8-all {OURS} {STEPS}")],),
    ([bench("5b", f"--plans none --xdit cfg2,ulysses2 {OURS} --steps 4")],),
    ([bench("2b", f"--plans cfg2 --precisions lossless,fp8-all --xdit cfg2 --steps 4 {OURS}")],),
    ([ERRORS], [bench("5b", LOW_MEMORY, 1)]),
    ([bench("2b", f"--plans ulysses2,ring2,cfg2-fsdp2,ulysses2-fsdp2,ring2-fsdp2,tensor2 --steps 4 {OURS}")],),
    ([bench("2b", f"--plans pipefusion2 --pipefusion-warmup 1 --steps 6 {OURS}")],),
    ([bench("5b", f"--plans cfg2-fsdp2,tensor2,ulysses2-fsdp2,ring2,ring2-fsdp2 {OURS} {STEPS}")],),
    ([bench("5b", f"--plans pipefusion2 --pipefusion-warmup 1 --steps 6 {OURS}")],),
    ([build("1.5-5b")],),
    (
        [bench("1.5-5b", f"--plans single {FEW} {OURS}", 0)],
        [bench("1.5-5b", "--plans none --diffusers eager --steps 2 --repeat 1", 1)],
    ),
    ([bench("1.5-5b", f"--plans cfg2 --precisions lossless,fp8-all {FEW} {OURS}")],),
    ([bench("1.5-5b", f"--plans cfg2-fsdp2 {FEW} --decode --tiling on {OURS}", XDIT_MEMORY_GIB="24")],),
)


def many(best: str, of_2b: str, others: str, others_of_2b: str, xdit: str) -> tuple[Phase, ...]:
    """The phases of four GPUs or more.

    Args:
        best, of_2b: the plans to be fastest, of 48 heads and of 30.
        others, others_of_2b: what else fits them.
        xdit: plans of xDiT's own pipeline.
    """
    return (
        ([build("5b")], [build("2b", 1)], [build("1.5-5b", 2)]),
        (
            [bench("5b", f"--plans single --precisions lossless,fp8-all --decode {OURS} {STEPS}", 0)],
            [bench("5b", "--plans none --diffusers eager --decode --steps 4", 1)],
            [bench("2b", "--plans single --precisions lossless,fp8-all --steps 4", 2)],
            [bench("1.5-5b", f"--plans single --precisions lossless,fp8-all --diffusers eager {FEW}", 3)],
        ),
        (of_5b(best),),
        ([bench("2b", f"--plans {of_2b} --precisions lossless,fp8-all --steps 4 {OURS}")],),
        ([bench("1.5-5b", f"--plans {best} --precisions lossless,fp8-all --decode {FEW} {OURS}")],),
        ([bench("5b", f"--plans none --xdit {xdit} {OURS} --steps 4")],),
        ([bench("5b", f"--plans {others} {OURS} {STEPS}")],),
        ([bench("2b", f"--plans {others_of_2b} --steps 4 {OURS}")],),
        ([bench("1.5-5b", f"--plans {others} {FEW} {OURS}")],),
        ([ERRORS],),
    )


PHASES = {
    1: ONE,
    2: TWO,
    4: many(
        "cfg2-ulysses2", "cfg2-ulysses2", "ulysses4,cfg2-ring2,ring4,cfg2-ulysses2-fsdp4,cfg2-tensor2", "cfg2-ring2,ulysses2-ring2",
        "cfg2-ulysses2,ulysses4",
    ),
    8: many(
        "cfg2-ulysses4", "cfg2-ulysses2-ring2", "ulysses8,cfg2-ulysses2-ring2,cfg2-ring4,cfg2-ulysses4-fsdp8,cfg2-tensor4", "cfg2-ring4",
        "cfg2-ulysses4,ulysses8",
    ),
}  # fmt: skip
"""By the number of GPUs, one after the other; what matters most comes first."""


class Run:
    """One run of all phases.

    Args:
        output: of the rows.
        gpus: that there are.
        seconds: that it may take.
        work: folder for checkpoints.
        small: on the CPU.
    """

    def __init__(self, output: Path, gpus: int, *, seconds: float, work: Path, small: bool):
        self.output, self.gpus, self.work, self.small = output, gpus, work, small
        self.ends = time.monotonic() + seconds
        self.began = time.monotonic()
        self._lock = threading.Lock()

    def all(self, first: int, last: int) -> None:
        """Runs the phases from one to another, but for those of which every command has ended well in this folder."""
        for number in range(first, last + 1):
            ended = self.work / f"ended-{number:02}"
            if ended.exists():
                continue
            streams = PHASES[self.gpus][number]
            names = [f"{number:02}-{place}" for place in range(len(streams))]
            with ThreadPoolExecutor(len(streams)) as pool:
                if all(pool.map(self.one_by_one, streams, names)):
                    ended.touch()

    def one_by_one(self, commands: list[Command], name: str) -> bool:
        """Runs the commands of one stream, the rest too where one fails. Returns whether all ended well."""
        return all([self.run(command, self.work / f"rows-{name}-{number}.json") for number, command in enumerate(commands)])

    def run(self, command: Command, rows: Path) -> bool:
        """Runs one command, while there is time, and writes all rows so far. Returns whether it ended well."""
        left = self.ends - time.monotonic()
        if left < LEAST_SECONDS:
            self.say(f"left out, the time is up: {command.name.format(work=self.work)}")
            return False
        filled = command.words.format(
            work=self.work,
            whole="" if self.small else "--full-size --device cuda --text-layers 1",
            size=f"{SMALL} --devices cpu:{self.gpus if command.gpu is None else 1}" if self.small else "",
        ).split()
        asked = [sys.executable, *filled, *(["--output", str(rows)] if "bench" in filled else [])]
        seen = range(self.gpus) if command.gpu is None else [command.gpu]
        environment = (
            os.environ | command.environment | {"CUDA_VISIBLE_DEVICES": "" if self.small else ",".join(map(str, seen))}
        )
        before, ended_well = time.monotonic(), False
        try:
            done = subprocess.run(asked, env=environment, capture_output=True, text=True, timeout=left)
            ended_well, said = done.returncode == 0, f"exit {done.returncode}"
            if done.returncode:
                said += f": {(done.stderr.strip().splitlines() or [''])[-1][:300]}"
        except subprocess.TimeoutExpired:
            said = "cut off, the time is up"
        self.say(f"{command.name.format(work=self.work)}: {time.monotonic() - before:.0f} s, {said}")
        if rows.exists():
            found = json.loads(rows.read_text())
            for row in found:
                row |= {"memory_gib": command.environment.get("XDIT_MEMORY_GIB")}
            rows.write_text(json.dumps(found))
            with self._lock:
                every = [row for path in sorted(self.work.glob("rows-*.json")) for row in json.loads(path.read_text())]
                self.output.write_text(json.dumps(every, indent=1))
            for row in found:
                seconds, notes = row["seconds_per_step"], "; ".join(row["notes"])
                self.say(f"    {row['name']} {row['plan']} {row['precision']}: {seconds and round(seconds, 4)} {notes[:200]}")
        return ended_well

    def say(self, line: str) -> None:
        """A line with the seconds since the beginning."""
        print(f"[{time.monotonic() - self.began:5.0f}] {line}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path)
    parser.add_argument("--seconds", type=float, default=3600)
    parser.add_argument("--work", type=Path, default=Path("/dev/shm/cogvideox"))
    parser.add_argument("--gpus", type=int, choices=PHASES, default=2)
    parser.add_argument("--phases", default="0-", metavar="FIRST-LAST", help="of those of so many GPUs")
    parser.add_argument("--small", action="store_true")
    asked = parser.parse_args()
    first, _, last = asked.phases.partition("-")
    asked.work.mkdir(parents=True, exist_ok=True)
    Run(asked.output, asked.gpus, seconds=asked.seconds, work=asked.work, small=asked.small).all(
        int(first or 0), int(last or len(PHASES[asked.gpus]) - 1)
    )
