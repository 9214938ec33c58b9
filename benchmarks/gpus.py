"""The table of speed: ours, diffusers and xDiT's own pipeline side by side in one run on one, two, four or eight GPUs.

``python -m benchmarks.gpus OUTPUT.json --gpus 2 [--seconds 540]`` makes full-size checkpoints with random weights, measures, and
writes all rows to one file after every measurement. What the time does not suffice for is left out, and said; the next call in the
same ``--work`` folder goes on there. What needs one GPU is measured on several at a time, where there are.
``--table cards`` measures on two GPUs what stands nearest to other cards: 8-bit modes, cuDNN's attention, no peer access, little memory.
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
CACHES = "fp8-all+cache1,fp8-all+cache1.3,fp8-all+guidance4"
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
REFERENCE = "--reference {work}/5b-{steps}.latent"
EIGHT_BITS = ("--precisions lossless,int8,fp8", "--attention int8 --precisions lossless,int8")
"""The first writes the reference of all others."""
EVERY_PLAN = "cfg2,cfg2-fsdp2,ring2,ring2-fsdp2,ulysses2,ulysses2-fsdp2,tensor2"
NO_PEER_ACCESS = {"NCCL_P2P_DISABLE": "1", "NCCL_SHM_DISABLE": "0"}


def in_eight_bits(plan: str, steps: int, modes: str, gpu: int | None = None) -> Command:
    """Measures modes of 8 bits of 5b beside lossless."""
    reference = REFERENCE.replace("{steps}", str(steps))
    return bench("5b", f"--plans {plan} {modes} --steps {steps} --warmup-steps 2 {reference} {OURS}", gpu)


def small(model: str, gib: int, gpu: int | None = None, options: str = "") -> Command:
    """Measures what ``auto`` makes of GPUs of which so many GiB may be used: a GiB less than they have, as in the table of cards."""
    return bench(model, f"--plans auto {options} --decode {FEW} {OURS}", gpu, XDIT_MEMORY_GIB=str(gib))


CARDS: tuple[Phase, ...] = (
    ([build("5b")], [build("1.5-5b", 1)]),
    ([in_eight_bits("cfg2", 4, modes) for modes in EIGHT_BITS],),
    ([in_eight_bits("single", 4, EIGHT_BITS[0], 0)], [in_eight_bits("single", 4, EIGHT_BITS[1], 1)]),
    ([in_eight_bits("cfg2", 50, modes) for modes in EIGHT_BITS],),
    ([bench("5b", f"--plans {EVERY_PLAN} --attention cudnn --steps 3 {OURS}")],),
    ([bench("5b", f"--plans {EVERY_PLAN} --steps 3 {OURS}", **NO_PEER_ACCESS)],),
    (
        [small("5b", 7, 0), small("5b", 15, 0), small("5b", 23, 0), small("5b", 7, 0, "--precisions int8")],
        [small("5b", 11, 1, "--precisions int8"), small("1.5-5b", 11, 1), small("1.5-5b", 23, 1)],
    ),
    ([small("5b", 7), small("5b", 11), small("1.5-5b", 15)],),
)
TABLES = {"speed": PHASES, "cards": {2: CARDS}}


class Run:
    """One run of a table's phases.

    Args:
        output: of the rows.
        table: of :data:`TABLES`.
        gpus: that there are.
        seconds: that it may take.
        work: folder for checkpoints.
        small: on the CPU.
    """

    def __init__(self, output: Path, table: str, gpus: int, *, seconds: float, work: Path, small: bool):
        self.output, self.table, self.gpus, self.work, self.small = output, table, gpus, work, small
        self.ends = time.monotonic() + seconds
        self.began = time.monotonic()
        self._lock = threading.Lock()

    def all(self, first: int, last: int) -> None:
        """Runs the phases from one to another, but for those of which every command has ended well in this folder."""
        for number in range(first, last + 1):
            ended = self.work / f"ended-{self.table}-{number:02}"
            if ended.exists():
                continue
            streams = TABLES[self.table][self.gpus][number]
            names = [f"{self.table}-{number:02}-{place}" for place in range(len(streams))]
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
                row |= {"memory_gib": command.environment.get("XDIT_MEMORY_GIB"), "environment": command.environment}
            rows.write_text(json.dumps(found))
            with self._lock:
                every = [
                    row for path in sorted(self.work.glob(f"rows-{self.table}-*.json")) for row in json.loads(path.read_text())
                ]
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
    parser.add_argument("--table", choices=TABLES, default="speed")
    parser.add_argument("--gpus", type=int, choices=PHASES, default=2)
    parser.add_argument("--phases", default="0-", metavar="FIRST-LAST", help="of those of so many GPUs")
    parser.add_argument("--small", action="store_true")
    asked = parser.parse_args()
    if asked.gpus not in TABLES[asked.table]:
        parser.error(f"the table '{asked.table}' is of {', '.join(map(str, TABLES[asked.table]))} GPUs")
    first, _, last = asked.phases.partition("-")
    asked.work.mkdir(parents=True, exist_ok=True)
    Run(asked.output, asked.table, asked.gpus, seconds=asked.seconds, work=asked.work, small=asked.small).all(
        int(first or 0), int(last or len(TABLES[asked.table][asked.gpus]) - 1)
    )
