"""A checkpoint is judged by its files before anything of it is loaded."""

import json
import shutil
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLCogVideoX, CogVideoXTransformer3DModel
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from benchmarks.random_weights import parse
from parallel_backend.cogvideox.checkpoint import checkpoint, index, shards, weights
from parallel_backend.cogvideox.checkpoint.checkpoint import Checkpoint
from parallel_backend.cogvideox.checkpoint.libraries import member
from parallel_backend.cogvideox.pipeline import validation
from parallel_backend.errors import RequestError
from parallel_backend.jobs import DecodeJob
from parallel_backend.model import DTYPES, Model

IMAGE, VIDEO = torch.ones(1, 16, 1, 8, 12), torch.ones(1, 16, 3, 8, 12)
INPAINT = {"masked_video": VIDEO, "mask": VIDEO[:, :1]}
REMOVAL = {"masked_video": VIDEO, "mask": VIDEO}


def configure(folder, **changes) -> None:
    """Changes the transformer's configuration."""
    path = folder / "transformer" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture
def broken(checkpoints, tmp_path):
    """A copy to break."""
    return shutil.copytree(checkpoints["5b"], tmp_path / "broken")


def refusal(path) -> str:
    with pytest.raises(RequestError) as error:
        Checkpoint.open(path)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_what_a_checkpoint_can_do_comes_from_its_configurations(checkpoints):
    old, new, newest = (Checkpoint.open(checkpoints[like]) for like in ("2b", "5b", "1.5-5b"))
    assert (old.rotary, new.rotary, newest.rotary) == (False, True, True)
    assert (old.default_scheduler, new.default_scheduler) == ("ddim", "dpm")
    assert (old.scaling_factor, new.scaling_factor) == (1.15258426, 0.7)
    assert (new.patch_size_t, newest.patch_size_t) == (None, 2)
    assert (new.default_fps, newest.default_fps) == (8, 16)
    assert new.default_size == (96, 64, 17)
    assert new.native_dtype == "fp32"
    assert new.dtype("auto", torch.device("cpu")) == torch.float32


def test_what_a_video_is_made_from_comes_from_the_configurations_and_not_from_the_name(checkpoints, broken):
    tasks = {"": "text", "i2v": "image", "control": "control", "inp": "inpaint", "void": "removal"}
    found = {like: Checkpoint.open(path) for like, path in checkpoints.items()}
    assert {like: checkpoint.task for like, checkpoint in found.items()} == {like: tasks[parse(like)[1]] for like in found}
    assert "CogVideoX 1.0, text to video, 3 layers, 4 heads, rotary, fp32" in found["5b"].describe
    assert "CogVideoX 1.0, image to video, 3 layers, 4 heads, rotary and learned, fp32" in found["5b-i2v"].describe
    assert "CogVideoX 1.5, image to video, 3 layers, 4 heads, rotary, fp32" in found["1.5-5b-i2v"].describe
    assert "CogVideoX 1.0, control video to video, 3 layers, 4 heads, sincos, fp32" in found["2b-control"].describe
    assert "CogVideoX 1.5, inpainting, first and last frame, 3 layers, 4 heads, rotary, fp32" in found["1.5-5b-inp"].describe
    assert (found["5b-i2v"].ofs, found["1.5-5b-i2v"].ofs) == (None, 2.0)
    assert "CogVideoX 1.5, object removal, 3 layers, 4 heads, rotary, fp32" in found["1.5-5b-void"].describe
    configure(broken, in_channels=40)
    assert "not supported yet (40 channels in)" in Checkpoint.open(broken).describe


@pytest.mark.parametrize(
    "changes, pipeline, task",
    [
        ({}, "CogVideoXFunControlPipeline", "control"),
        ({}, "CogVideoXPipeline", "control"),
        ({}, None, "control"),  # the CogVideoX wrapper's folders have no model_index.json
        ({}, "CogVideoXImageToVideoPipeline", "image"),
        ({"use_learned_positional_embeddings": True}, "CogVideoXPipeline", "image"),
        ({"patch_size_t": 2, "ofs_embed_dim": 64}, None, "image"),
        ({"patch_size_t": 2}, None, "control"),
    ],
)
def test_32_channels_are_an_image_where_positions_or_ofs_or_the_pipeline_say_so(changes, pipeline, task, broken):
    configure(broken, in_channels=32, **changes)
    index = broken / "model_index.json"
    index.write_text(json.dumps({"_class_name": pipeline}))
    if pipeline is None:
        index.unlink()
    assert Checkpoint.open(broken).task == task


