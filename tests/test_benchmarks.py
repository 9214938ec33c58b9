"""The benchmark of one to eight GPUs asks for what the command line and the planner know; that it runs is for `--small` to show.
The table of a group's life is made here on CPUs, as on GPUs."""

import json
import math

import imageio.v3 as iio
import pytest
import torch

from benchmarks import group, kernels, pages, quality, speed_table
from benchmarks.gpus import TABLES
from parallel_backend.cli.bench_options import chosen_precisions
from parallel_backend.cli.bench_pipelines import XDIT
from parallel_backend.cli.parser import build_parser
from parallel_backend.cogvideox.checkpoint.checkpoint import Checkpoint
from parallel_backend.plan import Plan

from .conftest import workers

HEADS = {"2b": 30, "5b": 48, "1.5-5b": 48}


def benches(table: str, gpus: int):
    """The ``bench`` commands of a table of so many GPUs, parsed, and how many each one sees."""
    for phase in TABLES[table][gpus]:
        for command in (command for commands in phase for command in commands):
            assert command.gpu is None or command.gpu < gpus
            module, *words = command.words.format(work="/work", whole="", size="").split()[1:]
            if module == "parallel_backend":
                yield build_parser().parse_args(words), gpus if command.gpu is None else 1


@pytest.mark.parametrize("table, gpus", [(table, gpus) for table, of in TABLES.items() for gpus in of])
def test_every_command_is_understood_and_every_plan_takes_all_gpus_it_sees(table, gpus):
    best = set()
    for asked, seen in benches(table, gpus):
        assert chosen_precisions(asked.precisions)
        best.add(asked.model)
        for word in [] if asked.plans in ("none", "auto") else asked.plans.split(","):
            plan, heads = Plan.parse(word), HEADS[asked.model.removeprefix("/work/")]
            assert plan.world_size == seen and heads % (plan.ulysses * plan.tensor) == 0, word
        for word in [] if asked.xdit == "none" else asked.xdit.split(","):
            assert word in XDIT and Plan.parse(word).world_size == seen
    assert best == {f"/work/{model}" for model in HEADS if table == "speed" or model != "2b"}


LIFE = (
    "answers, imports not done, s",
    "answers, imports done, s",
    "first step of a new group, s",
    "first step: of that, loading, s",
    "step, s",
    "rank 0 killed at step 3: longer, without the steps lost, s",
    "rank 0 killed: of that, loading, s",
    "left on a GPU after Unload models, GB",
    "cfg2 to ulysses2: first step without loading and a step's own time, s",
)
DIFFERENCES = (LIFE[5], LIFE[8])
"""May be less than zero on a machine with other work."""


def test_the_table_of_a_group_s_life_is_made_on_cpus_too(monkeypatch, capsys, caplog):
    monkeypatch.setattr("sys.argv", ["group", "--life", "--rounds", "1", "--steps", "12"])
    group.main()
    head, _, *rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()]
    assert head == ["measure", "median", "all"] and tuple(name for name, *_ in rows) == LIFE
    for name, value, only in rows:
        assert value == only and math.isfinite(float(value)) and (name in DIFFERENCES or float(value) >= 0), name
    cold, warm, first, loading, *_, left, _ = (float(value) for _, value, _ in rows)
    assert min(cold, warm, first) > 0 and loading < first and left == 0
    assert "rank 0 was killed by SIGKILL" in caplog.text and not workers()


def test_the_table_of_quality_compares_each_mode_with_lossless(checkpoints, monkeypatch, tmp_path, capsys):
    words = [
        "--model",
        checkpoints["5b"],
        "--devices",
        "cpu",
        "--count",
        1,
        "--steps",
        6,
        "--modes",
        "lossless+cache2,fp8,int8",
    ]
    words += ["--prompts", tmp_path / "prompts.txt", "--output", tmp_path / "rows.json", "--sheet", tmp_path / "sheet.webp"]
    (tmp_path / "prompts.txt").write_text("a red ball\n\na blue ball\n")
    monkeypatch.setattr("sys.argv", ["quality", *map(str, words)])
    monkeypatch.setattr(Checkpoint, "default_size", (48, 32, 5))
    quality.main()
    lossless, *others = json.loads((tmp_path / "rows.json").read_text())
    assert lossless["psnr"] is None and lossless["right"] is None
    assert [row["mode"] for row in others] == ["lossless+cache2", "fp8", "int8"]
    assert all(row["psnr"] < 99 and row["ssim"] < 0.9999 and row["least_psnr"] == row["psnr"] for row in others)
    cached, *quantized = others  # steps that are left out of random weights make another video, rounding does not
    assert all(row["psnr"] > cached["psnr"] + 5 and row["ssim"] > cached["ssim"] + 0.2 for row in quantized)
    assert iio.imread(tmp_path / "sheet.webp").shape[1] == 4 * (quality.WIDTH + quality.GAP) - quality.GAP
    assert "1 prompts, 6 steps" in capsys.readouterr().out


