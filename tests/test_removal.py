"""Object removal (VOID): the condition of its training, and the latents of ComfyUI's own nodes in both passes and every plan."""

import subprocess
from collections.abc import Callable

import pytest
import torch
from diffusers import CogVideoXPipeline
from safetensors.torch import load_file, save_file

from parallel_backend.cogvideox.checkpoint.checkpoint import Checkpoint
from parallel_backend.cogvideox.pipeline import conditions, removal
from parallel_backend.cogvideox.vae import codec
from parallel_backend.devices import Devices
from parallel_backend.executor.replicas import ReplicasExecutor
from parallel_backend.jobs import EncodeJob, SampleJob, empty_latent
from parallel_backend.model import Model, Windows
from parallel_backend.plan import Plan

from .conftest import REPO, TOLERANCE, Broken, made
from .support import void
from .support.comfyui_server import find_comfyui, find_python
from .support.norms import without_norms

LIKE = "1.5-5b-void"
WIDTH, HEIGHT, FRAMES = 96, 64, 13
OF_THE_CORE = (find_comfyui() or REPO) / "comfy_extras" / "nodes_void.py"
needs_core = pytest.mark.skipif(
    not OF_THE_CORE.is_file(), reason="no ComfyUI with VOID's nodes here (0.33 has them): set COMFYUI_PATH"
)


def difference(one: torch.Tensor, other: torch.Tensor) -> float:
    assert one.shape == other.shape
    return (one - other).abs().max().item()


def levels(mask: torch.Tensor) -> list[int]:
    """The different values of a mask, as whole numbers up to 255."""
    return sorted({*(mask * 255).round().int().flatten().tolist()})


