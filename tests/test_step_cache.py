"""A step cache spares steps and stays near, with every rank taking the same decision; without a threshold nothing changes."""

import re
from dataclasses import replace

import pytest
import torch

from parallel_backend.cli.bench_table import distance
from parallel_backend.cogvideox import offload
from parallel_backend.cogvideox.checkpoint.checkpoint import Checkpoint
from parallel_backend.cogvideox.pipeline.caches import JobCaches
from parallel_backend.cogvideox.pipeline.forward import Runtime
from parallel_backend.cogvideox.pipeline.sampling import Sampling
from parallel_backend.cogvideox.transformer.step_cache import LIMIT, StepCache
from parallel_backend.errors import RequestError
from parallel_backend.jobs import SampleJob, empty_latent
from parallel_backend.model import Model, Windows
from parallel_backend.parallel.rank import RankContext
from parallel_backend.plan import Plan

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


def test_earlier_steps_predict_nothing_where_the_condition_changes(make_job, checkpoints):
    image = torch.ones(1, 16, 1, 8, 12)
    job = make_job("5b-i2v", size=(96, 64, 9), steps=8, image=image, image_start=0.25, image_end=0.6)
    sampling = Sampling(
        job,
        Checkpoint.open(checkpoints["5b-i2v"]),
        Runtime(torch.device("cpu"), torch.float32, RankContext(torch.device("cpu"))),
    )
    assert [step for step in range(8) if sampling.turns(step)] == [2, 5]


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
        for index, block in enumerate(local.engine.cache.held["transformer"][1].transformer_blocks)
    ]
    inner = [block.ff.net[2].register_forward_hook(lambda *_: calls.append("worked")) for block in
             local.engine.cache.held["transformer"][1].transformer_blocks]  # fmt: skip
    count, _ = reused(local.sample(cached(job, 0.3)))
    for hook in (*hooks, *inner):
        hook.remove()
    blocks = len(hooks)
    assert calls.count("worked") == (STEPS - count) * blocks + count


