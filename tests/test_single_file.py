"""A transformer in one file is told by its header, and gives what its folder gives."""

import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from parallel_backend.cli.parser import main
from parallel_backend.cogvideox.checkpoint import single_file
from parallel_backend.cogvideox.checkpoint.checkpoint import Checkpoint
from parallel_backend.cogvideox.checkpoint.description import conclusions
from parallel_backend.cogvideox.pipeline import validation
from parallel_backend.errors import RequestError
from parallel_backend.jobs import DecodeJob, EncodeJob, SampleJob, empty_latent
from parallel_backend.model import Model

from .conftest import TOLERANCE
from .support.single_files import LAYOUTS, WEIGHTS, republish, save_as

PUBLISHED = {"sample_width": 90, "sample_height": 60, "sample_frames": 49, "max_text_seq_length": 226}
PUBLISHED_1_5 = {"sample_width": 300, "sample_height": 300, "sample_frames": 81, "max_text_seq_length": 226}
CHANGES = {
    "2b": {**PUBLISHED, "num_attention_heads": 30, "attention_head_dim": 16, "num_layers": 2},
    "5b": PUBLISHED,
    "5b-i2v": PUBLISHED,
    "1.5-5b": PUBLISHED_1_5,
    "1.5-5b-i2v": PUBLISHED_1_5,
}
"""What is published and no weight tells; and the 2b's heads, which tell its family."""
SIZES = {"5b-i2v": (720, 480, 1)}
"""The one size of learned positions; any other model takes a small one."""


@pytest.fixture(scope="module")
def folders(checkpoints, tmp_path_factory):
    root = tmp_path_factory.mktemp("published")
    return {like: republish(checkpoints[like], root / like, **changes) for like, changes in CHANGES.items()}


@pytest.fixture(scope="module")
def files(folders, tmp_path_factory):
    root = tmp_path_factory.mktemp("files")
    return {like: {layout: save_as(folder, root / f"{index}-{layout}.safetensors", layout) for layout in LAYOUTS}
            for index, (like, folder) in enumerate(folders.items())}  # fmt: skip


def job_for(path, like: str, **settings) -> SampleJob:
    generator = torch.Generator().manual_seed(7)
    width, height, frames = SIZES.get(like, (80, 48, 9))
    if like.endswith("-i2v"):
        settings["image"] = torch.randn(1, 16, 1, height // 8, width // 8, generator=generator)
    positive, negative = torch.randn(2, 1, 226, 32, generator=generator)
    latent = empty_latent(width=width, height=height, frames=frames)
    return SampleJob(
        Model(str(path), dtype=settings.pop("dtype", "auto")), positive, latent, negative, seed=4, steps=2, **settings
    )


@pytest.mark.parametrize("like", CHANGES)
def test_a_file_gives_the_latents_of_its_folder(like, folders, files, local):
    """Not to the bit: the same weights lie at other addresses in another file, where kernels round otherwise (2e-5)."""
    expected = local.sample(job_for(folders[like], like)).tensor
    found = local.sample(job_for(files[like]["core"], like)).tensor
    assert (found - expected).abs().max() <= TOLERANCE


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("like", CHANGES)
def test_every_layout_loads_what_the_folder_loads(like, dtype, folders, files):
    expected = tensors_of(Checkpoint.open(folders[like]).load_transformer(dtype))
    for layout, path in files[like].items():
        model = Checkpoint.open(path).load_transformer(dtype)
        found = tensors_of(model)
        assert found.keys() == expected.keys(), layout
        for name, tensor in expected.items():
            assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), (layout, name)
        assert not model.training and not any(weight.requires_grad for weight in model.parameters())


