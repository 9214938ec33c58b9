"""Compares what ``auto`` chooses with what was measured, and predicts larger machines: ``python -m benchmarks.plans_table``
writes the tables into benchmarks/NOTES.md, between the marks.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

from parallel_backend.plan import Plan
from parallel_backend.planner.cost_model import predict
from parallel_backend.planner.gpu_table import KNOWN
from parallel_backend.planner.machine import Link, Machine
from parallel_backend.planner.planner import assumed, pick, predictions
from parallel_backend.planner.work import Work

from . import pages
from .speed_table import RESULTS, RUN

TOKENS_OF_1_5, TOKENS_OF_LONG = (frames // 2 * 48 * 85 + 226 for frames in (22, 42))
"""Of 1.5-5B at 81 and 161x768x1360: so many latent frames, two to a token, 48 x 85 tokens each, and 226 of text."""
QUANTIZE = {"lossless": "off", "fp8": "fp8", "fp8-all": "fp8", "int8": "int8", "bf16": "off", "fp16": "off"}
"""What the benchmark's words for a precision say of linear layers; the last two are of an earlier version."""
FLASH_3 = ("h100x2-flash3.json", "h100x2-before.json")
"""Of versions whose attention was FlashAttention-3, with its rates: 571 TFLOP/s on an H200, and 651 in FP8; an H100's by the rates of products."""
WAITING = "h100x2-waiting.json"
OLDER = (WAITING, *FLASH_3)
"""Of versions that waited in every step for the host (NOTES), and had cuDNN's attention in fp16."""
WAITED_FOR_FLAGS = (WAITING, FLASH_3[0])
"""Of those in which one rank's attention held up the flags that another one waited for, with Ulysses."""
ON_H100S = "h100x2-2026-11-28.json"
NEWEST = ("h200-kernels.json", ON_H100S, "h100x2-own-heads-2026-11-28.json", "h100x2-other-plans-2026-11-28.json", RUN)
"""Of versions with kernels of their own between products, and values in FP8 too (NOTES); before it they were in 16 bits."""
EIGHT_BITS = "h100x2-8bit-2026-11-27.json"
"""Of layers and attention in 8 bits, and of cuDNN's attention in every plan."""
ATTENTION = {"cudnn": 426e12, "int8": 374e12}
"""Operations a second of other functions than this pack's on an H100, of 48 x 17776 x 64 in bf16 (docs/speed.md)."""
NO_PEER_ACCESS = "h100x2-no-p2p-2026-11-27.json"
"""Of two GPUs that exchange through host memory: ``NCCL_P2P_DISABLE=1``."""
CUDNN_FP16 = {"H100": 423e12, "H200": 436e12}
"""Its operations a second."""
PAGE = Path(__file__).with_name("NOTES.md")
MODELS = {"5b, 49x480x720": assumed(48, True), "1.5-5B, 81x768x1360": replace(assumed(48, True), tokens=TOKENS_OF_1_5)}
ETHERNET = Link(10e9 / 8, 60e-6)
"""One rank's share of 10 GB/s between machines of eight."""
MACHINES = {
    "H100, NVLink; 40 GB/s a GPU between machines": replace(KNOWN["H100"], network=Link(40e9, 60e-6), knows_link=True),
    "L40, PCIe; 10 GB/s a machine between machines": replace(KNOWN["L40"], network=ETHERNET, knows_link=True),
}
"""Eight GPUs each; the links are taken for true."""
GPUS = (4, 8, 16, 64)
PUBLISHED: dict[tuple[str, str], dict[str, float]] = {
    ("2b", "L40"): {
        "single": 2.10, "ulysses2": 1.24, "ring2": 1.23, "cfg2": 1.02, "ulysses3": 0.95, "ring3": 0.89, "cfg2-ulysses2": 0.63,
        "cfg2-ring2": 0.60, "ulysses3-ring2": 0.55, "ulysses2-ring3": 0.63, "cfg2-ulysses3": 0.50, "cfg2-ring3": 0.49,
        "cfg2-ulysses3-ring2": 0.69, "cfg2-ulysses2-ring3": 0.54,
    },
    ("5b", "L40"): {
        "single": 6.28, "ulysses2": 3.63, "ring2": 3.65, "cfg2": 3.05, "ulysses3": 2.70, "ring3": 2.61, "cfg2-ulysses2": 1.80,
        "cfg2-ring2": 1.73, "ulysses3-ring2": 1.45, "ulysses2-ring3": 1.58, "cfg2-ulysses3": 1.35, "cfg2-ring3": 1.31,
        "cfg2-ulysses3-ring2": 0.82, "cfg2-ulysses2-ring3": 0.81,
    },
    ("1.5-5B, 161x768x1360", "L40"): {
        "single": 3624.1, "ulysses2": 2092.1, "ring2": 2023.1, "cfg2": 1855.8, "ulysses3": 1486.6, "ring3": 1444.9, "ulysses4": 1484.3,
        "ring4": 1162.9, "cfg2-ulysses3": 740.7, "cfg2-ring3": 737.0, "cfg2-ulysses4": 761.2, "cfg2-ring4": 593.2,
        "cfg2-ulysses2-ring2": 592.7,
    },
    ("2b", "A100"): {"single": 1.44, "ulysses2": 0.87, "ring2": 0.88, "cfg2": 0.74, "cfg2-ulysses2": 0.48, "cfg2-ring2": 0.47},
    ("5b", "A100"): {"single": 4.07, "ulysses2": 2.38, "ring2": 2.44, "cfg2": 2.12, "cfg2-ulysses2": 1.27, "cfg2-ring2": 1.27},
}  # fmt: skip
"""Seconds a step, or of a whole video, by xDiT's own pipeline, by model and GPU: xdit_assets, ``performance/cogvideo``."""
THEIR_WORK = {
    "2b": assumed(30, True),
    "5b": assumed(48, True),
    "1.5-5B, 161x768x1360": replace(assumed(48, True), tokens=TOKENS_OF_LONG),
}


