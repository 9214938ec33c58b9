"""ControlNets, opened by their configuration and the header of their weights.

They are those of TheDenk/cogvideox-controlnet (e21a4a3, ``cogvideo_controlnet.py``): an embedding of the noisy latents and the control
video, and CogVideoX's first blocks. All were trained with CogVideoX 1.0.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import torch

from ...errors import RequestError
from ...model import ControlNet
from . import kinds, weights
from .checkpoint import Checkpoint
from .index import read_config
from .single_file import SUFFIXES, TEXT_TOKENS, has_weight

CLASS = "CogVideoXControlnet"
"""The class that a ControlNet's ``config.json`` names."""
ENCODER = ("controlnet_encode_first.0", "controlnet_encode_first.1", "controlnet_encode_second.0", "controlnet_encode_second.1")
"""The layers of the control video's encoder, in order: a convolution and a norm, twice."""
FIRST, SECOND = f"{ENCODER[0]}.weight", f"{ENCODER[2]}.weight"
EMBED, TEXT, TIME = "patch_embed.proj.weight", "patch_embed.text_proj.weight", "time_embedding.linear_1.weight"
HEAD, PROJECTOR = "transformer_blocks.0.attn1.norm_q.weight", "out_projectors.0.weight"
DOWNSCALE = 8
"""Pixels a side that the encoder joins, as in all published ControlNets."""
SETTINGS = {
    "downscale_coef": DOWNSCALE, "max_text_seq_length": TEXT_TOKENS, "sample_width": 90, "sample_height": 60, "sample_frames": 49,
    "temporal_compression_ratio": 4, "spatial_interpolation_scale": 1.875, "temporal_interpolation_scale": 1.0,
    "flip_sin_to_cos": True, "freq_shift": 0, "timestep_activation_fn": "silu", "activation_fn": "gelu-approximate",
    "norm_elementwise_affine": True, "norm_eps": 1e-5, "use_rotary_positional_embeddings": False,
    "use_learned_positional_embeddings": False,
}  # fmt: skip
"""What the weights do not say, with the defaults of the author's class. His training script leaves them as they are, also for 5b: its
ControlNet adds sinusoidal positions to the tokens and gets the model's rotary ones too."""


@dataclass(frozen=True)
class ControlNetFile:
    """A ControlNet whose weights are not read. Create it with :meth:`open`."""

    path: Path
    """A folder with ``config.json`` and weights, or a file of weights."""
    config: dict[str, Any]
    stored: dict[str, weights.Stored]
    """The location of each weight."""

    default_fps = 8
    """Frames a second of CogVideoX 1.0, which the ControlNets were trained with."""
    patch_size_t = None
    """CogVideoX 1.0 has tokens of one latent frame."""

    @classmethod
    def open(cls, path: str | Path) -> "ControlNetFile":
        """Reads the configuration and the header, and checks that they fit each other.

        Raises:
            RequestError: if files are missing or truncated, or it is something else than a ControlNet for CogVideoX.
        """
        path = Path(path).expanduser()
        if path.is_dir():
            return read(path, weights.fingerprint(sorted(file for file in path.iterdir() if file.is_file())))
        if not path.is_file():
            raise RequestError(
                f"there is no ControlNet {path}; give a folder with config.json and weights, or a .safetensors file"
            )
        if path.suffix not in SUFFIXES:
            raise RequestError(
                f"the ControlNet {path.name} is not a .safetensors file; only safetensors are supported: convert it"
            )
        return read(path, weights.fingerprint([path]))

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def files(self) -> list[Path]:
        """The files of weights."""
        return sorted({where.path for where in self.stored.values()})

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each weight."""
        return {name: where.shape for name, where in self.stored.items()}

    @property
    def layers(self) -> int:
        """Number of blocks."""
        return len({name.split(".")[1] for name in self.stored if name.startswith("transformer_blocks.")})

    @property
    def features(self) -> int:
        """Features of a token."""
        return self.shapes[EMBED][0]

    @property
    def head_dim(self) -> int:
        return self.shapes[HEAD][0]

    @property
    def heads(self) -> int:
        return self.features // self.head_dim

    @property
    def downscale(self) -> int:
        """Pixels a side that the encoder joins."""
        return self.config["downscale_coef"]

    @property
    def channels(self) -> int:
        """Channels of the encoded control video."""
        return self.shapes[SECOND][0]

    @property
    def latent_channels(self) -> int:
        """Channels of the noisy latents that it sees."""
        return self.shapes[EMBED][1] - self.channels

    @property
    def projected(self) -> int:
        """Features of what each block adds to a token of the model."""
        return self.shapes.get(PROJECTOR, (self.features,))[0]

    def weight_bytes(self, dtype: torch.dtype) -> int:
        """Returns the bytes of the weights once loaded in ``dtype``. The encoder's, a few kilobytes, are included."""
        return sum(map(math.prod, self.shapes.values())) * dtype.itemsize

    @property
    def describe(self) -> str:
        """One line for the user."""
        positions = "no positions of its own" if self.config["use_rotary_positional_embeddings"] else "sinusoidal positions"
        concluded = "" if self.path.is_dir() else " (as its author trains them: the file does not say, config.json would)"
        return f"{self.name}: ControlNet of {self.layers} blocks, {self.heads} heads, {positions}{concluded}"

    def check(self, checkpoint: Checkpoint) -> None:
        """Raises RequestError unless it was made for a model of this shape."""
        name, model = self.name, checkpoint.name
        if checkpoint.patch_size_t is not None:
            raise RequestError(
                f"{name} is for CogVideoX 1.0 and {model} is CogVideoX 1.5; use CogVideoX-2b, 5b or 5b-I2V with it"
            )
        for what, own, wanted in (
            ("heads", self.heads, checkpoint.heads),
            ("features of a head", self.head_dim, checkpoint.head_dim),
            ("features of a block's output", self.projected, checkpoint.heads * checkpoint.head_dim),
            ("features of a text token", self.shapes[TEXT][1], checkpoint.text_features),
            ("text tokens", self.config["max_text_seq_length"], checkpoint.text_tokens),
            ("channels of the latent", self.latent_channels, checkpoint.channels),
            ("pixels a side of a patch", self.shapes[EMBED][2], checkpoint.transformer.get("patch_size", 2)),
        ):
            if own != wanted:
                raise RequestError(f"{name} has {own} {what} and {model} has {wanted}; use a ControlNet made for {model}")
        if self.layers > checkpoint.layers:
            raise RequestError(f"{name} has {self.layers} blocks and {model} only {checkpoint.layers}; use another ControlNet")