def tensors_of(model) -> dict[str, torch.Tensor]:
    """Every parameter and buffer, those too that no file holds."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


@pytest.mark.parametrize("like", CHANGES)
def test_what_the_header_tells_is_what_the_folder_says(like, folders, files):
    folder = Checkpoint.open(folders[like])
    for path in files[like].values():
        found = Checkpoint.open(path)
        assert found.transformer == {name: folder.transformer.get(name) for name in found.transformer}
        assert found.scheduler == {name: folder.scheduler[name] for name in found.scheduler}
        assert found.scaling_factor == folder.scaling_factor
        assert found.image_scale("auto") == folder.image_scale("auto")
        assert found.elements == {"transformer": folder.elements["transformer"]}
        assert found.default_size == folder.default_size
        assert found.describe == folder.describe.replace(folder.path.name, path.name)


def test_published_values_of_the_families(files):
    found = {like: Checkpoint.open(paths["core"]) for like, paths in files.items()}
    assert {like: checkpoint.scheduler["snr_shift_scale"] for like, checkpoint in found.items()} == {
        "2b": 3.0, "5b": 1.0, "5b-i2v": 1.0, "1.5-5b": 1.0, "1.5-5b-i2v": 1.0,
    }  # fmt: skip
    assert {like: (checkpoint.scaling_factor, checkpoint.image_scale("auto")) for like, checkpoint in found.items()} == {
        "2b": (1.15258426, 1.15258426), "5b": (0.7, 0.7), "5b-i2v": (0.7, 0.7), "1.5-5b": (0.7, 0.7), "1.5-5b-i2v": (0.7, 1 / 0.7),
    }  # fmt: skip
    assert {like: checkpoint.default_scheduler for like, checkpoint in found.items()} == {
        "2b": "ddim", "5b": "dpm", "5b-i2v": "ddim", "1.5-5b": "ddim", "1.5-5b-i2v": "ddim",
    }  # fmt: skip
    assert (found["5b"].default_size, found["1.5-5b"].default_size) == ((720, 480, 49), (1360, 768, 81))


def test_the_name_of_the_file_changes_nothing(files, tmp_path):
    renamed = shutil.copy(files["2b"]["diffusers"], tmp_path / "CogVideoX_Fun_1_5_5b_I2V_Control.safetensors")
    assert Checkpoint.open(renamed).transformer == Checkpoint.open(files["2b"]["diffusers"]).transformer


def test_plain_fp8_is_computed_in_16_bits_and_says_so(folders, local, tmp_path):
    path = save_as(folders["5b"], tmp_path / "fp8.safetensors", "diffusers", torch.float8_e4m3fn)
    checkpoint = Checkpoint.open(path)
    assert checkpoint.native_dtype == "bf16"
    assert "bf16 (stored in F8_E4M3)" in checkpoint.describe
    rounded = republish(folders["5b"], tmp_path / "rounded")
    state = load_file(path)
    save_file({name: weight.float() for name, weight in state.items()}, rounded / WEIGHTS)
    job = job_for(path, "5b")
    found = local.sample(job).tensor
    assert (found - local.sample(job_for(rounded, "5b")).tensor).abs().max() <= TOLERANCE
    assert (found - local.sample(job_for(folders["5b"], "5b")).tensor).abs().max() > 0.01


def test_a_file_is_read_again_only_when_it_changed(folders, files, local, tmp_path):
    path = shutil.copy(files["5b"]["core"], tmp_path / "model.safetensors")
    first = local.sample(job_for(path, "5b")).tensor
    loads = local.status()["loads"]
    local.sample(job_for(path, "5b"))
    assert local.status()["loads"] == loads
    other = republish(folders["5b"], tmp_path / "other", num_layers=1)
    save_as(other, tmp_path / "new.safetensors", "diffusers").rename(path)
    assert not torch.equal(local.sample(job_for(path, "5b")).tensor, first)
    assert Checkpoint.open(path).layers == 1


def refusal(path) -> str:
    with pytest.raises(RequestError) as error:
        Checkpoint.open(path)
    assert "\n" not in str(error.value) and path.name in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    "name, words",
    [
        ("transformer_blocks.0.attn1.to_q.lora_A.weight", "is not a CogVideoX transformer but a LoRA"),
        ("decoder.conv_in.conv.weight", "but a VAE: load it with the core's VAELoader"),
        ("encoder.block.0.layer.0.SelfAttention.q.weight", "but a T5 text encoder: load it with the core's CLIPLoader"),
        ("model.diffusion_model.blocks.0.self_attn.q.weight", "but a Wan"),
        ("double_blocks.0.img_attn.qkv.weight", "but a Flux or HunyuanVideo"),
        ("something.else", "is not a CogVideoX transformer; choose another file"),
    ],
)
def test_another_model_is_named(name, words, tmp_path):
    path = tmp_path / "CogVideoX-5b.safetensors"
    save_file({name: torch.zeros(2, 2)}, path)
    assert words in refusal(path)
    assert not single_file.is_cogvideox(path)


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda state: state.pop("transformer_blocks.1.ff.net.2.bias"), "lacks 1 weights, such as transformer_blocks.1.ff.net.2.bias"),
        (lambda state: state.pop("patch_embed.proj.weight"), "lacks the weight patch_embed.proj.weight"),
        (lambda state: state.update({"combine_linears.0.weight": torch.zeros(2)}), "such as combine_linears.0.weight: .* control branch"),
        (lambda state: state.update({"transformer_blocks.0.ff.net.2.weight_scale": torch.zeros(2)}), "quantised with scales"),
        (lambda state: state.update({"proj_out.bias": torch.zeros(2, dtype=torch.int8)}), "proj_out.bias is stored in I8; use a file"),
        (lambda state: state.update({"patch_embed.pos_embedding": torch.zeros(1, 99, 128)}), "learned positions for 99 tokens"),
    ],
    ids=["missing", "missing shape", "additions", "scaled", "int8", "positions"],
)  # fmt: skip
def test_half_a_model_and_more_than_one_are_refused(change, words, folders, tmp_path):
    state = load_file(folders["5b"] / WEIGHTS)
    change(state)
    save_file(state, tmp_path / "changed.safetensors")
    with pytest.raises(RequestError, match=words):
        Checkpoint.open(tmp_path / "changed.safetensors")
    assert "\n" not in refusal(tmp_path / "changed.safetensors")


def replaced(ending: str, other: str):
    """A change that renames the weights whose names end so."""

    def change(state: dict[str, torch.Tensor]) -> None:
        for name in [name for name in state if name.endswith(ending)]:
            state[name.removesuffix(ending) + other] = state.pop(name)

    return change


def fused(state: dict[str, torch.Tensor]) -> None:
    """Query, key and value in one layer, as diffusers' ``fuse_qkv_projections`` makes it."""
    for name in [name for name in state if ".to_q." in name]:
        parts = [state.pop(name.replace("to_q", f"to_{letter}")) for letter in "qkv"]
        state[name.replace("to_q", "to_qkv")] = torch.cat(parts)


