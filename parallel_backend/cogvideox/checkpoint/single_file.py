"""A transformer in one ``.safetensors`` file, as ComfyUI stores them: its configuration and its weights.

Two layouts are supported: diffusers' names, which the CogVideoX wrapper's files use, and those of ComfyUI's own CogVideoX
(``blocks.0.q.weight``). Either may have a prefix such as ``model.diffusion_model.``. The file has no configuration. It is
derived from the names and shapes in the header, never from the file's name. What they do not determine (size of positions,
scheduler, VAE scale) is taken from the published models with those shapes.
"""

import math
from functools import lru_cache
from pathlib import Path
from typing import Any

from ...errors import RequestError
from . import kinds, weights

SUFFIXES = (".safetensors", ".sft")
ANCHOR = "patch_embed.text_proj.weight"
"""A weight that every CogVideoX model has under this name, in both layouts, and no other model has."""
CORE_TO_DIFFUSERS = {
    "blocks": "transformer_blocks",
    "q": "attn1.to_q",
    "k": "attn1.to_k",
    "v": "attn1.to_v",
    "norm_q": "attn1.norm_q",
    "norm_k": "attn1.norm_k",
    "attn_out": "attn1.to_out.0",
    "ff_proj": "ff.net.0.proj",
    "ff_out": "ff.net.2",
    "time_embedding_linear_1": "time_embedding.linear_1",
    "time_embedding_linear_2": "time_embedding.linear_2",
    "ofs_embedding_linear_1": "ofs_embedding.linear_1",
    "ofs_embedding_linear_2": "ofs_embedding.linear_2",
}
"""Parts of weight names: ComfyUI's (0.33, comfy/ldm/cogvideo/model.py) to diffusers'."""
PLAIN_DTYPES = {*weights.DTYPE_NAMES, "F64", "F8_E4M3", "F8_E5M2"}
"""Supported storage dtypes. FP8 is for storage only; computation is in 16 bits or more."""
HEADS_OF_2B = 30
"""Identifies the 2b family, which has sinusoidal positions and a shifted noise schedule. Models of the 5b family have more
heads."""
TEXT_TOKENS = 226
SAMPLE_SIZES = {False: (90, 60, 49), True: (300, 300, 81)}
"""Latent columns, latent rows and frames in the published configurations: of CogVideoX 1.0 (False) and of 1.5 (True)."""
SCHEDULER = {
    "beta_end": 0.012, "beta_schedule": "scaled_linear", "beta_start": 0.00085, "clip_sample": False,
    "num_train_timesteps": 1000, "prediction_type": "v_prediction", "rescale_betas_zero_snr": True,
    "set_alpha_to_one": True, "timestep_spacing": "trailing",
}  # fmt: skip
"""Settings that all published scheduler configurations share."""

Entries = dict[str, dict[str, Any]]


def is_cogvideox(path: Path) -> bool:
    """Returns whether a file is a CogVideoX transformer, by its header. Fast, as lists of files are refreshed often."""
    try:
        return has_weight(path, weights.fingerprint([path]), ANCHOR)
    except OSError:
        return False


@lru_cache(maxsize=4096)
def has_weight(path: Path, state: tuple, name: str) -> bool:
    """Returns whether a file's header has a weight whose name ends in ``name``; cached by the fingerprint ``state``."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        return path.suffix in SUFFIXES and length <= weights.MAX_HEADER and f'{name}"'.encode() in file.read(length)


def read(path: Path) -> tuple[dict, dict, dict, dict[str, int]]:
    """Derives a file's configurations from its header.

    Returns:
        The configurations of transformer, VAE and scheduler, and the number of weight elements of each part.
    Raises:
        RequestError: if the file is truncated, quantised, or not a CogVideoX transformer.
    """
    found = {name: entry for name, (_, entry) in entries(path).items()}
    config = transformer_config(path, found)
    check_names(path, set(found), config)
    check_dtypes(path, found)
    elements = {"transformer": sum(math.prod(entry["shape"]) for entry in found.values())}
    return config, vae_config(config), scheduler_config(config), elements


def vae_config(config: dict[str, Any]) -> dict[str, Any]:
    """Returns what of the published VAE's configuration depends on the model, given its transformer's configuration."""
    small = config["num_attention_heads"] == HEADS_OF_2B
    return {"scaling_factor": 1.15258426 if small else 0.7, "invert_scale_latents": config.get("ofs_embed_dim") is not None}


def scheduler_config(config: dict[str, Any]) -> dict[str, Any]:
    """Returns the published scheduler configuration of a model, given its transformer's configuration."""
    return SCHEDULER | {
        "_class_name": "CogVideoXDPMScheduler" if is_base_5b(config) else "CogVideoXDDIMScheduler",
        "snr_shift_scale": 3.0 if config["num_attention_heads"] == HEADS_OF_2B else 1.0,
    }


def is_base_5b(config: dict[str, Any]) -> bool:
    """Returns whether this is CogVideoX-5b, the only model that is published with DPM. VideoX-Fun's models have DDIM by default."""
    return (
        config["num_attention_heads"] != HEADS_OF_2B
        and config.get("patch_size_t") is None
        and config["in_channels"] == config["out_channels"]
    )