@dataclass(frozen=True)
class Choice:
    """``auto``'s choice on two GPUs beside all plans that were measured there for the same work."""

    machine: str
    model: str
    plan: Plan
    seconds: float
    """Of the choice's step, as it was measured."""
    others: dict[str, float]
    """Of the other plans'."""

    @property
    def over(self) -> float:
        """How many times as long as the fastest it takes."""
        return self.seconds / min(self.seconds, *self.others.values())


def measured(file: str) -> list[dict]:
    """Our rows in a file of results that say of a plan what it takes without another video, or in FP8.

    Those that say how far it is from float32 are of one job, whose steps have compiling in them; those with offload are of another way
    than the one that is predicted.
    """
    found = json.loads((RESULTS / file).read_text())
    timed = (row for row in found if row.get("from_float32") is None and row.get("offload", "auto") == "auto")
    return [row for row in timed if row["name"] == "ours" and row["precision"] in QUANTIZE]


def as_measured(row: dict, file: str) -> tuple[Work, Machine]:
    """The work of a row, and the GPU with the rates of that run: attention's follow the products'."""
    quantize, size = QUANTIZE[row["precision"]], row["model"].removeprefix("CogVideoX-")
    work = assumed(30 if size == "2b" else 48, row["cfg"] > 1)
    work = replace(work, quantize=quantize, attention_fp8=row["precision"] == "fp8-all")
    if size == "1.5-5b":
        work = replace(work, tokens=TOKENS_OF_1_5)
    if quantize != "off":
        work = replace(work, matrices=work.matrices - 12 * work.layers * work.features**2)
    if size == "2b" and row["dtype"] == "auto":
        work = replace(work, dtype="fp16")
    if file == "h200x2.json":  # of a version that compiled nothing and had cuDNN's attention
        return replace(work, compile="off"), replace(KNOWN["H200"], attention=CUDNN_FP16["H200"])
    machine, rows = KNOWN[file[:4].upper()], json.loads((RESULTS / file).read_text())
    faster = median(each["peak_tflops"] for each in rows) * 1e12 / machine.matrix
    if file not in NEWEST:
        machine = replace(machine, attention_fp8=285 / 256)
    if file in FLASH_3:
        machine = replace(machine, attention=554e12, attention_fp8=651 / 571)
    if file in OLDER:
        machine = replace(machine, attention_fp16=CUDNN_FP16["H100"])
    if file not in NEWEST and work.dtype == "fp16" and quantize == "fp8":
        machine = replace(machine, attention=machine.attention_fp16)
    machine = replace(machine, attention=ATTENTION.get(row.get("attention"), machine.attention))
    rates = {name: getattr(machine, name) * faster for name in ("matrix", "attention", "attention_fp16")}
    return work, replace(machine, **rates)