def test_however_high_the_threshold_no_more_steps_in_a_row_are_spared(job, local):
    whole = -(-STEPS // (LIMIT + 1))
    assert reused(local.sample(cached(job, 2.0))) == (STEPS - whole, STEPS)


def test_what_goes_on_is_nearer_than_what_stands_still(job, local, plain, monkeypatch):
    calm = replace(job, scheduler="ddim", steps=2 * STEPS)  # no new noise, and steps near each other
    exact, goes_on = local.sample(calm).tensor, local.sample(cached(calm, 0.1))
    monkeypatch.setattr(StepCache, "_ahead", property(lambda cache: 0.0, lambda cache, value: None), raising=False)
    stands_still = local.sample(cached(calm, 0.1))
    assert reused(goes_on)[0] >= STEPS / 2 and reused(stands_still)[0] >= STEPS / 2
    assert distance(goes_on.tensor, exact) < 0.6 * distance(stands_still.tensor, exact)


@pytest.mark.parametrize("plan", ["cfg2", "ulysses2", "ring2", "cfg2-ulysses2"])
@pytest.mark.slow
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
    count, forwards = reused(result := local.sample(cached(long, 0.1)))
    assert forwards == 2 * STEPS and count > 2
    assert distance(result.tensor, local.sample(long).tensor) < 0.5


@pytest.mark.parametrize("schedule", ["static", "uniform"])
def test_the_caches_of_all_windows_are_planned_for(schedule, job, local, monkeypatch):
    seen = []
    monkeypatch.setattr(JobCaches, "notes", property(lambda caches: seen.extend(caches._steps.values()) or []))
    long = replace(job, latent=empty_latent(width=64, height=48, frames=25), windows=Windows(17, 12, schedule))
    asked, checkpoint = cached(long, 0.15), Checkpoint.open(job.model.path)
    local.sample(asked)
    less, more = (offload.working_bytes(each, checkpoint, Plan(), torch.float32) for each in (long, asked))
    kept = [[part.nbytes for part in vars(cache).values() if torch.is_tensor(part) and part.ndim == 3] for cache in seen]
    assert len(seen) == {"static": 2, "uniform": 3}[schedule]
    assert max(sum(map(sum, kept)), len(kept) * max(map(sum, kept))) == pytest.approx(more - less, rel=1e-6)


def test_a_job_that_goes_on_says_that_its_cache_began_again(job, local):
    kept = []
    local.engine.run(cached(job, 0.3), lambda progress, steps: kept.append(progress) or True)
    notes = local.sample(replace(cached(job, 0.3), progress=kept[3])).report.notes
    assert any("was reset on the way" in note for note in notes)


def run(cache: StepCache, change: torch.Tensor, added: torch.Tensor, real: int | None = None) -> torch.Tensor | None:
    """A forward whose first block adds ``change`` and whose others ``added``: what comes of those where they were spared."""
    cache.begin()
    before = torch.zeros_like(change)
    cache.after_first(before, before + change, change.shape[1] if real is None else real)
    tokens = before + change + (0 if cache.reusing else added)
    after = cache.after_last(tokens)
    assert cache.reusing or torch.equal(after, tokens)
    return after - change if cache.reusing else None


def test_what_changes_evenly_is_told_exactly():
    random = torch.Generator().manual_seed(0)
    base, step, added, gain = (torch.randn(2, 9, 4, generator=random) for _ in range(4))
    cache = StepCache(1.0, lambda tensor: tensor)
    for time in (0, 5, 6, 7, 8, 13, 14):
        found = run(cache, base + time * step, added + time * gain)
        assert (found is None) == (time in (0, 5, 13))
        assert found is None or (found - added - time * gain).abs().max() <= 1e-4


def test_new_noise_in_a_step_is_no_way_along_the_line():
    random = torch.Generator().manual_seed(2)
    cache = StepCache(1.0, lambda tensor: tensor)
    early, late, later = (size + torch.randn(2, 200, 4, generator=random) for size in (1, 10, 10))
    for change, added in ((early, 0.0), (late, 1.0)):
        assert run(cache, change, torch.full_like(change, added)) is None
    assert run(cache, later, late).sub(1).abs().max() < 0.05


def test_it_is_the_rule_that_is_stated():
    """Against the rule written down once more, over a walk with padding."""
    random = torch.Generator().manual_seed(1)
    cache, whole, in_a_row, spared = StepCache(0.2, lambda tensor: tensor), [], 0, 0
    change, added = (torch.randn(2, 12, 3, generator=random) for _ in range(2))
    for _ in range(60):
        size = 0.4 * torch.rand((), generator=random)
        change = change + size * (torch.randn(2, 12, 3, generator=random) + 0.3)
        added = added + size * torch.randn(2, 12, 3, generator=random)
        found = run(cache, change, added, real=10)
        last, rest = whole[-1] if whole else (None, None)
        if whole and in_a_row < LIMIT and (change - last)[:, :10].abs().sum() < 0.2 * last[:, :10].abs().sum():
            before, rest_before = whole[-2] if len(whole) > 1 else (0 * last, 0 * rest)
            gained, moved = (last - before)[:, :10], (change - last)[:, :10]
            ahead = ((moved * gained).sum() / gained.square().sum()).clamp(0, LIMIT)
            assert (found - rest - ahead * (rest - rest_before)).abs().max() <= 1e-4
            in_a_row, spared = in_a_row + 1, spared + 1
        else:
            assert found is None
            whole.append((change, added))
            in_a_row = 0
    assert 30 < spared < 45


def test_a_first_block_that_stands_still_tells_no_direction():
    cache = StepCache(0.5, lambda tensor: tensor)
    for time in range(2 * LIMIT + 2):
        found = run(cache, torch.ones(1, 4, 2), torch.full((1, 4, 2), float(time)))
        assert found is None or (found == (time // (LIMIT + 1)) * (LIMIT + 1)).all()


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


def test_another_prompt_is_seen_by_all_blocks_at_once(job, local):
    """A cache that spares all that it may would else go on with the first prompt."""
    states = torch.stack([job.positive, job.negative], dim=1)
    changed = replace(cached(job, 2.0), positive=states, positive_starts=(0, 6 / STEPS), cfg=1.0)
    forwards = []
    transformer = local.engine.cache.transformer(changed, Checkpoint.open(job.model.path), torch.float32, lambda: True)
    hooks = [
        transformer.transformer_blocks[place].ff.net[2].register_forward_hook(lambda *_, place=place: forwards.append(place))
        for place in (0, -1)
    ]
    local.sample(changed)
    for hook in hooks:
        hook.remove()
    first_blocks = [index for index, place in enumerate(forwards) if place == 0]
    whole = [step for step, index in enumerate(first_blocks) if forwards[index : index + 2] == [0, -1]]
    assert whole == [0, 4, 6, 10, 14]
