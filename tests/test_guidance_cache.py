"""A guidance cache spares the unconditional half as FasterCache was published, alike in every plan; without it nothing changes."""

import copy
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from diffusers import CogVideoXPipeline, FasterCacheConfig
from diffusers.hooks.faster_cache import _split_low_high_freq

from parallel_backend.cogvideox import offload
from parallel_backend.cogvideox.attention.registry import FUNCTIONS, LAST_RESORT
from parallel_backend.cogvideox.checkpoint.checkpoint import Checkpoint
from parallel_backend.cogvideox.pipeline.caches import JobCaches
from parallel_backend.cogvideox.pipeline.guidance_cache import low_pass
from parallel_backend.cogvideox.pipeline.sampling import Sampling
from parallel_backend.cogvideox.pipeline.windows import Layout
from parallel_backend.errors import RequestError
from parallel_backend.executor.batch import cut
from parallel_backend.jobs import SampleJob
from parallel_backend.model import Model, Windows
from parallel_backend.notes import is_warning
from parallel_backend.parallel.guidance import why_not_joined
from parallel_backend.parallel.sequence import JointSequence
from parallel_backend.plan import Plan

from .conftest import TOLERANCE, demo_job, rank_processes
from .support.diffusers_reference import reference
from .support.ranks import results_of

STEPS, MOST = 16, 4
SPARED = [*range(6, 10), *range(11, 15)]
"""Of so many steps: timestep 624 is the first below 660, and after four steps comes a full one."""


def cached(job: SampleJob, most: int = MOST, **settings) -> SampleJob:
    return replace(job, model=replace(job.model, guidance_cache=most, **settings))


def note_of(result) -> str:
    (note,) = (note for note in result.report.notes if note.startswith("guidance cache"))
    return note


@contextmanager
def prompts_of_steps(local, job: SampleJob) -> Iterator[list[int]]:
    """Lists how many samples each forward pass of the job's transformer has, prompts times videos."""
    transformer = local.engine.cache.transformer(job, Checkpoint.open(job.model.path), torch.float32, lambda: True)
    found: list[int] = []
    hook = transformer.register_forward_pre_hook(
        lambda module, args, kwargs: found.append(len(kwargs["hidden_states"])), with_kwargs=True
    )
    yield found
    hook.remove()


@pytest.fixture(scope="module")
def job() -> SampleJob:
    return demo_job(64, 48, 17, steps=STEPS)


@pytest.mark.parametrize(
    "like, settings", [("2b", {"scheduler": "ddim", "dynamic_cfg": True}), ("5b", {"scheduler": "dpm", "batch": 2})], ids=str
)
def test_latents_equal_those_of_diffusers_with_its_faster_cache(like, settings, checkpoints, make_job, local):
    settings |= {"size": (80, 48, 9), "steps": STEPS}
    pipeline = CogVideoXPipeline.from_pretrained(checkpoints[like])
    pipeline.set_progress_bar_config(disable=True)
    published = FasterCacheConfig(
        spatial_attention_block_skip_range=None,
        unconditional_batch_skip_range=MOST + 1,
        unconditional_batch_timestep_skip_range=(-1, 660),
        low_frequency_weight_update_timestep_range=(200, 1000),
        high_frequency_weight_update_timestep_range=(-1, 420),
        alpha_low_frequency=1.1,
        alpha_high_frequency=1.1,
        tensor_format="BFCHW",
        current_timestep_callback=lambda: pipeline._current_timestep,
    )
    pipeline.transformer.enable_cache(published)
    expected = reference(pipeline, num_frames=9, **settings)
    asked = make_job(like, **settings)
    result = local.sample(cached(asked))
    assert (result.tensor - expected).abs().max() <= TOLERANCE
    assert (local.sample(asked).tensor - expected).abs().max() > 0.01
    assert note_of(result) == f"guidance cache {MOST}: {len(SPARED)} of {STEPS} forwards ran on the positive prompt only"


@pytest.mark.parametrize("height, width", [(60, 90), (6, 10), (2, 2), (48, 20)])
def test_low_frequencies_are_those_that_diffusers_takes(height, width):
    states = torch.randn(2, 3, 4, height, width, generator=torch.Generator().manual_seed(0))
    low, _ = _split_low_high_freq(states.flatten(0, 1))
    expected = torch.fft.ifft2(torch.fft.ifftshift(low)).real.unflatten(0, (2, 3))
    assert (low_pass(states) - expected).abs().max() < 1e-5


@pytest.mark.parametrize("most", [1, MOST])
def test_spared_steps_run_one_prompt(most, job, local):
    with prompts_of_steps(local, job) as found:
        local.sample(cached(job, most))
    spared = SPARED if most == MOST else range(6, STEPS, 2)
    assert found == [1 if step in spared else 2 for step in range(STEPS)]


@pytest.fixture(scope="module")
def plain(job, local) -> torch.Tensor:
    return local.sample(job).tensor


