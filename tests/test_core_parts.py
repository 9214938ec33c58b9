"""ComfyUI's own CogVideoX parts beside ours: the same weights give the same text states, frames and velocities.

The core's code runs in its own interpreter, once; its results come back in a file. tests/support/narrow_core.py says what of it
is not as it is shipped.
"""

import subprocess

import pytest
import torch
from diffusers import AutoencoderKLCogVideoX
from safetensors.torch import load_file, save_file

from parallel_backend.cogvideox.checkpoint.checkpoint import Checkpoint
from parallel_backend.cogvideox.pipeline.text import TextEncoder
from parallel_backend.cogvideox.transformer.positions import rotary_tables
from parallel_backend.cogvideox.vae import codec
from parallel_backend.jobs import DecodeJob, EncodeJob, SampleJob, empty_latent
from parallel_backend.model import Model

from .conftest import NEGATIVE, PROMPT, REPO, TOLERANCE, Broken, made
from .support.comfyui_server import find_comfyui, find_python
from .support.core_files import CoreFiles
from .support.norms import without_norms

pytestmark = pytest.mark.skipif(
    not ((find_comfyui() or REPO) / "comfy" / "ldm" / "cogvideo").is_dir(),
    reason="no ComfyUI with CogVideoX of its own here (0.33 has it): set COMFYUI_PATH, or put it at ~/comfy/ComfyUI",
)

WEIGHTED = "a (red circle:1.3), (((moves) left:0.6)) over) a (blue:-0.5) [city] (at night"
ESCAPED = r"a \(red:2\) circle (moves \(left\):1.2) embedding:nothing, over a city"
LONG = "a red circle moves left over a blue city at night while it rains " * 20
IN_THE_CORE = """
import sys
comfyui, tests, given, transformer, text_encoder, vae, result = sys.argv[1:]
sys.path[:0] = [comfyui, tests]
sys.argv = [sys.argv[0], "--cpu"]
import torch
import comfy.options
comfy.options.enable_args_parsing()
import narrow_core
from norms import without_norms
import comfy.sd, comfy.utils
given, found = comfy.utils.load_torch_file(given), {}
with torch.inference_mode():
    model = comfy.sd.load_diffusion_model(transformer).model.diffusion_model
    names = {name for name, _ in model.named_parameters()}
    assert names == set(comfy.utils.load_torch_file(transformer)), names ^ set(comfy.utils.load_torch_file(transformer))
    found["velocity"] = model(given["x"], given["timestep"], given["text"], ofs=given["ofs"])
    loaded = comfy.sd.VAE(sd=comfy.utils.load_torch_file(vae))
    for norms in ("", " without norms"):
        if norms:
            without_norms(loaded.first_stage_model)
        for name, value in given.items():
            if name.startswith(("latent", "still")):
                found[name + norms] = loaded.decode(value)
            if name.startswith("pixels"):
                found[name + norms] = loaded.encode(value)
    clip = comfy.sd.load_clip([text_encoder], embedding_directory=[comfyui + "/models/embeddings"], clip_type=comfy.sd.CLIPType.COGVIDEOX)
    for name in ("prompt", "negative", "empty", "weighted", "escaped", "long"):
        words = bytes(given[name].tolist()).decode()
        found[name] = clip.encode_from_tokens_scheduled(clip.tokenize(words))[0][0]
comfy.utils.save_torch_file({name: value.float().contiguous() for name, value in found.items()}, result)
"""


@pytest.fixture
def files(core_models) -> CoreFiles:
    return core_models["1.5-5b-i2v"]


@pytest.fixture(scope="module")
def given() -> dict[str, torch.Tensor]:
    """What both sides are asked; texts as bytes."""
    generator = torch.Generator().manual_seed(8)
    texts = {"prompt": PROMPT, "negative": NEGATIVE, "empty": "", "weighted": WEIGHTED, "escaped": ESCAPED, "long": LONG}
    return {
        "x": torch.randn(2, 32, 4, 8, 12, generator=generator),
        "timestep": torch.tensor([700.0, 700.0]),
        "text": torch.randn(2, 226, 32, generator=generator),
        "ofs": torch.tensor([2.0]),
        **{f"latent {count}": torch.randn(1, 16, count, 6, 10, generator=generator) for count in (1, 3, 5)},
        **{f"still {count}": torch.randn(1, 16, 1, 6, 10, generator=generator).repeat(1, 1, count, 1, 1) for count in (3, 5)},
        **{f"pixels {count}": torch.rand(count, 48, 80, 3, generator=generator) for count in (1, 9, 13, 17)},
        **{name: torch.tensor([*words.encode()], dtype=torch.uint8) for name, words in texts.items()},
    }


