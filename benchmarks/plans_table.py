"""The plans that ``auto`` is predicted to choose on more GPUs than there are here: ``python -m benchmarks.plans_table`` writes
them into docs/plans.md, between the marks.
"""

from dataclasses import replace
from pathlib import Path

from parallel_backend.costs import Link, Machine, Work, predict
from parallel_backend.machines import KNOWN
from parallel_backend.planner import assumed, pick, predictions
from parallel_backend.plans import Plan

PAGE = Path(__file__).parents[1] / "docs" / "plans.md"
MARKS = ("<!-- benchmarks/plans_table.py -->\n", "<!-- end -->\n")
MODELS = {"5b, 49x480x720": assumed(48, True), "1.5-5B, 81x768x1360": replace(assumed(48, True), tokens=45106)}
"""1.5-5B: 22 latent frames, two to a token, 48 x 85 tokens each, and 226 of text."""
MACHINES = {
    "H100, NVLink; 40 GB/s a GPU between machines": replace(KNOWN["H100"], network=Link(40e9, 60e-6)),
    "L40, PCIe; 10 GB/s a machine between machines": replace(KNOWN["L40"], network=Link(10e9 / 8, 60e-6)),
}
"""Eight GPUs each."""
GPUS = (4, 8, 16, 64)
PUBLISHED = (
    ("2b", 12, assumed(30, True), "4.29"),
    ("5b", 12, assumed(48, True), "7.75"),
    ("1.5-5B", 8, MODELS["1.5-5B, 81x768x1360"], "6.12"),
)


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
    lines = []
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
