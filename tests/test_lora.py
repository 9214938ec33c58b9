"""LoRAs give what diffusers, run here with PEFT, makes of them; without them the model is the checkpoint again, to the bit."""

import os
import shutil
from dataclasses import replace
from importlib.metadata import version
from inspect import signature

import pytest
import torch
from diffusers import CogVideoXPipeline
from packaging.version import Version
from peft import LoraConfig

from parallel_backend.cogvideox.checkpoint import weights
from parallel_backend.cogvideox.checkpoint.checkpoint import Checkpoint
from parallel_backend.cogvideox.checkpoint.shards import Shard
from parallel_backend.cogvideox.pipeline import validation
from parallel_backend.cogvideox.transformer import lora
from parallel_backend.cogvideox.transformer.lora import LoraFile
from parallel_backend.errors import RequestError
from parallel_backend.executor.local import LocalExecutor
from parallel_backend.jobs import DecodeJob
from parallel_backend.model import Lora, Model

from .conftest import TOLERANCE
from .support.diffusers_reference import reference
from .support.lora_files import core_layout, diffusers_layout, fun_layout, random_change, write

SIZE = {"size": (48, 32, 5), "steps": 3, "scheduler": "ddim"}
EVERY_LAYER = r"proj|text_proj|linear(_\d)?|to_(q|k|v|out\.0)|net\.2|proj_out"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def pipelines(checkpoints):
    found = {like: CogVideoXPipeline.from_pretrained(checkpoints[like]) for like in ("2b", "5b", "1.5-5b")}
    for pipeline in found.values():
        pipeline.set_progress_bar_config(disable=True)
    return found


@pytest.fixture
def diffusers_with(pipelines):
    """diffusers' latents with LoRA files at their strengths."""

    def run(like: str, files: dict[str, float]) -> torch.Tensor:
        pipeline = pipelines[like]
        names = [f"lora{index}" for index in range(len(files))]
        for name, file in zip(names, files):
            pipeline.load_lora_weights(file, adapter_name=name)
        pipeline.set_adapters(names, list(files.values()))
        try:
            return reference(pipeline, num_frames=SIZE["size"][2], **SIZE)
        finally:
            pipeline.unload_lora_weights()

    return run


@pytest.fixture
def with_loras(make_job, checkpoints):
    """A job on a small model with LoRA files at their strengths."""

    def make(like: str, files: dict[str, float], **settings):
        model = Model(str(checkpoints[like]), loras=tuple(Lora(*item) for item in files.items()), **settings)
        return make_job(like, model=model, **SIZE)

    return make


@pytest.mark.parametrize("like, strength", [("2b", 1.0), ("5b", -0.6), ("1.5-5b", 1.0)])
def test_a_lora_of_every_layer_gives_the_latents_of_diffusers(
    like, strength, diffusers_with, with_loras, local, checkpoints, tmp_path
):
    change = random_change(checkpoints[like], layers=EVERY_LAYER)
    assert len(change) == len(Checkpoint.open(checkpoints[like]).layer_shapes)
    file = write(tmp_path / "all.safetensors", diffusers_layout(change))
    result = local.sample(with_loras(like, {file: strength}))
    assert (result.tensor - local.sample(with_loras(like, {})).tensor).abs().max() > 0.1
    assert (result.tensor - diffusers_with(like, {file: strength})).abs().max() <= TOLERANCE


