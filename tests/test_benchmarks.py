"""The benchmark of one to eight GPUs asks for what the command line and the planner know; that it runs is for `--small` to show."""

import pytest

from benchmarks.gpus import PHASES
from benchmarks.pipelines import XDIT
from benchmarks.table import chosen_precisions
from parallel_backend.cli.parser import build_parser
from parallel_backend.plan import Plan

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
