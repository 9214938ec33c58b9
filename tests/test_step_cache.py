"""A step cache spares steps and stays near, with every rank taking the same decision; without a threshold nothing changes."""

import re
from dataclasses import replace

import pytest
import torch

from parallel_backend.bench.table import distance
from parallel_backend.cogvideox.step_cache import StepCache
from parallel_backend.errors import RequestError
from parallel_backend.jobs import Model, SampleJob, Windows, empty_latent

from .conftest import TOLERANCE, demo_job

STEPS = 16


@pytest.fixture(scope="module")
def job() -> SampleJob:
    """One for which a cache is of use."""
    return demo_job(64, 48, 17, steps=STEPS)


def cached(job: SampleJob, threshold: float, **settings) -> SampleJob:
    return replace(job, model=replace(job.model, step_cache=threshold, **settings))


def reused(result) -> tuple[int, int]:
    """Forwards that used earlier work, of how many, as the person is told."""
    (note,) = (note for note in result.report.notes if note.startswith("step cache"))
    return tuple(map(int, re.search(r"(\d+) of (\d+) forwards", note).groups()))


@pytest.fixture(scope="module")
def plain(job, local) -> torch.Tensor:
    return local.sample(job).tensor


def test_a_higher_threshold_spares_more_steps_and_goes_further_from_the_video_without(job, local, plain):
    assert reused(result := local.sample(cached(job, 1e-9))) == (0, STEPS) and torch.equal(result.tensor, plain)
    results = [local.sample(cached(job, threshold)) for threshold in (0.15, 0.4)]
    (few, _), (many, _) = map(reused, results)
    assert 0 < few < many < STEPS
    assert 1e-4 < distance(results[0].tensor, plain) < distance(results[1].tensor, plain) < 0.5
    again = local.sample(job)  # nothing of it stays behind
    assert torch.equal(again.tensor, plain) and not again.report.notes


def test_a_step_that_is_spared_runs_one_block(job, local, plain):
    calls = []
    hooks = [
        block.register_forward_hook(lambda *_, index=index: calls.append(index))
        for index, block in enumerate(local.engine._held["transformer"][1].transformer_blocks)
    ]
    inner = [block.ff.net[2].register_forward_hook(lambda *_: calls.append("worked")) for block in
             local.engine._held["transformer"][1].transformer_blocks]  # fmt: skip
    count, _ = reused(local.sample(cached(job, 0.3)))
    for hook in (*hooks, *inner):
        hook.remove()
    blocks = len(hooks)
    assert calls.count("worked") == (STEPS - count) * blocks + count


@pytest.mark.parametrize("plan", ["cfg2", "ulysses2", "ring2", "cfg2-ulysses2"])
def test_every_plan_takes_the_decisions_of_single(plan, job, local, start_group):
    group = start_group(plan)
    for settings in ({"size": (64, 48, 17)}, {"size": (80, 48, 13)}):
        width, height, frames = settings["size"]
        asked = cached(replace(job, latent=empty_latent(width=width, height=height, frames=frames), cfg=3.0), 0.25)
        alone, together = local.sample(asked), group.sample(asked)
        assert reused(together) == reused(alone) and reused(alone)[0] > 0
        assert (together.tensor - alone.tensor).abs().max() <= TOLERANCE


def test_each_window_has_a_cache_of_its_own(job, local):
    long = replace(job, latent=empty_latent(width=64, height=48, frames=25), windows=Windows(17, 12))
    count, forwards = reused(result := local.sample(cached(long, 0.15)))
    assert forwards == 2 * STEPS and count > 2
    assert distance(result.tensor, local.sample(long).tensor) < 0.5


def test_a_job_that_goes_on_says_that_its_cache_began_anew(job, local):
    kept = []
    local.engine.run(cached(job, 0.3), lambda progress, steps: kept.append(progress) or True)
    notes = local.sample(replace(cached(job, 0.3), progress=kept[3])).report.notes
    assert any("began anew on the way" in note for note in notes)


def test_small_changes_add_up():
    cache, decisions = StepCache(0.25, lambda tensor: tensor), []
    for size in (1.0, 1.1, 1.2, 1.3, 1.4):
        cache.begin()
        cache.after_first(torch.zeros(1, 4, 2), torch.full((1, 4, 2), size), 4)
        decisions.append(cache.reusing)
        cache.after_last(torch.ones(1, 4, 2))
    assert decisions == [False, True, True, False, True]


def test_padding_has_no_say():
    cache = StepCache(0.25, lambda tensor: tensor)
    for padding in (0.0, 100.0):
        cache.begin()
        after = torch.ones(1, 4, 2)
        after[:, 3] = padding
        cache.after_first(torch.zeros(1, 4, 2), after, 3)
        cache.after_last(after)
    assert cache.reused == 1


@pytest.mark.parametrize("threshold", [-0.1, 2.5, float("nan")])
def test_a_threshold_that_makes_no_sense_is_refused(threshold):
    with pytest.raises(RequestError, match="step_cache is .*; use 0 to 2"):
        Model("/nowhere", step_cache=threshold)
