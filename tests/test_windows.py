"""Long videos in windows: what is covered, with what weight and noise, and that a loop written here gives the same latents."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from diffusers import CogVideoXPipeline

from parallel_backend.cli.parser import main
from parallel_backend.cogvideox import offload
from parallel_backend.cogvideox.checkpoint.checkpoint import Checkpoint
from parallel_backend.cogvideox.checkpoint.facts import CheckpointFacts
from parallel_backend.cogvideox.pipeline import validation
from parallel_backend.cogvideox.pipeline.windows import Layout
from parallel_backend.cogvideox.transformer.positions import riflex_period
from parallel_backend.errors import Cancelled, GroupLost, RequestError
from parallel_backend.executor.continuing import spans
from parallel_backend.jobs import DecodeJob, Progress, empty_latent
from parallel_backend.model import Windows
from parallel_backend.notes import is_warning
from parallel_backend.plan import Plan

from .conftest import NEGATIVE, PROMPT, TOLERANCE
from .support.diffusers_reference import SCHEDULERS
from .support.diffusers_reference import reference as diffusers_latents

LAYOUTS = [
    Layout(frames * token, length * token, overlap * token, token, shifted, True)
    for frames in (2, 3, 5, 12, 13, 31)
    for length in range(1, min(frames, 13))
    for overlap in range(length)
    for token in (1, 2)
    for shifted in (False, True)
]
LATENT = torch.randn(1, 16, 7, 6, 10, generator=torch.Generator().manual_seed(5))
"""Of 25 frames 80x48."""
TWO = {  # windows of 17 frames that overlap by 12, of a video of 25 (CogVideoX 1.5: and one padding frame in front)
    "5b": [(slice(0, 5), [1, 1, 3 / 4, 1 / 2, 1 / 4]), (slice(2, 7), [1 / 4, 1 / 2, 3 / 4, 1, 1])],
    "1.5-5b": [(slice(0, 6), [1, 1, 3 / 4, 3 / 5, 2 / 5, 1 / 4]), (slice(2, 8), [1 / 4, 2 / 5, 3 / 5, 3 / 4, 1, 1])],
}
TWO["2b"] = TWO["5b"]
IMAGES = {"2b-i2v": 1.15258426, "1.5-5b-i2v": 1 / 0.7}
"""Image-to-video models, and the factor of a start image's latent."""
SEED = 4
"""That swaps the two frames whose noise the second window takes over."""


@pytest.fixture(scope="module")
def pipelines(checkpoints):
    found = {like: CogVideoXPipeline.from_pretrained(checkpoints[like]) for like in (*TWO, *IMAGES)}
    for pipeline in found.values():
        texts = pipeline.encode_prompt(PROMPT, NEGATIVE, max_sequence_length=pipeline.transformer.config.max_text_seq_length)
        pipeline.both = torch.cat(texts[::-1])
    return found