@pytest.fixture(scope="module")
def from_core(made_core_models, given, tmp_path_factory) -> dict[str, torch.Tensor] | Broken:
    if isinstance(made_core_models, Broken):
        return made_core_models
    files = made_core_models["1.5-5b-i2v"]
    folder = tmp_path_factory.mktemp("exchange")
    save_file({name: value for name, value in given.items()}, folder / "given.safetensors")
    paths = (
        find_comfyui(),
        REPO / "tests" / "support",
        folder / "given.safetensors",
        files.transformer,
        files.text_encoder,
        files.vae,
    )
    command = [find_python(find_comfyui()), "-c", IN_THE_CORE, *paths, folder / "found.safetensors"]
    run = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300)
    if run.returncode:
        return Broken([f"the ComfyUI at {find_comfyui()} failed: {(run.stderr.strip() or 'it said nothing').splitlines()[-1]}"])
    return load_file(folder / "found.safetensors")


@pytest.fixture
def core(from_core) -> dict[str, torch.Tensor]:
    """What the core makes of it."""
    return made(from_core)


def difference(one: torch.Tensor, other: torch.Tensor) -> float:
    assert one.shape == other.shape
    return (one - other).abs().max().item()


@torch.inference_mode()
def test_a_file_with_the_core_s_names_is_to_us_what_it_is_to_the_core(files, given, core):
    checkpoint = Checkpoint.open(files.transformer)
    transformer = checkpoint.load_transformer(torch.float32)
    found = transformer(
        hidden_states=given["x"].transpose(1, 2),
        encoder_hidden_states=given["text"],
        timestep=given["timestep"],
        ofs=given["ofs"],
        image_rotary_emb=rotary_tables(checkpoint, *given["x"].shape[2:], torch.device("cpu")),
        return_dict=False,
    )[0]
    assert difference(found.transpose(1, 2), core["velocity"]) <= 1e-5


def test_the_core_s_text_is_ours_and_gives_the_same_video(files, core, local):
    encoder = TextEncoder(Checkpoint.open(files.folder), device=torch.device("cpu"), dtype=torch.float32)
    words = {"prompt": PROMPT, "negative": NEGATIVE, "empty": "", "weighted": WEIGHTED, "escaped": ESCAPED}
    ours = {name: encoder.encode_prompt(text) for name, text in words.items()}
    for name, states in ours.items():
        assert difference(states, core[name]) <= TOLERANCE, name
    assert difference(ours["prompt"], ours["negative"]) > 0.1
    assert core["long"].shape[1] > 226  # not cut off: the sampler does that, and says so
    image = torch.randn(1, 16, 1, 6, 10, generator=torch.Generator().manual_seed(9))
    latents = []
    for texts, path in ((ours, files.folder), (core, files.transformer)):
        empty = empty_latent(width=80, height=48, frames=9)
        job = SampleJob(Model(str(path)), texts["prompt"], empty, texts["negative"], seed=2, steps=4, image=image)
        latents.append(local.sample(job).tensor)
    assert difference(*latents) <= TOLERANCE


def without(files) -> torch.nn.Module:
    """Our VAE with its group norms off: the core takes their statistics over other chunks of frames than diffusers does."""
    module = Checkpoint.open(files.folder).load_vae(torch.float32)
    without_norms(module)
    return module


@pytest.mark.parametrize("count", [1, 3, 5])
def test_the_core_decodes_our_latents_to_our_frames(count, files, given, core, local):
    """But for the norms' chunks: they meet in a single frame, in a still video, and where the norms are off."""
    same = f"still {count}" if count > 1 else "latent 1"
    job = DecodeJob(Model(str(files.folder)), given[same])
    assert difference(local.decode(job).tensor, core[same]) <= 1e-3
    moving = f"latent {count}"
    assert difference(codec.decode(without(files), given[moving]), core[f"{moving} without norms"]) <= 1e-3


@pytest.mark.parametrize("frames", [1, 9, 13, 17])
@torch.inference_mode()
def test_our_vae_encode_is_diffusers_at_every_length_and_the_core_s_is_not_at_8k_plus_1(frames, files, given, core, local):
    """The core forgets the context of a first chunk of one frame, whatever the norms do."""
    pixels = given[f"pixels {frames}"]
    ours = local.encode(EncodeJob(Model(str(files.folder)), pixels)).tensor
    reference = AutoencoderKLCogVideoX.from_pretrained(files.folder / "vae")
    expected = reference.encode(pixels.permute(3, 0, 1, 2)[None] * 2 - 1).latent_dist.mode()
    assert difference(ours, expected) <= 1e-5  # rounding: norms are computed in another order than diffusers'
    found = difference(codec.encode(without(files), pixels), core[f"pixels {frames} without norms"])
    assert found > 0.1 if frames in (9, 17) else found <= 1e-3