def entries(path: Path) -> dict[str, tuple[str, dict[str, Any]]]:
    """Returns the transformer's weights by diffusers' name: their name in the file, and their header entry (dtype and shape).

    Raises:
        RequestError: if the file is not safetensors, truncated, or another model.
    """
    if path.suffix not in SUFFIXES:
        raise RequestError(
            f"{path.name} is not a .safetensors file; GGUF and pickled files are not supported: use one in bf16 or fp16"
        )
    stored = weights.header(path)
    anchors = [name for name in stored if name.endswith(ANCHOR)]
    if len(anchors) != 1:
        raise RequestError(f"{path.name} is not a CogVideoX transformer{kinds.looks_like(stored)}; choose another file")
    kinds.check(path.name, stored)
    prefix = anchors[0].removesuffix(ANCHOR)
    from_core = f"{prefix}blocks.0.q.weight" in stored
    return {
        diffusers_name(name.removeprefix(prefix)) if from_core else name.removeprefix(prefix): (name, entry)
        for name, entry in stored.items()
        if name.startswith(prefix)
    }


def stored(path: Path) -> dict[str, weights.Stored]:
    """Returns the location of each of the transformer's weights, by diffusers' name."""
    found = entries(path).items()
    return {name: weights.Stored(path, inside, tuple(entry["shape"])) for name, (inside, entry) in found}


def diffusers_name(name: str) -> str:
    """Returns diffusers' name for a weight of ComfyUI's own CogVideoX."""
    return ".".join(CORE_TO_DIFFUSERS.get(part, part) for part in name.split("."))


def transformer_config(path: Path, found: Entries) -> dict[str, Any]:
    """Derives the arguments of diffusers' transformer from the shapes of its weights.

    Args:
        path: of the file, for messages.
        found: header entries by diffusers' name.
    Raises:
        RequestError: if a required weight is missing, or learned positions are for an unknown size.
    """

    def shape(name: str) -> list[int]:
        if name not in found:
            raise RequestError(f"{path.name} lacks the weight {name} of a CogVideoX transformer; download it again")
        return found[name]["shape"]

    features, head = shape(ANCHOR)[0], shape("transformer_blocks.0.attn1.norm_q.weight")[0]
    patch = shape("patch_embed.proj.weight")
    two_frames = len(patch) == 2  # CogVideoX 1.5 embeds patches of two frames, by a linear layer
    edge = 2 if two_frames else patch[2]
    width, height, frames = SAMPLE_SIZES[two_frames]
    config = {
        "num_attention_heads": features // head,
        "attention_head_dim": head,
        "num_layers": len({name.split(".")[1] for name in found if name.startswith("transformer_blocks.")}),
        "in_channels": patch[1] // (2 * edge**2) if two_frames else patch[1],
        "out_channels": shape("proj_out.weight")[0] // (edge**2 * (2 if two_frames else 1)),
        "time_embed_dim": shape("time_embedding.linear_1.weight")[0],
        "ofs_embed_dim": shape("ofs_embedding.linear_1.weight")[1] if "ofs_embedding.linear_1.weight" in found else None,
        "text_embed_dim": shape(ANCHOR)[1],
        "max_text_seq_length": TEXT_TOKENS,
        "sample_width": width,
        "sample_height": height,
        "sample_frames": frames,
        "patch_size": edge,
        "patch_size_t": 2 if two_frames else None,
        "patch_bias": not two_frames,  # as published; diffusers' linear layer has one all the same
        "use_rotary_positional_embeddings": features // head != HEADS_OF_2B,
        "use_learned_positional_embeddings": "patch_embed.pos_embedding" in found and features // head != HEADS_OF_2B,
    }
    if (
        config["in_channels"] == 2 * config["out_channels"] + 1
        and config["use_rotary_positional_embeddings"]
        and not two_frames
    ):
        config["add_noise_in_inpaint_model"] = True  # V1.1-5b-InP's, and V1.0's has the same shapes
    if config["use_learned_positional_embeddings"]:
        positions = shape("patch_embed.pos_embedding")[1]
        published = TEXT_TOKENS + ((frames - 1) // 4 + 1) * (height // edge) * (width // edge)
        if two_frames or positions != published:
            raise RequestError(
                f"{path.name} has learned positions for {positions} tokens; only those of CogVideoX-5b-I2V, {published}, are "
                "known: use its folder in diffusers layout"
            )
    return config


def check_names(path: Path, names: set[str], config: dict[str, Any]) -> None:
    """Raises RequestError unless these are exactly the weights of a CogVideoX with this configuration."""
    expected = kinds.expected_weights(config)
    if unknown := names - expected:
        raise RequestError(
            f"{path.name} holds {len(unknown)} unknown weights, such as {min(unknown)}: it is a CogVideoX with "
            f"{kinds.addition_of(unknown)}; use the plain bf16 or fp16 file"
        )
    if missing := expected - names:
        raise RequestError(f"{path.name} lacks {len(missing)} weights, such as {min(missing)}; download it again")


def check_dtypes(path: Path, found: Entries) -> None:
    """Raises RequestError if a weight is quantised."""
    for name, entry in found.items():
        if entry["dtype"] not in PLAIN_DTYPES:
            raise RequestError(
                f"{path.name} is quantised: {name} is stored in {entry['dtype']}; use a file in bf16, fp16 or plain FP8"
            )


def stored_dtype(path: Path) -> str:
    """Returns the dtype that most of the transformer's elements are stored in, by its safetensors name."""
    return weights.most_common_dtype(entry for _, entry in entries(path).values())