@torch.no_grad()
def reference(pipeline, windows, *, scheduler, shuffled, steps, skipped=0, latent=None, cfg=6.0) -> torch.Tensor:
    """Two windows a step, blended, by diffusers' transformer, scheduler and rotary tables; in ComfyUI's layout."""
    generator = torch.Generator().manual_seed(SEED)
    scheduler = SCHEDULERS[scheduler].from_config(pipeline.scheduler.config)
    scheduler.set_timesteps(steps)
    timesteps = scheduler.timesteps[skipped:]
    length, frames = windows[0][0].stop, windows[1][0].stop
    if latent is not None:
        torch.randn(latent.shape, generator=generator)  # where diffusers would sample the VAE's posterior
    noise = torch.randn(1, frames, 16, 6, 10, generator=generator)
    if shuffled:  # the two frames that the second window takes in have the noise of the two that it leaves
        noise[:, length:] = noise[:, torch.randperm(2, generator=generator)]
    latents, history = noise, None
    if latent is not None:
        clean = latent.permute(0, 2, 1, 3, 4) * pipeline.vae.config.scaling_factor
        latents = scheduler.add_noise(clean, noise, timesteps[:1])
    rotary = None
    if pipeline.transformer.config.use_rotary_positional_embeddings:
        rotary = pipeline._prepare_rotary_positional_embeddings(48, 80, length, torch.device("cpu"))
    for index, timestep in enumerate(timesteps):
        velocity = torch.zeros_like(latents)
        for place, weights in windows:
            both = torch.cat([latents[:, place]] * 2)
            said = pipeline.transformer(both, pipeline.both, timestep.expand(2), image_rotary_emb=rotary).sample
            velocity[:, place] += torch.tensor(weights)[:, None, None, None] * torch.lerp(*said.split(1), weight=cfg)
        if isinstance(scheduler, SCHEDULERS["ddim"]):
            latents = scheduler.step(velocity, timestep, latents).prev_sample
        else:
            before = timesteps[index - 1] if index else None
            latents, history = scheduler.step(
                velocity, history, timestep, before, latents, generator=generator, return_dict=False
            )
    return latents[:, -7:].permute(0, 2, 1, 3, 4) / pipeline.vae.config.scaling_factor


@pytest.mark.parametrize("shuffled", [True, False], ids=["shuffled", "own noise"])
@pytest.mark.parametrize("scheduler", ["ddim", "dpm"])
@pytest.mark.parametrize("like", TWO)
def test_two_windows_give_the_latents_of_a_loop_around_diffusers(like, scheduler, shuffled, pipelines, make_job, local):
    expected = reference(pipelines[like], TWO[like], scheduler=scheduler, shuffled=shuffled, steps=4)
    windows = Windows(17, 12, shuffle_noise=shuffled)
    job = make_job(like, size=(80, 48, 25), steps=4, seed=SEED, scheduler=scheduler, windows=windows)
    result = local.sample(job)
    assert (result.tensor - expected).abs().max() <= TOLERANCE
    assert len(result.report.step_seconds) == 4


@pytest.mark.parametrize("shuffled", [True, False], ids=["shuffled", "own noise"])
@pytest.mark.parametrize("scheduler", ["ddim", "dpm"])
def test_a_long_video_is_made_of_a_long_video(scheduler, shuffled, pipelines, make_job, local):
    settings = {"scheduler": scheduler, "latent": LATENT, "steps": 6}
    windows = Windows(17, 12, shuffle_noise=shuffled)
    expected = reference(pipelines["5b"], TWO["5b"], shuffled=shuffled, skipped=3, **settings)
    result = local.sample(make_job("5b", denoise=0.5, seed=SEED, windows=windows, **settings))
    assert (result.tensor - expected).abs().max() <= TOLERANCE