@pytest.mark.parametrize(
    "config",
    [
        {"lora_alpha": 2},
        {"lora_alpha": 8, "use_rslora": True},
        {"lora_alpha": 4, "alpha_pattern": {"to_q": 1, r"transformer_blocks\.1\.attn1\.to_k": 9}},
    ],
    ids=str,
)
def test_the_alpha_that_diffusers_saves_beside_a_lora_counts(config, diffusers_with, with_loras, local, checkpoints, tmp_path):
    if "transformer_lora_adapter_metadata" not in signature(CogVideoXPipeline.save_lora_weights).parameters:
        pytest.skip("this diffusers saves no alpha beside a LoRA")
    tensors = diffusers_layout(random_change(checkpoints["5b"]), prefix="")
    saved = LoraConfig(r=4, target_modules=["to_q", "to_k", "to_v", "to_out.0"], **config).to_dict()
    saved = {key: sorted(value) if isinstance(value, set) else value for key, value in saved.items()}
    CogVideoXPipeline.save_lora_weights(tmp_path, transformer_lora_layers=tensors, transformer_lora_adapter_metadata=saved)
    file = str(tmp_path / "pytorch_lora_weights.safetensors")
    plain = write(tmp_path / "plain.safetensors", diffusers_layout(random_change(checkpoints["5b"])))
    latents = local.sample(with_loras("5b", {file: 1.0})).tensor
    assert (latents - diffusers_with("5b", {file: 1.0})).abs().max() <= TOLERANCE
    assert (latents - local.sample(with_loras("5b", {plain: 1.0})).tensor).abs().max() > 0.01


@pytest.mark.parametrize("like", ["2b", "1.5-5b"])
def test_the_layout_of_cogvideox_fun_gives_the_same_with_its_alpha_over_rank(
    like, diffusers_with, with_loras, local, checkpoints, tmp_path
):
    change = random_change(checkpoints[like], layers=EVERY_LAYER)
    fun = write(tmp_path / "fun.safetensors", fun_layout(change, alpha=2.0))
    halved = {layer: (down, up / 2) for layer, (down, up) in change.items()}  # alpha 2 over rank 4
    same = write(tmp_path / "same.safetensors", diffusers_layout(halved))
    latents = local.sample(with_loras(like, {fun: 0.8})).tensor
    assert (latents - diffusers_with(like, {same: 0.8})).abs().max() <= TOLERANCE


def test_several_loras_add_up_as_in_diffusers(diffusers_with, with_loras, local, checkpoints, tmp_path):
    first = write(tmp_path / "first.safetensors", diffusers_layout(random_change(checkpoints["5b"], seed=1)))
    layers = r"ff\.net\.2|to_q"  # some that the first changes and some that it does not
    second = write(tmp_path / "second.safetensors", diffusers_layout(random_change(checkpoints["5b"], layers=layers, rank=2)))
    files = {first: 0.7, second: -0.4}
    latents = local.sample(with_loras("5b", files)).tensor
    assert (latents - diffusers_with("5b", files)).abs().max() <= TOLERANCE
    swapped = local.sample(with_loras("5b", dict(reversed(files.items())))).tensor
    assert (latents - swapped).abs().max() <= TOLERANCE


