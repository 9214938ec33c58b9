"""Bars of seconds per step from a benchmark's rows: ``python -m benchmarks.plot RESULTS.json PICTURE.png``. Needs matplotlib."""

import json
import sys
from pathlib import Path

LONG = 20
"""Steps from which a GPU has become warm, and slower."""
COLOURS = {"ours": "#1f77b4", "xdit": "#ff7f0e", "diffusers": "#7f7f7f"}


def title_of(row: dict) -> str:
    """What a bar is called: whose, how split, and in what precision."""
    steps = f", {row['steps']} steps in a row" if row["steps"] >= LONG else ""
    return f"{row['name']}, {row['plan']}, {row['precision']}{steps}"


def is_timing(row: dict) -> bool:
    """Whether a row is of the whole model at its best: neither without a time, nor in tiles, nor for its distance from float32.

    With a cache the median step says only which kind of step there was more of.
    """
    whole = row["tiling"] == "auto" and row["offload"] == "auto"
    return bool(row["seconds_per_step"]) and whole and row.get("from_float32") is None and "+" not in row["precision"]


def draw(rows: list[dict], picture: Path) -> None:
    """One picture with a panel for each model, fastest at the top."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [row for row in rows if is_timing(row)]
    models = list(dict.fromkeys((row["model"], row["dtype"]) for row in rows))
    panels = [[row for row in rows if (row["model"], row["dtype"]) == model] for model in models]
    heights = [len(panel) + 1 for panel in panels]
    figure, axes = pyplot.subplots(
        len(models), 1, figsize=(9, 0.3 * sum(heights) + 0.8), squeeze=False, gridspec_kw={"height_ratios": heights}
    )
    for panel, axis in zip(panels, axes[:, 0]):
        panel.sort(key=lambda row: -row["seconds_per_step"])
        seconds = [row["seconds_per_step"] for row in panel]
        bars = axis.barh(
            [f"{title_of(row)} ({row['gpus']} GPU{'s' * (row['gpus'] > 1)})" for row in panel],
            seconds,
            color=[COLOURS[row["name"]] for row in panel],
        )
        axis.bar_label(bars, labels=[f" {value:.3f}" for value in seconds], fontsize=8)
        first = panel[0]
        axis.set_title(
            f"CogVideoX-{first['model']} size, {first['frames']}x{first['height']}x{first['width']}, cfg {first['cfg']}, {first['device']}",
            fontsize=9,
        )
        axis.tick_params(labelsize=8)
        axis.margins(x=0.12)
        axis.spines[["top", "right"]].set_visible(False)
    axes[-1, 0].set_xlabel("seconds per step", fontsize=9)
    figure.tight_layout()
    figure.savefig(picture, dpi=110)


if __name__ == "__main__":
    draw(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))