@torch.no_grad()
def continued(pipeline, image: torch.Tensor, *, scheduler: str, steps: int, scale: float) -> torch.Tensor:
    """25 frames in two windows of 17, of which the second one continues the last 9 of the first; in ComfyUI's layout."""
    config, factor = pipeline.transformer.config, pipeline.vae.config.scaling_factor
    padding, kept, known, parts = 1 if config.patch_size_t else 0, 3, None, []
    rotary = None
    if config.use_rotary_positional_embeddings:
        rotary = pipeline._prepare_rotary_positional_embeddings(48, 80, 5 + padding, torch.device("cpu"))
    given = {"image_rotary_emb": rotary, "ofs": torch.tensor([2.0]) if config.ofs_embed_dim else None}
    scheduler = SCHEDULERS[scheduler].from_config(pipeline.scheduler.config)
    scheduler.set_timesteps(steps)
    for number in range(2):
        generator = torch.Generator().manual_seed(SEED + number)
        torch.randn(image.shape, generator=generator)  # where diffusers would sample the VAE's posterior
        latents = noise = torch.randn(1, 5 + padding, 16, 6, 10, generator=generator)
        condition, history, places = torch.zeros_like(latents), None, slice(padding, padding + kept)
        condition[:, 0] = image[:, :, 0] * scale
        for index, timestep in enumerate(scheduler.timesteps):
            if known is not None:
                latents = latents.clone()
                latents[:, places] = scheduler.add_noise(known, noise[:, places], timestep[None])
            seen = torch.cat([torch.cat([latents, condition], dim=2)] * 2)
            said = pipeline.transformer(seen, pipeline.both, timestep.expand(2), **given).sample
            velocity = torch.lerp(*said.split(1), weight=6.0)
            if isinstance(scheduler, SCHEDULERS["ddim"]):
                latents = scheduler.step(velocity, timestep, latents).prev_sample
            else:
                before = scheduler.timesteps[index - 1] if index else None
                latents, history = scheduler.step(
                    velocity, history, timestep, before, latents, generator=generator, return_dict=False
                )
        made = latents[:, padding:]
        if known is not None:
            return torch.cat([parts[0], made[:, kept:]], dim=1).transpose(1, 2) / factor
        parts.append(made)
        ending = pipeline.vae.decode(made.transpose(1, 2) / factor).sample.clamp(-1, 1)[:, :, -9:]
        image = pipeline.vae.encode(ending[:, :, :1]).latent_dist.mode()
        known = pipeline.vae.encode(ending).latent_dist.mode().transpose(1, 2) * factor


@pytest.mark.parametrize("like, scheduler", [("2b-i2v", "dpm"), ("1.5-5b-i2v", "ddim")])
def test_windows_of_a_start_image_continue_the_frames_of_the_one_before(like, scheduler, pipelines, make_job, local):
    image = torch.randn(1, 16, 1, 6, 10, generator=torch.Generator().manual_seed(6))
    given = {"scheduler": scheduler, "steps": 3}
    expected, steps = continued(pipelines[like], image, scale=IMAGES[like], **given), []
    job = make_job(like, size=(80, 48, 25), seed=SEED, windows=Windows(17, 8), image=image, **given)
    result = local.sample(job, on_step=lambda *step: steps.append(step))
    assert result.tensor.shape == expected.shape and (result.tensor - expected).abs().max() <= TOLERANCE
    assert steps == [(step, 6) for step in range(1, 7)] and len(result.report.step_seconds) == 6
    (note,) = result.report.notes
    assert note == "2 windows, one after the other: each continues the last 9 frames of the one before" and not is_warning(note)


def test_a_loss_in_one_window_of_a_start_image_leaves_no_progress_of_the_whole_video(make_job, local, monkeypatch):
    def lose(job, *_):
        error = GroupLost("rank 1 was killed")
        error.progress = Progress(1, job.latent, torch.zeros(1))
        raise error

    monkeypatch.setattr(local, "_run", lose)
    job = make_job("2b-i2v", size=(80, 48, 25), windows=Windows(17, 8), image=torch.ones(1, 16, 1, 6, 10))
    with pytest.raises(GroupLost) as lost:
        local.run(job)
    assert lost.value.progress is None


def test_a_window_of_a_start_image_that_needs_padding_is_refused_where_there_is_none(make_job, local):
    given = {"latent": torch.ones(1, 16, 8, 6, 10), "image": torch.ones(1, 16, 1, 6, 10), "denoise": 0.5}
    job = make_job("1.5-5b-i2v", windows=Windows(17, 8), **given)
    with pytest.raises(RequestError, match="denoise below 1 with .* of 2 latent frames and a window has 5: use 21 frames"):
        local.sample(job)


def test_windows_of_a_start_image_need_the_model_s_own_vae(make_job, checkpoints):
    alone = replace(Checkpoint.open(checkpoints["2b-i2v"]), elements={"transformer": 1})
    job = make_job("2b-i2v", size=(80, 48, 25), windows=Windows(17, 8), image=torch.ones(1, 16, 1, 6, 10))
    with pytest.raises(RequestError, match="2b-i2v has no VAE of its own; use a folder with one, or at most 17 frames"):
        validation.check(alone, job)