def test_without_it_or_without_guidance_nothing_is_spared(job, plain, local):
    with prompts_of_steps(local, job) as found:
        alone = local.sample(cached(replace(job, cfg=1.0)))
        again = local.sample(job)  # nothing of a cache stays behind
    assert found == [1] * STEPS + [2] * STEPS and torch.equal(again.tensor, plain) and not again.report.notes
    assert alone.report.notes == ("guidance_cache has no effect: cfg is 1, so no step runs on the negative prompt",)
    assert all(map(is_warning, alone.report.notes))
    assert torch.equal(alone.tensor, local.sample(replace(job, cfg=1.0)).tensor)


def test_the_video_of_a_trained_model_changes_little(job, plain, local):
    distances = [((local.sample(cached(job, most)).tensor - plain).norm() / plain.norm()).item() for most in (1, MOST)]
    assert 1e-4 < distances[0] < distances[1] < 0.2


def test_with_a_step_cache_a_pass_that_renews_the_difference_runs_all_blocks(job, local):
    """Even with a threshold that lets every other pass skip: three in a row, and with both prompts until there are spared ones."""
    with prompts_of_steps(local, job) as found:
        last = local.engine.cache.held["transformer"][1].transformer_blocks[-1].ff.net[2]
        hook = last.register_forward_hook(lambda *_: whole.append(len(found) - 1))
        whole = []
        result = local.sample(cached(job, step_cache=2.0))
        hook.remove()
    assert found == [1 if step in SPARED else 2 for step in range(STEPS)]
    assert whole == [0, 4, 6, 10, 11, 15]
    assert f"step cache 2: {STEPS - len(whole)} of {STEPS} forwards ran their first block only" in result.report.notes


def test_videos_of_a_batch_are_those_made_alone(make_job, local):
    batch = cached(make_job("5b", size=(48, 48, 5), steps=STEPS, batch=2, scheduler="ddim"))
    together = local.sample(batch).tensor
    for index, alone in enumerate(cut(batch)):
        assert (local.sample(alone).tensor - together[index]).abs().max() <= TOLERANCE


@pytest.mark.parametrize("schedule", ["static", "uniform"])
def test_each_window_has_a_difference_of_its_own_and_no_old_one(schedule, make_job, local):
    asked = make_job("5b", size=(48, 48, 25), steps=STEPS, scheduler="ddim", windows=Windows(17, 12, schedule))
    with prompts_of_steps(local, asked) as found:
        result = local.sample(cached(asked))
    full, expected = {}, []
    layout = Layout.of(asked, Checkpoint.open(asked.model.path))
    for step in range(STEPS):
        for window in layout.at(step):
            expected.append(1 if step >= SPARED[0] and step - full.get(window.start, -STEPS) <= MOST else 2)
            if expected[-1] == 2:
                full[window.start] = step
    assert found == expected and len(full) == {"static": 2, "uniform": 3}[schedule]
    assert f"{found.count(1)} of {len(found)} forwards" in note_of(result)


def test_a_difference_is_forgotten_where_the_prompt_changes(make_job, local):
    asked = cached(make_job("5b", size=(48, 48, 5), steps=STEPS, scheduler="ddim", positive_starts=(0, 8 / STEPS)))
    with prompts_of_steps(local, asked) as found:
        local.sample(asked)
    assert [step for step, prompts in enumerate(found) if prompts == 1] == [6, 7, *range(9, 13), 14, 15]


def test_a_job_that_goes_on_begins_with_a_full_step_and_says_so(job, local, monkeypatch):
    kept = []
    local.engine.run(cached(job), lambda progress, steps: kept.append(progress) or True)
    resumed = local.sample(replace(cached(job), progress=kept[7]))
    assert resumed.report.notes[0].startswith("the guidance cache was reset on the way, so this is not quite the video")
    monkeypatch.setattr(Sampling, "turns", lambda sampling, step: step == 8)
    assert torch.equal(resumed.tensor, local.sample(cached(job)).tensor)
    both = JobCaches(cached(job, step_cache=0.1), None)
    assert both.restarted == "the step cache and the guidance cache were reset on the way"


def test_both_caches_fit_into_what_is_planned(job, local, monkeypatch):
    seen = []
    monkeypatch.setattr(JobCaches, "notes", property(lambda caches: seen.extend(caches._steps.values()) or []))
    asked, checkpoint = cached(job, step_cache=0.15), Checkpoint.open(job.model.path)
    local.sample(asked)
    less, more = (offload.working_bytes(each, checkpoint, Plan(), torch.float32) for each in (job, asked))
    kept = [part.nbytes for cache in seen for part in vars(cache).values() if torch.is_tensor(part) and part.ndim == 3]
    assert len(seen) == 2 and sum(kept) == pytest.approx(more - less, rel=1e-6)