@pytest.mark.parametrize("offload, loads", [("none", [1, 1, 1, 1, 1, 1]), ("sequential", [1, 2, 3, 4, 5, 5])])
def test_the_model_without_loras_is_the_checkpoint_again_to_the_bit(offload, loads, with_loras, local, checkpoints, tmp_path):
    """Weights in place are changed in place; weights that hooks hold are read again."""
    first = write(tmp_path / "first.safetensors", diffusers_layout(random_change(checkpoints["5b"], seed=1)))
    second = write(tmp_path / "second.safetensors", fun_layout(random_change(checkpoints["5b"], layers=r"net\.2|to_v", seed=2)))
    executor = LocalExecutor(CPU)
    base = local.sample(with_loras("5b", {})).tensor
    alone = LocalExecutor(CPU).sample(with_loras("5b", {second: 0.5})).tensor
    seen, found = [], []
    for files in ({}, {first: 1.0, second: 3.0}, {second: 0.5}, {first: -2.0}, {}, {first: 0.0, second: 0.0}):
        found.append(executor.sample(with_loras("5b", files, offload=offload)).tensor)
        seen.append(executor.engine.cache.loads)
    assert seen == loads
    assert torch.equal(found[0], base) and torch.equal(found[4], base) and torch.equal(found[5], base)
    assert torch.equal(found[2], alone)
    assert all((one - base).abs().max() > 0.01 for one in found[1:4])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_weights_are_merged_in_float32_and_rounded_once(dtype, checkpoints, tmp_path):
    change = random_change(checkpoints["2b"], layers=EVERY_LAYER)
    half = {layer: (down.to(torch.bfloat16), up.to(torch.bfloat16)) for layer, (down, up) in change.items()}
    checkpoint = Checkpoint.open(checkpoints["2b"])
    opened = [
        LoraFile.open(Lora(write(tmp_path / f"{alpha}.safetensors", fun_layout(half, alpha)), 0.5), checkpoint)
        for alpha in (1, 3)
    ]
    transformer = checkpoint.load_transformer(dtype)
    before = {name: weight.clone() for name, weight in transformer.named_parameters()}
    lora.merge(transformer, checkpoint, opened, device=CPU)
    for layer, (down, up) in half.items():
        product = torch.einsum("or,ri->oi", up.flatten(1).double(), down.flatten(1).double()) * 0.5 * (1 + 3) / 4
        base = before[f"{layer}.weight"]
        expected = (base.double() + product.view_as(base)).to(dtype)
        torch.testing.assert_close(transformer.get_submodule(layer).weight, expected, rtol=torch.finfo(dtype).eps, atol=1e-6)
    lora.merge(transformer, checkpoint, [], device=CPU, before=opened)
    assert all(torch.equal(weight, before[name]) for name, weight in transformer.named_parameters())


def test_every_way_to_name_a_layer_is_the_same_layer(checkpoints, tmp_path):
    change = random_change(checkpoints["2b"], layers=EVERY_LAYER)
    checkpoint = Checkpoint.open(checkpoints["2b"])
    layouts = {
        "diffusers": diffusers_layout(change),
        "bare": diffusers_layout(change, prefix=""),
        "peft": diffusers_layout(change, prefix="base_model.model.", adapter=".default"),
        "prefixed": diffusers_layout(change, prefix="diffusion_model."),
        "fun": fun_layout(change, alpha=4.0),
        "core": core_layout(change),
        "named": diffusers_layout(change, adapter=".orbit_left"),
        "linear": {
            name.replace("lora_A", "lora_linear_layer.down").replace("lora_B", "lora_linear_layer.up"): tensor
            for name, tensor in diffusers_layout(change).items()
        },
        "kohya": {name.replace("lora_unet__", "lora_unet_"): tensor for name, tensor in fun_layout(change).items()},
    }
    for name, tensors in layouts.items():
        opened = LoraFile.open(Lora(write(tmp_path / f"{name}.safetensors", tensors)), checkpoint)
        assert opened.notes == (), name
        assert opened.pairs.keys() == change.keys(), name
        for layer, pair in opened.pairs.items():
            assert (tensors[pair.down] is change[layer][0], tensors[pair.up] is change[layer][1], pair.scale) == (
                True,
                True,
                1.0,
            )


def test_the_names_of_attention_processors_are_layers_too(checkpoints, tmp_path):
    change = random_change(checkpoints["5b"])
    tensors = {}
    for layer, (down, up) in change.items():
        block, name = layer.split(".attn1.")
        name = f"transformer.{block}.attn1.processor.{name.removesuffix('.0')}_lora"
        tensors |= {f"{name}.down.weight": down, f"{name}.up.weight": up}
    opened = LoraFile.open(Lora(write(tmp_path / "old.safetensors", tensors)), Checkpoint.open(checkpoints["5b"]))
    assert opened.notes == () and opened.pairs.keys() == change.keys()
    for layer, pair in opened.pairs.items():
        assert (tensors[pair.down] is change[layer][0], tensors[pair.up] is change[layer][1]) == (True, True)