def open_all(nets: Iterable[ControlNet], checkpoint: Checkpoint) -> tuple[ControlNetFile, ...]:
    """Opens ControlNets, and checks that each fits the checkpoint."""
    files = tuple(ControlNetFile.open(net.path) for net in nets)
    for file in files:
        file.check(checkpoint)
    return files


def weight_bytes(nets: Iterable[ControlNet], dtype: torch.dtype) -> int:
    """Returns the bytes of all ControlNets' weights once loaded in ``dtype``."""
    return sum(ControlNetFile.open(net.path).weight_bytes(dtype) for net in nets)


@lru_cache(maxsize=16)
def read(path: Path, state: tuple) -> ControlNetFile:
    """Opens a folder or a file; cached by its fingerprint ``state``."""
    config = {}
    if path.is_dir():
        config = read_config(path)
        if config.get("_class_name") != CLASS:
            raise RequestError(f"{path} is a {config.get('_class_name')}, not a ControlNet for CogVideoX ({CLASS})")
        stored = weights.stored(path)
    else:
        stored = {name: weights.Stored(path, name, tuple(entry["shape"])) for name, entry in weights.header(path).items()}
    shapes = {name: where.shape for name, where in stored.items()}
    if missing := {FIRST, SECOND, EMBED, TEXT, TIME, HEAD} - shapes.keys():
        what = (
            "is incomplete: download it again"
            if FIRST in shapes
            else f"is not a ControlNet for CogVideoX{kinds.looks_like(shapes)}"
        )
        raise RequestError(f"{path.name} {what} (it lacks {min(missing)})")
    known = {name: value for name, value in config.items() if name in SETTINGS}
    found = ControlNetFile(path, SETTINGS | known, stored)
    check_encoder(found)
    return found


def check_encoder(file: ControlNetFile) -> None:
    """Raises RequestError unless the encoder's weights fit a video in colour at the latent's size, and each other."""
    first, second = file.shapes[FIRST], file.shapes[SECOND]
    if first[1] != 3 * file.downscale**2 or file.downscale != DOWNSCALE or second[1] != first[0]:
        raise RequestError(
            f"{file.name} encodes {first[1]} channels of {file.downscale}x{file.downscale} pixels; only ControlNets for videos in "
            f"colour that join {DOWNSCALE}x{DOWNSCALE} pixels are supported"
        )
    for layer, channels in zip(ENCODER, (first[0], first[0], second[0], second[0])):
        if any(file.shapes.get(f"{layer}.{kind}", ())[:1] != (channels,) for kind in ("weight", "bias")):
            raise RequestError(f"{file.name} is incomplete: it lacks {layer} with {channels} channels; download it again")


def is_controlnet(path: Path) -> bool:
    """Returns whether a folder or a file is a ControlNet for CogVideoX, by its configuration or header. Fast, for lists of files."""
    try:
        if path.is_dir():
            return read_config(path).get("_class_name") == CLASS
        return has_weight(path, weights.fingerprint([path]), FIRST)
    except (OSError, RequestError, AttributeError):
        return False