def test_the_published_fun_models_make_whole_tokens_at_8_frames_a_second_and_know_of_noise(checkpoints, broken):
    configure(broken, in_channels=33, patch_size_t=2, sample_width=300, sample_height=300, sample_frames=81)
    checkpoint = Checkpoint.open(broken)
    assert (checkpoint.default_size, checkpoint.default_fps) == ((1360, 768, 85), 8)
    assert Checkpoint.open(checkpoints["1.5-5b-i2v"]).default_fps == 16
    anisora = Checkpoint.open(checkpoints["anisora-i2v"])
    assert (anisora.default_size, anisora.default_fps, anisora.most_frames) == ((1280, 720, 49), 16, 97)
    assert checkpoint.reference_noise == 0
    configure(broken, add_noise_in_inpaint_model=True)
    assert Checkpoint.open(broken).reference_noise == 0.0563


def test_the_published_removal_model_makes_windows_of_85_frames_at_12_a_second_without_guidance(broken):
    configure(broken, in_channels=48, patch_size_t=2, sample_width=300, sample_height=300, sample_frames=81)
    checkpoint = Checkpoint.open(broken)
    assert (checkpoint.default_size, checkpoint.most_frames) == ((672, 384, 85), 85)
    assert (checkpoint.default_fps, checkpoint.default_cfg) == (12, 1.0)
    assert "672x384x85 at 12 fps" in checkpoint.describe


@pytest.mark.parametrize("like, auto", [("5b-i2v", 0.7), ("1.5-5b-i2v", 1 / 0.7), ("2b-i2v", 1.15258426)])
def test_a_start_image_is_scaled_as_the_checkpoint_says_or_as_a_person_says(like, auto, checkpoints):
    checkpoint = Checkpoint.open(checkpoints[like])
    assert checkpoint.image_scale() == checkpoint.image_scale("auto") == auto
    factor = checkpoint.scaling_factor
    assert [checkpoint.image_scale(name) for name in ("inverse", "raw", "scaled")] == [1 / factor, 1.0, factor]


def test_the_published_1_5_says_how_far_its_positions_reach_and_not_its_size(checkpoints, broken):
    configure(broken, patch_size_t=2, sample_width=300, sample_height=300, sample_frames=81)
    checkpoint = Checkpoint.open(broken)
    assert (checkpoint.positions_size, checkpoint.default_size) == ((2400, 2400), (1360, 768, 81))


