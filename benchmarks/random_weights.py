"""CogVideoX pipelines with seeded random weights, saved in diffusers layout so that loading is the real thing.

``python -m benchmarks.random_weights --like 5b --output FOLDER`` makes one. The small ones
run on any machine in seconds and show noise; ``--full-size`` has the real shapes, for measuring.
"""

import argparse
import io
import json
import shutil
from pathlib import Path

import torch

from parallel_backend.cogvideox.checkpoint.single_file import SCHEDULER

WORDS = (
    "a the of in on at with and to from over under red green blue yellow purple orange white black grey circle "
    "square triangle star ball cube moves moving left right up down slowly fast grows shrinks bounces stops "
    "crosses cat dog panda boat sea sun moon city street forest mountain river snow rain night day ground"
).split()

CONDITION_CHANNELS = {"": 0, "i2v": 16, "control": 16, "inp": 17, "void": 32}
"""What is concatenated to the noise, by the end of a like's name."""
LIKES = (
    "2b", "5b", "1.5-5b", "5b-i2v", "1.5-5b-i2v", "2b-i2v",
    "2b-control", "5b-control", "1.5-5b-control", "2b-inp", "5b-inp", "1.5-5b-inp",
    "1.5-5b-void", "anisora-i2v",
)  # fmt: skip
CONTROLNETS = ("2b-controlnet", "5b-controlnet")
"""ControlNets beside a model of the same size."""
SMALL_SIZE = {"sample_width": 12, "sample_height": 8, "sample_frames": 17}
SIZES = {
    "1.5-5b": {"sample_width": 300, "sample_height": 300, "sample_frames": 81},
    "anisora": {"sample_width": 160, "sample_height": 90, "sample_frames": 49},
}
"""Configured sizes of the real shapes that are not those of CogVideoX 1.0."""


def parse(like: str) -> tuple[str, str]:
    """``5b-control`` as ``5b`` and ``control``; what follows is empty for text to video."""
    base, _, kind = like.rpartition("-")
    return (base, kind) if kind in CONDITION_CHANNELS else (like, "")


def transformer_config(like: str, full_size: bool) -> dict:
    """Arguments of the transformer: like ``2b`` (sincos), ``5b`` and ``anisora`` (rotary) or ``1.5-5b`` (two-frame tokens), and its
    channels."""
    base, kind = parse(like)
    in_channels = 16 + CONDITION_CHANNELS[kind]
    config = {"temporal_compression_ratio": 4, "patch_size": 2, "in_channels": in_channels, "out_channels": 16}
    time_features = 512 if full_size else 64
    if base != "2b":
        config["use_rotary_positional_embeddings"] = True
    if base == "1.5-5b":
        config |= {"patch_size_t": 2, "patch_bias": False}
    if like == "5b-i2v":
        config["use_learned_positional_embeddings"] = True
    if like == "1.5-5b-i2v":
        config["ofs_embed_dim"] = time_features
    if full_size:
        layers, heads = (30, 30) if base == "2b" else (42, 48)
        config |= {"num_layers": layers, "num_attention_heads": heads, "attention_head_dim": 64}
        return config | SIZES.get(base, {})
    shape = {"num_layers": 3, "num_attention_heads": 4, "attention_head_dim": 32, "time_embed_dim": time_features}
    size = SIZES[base] if base == "anisora" else SMALL_SIZE  # by which it is recognised
    return config | shape | {"text_embed_dim": 32, "max_text_seq_length": 32} | size


def vae_config(like: str, full_size: bool) -> dict:
    """Arguments of the VAE, 8x spatial and 4x temporal compression as the real one."""
    config = {
        "down_block_types": ("CogVideoXDownBlock3D",) * 4,
        "up_block_types": ("CogVideoXUpBlock3D",) * 4,
        "latent_channels": 16,
        "scaling_factor": 1.15258426 if parse(like)[0] == "2b" else 0.7,
        "temporal_compression_ratio": 4,
        "invert_scale_latents": like == "1.5-5b-i2v",
    }
    if full_size:
        return config
    return config | {"block_out_channels": (16, 16, 32, 32), "layers_per_block": 1, "norm_num_groups": 8}