def in_sat_layout(state: dict[str, torch.Tensor]) -> None:
    """Some of the names of CogVideoX's training code."""
    kept = {name: state[name] for name in ("patch_embed.text_proj.weight", "patch_embed.proj.weight")}
    state.clear()
    state |= {f"model.diffusion_model.mixins.{name}": weight for name, weight in kept.items()}
    state["model.diffusion_model.transformer.layers.0.attention.query_key_value.weight"] = torch.zeros(2, 2)


def as_controlnet(state: dict[str, torch.Tensor]) -> None:
    """TheDenk's ControlNet: a model's first blocks, without an end, and an encoder of its own."""
    for name in [name for name in state if name.startswith(("norm_", "proj_out"))]:
        del state[name]
    state["controlnet_encode_first.0.weight"] = torch.zeros(2, 2)


KINDS = [
    (replaced("ff.net.2.weight", "ff.net.2.Q4_0_qweight"), "is quantised as GGUF inside safetensors.*; use the file in bf16"),
    (as_controlnet, "is a ControlNet, which goes with a model; use Load CogVideoX ControlNet"),
    (fused, "has fused query, key and value layers .*; use the model as it was before"),
    (in_sat_layout, "has the layout of CogVideoX's training code .SAT.; convert it with tools/convert_weight_sat2hf.py"),
]