@pytest.mark.parametrize(
    "like, changes, settings, words",
    [
        ("5b", {}, {"image": IMAGE}, "text alone; .* image-to-video model, such as CogVideoX-5b-I2V or CogVideoX1.5-5B-I2V"),
        ("5b-i2v", {}, {}, "needs a start image .* text-to-video model, such as CogVideoX-2b"),
        ("5b", {"in_channels": 40}, {}, "takes 40 channels, which is not supported yet; .*CogVideoX-5b-I2V"),
        ("5b", {"in_channels": 40}, {"image": IMAGE}, "takes 40 channels"),
        ("5b", {}, {"control": VIDEO}, "text alone; for a control video use a control model, such as .*-Control or .*-Pose"),
        ("5b", {}, INPAINT, "text alone; for an end image or a mask use an inpaint model, such as .*-InP"),
        ("5b-i2v", {}, {"image": IMAGE, "control": VIDEO}, "from a start image; for a control video use a control model"),
        ("5b-i2v", {}, {"image": IMAGE, **INPAINT}, "from a start image; for an end image or a mask use an inpaint model"),
        ("5b-control", {}, {}, "needs a control video \\(CogVideoX Control To Video, or --control-video\\)"),
        ("5b-control", {}, {"control": VIDEO, "image": IMAGE}, "from a control video; for a start image use an image-to-video"),
        ("5b-inp", {}, {"control": VIDEO}, "what is missing of a video; for a control video use a control model"),
        ("5b-inp", {}, {"image": IMAGE}, "takes a start image as a masked video.*the VAE of this checkpoint"),
        ("5b-inp", {}, REMOVAL, "what is missing of a video, and the mask was made for an object removal model; connect"),
        ("1.5-5b-void", {}, INPAINT, "removes objects from a video, and the mask was made for an inpaint model; connect"),
        ("1.5-5b-void", {}, {}, "needs a video and a mask of what to remove \\(CogVideoX Inpaint, or --video and --mask\\)"),
        ("1.5-5b-void", {}, {"image": IMAGE}, "removes objects from a video; for a start image use an image-to-video model"),
        ("1.5-5b-void", {}, {"control": VIDEO}, "removes objects from a video; for a control video use a control model"),
        ("1.5-5b-void", {}, REMOVAL, "needs a multiple of 2 latent frames and the video has 3: use 13 frames"),
        ("1.5-5b-inp", {}, {}, "needs a multiple of 2 latent frames and the video has 3: use 13 frames"),
        ("1.5-5b-control", {}, {"control": VIDEO}, "needs a multiple of 2 latent frames and the video has 3: use 13 frames"),
        ("5b-i2v", {}, {"size": (80, 48, 9), "image": IMAGE[..., :6, :10]}, "positions for 96x64 only .* 80x48; use 96x64"),
    ],
)
def test_a_model_given_what_it_cannot_take_says_which_can(like, changes, settings, words, checkpoints, make_job, tmp_path):
    folder = shutil.copytree(checkpoints[like], tmp_path / "model")
    configure(folder, **changes)
    with pytest.raises(RequestError, match=words) as error:
        validation.check(Checkpoint.open(folder), make_job(like, **{"size": (96, 64, 9), **settings}))
    assert "\n" not in str(error.value)


def test_the_name_of_the_folder_changes_nothing(checkpoints, tmp_path):
    renamed = shutil.copytree(checkpoints["2b"], tmp_path / "CogVideoX1.5-5B-I2V-fun")
    assert Checkpoint.open(renamed).default_scheduler == "ddim"
    assert Checkpoint.open(renamed).patch_size_t is None


def test_weights_are_counted_without_being_read(checkpoints):
    checkpoint = Checkpoint.open(checkpoints["2b"])
    numbers = sum(weight.numel() for weight in checkpoint.load_transformer(torch.float32).parameters())
    assert checkpoint.weight_bytes("transformer", torch.bfloat16) == pytest.approx(2 * numbers, rel=0.05)