def choices() -> list[Choice]:
    """All that two GPUs have measured, where there was something to choose."""
    found = []
    older = (
        ("h100x2.json", "H100, values in 16 bits"),
        (WAITING, "H100, waiting for the host"),
        (FLASH_3[0], "H100, FlashAttention-3"),
        ("h200x2.json", "H200, cuDNN's attention"),
    )
    for file, machine in ((RUN, "H200"), (ON_H100S, "H100"), *older):
        works: dict[tuple, list[dict]] = {}
        for row in measured(file):
            works.setdefault((row["model"].removeprefix("CogVideoX-"), row["dtype"], row["precision"]), []).append(row)
        for (model, _, precision), rows in works.items():
            took: dict[str, float] = {}
            for row in rows:  # some plans were measured with weights that wait on the CPU too
                took[row["plan"]] = min(row["seconds_per_step"], took.get(row["plan"], row["seconds_per_step"]))
            plan = pick(predictions(*as_measured(rows[0], file), 2)).plan
            if len(took) > 2 and str(plan) in took:  # a run may have been cut off before it
                found.append(Choice(machine, f"{model}, {precision}", plan, took.pop(str(plan)), took))
    return found


def rows(work: Work, machine: Machine) -> list[str]:
    """A row for each number of GPUs."""
    alone, found = predict(Plan(), work, machine), []
    for gpus in GPUS:
        every = predictions(work, machine, gpus)
        best = pick(every)
        next_best = next((each for each in every if each is not best), best)
        found.append(
            f"| {gpus} | `{best.plan}` | {best.seconds:.3f} | {alone.seconds / best.seconds:.1f} | "
            f"{best.peak / 2**30:.1f} | {best.sent / 1e9:.1f} | `{next_best.plan}` {next_best.seconds:.3f} |"
        )
    return found


def speedups(model: str, gpu: str) -> dict[str, tuple[float, float]]:
    """How many times as fast as one GPU each published plan is, and how many are predicted of it. Twelve GPUs count as two machines of
    six: how they were spread is not said."""
    work, machine = replace(THEIR_WORK[model], compile="off"), KNOWN[gpu]
    alone, seconds, found = predict(Plan(), work, machine).seconds, PUBLISHED[model, gpu], {}
    for plan in map(Plan.parse, seconds):
        if plan.world_size > 1:
            among = replace(machine, per_machine=6 if plan.world_size > 8 else 8, network=ETHERNET)
            found[str(plan)] = seconds["single"] / seconds[str(plan)], alone / predict(plan, work, among).seconds
    return found


def tables() -> str:
    """All of them, in Markdown."""
    lines = [
        "**Measured on two GPUs, 49x480x720, s a step**",
        "",
        "| GPUs | model | `auto` | took | others took | over the fastest |",
        "|---|---|---|---|---|---|",
    ]
    for each in choices():
        others = ", ".join(f"`{plan}` {seconds:.3f}" for plan, seconds in each.others.items())
        lines.append(
            f"| 2 {each.machine} | {each.model} | `{each.plan}` | {each.seconds:.3f} | {others} | {each.over - 1:.0%} |"
        )
    lines += [
        "",
        "**These are predictions.** No row below has been run. The link's speed is the weakest of the assumptions. Machines have",
        "eight GPUs. A plan of fewer GPUs than there are is one that more would not make faster.",
        "",
    ]
    for machine_name, machine in MACHINES.items():
        for model, work in MODELS.items():
            alone = predict(Plan(), work, machine).seconds
            lines += [f"**{model}, {machine_name}** (one GPU: {alone:.2f} s)", ""]
            lines += [
                "| GPUs | plan | s a step | times as fast | peak GiB | GB sent a step | next |",
                "|---|---|---|---|---|---|---|",
            ]
            lines += [*rows(work, machine), ""]
    lines += [
        "**Published by xDiT, of its own pipeline: times as fast as one GPU, and what is predicted here (uncompiled)**",
        "",
        "| model, GPU | plan: published, predicted |",
        "|---|---|",
    ]
    for model, gpu in PUBLISHED:
        curve = speedups(model, gpu)
        lines.append(
            f"| {model}, {gpu} | {', '.join(f'`{plan}` {curve[plan][0]:.2f} {curve[plan][1]:.2f}' for plan in curve)} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Writes the tables into the page."""
    PAGE.write_text(pages.written(PAGE.read_text(), "plans_table", tables()))


if __name__ == "__main__":
    main()
