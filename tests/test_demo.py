"""The demo model does what it is told, as far as it has learnt to; and the measurements that say so can be trusted."""

import random

import pytest
import torch

from benchmarks.obedience import cases, first_frame, generate, image_cases, kept
from parallel_backend.cogvideox.checkpoint import bundled
from parallel_backend.cogvideox.checkpoint.checkpoint import Checkpoint
from parallel_backend.cogvideox.pipeline.text import TextEncoder
from parallel_backend.cogvideox.vae import codec
from parallel_backend.model import Windows
from training.drawing import draw
from training.scenes import BACKGROUNDS, COLOURS, Scene, caption, held_out_scenes, random_scene, training_scene, vocabulary
from training.vae import psnr

from .support.measures import Verdict, judge, nearest

SIZE_LIMIT = 24_000_000
QUALITIES = ("background", "colour", "shape", "motion")


@pytest.fixture(scope="module")
def demo() -> Checkpoint:
    return Checkpoint.open(bundled.find(bundled.DEMO))


@pytest.fixture(scope="module")
def encoder(demo) -> TextEncoder:
    return TextEncoder(demo, device=torch.device("cpu"), dtype=torch.float32)


@pytest.fixture(scope="module")
def verdicts(demo, encoder, local) -> list[tuple[Scene, Verdict]]:
    """A dozen of the benchmark's captions, in fewer steps than the benchmark's."""
    dozen = enumerate(cases(12))
    return [
        (scene, judge(generate(local, demo, encoder, prompt, seed=seed, steps=20), scene)) for seed, (scene, prompt) in dozen
    ]


@pytest.fixture(scope="module")
def drawn() -> list[tuple[Scene, torch.Tensor]]:
    """Scenes with their clips, drawn and not generated."""
    rng = random.Random(11)
    scenes = [random_scene(rng) for _ in range(80)]
    return list(zip(scenes, draw(scenes)))


def share(verdicts: list[Verdict], quality: str) -> float:
    return sum(getattr(verdict, quality) for verdict in verdicts) / len(verdicts)


def test_the_measurements_read_drawn_clips(drawn):
    read = [judge(clip, scene) for scene, clip in drawn]
    for quality in QUALITIES:
        assert share(read, quality) >= 0.97, quality


def test_the_measurements_see_that_a_clip_shows_something_else(drawn):
    def says(scene: Scene, quality: str):
        return scene.background if quality == "background" else getattr(scene.things[0], quality)

    singles = [(scene, clip) for scene, clip in drawn if len(scene.things) == 1]
    swapped = [(one, other, judge(clip, one)) for (one, _), (other, clip) in zip(singles, singles[1:])]
    for quality in QUALITIES:
        different = [verdict for one, other, verdict in swapped if says(one, quality) != says(other, quality)]
        assert len(different) > 20 and share(different, quality) <= 0.03, quality


def test_training_never_draws_what_the_captions_are_held_out_for():
    names = {scene.name for scene in held_out_scenes(60, pairs=16)}
    rng = random.Random(4)
    assert len(names) == 60 and not names & {training_scene(rng).name for _ in range(3000)}


def test_the_tokenizer_knows_every_word_of_the_captions(encoder):
    rng = random.Random(5)
    unknown = encoder.tokenize("xylophone")[0]
    assert unknown not in encoder.tokenize(" ".join(vocabulary()[:30]))
    for _ in range(200):
        assert unknown not in encoder.tokenize(caption(random_scene(rng), rng).upper() + ".")


def test_the_demo_is_small_enough_to_ship():
    assert sum(path.stat().st_size for path in bundled.SHIPPED.rglob("*") if path.is_file()) <= SIZE_LIMIT


def test_the_vae_gives_unseen_clips_back(demo):
    module = demo.load_vae(torch.float32)
    clips = draw(held_out_scenes(4, pairs=1))
    again = torch.cat([codec.decode(module, codec.encode(module, clip)) for clip in clips])
    assert psnr(clips, again).mean() >= 30


@pytest.mark.slow
def test_it_obeys_where_there_is_one_thing(verdicts):
    alone = [verdict for scene, verdict in verdicts if len(scene.things) == 1]
    assert len(alone) == 6
    assert sum(verdict.shape for verdict in alone) >= 5
    assert sum(verdict.motion for verdict in alone) >= 5


def test_it_obeys_with_one_thing_and_with_two(verdicts):
    right = {quality: sum(getattr(verdict, quality) for _, verdict in verdicts) for quality in QUALITIES}
    assert right["colour"] >= 11 and right["background"] >= 11 and right["motion"] >= 10 and right["shape"] >= 9, right
    pairs = [verdict for scene, verdict in verdicts if len(scene.things) == 2]
    assert len(pairs) == 6
    assert sum(verdict.motion for verdict in pairs) >= 4


@pytest.mark.slow
def test_image_to_video_keeps_the_image_and_moves_as_it_is_told(encoder, local):
    """Two of these have two things."""
    checkpoint, moved = Checkpoint.open(bundled.find(bundled.DEMO_I2V)), 0
    for seed, (scene, prompt) in enumerate(image_cases(8)):
        image = first_frame(scene)
        clip = generate(local, checkpoint, encoder, prompt, image=image, seed=seed, steps=10)
        assert kept(local, checkpoint, image, clip) >= 24, prompt
        moved += judge(clip, scene).motion
    assert moved >= 7


@pytest.mark.slow
def test_a_long_video_from_a_start_image_keeps_what_the_image_shows(encoder, local):
    checkpoint = Checkpoint.open(bundled.find(bundled.DEMO_I2V))
    scene, prompt = next(case for case in image_cases() if case[0].name == "black: yellow square left")
    settings = {"seed": 1, "steps": 8, "frames": 25, "windows": Windows(17, 8)}
    clip = generate(local, checkpoint, encoder, prompt, image=first_frame(scene), **settings)
    area = (nearest(clip, [BACKGROUNDS["black"], COLOURS["yellow"]]) == 1).flatten(1).sum(1)
    assert len(clip) == 25 and area.min() > 0.7 * area[0] and area.max() < 1.4 * area[0], area


def test_another_prompt_with_the_same_noise_is_another_video_and_the_negative_prompt_is_heard(demo, encoder, local):
    common = {"seed": 7, "steps": 20}
    red = generate(local, demo, encoder, "a red circle on a black background", **common)
    blue = generate(local, demo, encoder, "a blue circle on a black background", **common)
    assert red[..., 0].max() > red[..., 2].max() + 0.3 and blue[..., 2].max() > blue[..., 0].max() + 0.3
    away = generate(local, demo, encoder, "a circle on a background", negative_prompt="on a black background", **common)
    assert away.mean() > 0.3