@pytest.mark.parametrize(
    "frames, length, overlap, expected",
    [
        (7, 5, 2, [(0, 0), (2, 3)]),
        (8, 5, 2, [(0, 0), (3, 2)]),
        (25, 13, 8, [(0, 0), (5, 8), (10, 8), (12, 11)]),
        (9, 5, 1, [(0, 0), (4, 1)]),
    ],
)
def test_each_frame_of_a_continued_video_is_made_once(frames, length, overlap, expected):
    assert spans(frames, length, overlap) == expected
    assert sum(length - kept for _, kept in expected) == frames


def riflex_rotary(height: int, width: int, frames: int, device, *, features: int, lowered_for: int):
    """Tables of RIFLEx's authors for one token a frame, which is in the column 1 of the grid of 6x4 that its crop begins at."""
    angles, axes = (
        [],
        ((features // 4, torch.arange(frames)), (features // 8 * 3, torch.zeros(1)), (features // 8 * 3, torch.ones(1))),
    )
    for size, positions in axes:
        frequencies = 1 / 10000 ** (torch.arange(0, size, 2) / size)
        if not angles:
            frequencies[1] = 0.9 * 2 * torch.pi / lowered_for
        angles.append(torch.outer(positions, frequencies).repeat_interleave(2, dim=1).expand(frames, -1))
    whole = torch.cat(angles, dim=1)
    return whole.cos(), whole.sin()


@pytest.mark.parametrize("riflex, lowered_for", [("on", 65), ("finetuned", 25)])
def test_riflex_gives_the_latents_of_its_authors_positions(riflex, lowered_for, checkpoints, make_job, local):
    pipeline, size = CogVideoXPipeline.from_pretrained(checkpoints["5b"]), (16, 16, 257)
    pipeline.set_progress_bar_config(disable=True)
    features = pipeline.transformer.config.attention_head_dim
    pipeline._prepare_rotary_positional_embeddings = partial(riflex_rotary, features=features, lowered_for=lowered_for)
    given = {"size": size, "steps": 3, "scheduler": "ddim"}
    result = local.sample(make_job("5b", windows=Windows(257, 128, riflex=riflex), **given))
    expected = diffusers_latents(pipeline, num_frames=257, **given)
    assert (result.tensor - expected).abs().max() <= TOLERANCE
    plain = local.sample(make_job("5b", **given)).tensor
    assert (plain - expected).abs().max() > 0.01
    frames = (lowered_for - 1) * 4 + 1
    (note,) = (note for note in result.report.notes if not is_warning(note))
    assert note == f"riflex '{riflex}': temporal positions are stretched to {frames} frames"


def test_riflex_changes_nothing_within_a_period_and_is_for_cogvideox_5b(make_job, local):
    windows, given = Windows(17, 12), {"size": (32, 32, 25), "steps": 2}
    plain = local.sample(make_job("5b", windows=windows, **given)).tensor
    result = local.sample(make_job("5b", windows=replace(windows, riflex="on"), **given))
    assert torch.equal(result.tensor, plain)
    period = 249  # of the small model, whose heads have 32 features; 77 frames where they have 64
    assert result.report.notes == (f"riflex has no effect on 17 frames; it begins after {period}",)
    assert riflex_period(CheckpointFacts(None, {"attention_head_dim": 64}, {}, {})) == 20
    for like in ("2b", "1.5-5b"):
        with pytest.raises(RequestError, match=f"riflex is 'on', but {like} is not of CogVideoX-5b's shape"):
            local.sample(make_job(like, windows=replace(windows, riflex="on"), **given))


@pytest.mark.parametrize("windows", [Windows(17, 8), Windows(49, 24, "uniform")], ids=["of its length", "longer"])
@pytest.mark.parametrize("like", ["2b", "5b", "1.5-5b"])
def test_a_video_that_fits_in_one_window_is_what_it_is_without_and_says_so(like, windows, make_job, local):
    plain = local.sample(make_job(like, steps=3))
    result = local.sample(make_job(like, steps=3, windows=windows))
    assert torch.equal(result.tensor, plain.tensor)
    assert result.report.notes == (f"the video of 17 frames fits in one window of {windows.frames}: it is sampled whole",)
    assert plain.report.notes == ()


def test_a_video_longer_than_the_model_s_own_is_advised_to_have_windows(make_job, local):
    (note,) = local.sample(make_job("5b", size=(32, 32, 21), steps=1)).report.notes
    assert note.startswith("21 frames are more than the 17 that 5b was trained for")
    assert local.sample(make_job("5b", size=(32, 32, 21), steps=1, windows=Windows(17, 8))).report.notes == ()
    assert local.sample(make_job("1.5-5b", size=(32, 32, 33), steps=1)).report.notes == ()  # 1.5 saw twice its own length


@pytest.mark.parametrize("like, frames, others", [("5b", 25, 7), ("1.5-5b", 29, 8)])
def test_a_seed_gives_one_video_and_each_setting_another(like, frames, others, make_job, local):
    def video(windows, seed=3):
        return local.sample(make_job(like, size=(32, 32, frames), steps=3, scheduler="dpm", windows=windows, seed=seed)).tensor

    first = video(Windows(13, 0))
    assert torch.equal(first, video(Windows(13, 0)))
    settings = Windows(13, 8), Windows(17, 0), Windows(13, 0, "uniform"), Windows(13, 0, shuffle_noise=False), None
    videos = [first, video(Windows(13, 0), seed=4), *map(video, settings)]
    for index, one in enumerate(videos):
        assert all((one - other).abs().max() > 0.01 for other in videos[:index]), index
    decoded = local.decode(DecodeJob(make_job(like).model, first)).tensor
    assert first.shape == (1, 16, others, 4, 4) and decoded.shape == (1, frames, 32, 32, 3)


def test_lengths_become_whole_tokens(make_job, checkpoints):
    for like, expected in (("5b", Layout(7, 5, 3, 1, False, True)), ("1.5-5b", Layout(8, 6, 4, 2, False, True))):
        job = make_job(like, size=(32, 32, 25), windows=Windows(17, 12))
        assert Layout.of(job, Checkpoint.open(checkpoints[like])) == expected
    job = make_job("1.5-5b-inp", size=(32, 32, 29), windows=Windows(13, 4))  # an overlap of one latent frame
    assert Layout.of(job, Checkpoint.open(checkpoints["1.5-5b-inp"])) == Layout(8, 4, 2, 2, False, True)


@pytest.mark.parametrize("step", [0, 1, 2, 7, 49])
def test_windows_cover_every_frame_with_weights_that_sum_to_1(step):
    for layout in LAYOUTS:
        windows = layout.at(step)
        total = torch.zeros(layout.frames)
        for window in windows:
            assert len(window.weights) == layout.length and min(window.weights) > 0
            assert window.start % layout.token == 0
            total[window.frames] += torch.tensor(window.weights)
        assert torch.allclose(total, torch.ones(layout.frames)), layout
        starts = [window.start for window in windows]
        assert all(0 < after - before <= layout.stride for before, after in zip(starts, starts[1:])), layout
        if not layout.shifted:
            assert windows == layout.at(0)
            assert (len(windows) - 1) * layout.stride >= layout.frames - layout.length > (len(windows) - 2) * layout.stride


def test_shifted_windows_leave_no_seam_in_one_place():
    seams = [{window.start for window in Layout(31, 13, 5, shifted=True).at(step)} - {0, 18} for step in range(16)]
    assert len(set().union(*seams)) == 17 and not set.intersection(*seams)


def test_every_window_sees_the_first_one_s_noise_in_its_own_order():
    for seed, layout in enumerate(layout for layout in LAYOUTS if not layout.shifted):
        order = layout.noise_order(torch.Generator().manual_seed(seed))
        assert len(order) == layout.frames and order[: layout.length] == list(range(layout.length))
        for window in layout.at(0):
            assert sorted(order[window.frames]) == list(range(layout.length)), layout
    layout = Layout(60, 20, 10)
    orders = {tuple(layout.noise_order(torch.Generator().manual_seed(seed))) for seed in range(5)}
    assert len(orders) == 5
    assert all(order[:20] != order[20:40] != order[40:] != order[:20] for order in orders)


def test_memory_is_that_of_one_window(make_job, checkpoints):
    def working(like, frames, windows=None):
        job = make_job(like, size=(96, 64, frames), windows=windows)
        return offload.working_bytes(job, Checkpoint.open(checkpoints[like]), Plan(), torch.float32)

    for like in ("5b", "1.5-5b"):
        assert working(like, 97, Windows(17, 8)) == working(like, 17) < working(like, 97)


@pytest.mark.parametrize("ask, done", [(1, 0), (5, 1), (6, 2)])
def test_a_long_step_can_be_stopped_between_its_windows(ask, done, make_job, local):
    asked = []

    def stop() -> bool:
        asked.append(True)
        return len(asked) == ask  # a step of three windows asks three times

    job = make_job("5b", size=(48, 48, 25), steps=6, windows=Windows(9, 4))
    assert len(Layout.of(job, Checkpoint.open(job.model.path)).at(0)) == 3
    local.load(job)  # a job asks while it reads weights too
    with pytest.raises(Cancelled, match=f"stopped after step {done} of 6"):
        local.sample(job, should_stop=stop)


@pytest.mark.parametrize(
    "values, words",
    [
        ({"frames": 48}, "window is 48 frames; it must be 4k\\+1, such as 49"),
        ({"frames": 1, "overlap": 0}, "window is 1 frames; it must be 4k\\+1, such as 5"),
        ({"overlap": 15}, "overlap is 15 frames; it must be a multiple of 4, such as 16"),
        ({"overlap": -4}, "overlap is -4 frames.*such as 0"),
        ({"frames": 17, "overlap": 20}, "windows of 17 frames cannot overlap by 20; use less, such as 12"),
        ({"riflex": "yes"}, "riflex is 'yes'; use one of off, on, finetuned"),
        ({"schedule": "looped"}, "schedule is 'looped'; use one of static, uniform"),
    ],
)
def test_windows_that_make_no_sense_are_refused_in_one_line(values, words):
    with pytest.raises(RequestError, match=words) as error:
        Windows(**values)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "like, settings, words",
    [
        ("1.5-5b", {"windows": Windows(13, 12)}, "overlap by 12 do not advance with 1.5-5b, whose tokens are 8 frames"),
    ],
)
def test_what_a_model_cannot_do_in_windows_is_refused_and_done_whole(like, settings, words, make_job, checkpoints):
    checkpoint = Checkpoint.open(checkpoints[like])
    with pytest.raises(RequestError, match=words) as error:
        validation.check(checkpoint, make_job(like, **settings))
    assert "\n" not in str(error.value)
    short = {**settings, "latent": empty_latent(width=96, height=64, frames=13)}
    validation.check(checkpoint, make_job(like, **short))


@pytest.mark.parametrize(
    "options, words",
    [
        (["--overlap", "8"], "give --window too"),
        (["--no-noise-shuffle"], "give --window too"),
        (["--riflex", "on"], "give --window too"),
        (["--window", "17", "--overlap", "20"], "cannot overlap by 20; use less, such as 12"),
        (["--window", "20"], "the window is 20 frames"),
    ],
)
def test_the_command_line_says_what_a_window_needs(options, words, tmp_path, capsys):
    asked = ["generate", "--model", "demo", "--prompt", "a red circle", "--output", str(tmp_path / "a.mp4"), "--devices", "cpu"]
    assert main([*asked, *options]) == 2
    assert words in capsys.readouterr().err