@pytest.mark.parametrize("change, words", KINDS, ids=["Q4_0", "ControlNet", "fused", "SAT"])
def test_another_form_of_a_cogvideox_is_named_as_a_file_and_as_a_folder(change, words, folders, tmp_path):
    folder = shutil.copytree(folders["5b"], tmp_path / "folder")
    state = load_file(folder / WEIGHTS)
    change(state)
    save_file(state, folder / WEIGHTS)
    for path in (shutil.copy(folder / WEIGHTS, tmp_path / "file.safetensors"), folder):
        assert re.search(words, refusal(path))
        assert "download it again" not in refusal(path)


def test_a_git_lfs_pointer_is_named_as_a_file_and_in_a_folder(folders, tmp_path):
    folder = shutil.copytree(folders["5b"], tmp_path / "folder")
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 11140296208\n"
    (folder / WEIGHTS).write_text(pointer)
    for path in (shutil.copy(folder / WEIGHTS, tmp_path / "file.safetensors"), folder):
        assert "is a Git LFS pointer of 136 bytes, not the file itself; run 'git lfs pull' in its folder" in refusal(path)


def test_a_folder_with_tora_s_motion_part_says_that_it_is_not_used(folders, tmp_path):
    folder = shutil.copytree(folders["5b"], tmp_path / "tora")
    state = load_file(folder / WEIGHTS)
    save_file(state | {"fuser_list.0.flow_gamma_spatial.weight": torch.zeros(2, 2)}, folder / WEIGHTS)
    assert conclusions(Checkpoint.open(folder)) == [
        "1 weights are not used, such as fuser_list.0.flow_gamma_spatial.weight: Tora's motion part"
    ]
    assert conclusions(Checkpoint.open(folders["5b"])) == []
    path = shutil.copy(folder / WEIGHTS, tmp_path / "tora.safetensors")
    assert "it is a CogVideoX with Tora's motion part; use the plain" in refusal(path)


def test_files_that_look_like_a_control_model_are_image_models_if_the_user_says_so(folders, tmp_path):
    """5b-I2V without its learned positions, as some exports, and a start-image finetune of 2b."""
    state = load_file(folders["5b-i2v"] / WEIGHTS)
    del state["patch_embed.pos_embedding"]
    save_file(state, tmp_path / "i2v.safetensors")
    assert Checkpoint.open(tmp_path / "i2v.safetensors").task == "control"
    checkpoint = Checkpoint.of(Model(str(tmp_path / "i2v.safetensors"), task="image"))
    assert (checkpoint.task, checkpoint.takes_image, checkpoint.is_fun) == ("image", True, False)
    checkpoint.load_transformer(torch.float32)


def test_a_cut_off_file_and_other_kinds_of_files_are_named(files, tmp_path):
    data = files["5b"]["core"].read_bytes()
    for kept in (0, 5, 200, len(data) - 1):
        path = tmp_path / "cut.safetensors"
        path.write_bytes(data[:kept])
        assert "download it again" in refusal(path)
    for name in ("model.gguf", "model.pt"):
        (tmp_path / name).write_bytes(data)
        assert "is not a .safetensors file; GGUF and pickled files are not supported" in refusal(tmp_path / name)


def test_text_and_vae_come_from_the_loaders_of_the_core(files, local):
    checkpoint, model = Checkpoint.open(files["5b"]["core"]), Model(str(files["5b"]["core"]))
    for job in (DecodeJob(model, torch.zeros(1, 16, 1, 2, 2)), EncodeJob(model, torch.zeros(1, 16, 16, 3))):
        with pytest.raises(RequestError, match="has no VAE; use the core's VAELoader"):
            validation.check(checkpoint, job)
    with pytest.raises(RequestError, match="has no text encoder; use the core's CLIPLoader .type cogvideox."):
        checkpoint.check_text()
    assert checkpoint.weight_bytes("vae", torch.float32) == 0


def test_the_command_line_plans_for_a_file_and_asks_for_a_folder_to_generate(files, tmp_path, capsys):
    path = str(files["5b"]["core"])
    assert main(["plan", "--model", path, "--gpus", "4"]) == 0
    assert "-> cfg2-ulysses2" in capsys.readouterr().out
    assert main(["generate", "--model", path, "--prompt", "a ball", "--output", str(tmp_path / "ball.mp4")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "has no text encoder and no vae" in line and "give a complete folder in diffusers layout" in line