def clip(frames: int, width: int, height: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A video and a mask of four levels as VOID's authors store it, in squares of 16 pixels; both in 0..1."""
    generator = torch.Generator().manual_seed(8)
    squares = torch.randint(4, (frames, height // 16, width // 16), generator=generator)
    mask = torch.tensor([0.0, 63, 127, 255])[squares] / 255
    mask = mask.repeat_interleave(16, dim=1).repeat_interleave(16, dim=2)
    return torch.rand(frames, height, width, 3, generator=generator), mask.contiguous()


def shown(local, path, video: torch.Tensor, stored: torch.Tensor) -> dict[str, torch.Tensor]:
    """What a model is shown, as fields of a job."""
    pixels, _ = conditions.to_show(video, 1 - stored, noise=0.0, removes=True)
    return {name: local.encode(EncodeJob(Model(str(path)), part)).tensor for name, part in pixels.items()}


def test_a_mask_has_the_levels_of_the_training_and_the_video_is_whole():
    video, stored = clip(FRAMES, WIDTH, HEIGHT)
    pixels, ready = conditions.to_show(video, 1 - stored, noise=0.0, removes=True)
    assert ready == {} and torch.equal(pixels["masked_video"], video)
    assert levels(removal.rounded(1 - stored)) == [0, 127, 255]  # what is removed and affected counts as removed
    expected = (1 - void.trained_mask(stored))[..., None].expand(-1, -1, -1, 3)
    assert difference(pixels["mask"] * 2 - 1, expected) <= 1e-6
    between = (torch.arange(255) + 0.25) / 255  # as resizing leaves them
    assert torch.equal(removal.rounded(between), void.trained_mask(1 - between))


@pytest.fixture(scope="module")
def pipeline(checkpoints):
    found = CogVideoXPipeline.from_pretrained(checkpoints[LIKE])
    found.set_progress_bar_config(disable=True)
    return found


@pytest.fixture(scope="module")
def long_job(checkpoints, make_job, local) -> SampleJob:
    """Three windows of 21 frames that overlap by 8, from noise that is given."""
    encoded = shown(local, checkpoints[LIKE], *clip(53, 64, 48))
    noise = torch.randn(1, 16, 14, 6, 8, generator=torch.Generator().manual_seed(4))
    windows = Windows(21, 8, shuffle_noise=False)
    return make_job(LIKE, size=(64, 48, 53), steps=4, cfg=1.0, noise=noise, windows=windows, **encoded)


@pytest.fixture(scope="module")
def by_its_authors(long_job, pipeline, texts) -> torch.Tensor:
    settings = {"steps": 4, "window": 6, "overlap": 2, "cfg": 1.0, "texts": texts[LIKE], "noise": long_job.noise}
    return void.remove(pipeline, *clip(53, 64, 48), **settings)


def test_windows_give_the_latents_of_its_authors_formula(long_job, by_its_authors, local):
    assert difference(local.sample(long_job).tensor, by_its_authors) <= TOLERANCE


def test_replicas_share_the_windows_and_give_the_same(long_job, by_its_authors):
    executor = ReplicasExecutor(Plan.parse("replicas2"), Devices("cpu", (0, 1)))
    try:
        assert difference(executor.sample(long_job).tensor, by_its_authors) <= TOLERANCE
    finally:
        executor.close()


@pytest.mark.parametrize("cfg", [1.0, 6.0])
def test_one_window_gives_the_latents_of_its_authors_formula(cfg, pipeline, checkpoints, texts, make_job, local):
    """From the seed, and with guidance as in the second pass of its authors."""
    video, stored = clip(FRAMES, 64, 48)
    encoded = shown(local, checkpoints[LIKE], video, stored)
    noise = torch.randn(1, 4, 16, 6, 8, generator=torch.Generator().manual_seed(3)).transpose(1, 2)
    settings = {"steps": 3, "cfg": cfg}
    expected = void.remove(pipeline, video, stored, noise=noise, texts=texts[LIKE], window=4, overlap=1, **settings)
    assert difference(local.sample(make_job(LIKE, size=(64, 48, FRAMES), **encoded, **settings)).tensor, expected) <= TOLERANCE


@pytest.fixture(scope="module")
def given() -> dict[str, torch.Tensor]:
    """What both sides are given."""
    generator = torch.Generator().manual_seed(9)
    video, stored = clip(FRAMES, WIDTH, HEIGHT)
    states = {name: torch.randn(1, 226, 32, generator=generator) for name in ("positive", "negative")}
    return {"video": video, "stored mask": stored, **states}


@pytest.fixture(scope="module")
def from_core(made_core_models, given, tmp_path_factory) -> dict[str, torch.Tensor] | Broken:
    if isinstance(made_core_models, Broken):
        return made_core_models
    files = made_core_models[LIKE]
    exchange = tmp_path_factory.mktemp("exchange")
    save_file(given, exchange / "given.safetensors")
    command = [
        find_python(find_comfyui()),
        REPO / "tests" / "support" / "void_core.py",
        find_comfyui(),
        exchange / "given.safetensors",
        files.transformer,
        files.vae,
        exchange / "found.safetensors",
    ]
    run = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=600)
    if run.returncode:
        return Broken([f"the ComfyUI at {find_comfyui()} failed: {(run.stderr.strip() or 'it said nothing').splitlines()[-1]}"])
    return load_file(exchange / "found.safetensors")


@pytest.fixture
def core(from_core) -> dict[str, torch.Tensor]:
    """What the core's nodes make of it."""
    return made(from_core)


@pytest.fixture
def job_of(core, core_models, given) -> Callable[..., SampleJob]:
    """Makes the job of a pass of the core, with the core's own condition and noise."""

    def make(name: str, **settings) -> SampleJob:
        mask, video = core["condition"].chunk(2, dim=1)
        texts = given["positive"], empty_latent(width=WIDTH, height=HEIGHT, frames=FRAMES), given["negative"]
        settings = {"steps": 4, **settings}
        model = Model(str(core_models[LIKE].transformer))
        return SampleJob(model, *texts, mask=mask, masked_video=video, noise=core[f"noise of {name}"], **settings)

    return make


@needs_core
def test_the_core_s_condition_is_ours_but_for_three_things_that_the_training_does_otherwise(given, core, core_models):
    """It hides the video, scales the mask to -1..1, and keeps a fourth level."""
    video, stored = given["video"], given["stored mask"]
    vae = Checkpoint.open(core_models[LIKE].folder).load_vae(torch.float32)
    without_norms(vae)  # the core takes their statistics over other chunks of frames
    as_core = torch.cat([codec.encode(vae, core[f"{name} pixels"]) for name in ("mask", "video")], dim=1)
    assert difference(as_core, core["condition"]) <= TOLERANCE
    mask = core["mask"]
    assert levels(mask) == [0, 128, 192, 255] and difference(mask, 1 - stored) <= 1e-6
    assert difference(core["video pixels"], video * (1 - mask[..., None])) <= 1e-6
    pixels, _ = conditions.to_show(video, mask, noise=0.0, removes=True)
    assert torch.equal(pixels["masked_video"], video)
    same = (mask < 0.4) | (mask > 0.9)  # the levels that both have
    assert difference((2 * pixels["mask"] - 1)[same], core["mask pixels"][same]) <= 1e-6
    ours = torch.cat([codec.encode(vae, pixels[name]) for name in ("mask", "masked_video")], dim=1)
    apart = (ours - core["condition"]).abs().amax(dim=(0, 2, 3, 4))
    assert (apart > 0.1).all()


@needs_core
@pytest.mark.parametrize("name, cfg", [("first pass", 1.0), ("second pass", 6.0)])
def test_a_pass_gives_the_latents_of_the_core_s_nodes(name, cfg, core, job_of, local):
    assert difference(local.sample(job_of(name, cfg=cfg)).tensor, core[name]) <= TOLERANCE


@needs_core
@pytest.mark.parametrize("plan", ["ulysses2", "ring2", "tensor2", "cfg2"])
def test_a_pass_on_two_processes_gives_the_latents_of_the_core_s_nodes(plan, core, job_of, start_group):
    group = start_group(plan)
    for name, cfg in [("second pass", 6.0)] + [("first pass", 1.0)] * (plan != "cfg2"):
        result = group.sample(job_of(name, cfg=cfg))
        assert result.report.world_size == 2
        assert difference(result.tensor, core[name]) <= TOLERANCE, name


@needs_core
def test_the_core_s_schedule_differs_by_its_end_and_where_steps_do_not_divide_1000(core, job_of, local):
    """It starts with a little signal, 2.2e-4, where the training has none, and rounds timesteps the other way."""
    shipped = difference(core["as shipped"], core["first pass"])
    assert 1e-4 < shipped < 1e-2
    name = "three steps"
    by_hand = local.sample(job_of(name, cfg=1.0, steps=3, timesteps=(999, 666, 333))).tensor
    assert difference(by_hand, core[name]) <= TOLERANCE
    assert difference(local.sample(job_of(name, cfg=1.0, steps=3)).tensor, core[name]) > 0.01  # 999, 666, 332
