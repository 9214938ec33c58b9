"""The tables of speed in the READMEs and in docs/numbers.md, from the rows of one run: ``python -m benchmarks.speed_table`` writes them
between the marks. The run is ``python -m benchmarks.gpus benchmarks/results/h200x2-2026-11-28.json --gpus 2``.
"""

import json
from pathlib import Path

from parallel_backend.cli.bench_options import changes_of

from . import pages
from .plot import LONG, is_timing

RESULTS = Path(__file__).parent / "results"
RUN = "h200x2-2026-11-28.json"
GUIDANCE = "h200x2-guidance-2026-11-28.json"
"""Of the same version and kind of machine: ``fp8-all+guidance4`` and ``lossless+guidance4``."""
REPO = Path(__file__).parents[1]
MODELS = ("5b", "2b", "1.5-5b")
SIZES = {"1.5-5b": "1.5-5b, 81×768×1360"}
"""Names of models that were not measured at 49x480x720."""
WHAT = {
    ("diffusers", "eager"): "diffusers, eager",
    ("diffusers", "compiled"): "diffusers, blocks compiled",
    ("xdit", "eager"): "xDiT's own pipeline",
    ("ours", "eager"): "without this pack's kernels",
    ("ours", "lossless"): "lossless",
    ("ours", "fp8"): "`fp8` linears",
    ("ours", "fp8-all"): "`fp8` all",
}
CACHES = {"step_cache": "step cache", "guidance_cache": "`guidance_cache`"}
COLUMNS = (
    "model", "what", "GPUs", "plan", "steps", "s per step", "all steps, s", "peak GiB a GPU", "decode, s", "from lossless", "from float32"
)  # fmt: skip
HEADS = {
    "README.md": ("model", "what", "one H200", "two H200s"),
    "README.zh-CN.md": ("模型", "用什么", "一块 H200", "两块 H200"),
}
OURS, EAGER = ("ours", "lossless"), ("diffusers", "eager")
CHOSEN = (
    ("5b", "diffusers, eager", "diffusers，eager", (*EAGER, "single"), None),
    ("5b", "diffusers, blocks compiled", "diffusers，编译各块", ("diffusers", "compiled", "single"), None),
    ("5b", "xDiT's own pipeline, CFG", "xDiT 自己的 pipeline，CFG", None, ("xdit", "eager", "cfg2")),
    ("5b", "xDiT's own pipeline, Ulysses", "xDiT 自己的 pipeline，Ulysses", None, ("xdit", "eager", "ulysses2")),
    ("5b", "**this pack**, `single` and `cfg2`", "**本节点包**，`single` 和 `cfg2`", (*OURS, "single"), (*OURS, "cfg2")),
    ("5b", "this pack, `ulysses2`", "本节点包，`ulysses2`", None, (*OURS, "ulysses2")),
    (
        "5b",
        "**this pack**, FP8 everywhere (changes the video slightly)",
        "**本节点包**，全部使用 FP8（会略微改变视频）",
        ("ours", "fp8-all", "single"),
        ("ours", "fp8-all", "cfg2"),
    ),
    ("2b", "diffusers, eager", "diffusers，eager", (*EAGER, "single"), None),
    ("2b", "xDiT's own pipeline, CFG", "xDiT 自己的 pipeline，CFG", None, ("xdit", "eager", "cfg2")),
    ("2b", "**this pack**, `single` and `cfg2`", "**本节点包**，`single` 和 `cfg2`", (*OURS, "single"), (*OURS, "cfg2")),
    ("1.5-5b", "diffusers, eager", "diffusers，eager", (*EAGER, "single"), None),
    ("1.5-5b", "**this pack**, `single` and `cfg2`", "**本节点包**，`single` 和 `cfg2`", (*OURS, "single"), (*OURS, "cfg2")),
)
"""Rows of the READMEs: the model, the words in English and Chinese, and name, precision and plan on one GPU and on two."""


def rows() -> list[dict]:
    """Returns all rows that ran, by model and number of GPUs. Those with a guidance cache were not compared with lossless ones."""
    run, guidance = (json.loads((RESULTS / file).read_text()) for file in (RUN, GUIDANCE))
    every = [row for row in run + [row | {"from_first": None} for row in guidance] if row["seconds_per_step"]]
    return sorted(every, key=lambda row: (MODELS.index(row["model"]), row["gpus"]))


def what(row: dict) -> str:
    """Returns what a row measured, in words."""
    precision, plus, _ = row["precision"].partition("+")
    caches = changes_of(row["precision"]) if plus else {}
    words = [
        WHAT[row["name"], precision],
        *(f"{words} {caches[field]:g}" for field, words in CACHES.items() if field in caches),
    ]
    if row["offload"] != "auto":
        words.append(f"offload `{row['offload']}`")
    if row["tiling"] == "on":
        words.append("decode in tiles")
    return ", ".join(words)


def distance(row: dict, field: str) -> str:
    """Returns how far a row's latents are from others, or a dash. Those of ``pipefusion`` were compared with themselves."""
    found = row.get(field)
    is_compared = row["name"] == "ours" and found is not None and "pipefusion" not in row["plan"]
    if not is_compared:
        return "–"
    return f"{100 * found:.1f} %" if found else "0"


def in_numbers(row: dict) -> str:
    """Returns a row's line in docs/numbers.md."""
    decode = row.get("decode_whole_seconds") or row.get("decode_seconds")
    from_lossless = "–" if row.get("from_float32") is not None else distance(row, "from_first")
    cells = (
        SIZES.get(row["model"], row["model"]), what(row), row["gpus"], f"`{row['plan']}`", row["steps"], f"{row['seconds_per_step']:.3f}", f"{row['sample_seconds']:.1f}",
        f"{row['peak_gib']:.1f}", f"{decode:.2f}" if decode else "–", from_lossless, distance(row, "from_float32"),
    )  # fmt: skip
    return f"| {' | '.join(map(str, cells))} |"


def best(found: list[dict], model: str, about: tuple[str, str, str] | None) -> str:
    """Returns the seconds of the timing of few steps that a cell of a README is about."""
    if about is None:
        return ""
    name, precision, plan = about
    first, *_ = (
        row["seconds_per_step"]
        for row in found
        if (row["model"], row["name"], row["precision"], row["plan"]) == (model, name, precision, plan)
        and is_timing(row)
        and row["steps"] < LONG
    )
    return f"**{first:.3f}**" if name == "ours" and plan in ("single", "cfg2") else f"{first:.3f}"


def table(head: tuple[str, ...], lines: list[str]) -> str:
    """Returns a table in Markdown."""
    return "\n".join([f"| {' | '.join(head)} |", "|---" * len(head) + "|", *lines]) + "\n"


def tables() -> dict[str, str]:
    """Returns the table of each page."""
    found = rows()
    made = {"docs/numbers.md": table(COLUMNS, [in_numbers(row) for row in found])}
    for language, (page, head) in enumerate(HEADS.items()):
        lines = []
        for model, *words, one, two in CHOSEN:
            seconds = " | ".join(best(found, model, about) for about in (one, two))
            lines.append(f"| {SIZES.get(model, model)} | {words[language]} | {seconds} |".replace("|  |", "| |"))
        made[page] = table(head, lines)
    return made


def main() -> None:
    """Writes the tables into the pages."""
    for page, made in tables().items():
        path = REPO / page
        path.write_text(pages.written(path.read_text("utf-8"), "speed_table", made), "utf-8")


if __name__ == "__main__":
    main()
