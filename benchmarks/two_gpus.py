"""The table of speed: ours, diffusers and xDiT's own pipeline side by side in one run on two GPUs.

``python -m benchmarks.two_gpus OUTPUT.json [--seconds 540]`` makes full-size checkpoints with random weights, measures, and writes
all rows to one file after every measurement. What the time does not suffice for is left out, and said. What needs one GPU is
measured on both at a time. ``--small`` tries the script itself on the CPU.
"""

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

OURS = "--diffusers none"
SMALL = "--width 64 --height 48 --frames 9"


def build(like: str, name: str, gpus: str = "0") -> tuple[str, str, str]:
    """Makes a checkpoint."""
    return (
        gpus,
        f"build {name}",
        f"-m parallel_backend.cogvideox.random_weights --like {like} --output {{work}}/{name} {{whole}}",
    )


def bench(model: str, options: str, gpus: str = "0,1") -> tuple[str, str, str]:
    """Measures rows of a model."""
    return gpus, f"{model} {options}", f"-m parallel_backend bench --model {{work}}/{model} {options} {{size}}"


STEPS = "--steps 4 --reference {work}/5b.latent"
PHASES = (
    ([build("5b", "5b")], [build("2b", "2b", "1")]),
    (
        [
            bench("5b", f"--plans single --precisions lossless,fp8,fp8-all --decode {OURS} {STEPS}", "0"),
            bench("2b", f"--dtype bf16 --plans single --precisions lossless --steps 4 {OURS}", "0"),
        ],
        [
            bench("2b", f"--plans single --steps 1 --decode --tiling on --offload model {OURS}", "1"),
            bench("5b", "--plans none --diffusers eager,compiled --decode --steps 4", "1"),
            bench("2b", "--dtype bf16 --plans none --diffusers eager --steps 4", "1"),
            build("1.5-5b", "1.5-5b", "1"),
        ],
    ),
    ([bench("5b", f"--plans cfg2 --precisions lossless,fp8-all --decode {OURS} {STEPS}")],),
    ([bench("5b", f"--plans ulysses2 --precisions lossless,fp8-all {OURS} {STEPS}")],),
    ([bench("5b", f"--plans none --xdit cfg2,ulysses2 {OURS} --steps 4")],),
    ([bench("5b", f"--plans cfg2 --precisions fp8-all,fp8-all+cache1 --steps 50 --warmup-steps 2 --decode {OURS}")],),
    ([bench("2b", f"--dtype bf16 --plans cfg2 --precisions lossless,fp8-all --xdit cfg2 --steps 4 {OURS}")],),
    (
        [bench("1.5-5b", f"--plans single --steps 2 --warmup-steps 1 {OURS}", "0")],
        [bench("1.5-5b", "--plans none --diffusers eager --steps 2", "1")],
    ),
    ([bench("1.5-5b", f"--plans cfg2 --precisions lossless,fp8-all --steps 2 --warmup-steps 1 {OURS}")],),
    ([bench("5b", f"--plans cfg2-fsdp2,tensor2,ulysses2-fsdp2 {OURS} {STEPS}")],),
)
"""One after the other; what stands side by side in one runs at the same time."""


class Run:
    """One run of all phases.

    Args:
        output: of the rows.
        seconds: that it may take.
        work: folder for checkpoints.
        small: on the CPU.
    """

    def __init__(self, output: Path, *, seconds: float, work: Path, small: bool):
        self.output, self.work, self.small = output, work, small
        self.ends = time.monotonic() + seconds
        self.began = time.monotonic()
        self._rows: dict[str, list] = {}
        self._lock = threading.Lock()

    def all(self) -> None:
        """Runs every phase."""
        for phase in PHASES:
            streams = [threading.Thread(target=self.one_by_one, args=(stream,)) for stream in phase]
            for stream in streams:
                stream.start()
            for stream in streams:
                stream.join()

    def one_by_one(self, commands: list[tuple[str, str, str]]) -> None:
        """Runs the commands of one stream."""
        for command in commands:
            self.run(*command)

    def run(self, gpus: str, name: str, words: str) -> None:
        """Runs one command, while there is time, and adds its rows."""
        left = self.ends - time.monotonic()
        if left < 15:
            self.say(f"left out, the time is up: {name}")
            return
        filled = words.format(
            work=self.work,
            whole="" if self.small else "--full-size --device cuda --text-layers 1",
            size=SMALL + (" --devices cpu:2" if gpus == "0,1" else " --devices cpu") if self.small else "",
        )
        number = len(self._rows)
        rows = self.work / f"{number}-{name.split()[0]}-{threading.get_ident()}.json"
        measured = "bench" in filled.split()
        command = [sys.executable, *filled.split(), *(["--output", str(rows)] if measured else [])]
        environment = os.environ | {"CUDA_VISIBLE_DEVICES": "" if self.small else gpus}
        before = time.monotonic()
        try:
            done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=left)
            said = f"exit {done.returncode}"
            if done.returncode:
                said += f": {(done.stderr.strip().splitlines() or [''])[-1][:300]}"
        except subprocess.TimeoutExpired:
            said = "cut off, the time is up"
        self.say(f"{name}: {time.monotonic() - before:.0f} s, {said}")
        if rows.exists():
            with self._lock:
                self._rows[str(rows)] = json.loads(rows.read_text())
                self.output.write_text(json.dumps([row for found in self._rows.values() for row in found], indent=1))
            for row in self._rows[str(rows)]:
                seconds, notes = row["seconds_per_step"], "; ".join(row["notes"])
                self.say(f"    {row['name']} {row['plan']} {row['precision']}: {seconds and round(seconds, 4)} {notes[:200]}")

    def say(self, line: str) -> None:
        """A line with the seconds since the beginning."""
        print(f"[{time.monotonic() - self.began:5.0f}] {line}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path)
    parser.add_argument("--seconds", type=float, default=3600)
    parser.add_argument("--work", type=Path, default=Path("/dev/shm/cogvideox"))
    parser.add_argument("--small", action="store_true")
    asked = parser.parse_args()
    asked.work.mkdir(parents=True, exist_ok=True)
    Run(asked.output, seconds=asked.seconds, work=asked.work, small=asked.small).all()