CASES = [
    ("2b", {"size": (80, 48, 13), "scheduler": "dpm", "dynamic_cfg": True}),
    ("5b", {"size": (48, 48, 13), "scheduler": "ddim", "batch": 2, "windows": Windows(9, 4)}),
    ("1.5-5b-i2v", {"size": (48, 48, 9), "scheduler": "dpm", "image": torch.ones(1, 16, 1, 6, 6), "image_end": 0.6}),
]
PLANS = ["ulysses2", "ring2", "tensor2", "cfg2-fsdp2", "cfg2-ulysses2", "cfg2-ring2", "cfg2-tensor2"]


@pytest.fixture(scope="module")
def jobs(make_job) -> list[SampleJob]:
    """The first also with a step cache that skips all it may: at a lower threshold rounding might decide."""
    plain = [make_job(like, steps=STEPS, **settings) for like, settings in CASES]
    return [*map(cached, plain), cached(plain[0], step_cache=2.0)]


@pytest.fixture(scope="module")
def single(jobs, local) -> list[torch.Tensor]:
    return [local.sample(asked).tensor for asked in jobs]


def test_both_halves_of_cfg2_share_the_tokens_of_a_spared_step_and_equal_single(start_group, jobs, single):
    group = start_group("cfg2")
    for asked, expected in zip(jobs, single):
        result = group.sample(asked)
        assert (result.tensor - expected).abs().max() <= TOLERANCE, asked.model.path
        assert note_of(result).endswith("; in them the 2 ranks of both halves shared its tokens")
        assert not any(map(is_warning, result.report.notes))  # also after the way over the group's socket


@pytest.fixture(scope="module")
def ranks_made(jobs, tmp_path_factory) -> dict[str, tuple[list[torch.Tensor], list[list[int]]]]:
    """What processes make of the jobs under each plan."""
    return results_of(tmp_path_factory.mktemp("ranks"), jobs, PLANS)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.slow
def test_every_plan_equals_single(plan, jobs, single, ranks_made):
    for asked, found, expected in zip(jobs, ranks_made[plan][0], single):
        assert (found - expected).abs().max() <= TOLERANCE, asked.model.path


@pytest.mark.slow
def test_a_job_that_lost_a_rank_goes_on_with_a_full_step(start_group, make_job, local, monkeypatch):
    group, hurt = start_group("cfg2"), []
    job = make_job("5b", size=(160, 96, 17), steps=STEPS, scheduler="ddim")

    def kill(step: int, total: int) -> None:
        if step == 4 and not hurt:
            hurt.append(os.kill(rank_processes(group.address)[1], signal.SIGKILL))

    result = group.sample(cached(job), on_step=kill)
    (done,) = (int(note.split()[-1]) for note in result.report.notes if "went on after step" in note)
    assert hurt and done >= 3 and any("the guidance cache was reset on the way" in note for note in result.report.notes)
    assert [note for note in result.report.notes if not is_warning(note)] == [note_of(result)]
    monkeypatch.setattr(Sampling, "turns", lambda sampling, step: step == done)
    assert (result.tensor - local.sample(cached(job)).tensor).abs().max() <= TOLERANCE


ALIKE = [(half, "H100") for half in (0, 0, 1, 1)]


@pytest.mark.parametrize(
    "plan, heads, gpus, reason",
    [
        ("cfg2", 30, ALIKE[1:3], None),
        ("cfg2-ulysses2", 48, ALIKE, None),
        ("cfg2-ulysses2", 30, ALIKE, "30 heads do not divide by 4 ranks"),
        ("cfg2-ring2", 48, ALIKE, "a ring cannot take in the other half's ranks"),
        ("cfg2", 48, [(0, "H100"), (1, "A100")], "the halves' GPUs differ, and so may their attention functions"),
        ("cfg2-ulysses2", 48, [(0, "H100"), (0, "A100"), (1, "A100"), (1, "H100")], None),
    ],
)
def test_where_the_halves_cannot_share_tokens_the_reason_is_said(plan, heads, gpus, reason):
    assert why_not_joined(Plan.parse(plan), heads, gpus) == reason


def test_a_forward_that_spares_a_half_is_split_over_more_ranks(make_job, local):
    asked = make_job("5b", size=(48, 48, 5), steps=2)
    local.sample(asked)
    transformer = copy.deepcopy(local.engine.cache.held["transformer"][1])
    joined = SimpleNamespace(rank=1, size=2, ring=1, shared=None)
    made = []
    sequence = JointSequence(transformer, join=lambda: made.append(joined) or joined)
    given = {"hidden_states": torch.zeros(1, 2, 16, 6, 6), "encoder_hidden_states": torch.zeros(1, 32, 8), "timestep": None}
    lengths = []
    for spared in (False, True, False, True):
        about = {"cache": None, "controls": [], "attention": FUNCTIONS[LAST_RESORT], "spared": spared}
        sequence._begin(transformer, (), {**given, "attention_kwargs": about})
        lengths.append(sequence.chunk.length)
    assert lengths == [50, 25] * 2 and made == [joined]


@pytest.mark.parametrize("most", [-1, 11])
def test_a_number_that_makes_no_sense_is_refused(most):
    with pytest.raises(RequestError, match="guidance_cache is .*; use 0 to 10"):
        Model("/nowhere", guidance_cache=most)