def with_bias(change) -> dict[str, torch.Tensor]:
    """The tensors of a change whose up halves have a bias."""
    generator = torch.Generator().manual_seed(7)
    biases = {
        f"transformer.{layer}.lora_B.bias": torch.randn(len(up), generator=generator) * 0.3 for layer, (_, up) in change.items()
    }
    return diffusers_layout(change) | biases


@pytest.mark.skipif(
    Version(version("peft")) < Version("0.14"), reason="this PEFT, which diffusers uses, knows no bias of a LoRA"
)
def test_the_bias_of_a_lora_is_added_as_in_diffusers_and_taken_away_again(
    diffusers_with, with_loras, local, checkpoints, tmp_path
):
    change = random_change(checkpoints["5b"], layers=r"to_out\.0|net\.2")
    file = write(tmp_path / "bias.safetensors", with_bias(change))
    plain = write(tmp_path / "plain.safetensors", diffusers_layout(change))
    before = local.sample(with_loras("5b", {})).tensor
    latents = local.sample(with_loras("5b", {file: 0.7})).tensor
    assert (latents - diffusers_with("5b", {file: 0.7})).abs().max() <= TOLERANCE
    assert (latents - local.sample(with_loras("5b", {plain: 0.7})).tensor).abs().max() > 0.01
    assert torch.equal(local.sample(with_loras("5b", {})).tensor, before)


def test_each_rank_adds_its_part_of_a_bias_once(checkpoints, tmp_path):
    checkpoint = Checkpoint.open(checkpoints["5b"])
    file = write(tmp_path / "bias.safetensors", with_bias(random_change(checkpoints["5b"], layers=r"to_out\.0|net\.0\.proj")))
    opened = [LoraFile.open(Lora(file, 0.5), checkpoint)]

    def merged(rank: int, ranks: int) -> dict[str, torch.Tensor]:
        shard = Shard(tensor=ranks, tensor_rank=rank)
        transformer = checkpoint.load_transformer(torch.float32, shard=shard, prepare=shard.cut)
        lora.merge(transformer, checkpoint, opened, device=CPU, shard=shard)
        return dict(transformer.named_parameters())

    whole, parts = merged(0, 1), [merged(rank, 2) for rank in range(2)]
    for block in range(checkpoint.layers):
        out, hidden = (f"transformer_blocks.{block}.{layer}.bias" for layer in ("attn1.to_out.0", "ff.net.0.proj"))
        assert torch.equal(parts[0][out] + parts[1][out], whole[out])
        assert torch.equal(torch.cat([part[hidden] for part in parts]), whole[hidden])


@pytest.mark.parametrize(
    "rank, strength, alpha, told", [(256, 1.0, None, True), (64, 1.0, None, True), (32, 1.0, None, False), (256, 1.0, 256.0, False),
                                    (256, 0.0039, None, False)]
)  # fmt: skip
def test_a_large_rank_without_an_alpha_is_told_with_the_strength_to_try(rank, strength, alpha, told, checkpoints, tmp_path):
    change = random_change(checkpoints["5b"], rank=rank)
    file = write(tmp_path / "large.safetensors", diffusers_layout(change) if alpha is None else fun_layout(change, alpha))
    opened = LoraFile.open(Lora(file, strength), Checkpoint.open(checkpoints["5b"]))
    assert {pair.scale for pair in opened.pairs.values()} == {1.0}
    said = f"has rank {rank} and no alpha, so strength 1 adds all of it; if that is too much, try strength {1 / rank:.4f}"
    assert [said in note for note in opened.notes] == [True] * told


def test_another_lora_reloads_no_vae_and_a_file_that_changed_is_noticed(with_loras, checkpoints, tmp_path):
    path = tmp_path / "one.safetensors"
    file = write(path, diffusers_layout(random_change(checkpoints["5b"], seed=1)))
    executor = LocalExecutor(CPU)
    job = with_loras("5b", {file: 1.0})
    first = executor.sample(job).tensor
    executor.decode(DecodeJob(job.model, first))
    assert torch.equal(executor.sample(job).tensor, first)
    executor.decode(DecodeJob(replace(job.model, loras=()), first))
    assert executor.engine.cache.loads == 2
    write(path, diffusers_layout(random_change(checkpoints["5b"], seed=2)))
    os.utime(path, ns=(1, 1))  # whatever the file system's clock can tell apart
    assert (executor.sample(job).tensor - first).abs().max() > 0.01
    assert executor.engine.cache.loads == 2


