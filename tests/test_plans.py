"""Plans are checked arithmetic, and importable without torch."""

import subprocess
import sys

import pytest

from parallel_backend.errors import RequestError
from parallel_backend.planner import candidates, choose
from parallel_backend.plans import Plan

from .conftest import REPO


@pytest.mark.parametrize("text, world", [("single", 1), ("cfg2", 2), ("ulysses4", 4), ("cfg2-ulysses2-ring3", 12)])
def test_a_plan_reads_and_writes_the_same_and_multiplies(text, world):
    plan = Plan.parse(text)
    assert str(plan) == text
    assert plan.world_size == world


@pytest.mark.parametrize("text", ["", "cfg", "2", "cfg2-", "warp2", "cfg2-cfg2", "cfg3", "ulysses0", "cfg2 ulysses2", "auto"])
def test_a_plan_that_makes_no_sense_is_refused_in_one_line(text):
    with pytest.raises(RequestError) as error:
        Plan.parse(text)
    assert "\n" not in str(error.value)


def test_ulysses_must_divide_the_heads_and_the_error_names_what_does():
    Plan.parse("ulysses6").check_heads(30)
    with pytest.raises(RequestError, match="1, 2, 3, 5, 6, 10, 15, or ring4"):
        Plan.parse("ulysses4").check_heads(30)


def test_degrees_must_multiply_to_the_devices_and_the_error_names_each():
    with pytest.raises(RequestError, match="cfg 2 x ulysses 2 x ring 1.* but 3 were given"):
        Plan.parse("cfg2-ulysses2").check_world(3)


@pytest.mark.parametrize(
    "heads, world, guided, expected",
    [
        (48, 1, True, "single"), (48, 2, True, "cfg2"), (48, 2, False, "ulysses2"), (48, 8, True, "cfg2-ulysses4"),
        (30, 4, True, "cfg2-ulysses2"), (30, 8, True, "cfg2-ulysses2-ring2"), (30, 3, True, "ulysses3"),
        (48, 7, True, "ring7"), (30, 16, False, "ulysses2-ring8"),
    ],
)  # fmt: skip
def test_auto_uses_every_device_and_communicates_least(heads, world, guided, expected):
    plan, reason = choose(heads=heads, world_size=world, guided=guided)
    assert str(plan) == expected
    assert plan.world_size == world
    assert reason


@pytest.mark.parametrize("heads, world", [(30, 6), (48, 8), (30, 7)])
def test_every_candidate_fits_and_auto_is_one_of_them(heads, world):
    found = candidates(heads=heads, world_size=world)
    for plan in found:
        plan.check_world(world)
        plan.check_heads(heads)
    assert choose(heads=heads, world_size=world)[0] in found


def test_plans_import_without_torch():
    code = "import sys; import parallel_backend.planner; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=REPO).returncode == 0