def test_a_folder_is_read_again_only_when_a_file_of_it_changed(broken, monkeypatch):
    read = []
    header, config = weights.header, checkpoint.read_config
    monkeypatch.setattr(weights, "header", lambda path: read.append(path) or header(path))
    for module in (checkpoint, index):
        monkeypatch.setattr(module, "read_config", lambda *names: read.append(names) or config(*names))
    first = Checkpoint.open(broken)
    assert read
    read.clear()
    assert Checkpoint.open(str(broken)) == first
    assert first.weight_bytes("vae", torch.float32) and not read
    path = broken / "scheduler" / "scheduler_config.json"
    path.write_text(path.read_text().replace("DPM", "DDIM"))
    assert (first.default_scheduler, Checkpoint.open(broken).default_scheduler) == ("dpm", "ddim")
    (broken / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    assert "no weights" in refusal(broken)


def test_a_folder_can_borrow_parts_of_the_one_beside_it(checkpoints, tmp_path):
    lender, borrower = shutil.copytree(checkpoints["5b"], tmp_path / "lender"), tmp_path / "borrower"
    borrower.mkdir()
    (lender / "transformer").rename(borrower / "transformer")
    (borrower / "model_index.json").write_text(json.dumps({index.LENDER: "lender"}))
    ours, whole = Checkpoint.open(borrower), Checkpoint.open(checkpoints["5b"])
    ours.check_whole()
    assert ours.elements == whole.elements
    for part in ("transformer", "vae", "text_encoder"):
        one, other = (getattr(each, f"load_{part}")(torch.float32).state_dict() for each in (ours, whole))
        assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    assert ours.load_tokenizer()("a red ball").input_ids == whole.load_tokenizer()("a red ball").input_ids
    path = lender / "scheduler" / "scheduler_config.json"
    path.write_text(path.read_text().replace("DPM", "DDIM"))
    assert Checkpoint.open(borrower).default_scheduler == "ddim"
    for elsewhere in ("..", "/etc", "../../lender/.."):
        (borrower / "model_index.json").write_text(json.dumps({index.LENDER: elsewhere}))
        assert "has no" in refusal(borrower)
    (borrower / "model_index.json").write_text(json.dumps({index.LENDER: "lender"}))
    assert Checkpoint.open(borrower).default_scheduler == "ddim"
    shutil.rmtree(lender)
    assert "has no" in refusal(borrower)


def test_a_missing_or_empty_folder_is_named(tmp_path):
    assert "no checkpoint folder" in refusal(tmp_path / "none")
    assert "is empty" in refusal(tmp_path)


@pytest.mark.parametrize("part", ["transformer", "vae", "scheduler", "tokenizer"])
def test_half_a_checkpoint_names_what_is_missing(broken, part):
    shutil.rmtree(broken / part)
    assert part in refusal(broken)


@pytest.mark.parametrize("part", ["transformer", "vae"])
def test_missing_weights_are_named(broken, part):
    (broken / part / "diffusion_pytorch_model.safetensors").unlink()
    assert f"no weights in {broken / part}" in refusal(broken)


def test_a_missing_shard_is_named(broken):
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    folder = broken / "transformer"
    (folder / "diffusion_pytorch_model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    assert "lacks" in refusal(broken) and "model-00002-of-00002" in refusal(broken)


def test_pickled_weights_are_refused(broken):
    weights = broken / "transformer" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    assert "only safetensors" in refusal(broken)


@pytest.mark.parametrize("keep", [0, 7, 100, 0.5, -1])
def test_a_cut_off_file_is_noticed(broken, keep):
    weights = broken / "vae" / "diffusion_pytorch_model.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[: int(len(data) * keep)] if isinstance(keep, float) else data[:keep])
    assert str(weights) in refusal(broken) and "download it again" in refusal(broken)


def brief(content) -> str:
    """The name of a test case."""
    return str(content)[:20]


NO_OBJECT = [b"", bytes(range(256)), b"[]", b"null", b'"x"', b"[" * 100_000]


@pytest.mark.parametrize("content", [*NO_OBJECT, None], ids=brief)
@pytest.mark.parametrize("name", ["model_index.json", "transformer/config.json", "scheduler/scheduler_config.json"])
def test_a_configuration_that_cannot_be_read_is_named(name, content, broken):
    path = broken / name
    path.unlink(missing_ok=True)
    path.mkdir() if content is None else path.write_bytes(content)
    assert refusal(broken).startswith(f"{path} cannot be read: ")


@pytest.mark.parametrize("content", [*NO_OBJECT, b"{}", b'{"weight_map": []}', b'{"weight_map": {"a": 3}}'], ids=brief)
def test_an_index_of_shards_that_cannot_be_read_is_named(content, broken):
    path = broken / "vae" / "diffusion_pytorch_model.safetensors.index.json"
    path.write_bytes(content)
    assert refusal(broken) == f"{path} lists no weights; download it again"


ENTRY = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
NO_HEADERS = [[ENTRY], None, {"a": 3}, {"a": {}}, *({"a": {**ENTRY, name: "x"}} for name in ("shape", "data_offsets"))]


@pytest.mark.parametrize("header", NO_HEADERS, ids=brief)
def test_a_file_with_another_kind_of_header_is_named(header, broken):
    path, text = broken / "vae" / "diffusion_pytorch_model.safetensors", json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(4))
    assert refusal(broken).startswith(f"{path} is not a safetensors file (")


def test_a_file_of_weights_that_cannot_be_opened_is_named_with_the_reason(broken):
    path = broken / "transformer" / "diffusion_pytorch_model.safetensors"
    path.unlink()
    path.mkdir()
    assert refusal(broken) == f"{path} cannot be read: Is a directory; change its permissions, or download it again"


def test_another_model_is_named(broken):
    (broken / "transformer" / "config.json").write_text(json.dumps({"_class_name": "WanTransformer3DModel"}))
    assert "is a WanTransformer3DModel" in refusal(broken)
    (broken / "transformer" / "config.json").write_text("{")
    assert "cannot be read" in refusal(broken)


def test_a_folder_without_text_encoder_opens_and_says_where_text_comes_from(broken):
    shutil.rmtree(broken / "text_encoder")
    shutil.rmtree(broken / "tokenizer")
    checkpoint = Checkpoint.open(broken)
    with pytest.raises(RequestError, match="core's CLIPLoader"):
        checkpoint.check_text()


@pytest.mark.parametrize(
    "text, words", [((1, 77, 32), "77 tokens; .* takes 32"), ((1, 32, 4096), "4096 features; .* takes 32")]
)
def test_conditioning_of_another_model_is_named(make_job, checkpoints, text, words):
    job = make_job("5b")
    wrong = type(job)(job.model, torch.ones(text), job.latent, job.negative)
    with pytest.raises(RequestError, match=words):
        validation.check(Checkpoint.open(checkpoints["5b"]), wrong)


def test_a_latent_of_another_model_is_named(checkpoints):
    with pytest.raises(RequestError, match="4 channels, so it is for another model; CogVideoX takes 16"):
        DecodeJob(Model(str(checkpoints["5b"])), torch.ones(1, 4, 2, 4, 4))


def test_cogvideox_1_5_refuses_sizes_past_its_positions_whatever_an_early_configuration_says(make_job, checkpoints, broken):
    checkpoint = Checkpoint.open(checkpoints["1.5-5b"])
    with pytest.raises(RequestError, match="positions up to 2400x2400; 2416x64 is larger"):
        validation.check(checkpoint, make_job("1.5-5b", size=(2416, 64, 9)))
    configure(broken, patch_size_t=2, sample_width=170, sample_height=96, sample_frames=81)
    early = Checkpoint.open(broken)
    assert early.default_size == (1360, 768, 81)
    validation.check_positions(early, 1360 // 8, 768 // 8)  # upright


@pytest.mark.parametrize(
    "capabilities, in_a_group, expected",
    [([(8, 0)], False, "bf16"), ([(7, 5)], False, "fp16"), ([(8, 6), (7, 0)], True, "fp16"), ([(8, 6), (7, 0)], False, "bf16")],
)
def test_a_gpu_without_bf16_and_its_group_take_fp16(capabilities, in_a_group, expected, checkpoints, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capabilities[getattr(device, "index", device)])
    if in_a_group:
        monkeypatch.setenv("XDIT_RANKS", "0,1")
    checkpoint, gpu = Checkpoint.open(checkpoints["5b"]), torch.device("cuda", 0)
    monkeypatch.setattr(type(checkpoint), "native_dtype", "bf16")
    assert checkpoint.dtype("auto", gpu) == DTYPES[expected]
    assert checkpoint.dtype("bf16", gpu) == torch.bfloat16  # as asked


SLOW_LIBRARY = """
import sys, time, types
with open(__file__ + ".begun", "w"):
    pass
others = [name for name in ("first", "second") if hasattr(sys.modules.get(name), "__getattr__")]  # which are whole
time.sleep(0.5)
whole = sys.modules[__name__] = types.ModuleType(__name__)
whole.others = others
whole.__getattr__ = lambda name: getattr(sys.modules["whole library"], name)
"""
"""Replaces itself at the end of its import, as diffusers does."""


def both(first: Callable, second: Callable, begun: Path) -> list:
    """Returns what two functions return if a thread calls the second one while another thread is in the first one's import."""
    with ThreadPoolExecutor(2) as threads:
        one = threads.submit(first)
        while not begun.exists() and not one.done():
            time.sleep(0.01)
        other = threads.submit(second)
        return [one.result(), other.result()]


@pytest.mark.parametrize(
    "library, read",
    [
        ("diffusers", lambda found: found.make_scheduler("auto")),
        ("diffusers", lambda found: found.load_vae(torch.float32)),
        ("diffusers", lambda found: found.load_transformer(torch.float32)),
        ("transformers", lambda found: found.load_text_encoder(torch.float32)),
        ("transformers", lambda found: found.load_tokenizer()),
    ],
)
def test_a_thread_reads_a_part_while_another_one_imports_its_library(library, read, checkpoints, tmp_path, monkeypatch):
    found = Checkpoint.open(checkpoints["1.5-5b"])
    whole = read(found)  # nor does the library import its own parts then
    (tmp_path / f"{library}.py").write_text(SLOW_LIBRARY)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(sys.modules, "whole library", sys.modules[library])
    monkeypatch.delitem(sys.modules, library)
    parts = both(lambda: read(found), lambda: read(found), tmp_path / f"{library}.py.begun")
    assert [type(part) for part in parts] == [type(whole)] * 2


def test_two_threads_read_text_encoders_and_leave_transformers_as_it_was(checkpoints):
    found, before = Checkpoint.open(checkpoints["5b"]), PreTrainedModel.tie_weights
    with ThreadPoolExecutor(4) as threads:
        encoders = list(threads.map(lambda _: found.load_text_encoder(torch.float32), range(12)))
    assert PreTrainedModel.tie_weights is before
    assert not any(weight.is_meta for encoder in encoders for weight in encoder.parameters())


def test_threads_import_libraries_one_after_the_other(tmp_path, monkeypatch):
    """Parts of diffusers and transformers import each other: two threads that begin with different ones find some unfinished."""
    for name in ("first", "second"):
        (tmp_path / f"{name}.py").write_text(SLOW_LIBRARY)
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    others = both(lambda: member("first", "others"), lambda: member("second", "others"), tmp_path / "first.py.begun")
    assert others == [[], ["first"]]


def test_a_model_made_without_weights_takes_those_of_no_other_thread():
    def make():
        with ThreadPoolExecutor(1) as thread:  # as the panel makes a table of plans while a node reads a model
            other.append(thread.submit(torch.nn.Linear, 2, 2).result())
        return torch.nn.Linear(2, 2)

    other = []
    mine = shards.empty(make, torch.float16)
    assert (mine.weight.device.type, mine.weight.dtype, other[0].weight.device.type) == ("meta", torch.float16, "cpu")


@pytest.mark.parametrize("like", ["2b", "5b-i2v"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_models_equal_those_that_diffusers_reads(like, dtype, checkpoints):
    found = Checkpoint.open(checkpoints[like])
    pairs = {
        "vae": (AutoencoderKLCogVideoX, found.load_vae(dtype)),
        "transformer": (CogVideoXTransformer3DModel, found.load_transformer(torch.float32)),
    }
    for part, (cls, mine) in pairs.items():
        theirs = cls.from_pretrained(checkpoints[like], subfolder=part, torch_dtype=mine.dtype)
        assert not mine.training and not any(weight.requires_grad for weight in mine.parameters())
        names = [dict((*model.named_parameters(), *model.named_buffers())) for model in (mine, theirs)]
        assert names[0].keys() == names[1].keys()
        assert all(torch.equal(names[0][name], weight) for name, weight in names[1].items())


def test_a_vae_without_a_weight_is_named(broken):
    path = broken / "vae" / "diffusion_pytorch_model.safetensors"
    state = load_file(path)
    del state["decoder.conv_out.conv.bias"]
    save_file(state, path)
    with pytest.raises(RequestError, match="the VAE lacks 1 weights, such as decoder.conv_out.conv.bias"):
        Checkpoint.open(broken).load_vae(torch.float32)