def test_a_merge_that_fails_half_way_leaves_nothing_behind(with_loras, local, checkpoints, tmp_path, monkeypatch):
    file = write(tmp_path / "one.safetensors", diffusers_layout(random_change(checkpoints["5b"])))
    executor = LocalExecutor(CPU)
    base, job = with_loras("5b", {}), with_loras("5b", {file: 1.0})
    executor.sample(base)
    tensors = weights.tensors

    def fail(*wanted):
        yield next(tensors(*wanted))
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(weights, "tensors", fail)
        with pytest.raises(MemoryError):
            executor.sample(job)
    assert torch.equal(executor.sample(base).tensor, local.sample(base).tensor)
    assert torch.equal(executor.sample(job).tensor, local.sample(job).tensor)


def refusal(path, checkpoint) -> str:
    with pytest.raises(RequestError) as error:
        LoraFile.open(Lora(str(path)), checkpoint)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_file_that_is_no_lora_is_refused_in_one_line(checkpoints, tmp_path):
    checkpoint = Checkpoint.open(checkpoints["5b"])
    good = diffusers_layout(random_change(checkpoints["5b"]))
    file = write(tmp_path / "good.safetensors", good)
    assert "there is no LoRA file" in refusal(tmp_path / "none.safetensors", checkpoint)
    assert "there is no LoRA file" in refusal(tmp_path, checkpoint)
    for name, words in (
        ("good.pt", "only safetensors are supported: convert it"),
        ("cut.safetensors", "cut off; download it again"),
    ):
        shutil.copy(file, tmp_path / name)
        if name.startswith("cut"):
            os.truncate(tmp_path / name, os.path.getsize(file) - 5)
        assert words in refusal(tmp_path / name, checkpoint)
    (tmp_path / "text.safetensors").write_text("<html>not found</html>")
    assert "not a safetensors file" in refusal(tmp_path / "text.safetensors", checkpoint)
    bad = {"lora_adapter_metadata": '["transformer"]'}
    assert "bad.safetensors cannot be read" in refusal(write(tmp_path / "bad.safetensors", good, bad), checkpoint)


Q = "transformer_blocks.0.attn1.to_q"


