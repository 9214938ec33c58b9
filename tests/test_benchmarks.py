"""The benchmark of one to eight GPUs asks for what the command line and the planner know; that it runs is for `--small` to show.
The table of a group's life is made here on CPUs, as on GPUs."""

import math

import pytest

from benchmarks import group
from benchmarks.gpus import PHASES
from parallel_backend.cli.bench_pipelines import XDIT
from parallel_backend.cli.bench_table import chosen_precisions
from parallel_backend.cli.parser import build_parser
from parallel_backend.plan import Plan

from .conftest import workers

HEADS = {"2b": 30, "5b": 48, "1.5-5b": 48}


def benches(gpus: int):
    """The ``bench`` commands of so many GPUs, parsed, and how many each one sees."""
    for phase in PHASES[gpus]:
        for command in (command for commands in phase for command in commands):
            assert command.gpu is None or command.gpu < gpus
            module, *words = command.words.format(work="/work", whole="", size="").split()[1:]
            if module == "parallel_backend":
                yield build_parser().parse_args(words), gpus if command.gpu is None else 1


@pytest.mark.parametrize("gpus", PHASES)
def test_every_command_is_understood_and_every_plan_takes_all_gpus_it_sees(gpus):
    best = set()
    for asked, seen in benches(gpus):
        assert chosen_precisions(asked.precisions)
        for word in [] if asked.plans == "none" else asked.plans.split(","):
            plan, heads = Plan.parse(word), HEADS[asked.model.removeprefix("/work/")]
            assert plan.world_size == seen and heads % (plan.ulysses * plan.tensor) == 0, word
            best.add(asked.model)
        for word in [] if asked.xdit == "none" else asked.xdit.split(","):
            assert word in XDIT and Plan.parse(word).world_size == seen
    assert best == {f"/work/{model}" for model in HEADS}


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