def save_tokenizer(folder: Path, max_length: int) -> int:
    """A SentencePiece tokenizer in the files of the real checkpoints. Returns its vocabulary's size."""
    import sentencepiece

    letters = " ".join(chr(code) for code in range(33, 127))
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([letters, " ".join(WORDS)] * 10),
        model_writer=model,
        user_defined_symbols=[f"▁{word}" for word in WORDS],
        vocab_size=250,
        hard_vocab_limit=False,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    folder.mkdir(parents=True)
    (folder / "spiece.model").write_bytes(model.getvalue())
    config = {
        "tokenizer_class": "T5Tokenizer", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>",
        "extra_ids": 0, "model_max_length": max_length,
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1))
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue()).get_piece_size()


def fill(model: torch.nn.Module, generator: torch.Generator) -> None:
    """Draws every weight again, large enough that the prompt and each layer change the output."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim > 1:
                fan_in = weight[0].numel()
                weight.copy_(torch.randn(weight.shape, generator=generator, device=generator.device) * fan_in**-0.5)
            elif name.endswith("bias"):
                weight.copy_(torch.randn(weight.shape, generator=generator, device=generator.device) * 0.02)


def settle(transformer, vae, generator: torch.Generator) -> None:
    """What training leaves otherwise than :func:`fill`: positions that were learned, and a VAE that is sure of its latents."""
    with torch.no_grad():
        if transformer.config.use_learned_positional_embeddings:
            positions = transformer.patch_embed.pos_embedding
            positions.copy_(torch.randn(positions.shape, generator=generator, device=generator.device) * 0.5)
        spread = vae.encoder.conv_out.conv  # means, then logarithms of variances
        spread.weight[vae.config.latent_channels :] = 0
        spread.bias[vae.config.latent_channels :] = -30


def build(
    output: Path,
    *,
    like: str,
    full_size: bool = False,
    seed: int = 0,
    device: str = "cpu",
    text_layers: int | None = None,
    layers: int | None = None,
) -> Path:
    """Saves a pipeline in diffusers layout.

    Args:
        output: folder to make; replaced whole, and only once everything is written.
        like: one of ``LIKES``.
        full_size: the real shapes, in the dtype of the real checkpoint; else small and float32.
        seed: of all weights.
        device: where to draw the weights; a GPU is quick for the full size.
        text_layers: of the text encoder, whose real 24 are 9 GiB.
        layers: of the transformer; 3 of a small one unless said otherwise.
    """
    from diffusers import (
        AutoencoderKLCogVideoX,
        CogVideoXDDIMScheduler,
        CogVideoXDPMScheduler,
        CogVideoXFunControlPipeline,
        CogVideoXImageToVideoPipeline,
        CogVideoXPipeline,
        CogVideoXTransformer3DModel,
    )  # fmt: skip
    from transformers import AutoTokenizer, T5Config, T5EncoderModel

    base, kind = parse(like)
    dtype = torch.float32 if not full_size else torch.float16 if base == "2b" else torch.bfloat16
    transformer = transformer_config(like, full_size) | ({"num_layers": layers} if layers else {})
    partial = output.with_name(output.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    max_length = transformer.get("max_text_seq_length", 226)
    vocabulary = save_tokenizer(partial / "tokenizer", max_length)
    small_t5 = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
    full_t5 = {"d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64}
    sizes = (full_t5 if full_size else small_t5) | ({"num_layers": text_layers} if text_layers else {})
    t5 = T5Config(vocab_size=vocabulary, feed_forward_proj="gated-gelu", **sizes)

    generator = torch.Generator(device).manual_seed(seed)
    parts = {}
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            parts["transformer"] = CogVideoXTransformer3DModel(**transformer)
            parts["vae"] = AutoencoderKLCogVideoX(**vae_config(like, full_size))
            parts["text_encoder"] = T5EncoderModel(t5)
    finally:
        torch.set_default_dtype(before)
    for part in parts.values():
        fill(part, generator)
    settle(parts["transformer"], parts["vae"], generator)
    scheduler = CogVideoXDPMScheduler if like == "5b" else CogVideoXDDIMScheduler  # as published
    shift = {"snr_shift_scale": 3.0 if base == "2b" else 1.0}
    classes = {"i2v": CogVideoXImageToVideoPipeline, "control": CogVideoXFunControlPipeline}
    pipeline = classes.get(kind, CogVideoXPipeline)(  # diffusers has none for inpainting
        tokenizer=AutoTokenizer.from_pretrained(partial / "tokenizer"),
        scheduler=scheduler(**SCHEDULER, **shift),
        **{name: part.eval() for name, part in parts.items()},
    )
    pipeline.save_pretrained(partial, safe_serialization=True)
    shutil.rmtree(partial / "tokenizer")  # transformers wrote its own format over the real checkpoints'
    save_tokenizer(partial / "tokenizer", max_length)
    shutil.rmtree(output, ignore_errors=True)
    partial.rename(output)
    return output


def build_controlnet(output: Path, *, like: str, full_size: bool = False, seed: int = 0, **changes) -> Path:
    """Saves a ControlNet as TheDenk/cogvideox-controlnet publishes them: ``config.json`` and one file of weights.

    Args:
        output: folder to make.
        like: ``2b`` or ``5b``.
        full_size: the real shapes with eight blocks, in the dtype of the real model; else small, two blocks, float32.
        seed: of all weights.
        changes: of the configuration, such as ``out_proj_dim``.
    """
    from safetensors.torch import save_file

    from parallel_backend.cogvideox.checkpoint.controlnet import CLASS

    model = transformer_config(like, full_size)
    heads = {name: model[name] for name in ("num_attention_heads", "attention_head_dim")}
    sizes = {} if full_size else {"max_text_seq_length": model["max_text_seq_length"], **SMALL_SIZE}
    config = {"_class_name": CLASS, "in_channels": 3, "downscale_coef": 8, "vae_channels": 16, "num_layers": 8 if full_size else 2,
              "time_embed_dim": model.get("time_embed_dim", 512), "patch_size": 2, "use_rotary_positional_embeddings": False,
              "out_proj_dim": None, **heads, **sizes, **changes}  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    dtype = torch.float32 if not full_size else torch.float16 if like == "2b" else torch.bfloat16
    tensors = {
        name: drawn(name, shape, generator).to(dtype)
        for name, shape in controlnet_shapes(config, model.get("text_embed_dim", 4096)).items()
    }
    output.mkdir(parents=True, exist_ok=True)
    save_file(tensors, output / "diffusion_pytorch_model.safetensors")
    (output / "config.json").write_text(json.dumps(config, indent=1))
    return output


def controlnet_shapes(config: dict, text_features: int) -> dict[str, tuple[int, ...]]:
    """Returns the shape of each weight of a ControlNet with this configuration."""
    head, features = config["attention_head_dim"], config["num_attention_heads"] * config["attention_head_dim"]
    time, pixels = config["time_embed_dim"], config["in_channels"] * config["downscale_coef"] ** 2
    first, second, patch = pixels // 2, pixels // 4, config["patch_size"]
    layers = {
        "controlnet_encode_first.0": (first, pixels, 1, 1), "controlnet_encode_first.1": (first,),
        "controlnet_encode_second.0": (second, first, 1, 1), "controlnet_encode_second.1": (second,),
        "patch_embed.proj": (features, config["vae_channels"] + second, patch, patch), "patch_embed.text_proj": (features, text_features),
        "time_embedding.linear_1": (time, features), "time_embedding.linear_2": (time, time),
    }  # fmt: skip
    for number in range(config["num_layers"]):
        for name, shape in {
            "norm1.linear": (6 * features, time), "norm1.norm": (features,), "norm2.linear": (6 * features, time), "norm2.norm": (features,),
            **{f"attn1.to_{part}": (features, features) for part in ("q", "k", "v", "out.0")},
            "attn1.norm_q": (head,), "attn1.norm_k": (head,), "ff.net.0.proj": (4 * features, features), "ff.net.2": (features, 4 * features),
        }.items():  # fmt: skip
            layers[f"transformer_blocks.{number}.{name}"] = shape
        if config["out_proj_dim"]:
            layers[f"out_projectors.{number}"] = (config["out_proj_dim"], features)
    weights = {f"{name}.weight": shape for name, shape in layers.items()}
    return weights | {f"{name}.bias": shape[:1] for name, shape in layers.items()}


def drawn(name: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Returns a weight as :func:`fill` draws it; norms scale by one."""
    if len(shape) > 1:
        return torch.randn(shape, generator=generator) * torch.Size(shape[1:]).numel() ** -0.5
    return torch.randn(shape, generator=generator) * 0.02 if name.endswith("bias") else torch.ones(shape)


def main() -> None:
    """The command of the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--like", choices=LIKES + CONTROLNETS, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--full-size", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--text-layers", type=int, help="of the text encoder; the real 24 are 9 GiB")
    args = parser.parse_args()
    if args.like in CONTROLNETS:
        build_controlnet(args.output, like=args.like.partition("-")[0], full_size=args.full_size, seed=args.seed)
        return
    build(
        args.output,
        like=args.like,
        full_size=args.full_size,
        seed=args.seed,
        device=args.device,
        text_layers=args.text_layers,
    )


if __name__ == "__main__":
    main()
