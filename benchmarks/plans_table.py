"""What ``auto`` chooses, beside what was measured, and on more GPUs than there are here: ``python -m benchmarks.plans_table``
writes it into docs/plans.md, between the marks.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

from parallel_backend.costs import Link, Machine, Work, predict
from parallel_backend.machines import KNOWN
from parallel_backend.planner import assumed, pick, predictions
from parallel_backend.plans import Plan

TOKENS_OF_1_5 = 11 * 48 * 85 + 226
"""Of 1.5-5B at 81x768x1360: 22 latent frames, two to a token, 48 x 85 tokens each, and 226 of text."""
RESULTS = Path(__file__).parent / "results"
FP8 = {"lossless": "off", "fp8": "linears", "fp8-all": "all", "bf16": "off", "fp16": "off"}
"""What the benchmark's words for a precision say of FP8; the last two are of an earlier version."""
FLASH_3 = ("h100x2-flash3.json", "h100x2-before.json")
"""Of versions whose attention was FlashAttention-3, with its rates (FACTS; an H100's by the rates of products)."""
OLDER = ("h100x2-waiting.json", *FLASH_3)
"""Of versions that waited in every step for the host (NOTES), and had cuDNN's attention in fp16."""
WAITED_FOR_FLAGS = OLDER[:2]
"""Of those in which one rank's attention held up the flags that another one waited for, with Ulysses."""
CUDNN_FP16 = {"H100": 423e12, "H200": 436e12}
"""Its operations a second."""
PAGE = Path(__file__).parents[1] / "docs" / "plans.md"
MARKS = ("<!-- benchmarks/plans_table.py -->\n", "<!-- end -->\n")
MODELS = {"5b, 49x480x720": assumed(48, True), "1.5-5B, 81x768x1360": replace(assumed(48, True), tokens=TOKENS_OF_1_5)}
MACHINES = {
    "H100, NVLink; 40 GB/s a GPU between machines": replace(KNOWN["H100"], network=Link(40e9, 60e-6), knows_link=True),
    "L40, PCIe; 10 GB/s a machine between machines": replace(KNOWN["L40"], network=Link(10e9 / 8, 60e-6), knows_link=True),
}
"""Eight GPUs each; the links are taken for true."""
GPUS = (4, 8, 16, 64)
PUBLISHED = (
    ("2b", 12, assumed(30, True), "4.29"),
    ("5b", 12, assumed(48, True), "7.75"),
    ("1.5-5B", 8, MODELS["1.5-5B, 81x768x1360"], "6.12"),
)


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

    Those that say how far it is from float32 are of one job, whose steps have compiling in them.
    """
    found = json.loads((RESULTS / file).read_text())
    timed = (row for row in found if row.get("from_float32") is None)
    return [row for row in timed if row["name"] == "ours" and row["precision"] in FP8]


def as_measured(row: dict, file: str) -> tuple[Work, Machine]:
    """The work of a row, and the GPU with the rates of that run: attention's follow the products'."""
    fp8, size = FP8[row["precision"]], row["model"].removeprefix("CogVideoX-")
    work = replace(assumed(30 if size == "2b" else 48, row["cfg"] > 1), fp8=fp8)
    if size == "1.5-5b":
        work = replace(work, tokens=TOKENS_OF_1_5)
    if fp8 != "off":
        work = replace(work, matrices=work.matrices - 12 * work.layers * work.features**2)
    if size == "2b" and row["dtype"] == "auto":
        work = replace(work, dtype="fp16")
    if file == "h200x2.json":  # of a version that compiled nothing and had cuDNN's attention
        return replace(work, compile="off"), replace(KNOWN["H200"], attention=CUDNN_FP16["H200"])
    machine, rows = KNOWN["H100"], json.loads((RESULTS / file).read_text())
    faster = median(each["peak_tflops"] for each in rows) * 1e12 / machine.matrix
    if file in FLASH_3:
        machine = replace(machine, attention=554e12, attention_fp8=651 / 571)
    if file in OLDER:
        machine = replace(machine, attention_fp16=CUDNN_FP16["H100"])
    rates = {name: getattr(machine, name) * faster for name in ("matrix", "attention", "attention_fp16")}
    return work, replace(machine, **rates)


def choices() -> list[Choice]:
    """All that two GPUs have measured, where there was something to choose."""
    found = []
    older = (
        (OLDER[0], "H100, waiting for the host"),
        (FLASH_3[0], "H100, FlashAttention-3"),
        ("h200x2.json", "H200, cuDNN's attention"),
    )
    for file, machine in (("h100x2.json", "H100"), *older):
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
        "**Published by xDiT, on L40s with PCIe**",
        "",
        "| model | GPUs | plan here | predicted | published |",
        "|---|---|---|---|---|",
    ]
    machine = MACHINES["L40, PCIe; 10 GB/s a machine between machines"]
    for model, gpus, work, published in PUBLISHED:
        for name, each in (("one machine", replace(machine, per_machine=gpus)), ("two of 6", replace(machine, per_machine=6))):
            if gpus > 8 or name == "one machine":
                work = replace(work, compile="off")  # as xDiT's pipeline runs
                best = pick(predictions(work, each, gpus))
                faster = predict(Plan(), work, each).seconds / best.seconds
                lines.append(f"| {model} | {gpus}, {name} | `{best.plan}` | {faster:.2f} | {published} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Writes the tables into the page."""
    before, _, rest = PAGE.read_text().partition(MARKS[0])
    after = rest.partition(MARKS[1])[2]
    PAGE.write_text(before + MARKS[0] + "\n" + tables() + "\n" + MARKS[1] + after)


if __name__ == "__main__":
    main()