def test_a_clip_is_as_like_itself_as_can_be_and_less_like_a_blurred_one():
    clip = torch.rand(3, 32, 32, 3, generator=torch.Generator().manual_seed(0))
    assert quality.ssim(clip, clip) == pytest.approx(1)
    assert quality.ssim(clip, clip.roll(1, 1) / 2 + clip / 2) < 0.9


def test_a_step_s_kernels_and_gaps_are_those_between_the_first_and_the_last_step():
    """Steps of 10 ms: two attentions with a gap of 1 ms, a product, a copy beside it, and nothing for 2 ms; the first step is longer."""
    spans, begin = [kernels.Span("elementwise_kernel", 0.0, 0.5)], 0.5
    for _ in range(5):
        parts = [("optimistic_kernel", 0, 2), ("fmha_cutlass", 3, 5), ("nvjet_sm90", 5, 8), ("Memcpy PtoP", 6, 9.5)]
        spans += [kernels.Span(name, begin + start / 1e3, begin + end / 1e3) for name, start, end in parts]
        begin += 0.010
    found = kernels.figures(spans, 5)
    assert found["profiled_step"] == pytest.approx(0.010)
    assert found["kinds"] == pytest.approx({"attention": 0.004, "products": 0.003, "copies": 0.0035})
    between = {"optimistic_kernel -> fmha_cutlass": 0.001, "nvjet_sm90 -> optimistic_kernel": 0.002}
    assert found["gaps"] == pytest.approx(between) and found["gap"] == pytest.approx(sum(between.values()))
    with pytest.raises(ValueError, match="9 kernels of attention in 5 steps"):
        kernels.figures([*spans[:-4], spans[-3]], 5)


@pytest.mark.parametrize("page", speed_table.tables())
def test_the_tables_of_speed_are_those_of_one_run(page):
    """A page has the rows of the run's file, and the command that makes them is named where the table is."""
    text = (speed_table.REPO / page).read_text("utf-8")
    assert pages.written(text, "speed_table", speed_table.tables()[page]) == text
    assert f"benchmarks/results/{speed_table.RUN}" in text.partition(pages.mark_of("speed_table"))[0].rpartition("## ")[2]


def test_a_row_that_did_not_run_has_no_line_in_the_tables(tmp_path, monkeypatch):
    row = json.loads((speed_table.RESULTS / speed_table.RUN).read_text())[0]
    for name in (speed_table.RUN, speed_table.GUIDANCE):
        (tmp_path / name).write_text(json.dumps([row, {**row, "seconds_per_step": None}]))
    monkeypatch.setattr(speed_table, "RESULTS", tmp_path)
    assert [bool(row["seconds_per_step"]) for row in speed_table.rows()] == [True, True]


def test_a_cell_of_the_readme_is_the_seconds_of_the_row_that_it_names():
    rows = [
        {"model": "5b", "name": "ours", "precision": "lossless", "plan": "cfg2", "offload": "auto", "tiling": "auto", "steps": steps,
         "seconds_per_step": seconds, **changes}
        for steps, seconds, changes in (
            (50, 1.0, {}), (2, 2.0, {"from_float32": 0.1}), (2, 3.0, {"tiling": "on"}), (2, 4.0, {"offload": "group"}), (4, 0.5, {})
        )
    ]  # fmt: skip
    assert speed_table.best(rows, "5b", ("ours", "lossless", "cfg2")) == "**0.500**"
    assert speed_table.best(rows, "5b", None) == ""
    with pytest.raises(ValueError):
        speed_table.best(rows, "2b", ("ours", "lossless", "cfg2"))
