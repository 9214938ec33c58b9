"""Plans are checked arithmetic, and importable without torch."""

import subprocess
import sys

import pytest

from parallel_backend.devices import Devices
from parallel_backend.errors import RequestError
from parallel_backend.plan import Plan
from parallel_backend.planner.machine import CPU
from parallel_backend.planner.planner import assumed, candidates, choose

from .conftest import REPO


@pytest.mark.parametrize(
    "text, world",
    [
        ("single", 1), ("cfg2", 2), ("ulysses4", 4), ("cfg2-ulysses2-ring3", 12), ("tensor2-ulysses2", 4),
        ("cfg2-fsdp2", 2), ("cfg2-ulysses2-fsdp4", 4), ("cfg2-tensor3-ring2-fsdp4", 12),
        ("replicas2", 2), ("replicas3-cfg2-fsdp2", 6), ("replicas2-cfg2-ulysses3-pipefusion2", 24),
    ],
)  # fmt: skip
def test_a_plan_reads_and_writes_the_same_and_multiplies(text, world):
    plan = Plan.parse(text)
    assert str(plan) == text
    assert plan.world_size == world


@pytest.mark.parametrize("text", ["", "cfg", "2", "cfg2-", "warp2", "cfg2-cfg2", "cfg3", "ulysses0", "cfg2 ulysses2", "auto"])
def test_a_plan_that_makes_no_sense_is_refused_in_one_line(text):
    with pytest.raises(RequestError) as error:
        Plan.parse(text)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "text, words",
    [
        ("ulysses1025", "'ulysses1025' is for more than 1024 devices"),
        ("replicas1024-cfg2", "'replicas1024-cfg2' is for more than 1024 devices"),
        ("ulysses900000000-fsdp7", "is for more than 1024 devices"),  # its divisors would be sought for hours
        ("single-fsdp4000", "'single' is not understood"),
        ("ulysses" + "9" * 5000, "is not understood"),  # Python converts no number of so many digits
    ],
)
def test_a_plan_for_more_devices_than_anyone_has_is_refused_at_once(text, words):
    with pytest.raises(RequestError, match=words):
        Plan.parse(text)


@pytest.mark.parametrize(
    "text, words",
    [("cpu:0", "no devices"), ("cpu:1025", "more than 1024"), ("cpu:" + "9" * 5000, "understood"), ("9" * 5000, "understood")],
)
def test_devices_that_nobody_has_are_refused_at_once(text, words):
    with pytest.raises(RequestError, match=words):
        Devices.parse(text)


def test_ulysses_must_divide_the_heads_and_the_error_names_what_does():
    Plan.parse("ulysses6").check_heads(30)
    with pytest.raises(RequestError, match="1, 2, 3, 5, 6, 10, 15, or ring4"):
        Plan.parse("ulysses4").check_heads(30)


@pytest.mark.parametrize(
    "text, heads, words",
    [
        ("tensor4", 30, "tensor4 does not divide this model's 30 heads; use tensor 1, 2, 3, 5, 6, 10, 15$"),
        (
            "tensor4-ulysses8",
            48,
            "ulysses8 does not divide the 12 of this model's 48 heads .*; use ulysses 1, 2, 3, 4, 6, 12, or ring8",
        ),
    ],
)
def test_tensor_takes_heads_first_and_ulysses_of_what_is_left(text, heads, words):
    Plan.parse("tensor2-ulysses3").check_heads(30)
    with pytest.raises(RequestError, match=words):
        Plan.parse(text).check_heads(heads)


@pytest.mark.parametrize(
    "text, words",
    [
        ("fsdp2", "have the same weights, and here there is only one; use 'cfg2-fsdp2', or 'ulysses2-fsdp2'"),
        ("replicas2-fsdp2", "and here there is only one; use 'replicas2-cfg2-fsdp2', or 'replicas2-ulysses2-fsdp2'"),
        ("tensor2-fsdp2", "and here there is only one; use 'cfg2-tensor2-fsdp2', or 'tensor2-ulysses2-fsdp2'"),
        ("cfg2-ring2-fsdp3", "fsdp3 does not divide the 4 ranks that have the same weights; use fsdp 2, 4"),
    ],
)
def test_fsdp_is_over_ranks_that_would_have_the_same_weights(text, words):
    with pytest.raises(RequestError, match=words) as error:
        Plan.parse(text)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "text, words",
    [
        ("ring2-pipefusion2", "ring passes keys and values around .*; use 'ulysses2-pipefusion2', or 'ring2'$"),
        (
            "cfg2-tensor2-pipefusion2",
            "tensor has all-reduces in every block, .*; use 'cfg2-pipefusion4', or 'cfg2-tensor2'$",
        ),
        (
            "cfg2-pipefusion2-fsdp2",
            "pipefusion splits the weights already, .*; use 'cfg2-pipefusion2', or a higher pipefusion degree$",
        ),
    ],
)
def test_pipefusion_goes_with_cfg_and_ulysses_alone(text, words):
    with pytest.raises(RequestError, match=f"^plan '{text}': .*{words}") as error:
        Plan.parse(text)
    assert "\n" not in str(error.value)
    plan = Plan.parse("cfg2-ulysses2-pipefusion2")
    assert not plan.is_exact and str(plan.without_pipefusion) == "cfg2-ulysses4"
    assert not Plan.parse("cfg2-pipefusion2").talks_much and plan.talks_much


def test_a_replica_has_the_rest_of_the_plan():
    plan = Plan.parse("replicas3-cfg2-fsdp2")
    assert (str(plan.replica), plan.replica_size, plan.replica.world_size) == ("cfg2-fsdp2", 2, 2)
    assert not Plan.parse("replicas2-cfg2").talks_much and plan.talks_much


def test_degrees_must_multiply_to_the_devices_and_the_error_names_each():
    with pytest.raises(RequestError, match=r"needs 4 devices \(cfg 2 x ulysses 2\) but 3 were given"):
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
    plan, reason = choose(assumed(heads, guided), CPU, world)
    assert str(plan) == expected
    assert plan.world_size == world
    assert reason


@pytest.mark.parametrize("heads, world", [(30, 6), (48, 8), (30, 7)])
def test_every_candidate_fits_and_auto_is_one_of_them(heads, world):
    found = candidates(heads=heads, world_size=world)
    for plan in found:
        plan.check_world(world)
        plan.check_heads(heads)
    assert choose(assumed(heads, True), CPU, world)[0] in found


@pytest.mark.parametrize("heads, world", [(30, 2), (48, 8), (30, 7), (48, 1)])
def test_where_the_model_does_not_fit_every_candidate_splits_its_weights(heads, world):
    found = candidates(heads=heads, world_size=world, whole_fits=False)
    for plan in found:
        plan.check_world(world)
        plan.check_heads(heads)
        assert plan.tensor > 1 or plan.fsdp == world
    assert bool(found) == (world > 1)
    if (heads, world) == (30, 2):
        assert {*map(str, found)} == {"cfg2-fsdp2", "ulysses2-fsdp2", "ring2-fsdp2", "tensor2"}


def test_plans_import_without_torch():
    code = "import sys; import parallel_backend.planner.planner; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=REPO).returncode == 0