@pytest.mark.parametrize(
    "names, words",
    [
        (["diffusion_model.blocks.0.self_attn.q.lora_A.weight"], "fits no layer of CogVideoX .*self_attn.* looks made for Wan"),
        (["lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight"], "looks made for Flux or HunyuanVideo"),
        (["transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight"], "looks made for Flux or HunyuanVideo"),
        (
            ["lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_q.lora_down.weight"],
            "looks made for Stable Diffusion: use a LoRA made for 5b",
        ),
        (["transformer.transformer_blocks.0.attn.to_q.lora_A.weight"], "looks made for Stable Diffusion 3 or Qwen-Image"),
        ([f"{Q}.lora_A.weight", f"{Q}.lora_B.weight", "transformer_blocks.0.attn2.to_q.lora_A.weight"],
         "does not fit 5b and looks made for LTX-Video: it is for a .*to_q of 6x6 and rank 6, 5b has one of 128x128; use a LoRA"),
        ([f"{Q}.lora_A.weight", f"{Q}.lora_B.weight"], "does not fit 5b: it is for"),
        ([f"{Q}.lora_A.weight"], f"lacks the up half of {Q}"),
        ([f"{Q}.lora_up.weight", f"{Q}.alpha"], f"lacks the down half of {Q}"),
        (["lora_te_encoder_block_0_layer_0_SelfAttention_q.lora_down.weight"], "changes only a text encoder"),
        (["text_encoder.encoder.block.0.layer.0.SelfAttention.q.lora_A.weight"], "changes only a text encoder"),
        ([f"{Q}.weight", "proj_out.weight"], "fits no layer of CogVideoX \\(proj_out.weight, transformer"),
        ([f"{Q}.lora_A.weight", f"{Q}.lora_B.weight", f"{Q}.lora_magnitude_vector.weight"], "is a DoRA .*only LoRA is supported"),
        ([f"{Q}.dora_scale"], "is a DoRA"),
        ([f"{Q}.lora_A.one.weight", f"{Q}.lora_B.two.weight"], "has several adapters .one, two.; save each as a file of its own"),
        ([f"lora_unet__{Q}.hada_w1_a"], "is a LoHa"),
        ([f"lora_unet__{Q}.lokr_w1"], "is a LoKr"),
        ([], "is empty"),
    ],
    ids=str,
)  # fmt: skip
def test_a_lora_that_is_for_something_else_is_refused_in_one_line(names, words, checkpoints, make_job, tmp_path):
    file = write(tmp_path / "other.safetensors", {name: torch.ones(6, 6) for name in names})
    job = make_job("5b", model=Model(str(checkpoints["5b"]), loras=(Lora(file, 0.0),)))
    with pytest.raises(RequestError, match=words) as error:
        validation.check(Checkpoint.open(checkpoints["5b"]), job)
    assert "\n" not in str(error.value) and "other.safetensors" in str(error.value)


def test_a_bias_of_another_size_is_refused(checkpoints, tmp_path):
    tensors = diffusers_layout(random_change(checkpoints["5b"])) | {f"transformer.{Q}.lora_B.bias": torch.ones(64)}
    file = write(tmp_path / "bias.safetensors", tensors)
    assert f"has a bias (64,) for {Q}, which 5b does not have" in refusal(file, Checkpoint.open(checkpoints["5b"]))


@pytest.mark.parametrize(
    "down, up", [((4, 128), (128, 3)), ((0, 128), (128, 0)), ((4,), (128, 4)), ((4, 128), ()), ((4, 64), (128, 4))]
)
def test_halves_that_do_not_go_together_are_refused(down, up, checkpoints, tmp_path):
    tensors = {f"{Q}.lora_A.weight": torch.ones(down), f"{Q}.lora_B.weight": torch.ones(up)}
    file = write(tmp_path / "odd.safetensors", tensors)
    assert "does not fit 5b" in refusal(file, Checkpoint.open(checkpoints["5b"]))


def test_what_has_no_place_in_the_model_is_noted_with_each_job(with_loras, checkpoints, tmp_path):
    change = random_change(checkpoints["5b"])
    tensors = diffusers_layout(change)
    more = {"text_encoder.q.lora_A.weight": torch.ones(4, 4), f"transformer.{Q}.lora_A.bias": torch.ones(4)}
    file, clean = write(tmp_path / "more.safetensors", tensors | more), write(tmp_path / "clean.safetensors", tensors)
    executor = LocalExecutor(CPU)
    for _ in range(2):
        result = executor.sample(with_loras("5b", {file: 1.0}))
        (note,) = result.report.notes
        assert note.startswith(f"more.safetensors: 2 of {2 * len(change) + 2} tensors fit no layer and are not used, such as ")
        assert "lora_A.bias" in note
    whole = executor.sample(with_loras("5b", {clean: 1.0}))
    assert torch.equal(result.tensor, whole.tensor) and whole.report.notes == ()


@pytest.mark.parametrize("strength", [float("nan"), float("inf"), 11, -10.5])
def test_a_strength_that_makes_no_sense_is_refused(strength):
    with pytest.raises(RequestError, match="LoRA strength is .*; use -10.0 to 10.0"):
        Lora("x.safetensors", strength)
