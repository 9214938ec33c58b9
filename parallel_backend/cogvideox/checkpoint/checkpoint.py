"""One checkpoint, a folder or a single file: what it holds, what it can do, and its parts, loaded where they run."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from ...devices import has_bf16
from ...errors import RequestError
from ...jobs import DTYPES, empty_latent
from . import bundled, shards, single_file, weights

TRANSFORMER_CLASS = "CogVideoXTransformer3DModel"
VAE_CLASS = "AutoencoderKLCogVideoX"
SCHEDULER_CLASSES = {"ddim": "CogVideoXDDIMScheduler", "dpm": "CogVideoXDPMScheduler"}
SPATIAL, TEMPORAL = 8, 4
TASKS = {
    "text": "text to video",
    "image": "image to video",
    "control": "control video to video",
    "inpaint": "inpainting, first and last frame",
}
"""What a checkpoint makes a video from, and how messages name it."""
IMAGE_PIPELINE = "CogVideoXImageToVideoPipeline"
"""Tells a start image from a control video where a transformer of 32 channels does not."""
REFERENCE_NOISE = 0.0563
"""Standard deviation, of pixels in -1..1, of the noise on what an inpaint model is shown, where it was trained with noise
(``noise_aug_strength`` of VideoX-Fun's CogVideoXFunInpaintPipeline)."""
LENDER = "_parts_from"
"""In ``model_index.json``: the name of the folder beside it that lends what this one lacks, so that the VAE and the text
encoder of the pack's two models are stored once. diffusers passes over names that begin so."""
TRAINED_AT = (1360, 768)
"""CogVideoX 1.5's own size: its published configurations say 300x300 latents, which is how far its positions reach."""


def read_config(folder: Path, name: str = "config.json") -> dict[str, Any]:
    """A component's JSON configuration.

    Raises:
        RequestError: when the file is missing or is no JSON.
    """
    path = folder / name
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise RequestError(f"the checkpoint has no {path}; download the folder whole, in diffusers layout") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise RequestError(f"{path} cannot be read: {error}; download it again") from error


@dataclass(frozen=True)
class Checkpoint:
    """A folder in diffusers layout, or a transformer in one file, opened without reading weights. Make it with :meth:`open`."""

    path: Path
    transformer: dict[str, Any]
    vae: dict[str, Any]
    scheduler: dict[str, Any]
    elements: dict[str, int] = field(default_factory=dict)
    """Numbers in the weights of each part."""
    pipeline: str | None = None
    """The class that ``model_index.json`` names; None where there is no such file."""
    lender: Path | None = None
    """The folder beside it that has the parts it lacks; ``model_index.json`` names it (``LENDER``)."""

    @classmethod
    def open(cls, path: str | Path) -> "Checkpoint":
        """Reads the configurations and checks that every weight file is there, whole, and safetensors.

        A folder in which nothing changed is not read again: one decode opens it several times. A single file's
        configurations follow from its header; see :mod:`.single_file`.

        Raises:
            RequestError: one line for what is missing, cut off, or of the wrong kind.
        """
        path = Path(path)
        if path.is_file():
            return read_file(path, weights.fingerprint([path]))
        if not path.is_dir():
            raise RequestError(f"there is no checkpoint folder {path}")
        return read(path, state(path))

    @staticmethod
    def fingerprint(path: Path) -> str:
        """A digest that changes when a file of a checkpoint does, by names, sizes and times of change."""
        found = weights.fingerprint([path]) if path.is_file() else state(path)
        return hashlib.sha256(repr(found).encode()).hexdigest()

    @property
    def name(self) -> str:
        """For the user: the folder's or file's, or ORG/NAME for one in the Hugging Face cache, whose own name is a hash."""
        versions = self.path.parent
        return bundled.name_in_cache(versions.parent) if versions.name == "snapshots" else self.path.name

    @property
    def is_file(self) -> bool:
        """Whether it is a transformer in one file, whose VAE and text encoder come from the core's loaders."""
        return self.path.is_file()

    @property
    def has_text(self) -> bool:
        """Whether the folder has a text encoder; the CogVideoX wrapper's folders have none."""
        return "text_encoder" in self.elements

    @property
    def heads(self) -> int:
        """Attention heads."""
        return self.transformer.get("num_attention_heads", 30)

    @property
    def head_dim(self) -> int:
        """Features of one head."""
        return self.transformer.get("attention_head_dim", 64)

    @property
    def layers(self) -> int:
        """Transformer blocks."""
        return self.transformer.get("num_layers", 30)

    @property
    def channels(self) -> int:
        """Latent channels of noise and result."""
        return self.transformer.get("out_channels") or 16

    @property
    def in_channels(self) -> int:
        """Latent channels the transformer takes: the noise's, and after them what it is conditioned on."""
        return self.transformer.get("in_channels", 16)

    @property
    def task(self) -> str | None:
        """One of ``TASKS``, by the checkpoint's own configuration; None for channels this pack does not know.

        Published models: noise alone is 16 channels. 33 are VideoX-Fun's InP (noise, mask, masked video). 32 are noise and
        either a start image (5b-I2V has learned positions, 1.5-5B-I2V an ``ofs`` embedding) or a control video (Fun Control
        and Pose, which have neither: VideoX-Fun's issue 176). What is left, such as a start-image finetune of 2b, is known
        by the pipeline in ``model_index.json``; a folder without one, as the CogVideoX wrapper's, is taken for control.
        """
        if self.in_channels == self.channels:
            return "text"
        if self.in_channels == 2 * self.channels + 1:
            return "inpaint"
        if self.in_channels != 2 * self.channels:
            return None
        is_image = self.learned_positions or self.ofs is not None or self.pipeline == IMAGE_PIPELINE
        return "image" if is_image else "control"

    @property
    def takes_image(self) -> bool:
        """Whether it makes a video from a start image alone."""
        return self.task == "image"

    @property
    def is_fun(self) -> bool:
        """Whether it is of VideoX-Fun's family, which was trained on whole tokens and at 8 frames per second."""
        return self.task in ("control", "inpaint")

    @property
    def reference_noise(self) -> float:
        """Standard deviation of the noise on the pixels an inpaint model is shown: only V1.1-5b was trained with it."""
        return REFERENCE_NOISE if self.transformer.get("add_noise_in_inpaint_model") else 0.0

    @property
    def text_tokens(self) -> int:
        """Tokens a prompt is padded or cut to."""
        return self.transformer.get("max_text_seq_length", 226)

    @property
    def text_features(self) -> int:
        """Features of one text token."""
        return self.transformer.get("text_embed_dim", 4096)

    @property
    def patch_size_t(self) -> int | None:
        """Latent frames in one token; None in CogVideoX 1.0, where it is one."""
        return self.transformer.get("patch_size_t")

    @property
    def rotary(self) -> bool:
        """Whether positions are rotary (5b, 1.5) or added sines (2b)."""
        return bool(self.transformer.get("use_rotary_positional_embeddings", False))

    @property
    def learned_positions(self) -> bool:
        """Whether learned positions are added too (5b-I2V): they hold for one width and height."""
        return bool(self.transformer.get("use_learned_positional_embeddings", False))

    @property
    def ofs(self) -> float | None:
        """The constant that CogVideoX1.5-5B-I2V takes along with the timestep; None where there is none."""
        return 2.0 if self.transformer.get("ofs_embed_dim") else None

    @property
    def scaling_factor(self) -> float:
        """What a VAE latent is multiplied by for the transformer."""
        return self.vae.get("scaling_factor", 1.15258426)

    def image_scale(self, name: str = "auto") -> float:
        """What a start image's latent is multiplied by.

        One of ``jobs.IMAGE_SCALES``, the conventions that there are for CogVideoX1.5-5B-I2V: ``auto`` is diffusers', which
        follows the VAE's ``invert_scale_latents`` (the inverse of the factor there, the factor elsewhere); ``inverse`` is
        always the inverse; ``raw`` is 1, as in the CogVideoX wrapper and zai-org/CogVideo#761; ``scaled`` is always the
        factor, as in ComfyUI's own model.
        """
        if name == "auto":
            name = "inverse" if self.vae.get("invert_scale_latents") else "scaled"
        return {"inverse": 1 / self.scaling_factor, "raw": 1.0, "scaled": self.scaling_factor}[name]

    @property
    def default_scheduler(self) -> str:
        """``ddim`` or ``dpm``, as the checkpoint's own configuration says."""
        named = {value: key for key, value in SCHEDULER_CLASSES.items()}
        return named.get(self.scheduler.get("_class_name"), "ddim")

    @property
    def positions_size(self) -> tuple[int, int]:
        """Width and height in pixels that the configuration's positions are made for."""
        return self.transformer.get("sample_width", 90) * SPATIAL, self.transformer.get("sample_height", 60) * SPATIAL

    @property
    def default_size(self) -> tuple[int, int, int]:
        """Width and height in pixels and frames that the model was trained for."""
        size = self.positions_size
        if self.patch_size_t is not None:
            size = tuple(map(min, size, TRAINED_AT))
        frames = self.transformer.get("sample_frames", 49)
        if self.is_fun:  # which pads nothing: 85 frames for a configuration's 81
            frames += self.padding_frames((frames - 1) // TEMPORAL + 1) * TEMPORAL
        return *size, frames

    def empty_latent(self) -> torch.Tensor:
        """An empty latent of the size that the model was trained for."""
        return empty_latent(**dict(zip(("width", "height", "frames"), self.default_size)), channels=self.channels)

    def blank_text(self) -> torch.Tensor:
        """Text states ``[1, tokens, features]`` for a job whose text is not known yet."""
        return torch.zeros(1, self.text_tokens, self.text_features)

    @property
    def most_frames(self) -> int:
        """Frames of the longest videos it was trained for; CogVideoX 1.5 also saw twice its own 81 (161)."""
        frames = self.default_size[2]
        return frames if self.patch_size_t is None else 2 * frames - 1

    @property
    def default_fps(self) -> int:
        """Frames per second: 8 in CogVideoX 1.0 and in all of VideoX-Fun's models, 16 in 1.5."""
        return 8 if self.patch_size_t is None or self.is_fun else 16

    @property
    def describe(self) -> str:
        """One line for the user."""
        width, height, frames = self.default_size
        positions = ("rotary" if self.rotary else "sincos") + (" and learned" if self.learned_positions else "")
        task = TASKS[self.task] if self.task else f"not supported yet ({self.in_channels} channels in)"
        return (
            f"{self.name}: CogVideoX {'1.0' if self.patch_size_t is None else '1.5'}, {task}, {self.layers} layers, "
            f"{self.heads} heads, {positions}, {self.native_dtype}{self.stored_otherwise}, {self.default_scheduler}, "
            f"{width}x{height}x{frames} at {self.default_fps} fps"
        )

    @cached_property
    def stored_dtype(self) -> str:
        """What most of the transformer's weights are stored in, as safetensors calls it."""
        return single_file.stored_dtype(self.path) if self.is_file else weights.stored_dtype(self.folder("transformer"))

    @property
    def native_dtype(self) -> str:
        """``fp32``, ``bf16`` or ``fp16``: what the transformer is computed in unless asked otherwise."""
        return weights.DTYPE_NAMES.get(self.stored_dtype, "bf16")

    @property
    def stored_otherwise(self) -> str:
        """Said where weights are not stored in what they are computed in, as FP8 is."""
        return "" if self.stored_dtype in weights.DTYPE_NAMES else f" (stored in {self.stored_dtype})"

    @cached_property
    def stored(self) -> dict[str, weights.Stored]:
        """Where each weight of the transformer is stored, by diffusers' name."""
        return single_file.stored(self.path) if self.is_file else weights.stored(self.folder("transformer"))

    @property
    def layer_shapes(self) -> dict[str, tuple[int, ...]]:
        """The weight of each linear or convolutional layer of the transformer, by the layer's name."""
        return {
            name.removesuffix(".weight"): where.shape
            for name, where in self.stored.items()
            if name.endswith(".weight") and len(where.shape) > 1
        }

    def dtype(self, asked: str, device: torch.device) -> torch.dtype:
        """The dtype to compute in; ``auto`` is the checkpoint's own on a GPU, fp16 for bf16 on an old one, and float32 on the CPU."""
        if asked == "auto":
            asked = "fp32" if device.type == "cpu" else self.native_dtype
            if asked == "bf16" and not has_bf16(device):
                asked = "fp16"
        return DTYPES[asked]

    def weight_bytes(self, part: str, dtype: torch.dtype) -> int:
        """Bytes of a part's weights once loaded in ``dtype``; 0 for one that is not there."""
        return self.elements.get(part, 0) * dtype.itemsize

    def folder(self, part: str) -> Path:
        """The folder of a part."""
        return folder_of(self.path, part, self.lender)

    def files(self, part: str) -> list[Path]:
        """The files of a part's weights."""
        return [self.path] if self.is_file else weights.files(self.folder(part))

    def likeness(self) -> str:
        """What is the same for two copies of a model on two machines: a digest of its weight files' names, sizes and middles."""
        digest = hashlib.sha256()
        for path in dict.fromkeys(
            path for part in ("transformer", "vae") if part in self.elements for path in self.files(part)
        ):
            size = path.stat().st_size
            with path.open("rb") as file:
                file.seek(size // 2)
                digest.update(f"{path.name} {size} ".encode() + file.read(4096))
        return digest.hexdigest()

    def padding_frames(self, latent_frames: int) -> int:
        """Latent frames put in front so that they divide into tokens, dropped after the loop."""
        return -latent_frames % (self.patch_size_t or 1)

    def tokens(self, latent_frames: int, height: int, width: int) -> int:
        """Video tokens of a latent of this size; height and width in latent rows and columns."""
        patch = self.transformer.get("patch_size", 2)
        frames = (latent_frames + self.padding_frames(latent_frames)) // (self.patch_size_t or 1)
        return frames * (height // patch) * (width // patch)

    def make_scheduler(self, name: str):
        """A new scheduler from the checkpoint's configuration; ``auto`` is its own class."""
        import diffusers

        wanted = SCHEDULER_CLASSES[self.default_scheduler if name == "auto" else name]
        return getattr(diffusers, wanted).from_config(self.scheduler)

    def load_transformer(
        self,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        *,
        home: torch.device | str | None = None,
        shard: shards.Shard = shards.WHOLE,
        prepare: Callable[[torch.nn.Module], None] = lambda skeleton: None,
        look: Callable[[], None] = lambda: None,
    ):
        """The transformer, in evaluation mode.

        Args:
            dtype: to compute in.
            device: where weights are converted.
            home: where they stay; ``device`` unless said otherwise.
            shard: what of them this rank keeps, and reads.
            prepare: changes the model before its weights are read.
            look: called before each weight; may raise, to stop.
        """
        model = shards.skeleton(self.transformer, dtype)
        wanted = shards.find(model, self.stored)
        prepare(model)
        shards.fill(model, wanted, shard=shard, dtype=dtype, device=device, home=home or device, look=look)
        return model

    def load_vae(self, dtype: torch.dtype, device: torch.device | str = "cpu"):
        """The VAE, in evaluation mode."""
        from diffusers import AutoencoderKLCogVideoX

        return self._load(AutoencoderKLCogVideoX, "vae", dtype, device)

    def load_text_encoder(self, dtype: torch.dtype, device: torch.device | str = "cpu"):
        """The T5 encoder, in evaluation mode.

        Raises:
            RequestError: when the folder has none.
        """
        from transformers import T5EncoderModel

        self.check_text()
        return self._load(T5EncoderModel, "text_encoder", dtype, device)

    def check_text(self) -> None:
        """Raises RequestError when there is no text encoder, saying where text comes from then."""
        if not self.has_text:
            raise RequestError(f"{self.name} has no text encoder; use the core's CLIPLoader (type cogvideox) for the text")

    def check_vae(self) -> None:
        """Raises RequestError when there is no VAE, saying what is used then."""
        if "vae" not in self.elements:
            raise RequestError(f"{self.name} has no VAE; use the core's VAELoader with CogVideoX's VAE")

    def check_whole(self) -> None:
        """Raises RequestError unless text encoder and VAE are there, for where no ComfyUI can lend them."""
        lacking = [part.replace("_", " ") for part in ("text_encoder", "vae") if part not in self.elements]
        if lacking:
            raise RequestError(
                f"{self.name} has no {' and no '.join(lacking)}, which come from ComfyUI's loaders there; "
                "here give a whole folder in diffusers layout"
            )

    def load_tokenizer(self):
        """The tokenizer of the text encoder.

        Raises:
            RequestError: when the folder has none, or a package to read it is missing.
        """
        self.check_text()
        if not (self.folder("tokenizer") / "tokenizer.json").exists():
            for package, module in (("sentencepiece", "sentencepiece"), ("protobuf", "google.protobuf")):
                if not has_module(module):
                    raise RequestError(f"the tokenizer of {self.name} needs {package}: pip install {package}")
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.folder("tokenizer"), local_files_only=True)

    def _load(self, cls, part: str, dtype: torch.dtype, device: torch.device | str):
        model = cls.from_pretrained(
            self.folder(part), use_safetensors=True, local_files_only=True, **{dtype_argument(cls): dtype}
        )
        return ready(model, device)


def ready(model: torch.nn.Module, device: torch.device | str) -> torch.nn.Module:
    """A model to be used and not trained, on a device."""
    return model.requires_grad_(False).eval().to(device)


def whole_frames(frames: int, together: int = 1) -> int:
    """The most frames, 4k+1, that a video of so many gives without padding; ``together`` latent frames are one token."""
    latent = (frames - 1) // TEMPORAL + 1
    return (max(latent // together * together, 1) - 1) * TEMPORAL + 1


def folder_of(path: Path, part: str, lender: Path | None) -> Path:
    """A part's folder: the checkpoint's own, or the one that is lent."""
    own = path / part
    return lender / part if lender and not own.is_dir() else own


def state(path: Path) -> tuple:
    """Changes when a file of a checkpoint folder, or of one that lends it parts, does: names, sizes and times of change."""
    folders = [path, *filter(None, [lender_of(path, read_index(path))])]
    found = (file for folder in folders for file in sorted((*folder.glob("*"), *folder.glob("*/*"))))
    return weights.fingerprint(file for file in found if file.is_file())


def read_index(path: Path) -> dict[str, Any]:
    """What ``model_index.json`` says; nothing where there is none."""
    found = path / "model_index.json"
    return read_found_index(path, weights.fingerprint([found])) if found.exists() else {}


@lru_cache(maxsize=8)
def read_found_index(path: Path, state: tuple) -> dict[str, Any]:
    """The index of a folder in one state."""
    return read_config(path, "model_index.json")


def lender_of(path: Path, index: dict[str, Any]) -> Path | None:
    """The folder beside a checkpoint's that lends it parts; nowhere else, whatever the index says."""
    name = Path(str(index.get(LENDER, ""))).name
    return path.parent / name if name not in ("", "..") else None


@lru_cache(maxsize=8)
def read(path: Path, state: tuple) -> Checkpoint:
    """The checkpoint of a folder in one state; what is refused is not remembered."""
    if not any(path.iterdir()):
        raise RequestError(f"the checkpoint folder {path} is empty; put a CogVideoX in diffusers layout there")
    index = read_index(path)
    lender = lender_of(path, index)

    def folder(part: str) -> Path:
        return folder_of(path, part, lender)

    transformer = read_config(folder("transformer"))
    if transformer.get("_class_name") != TRANSFORMER_CLASS:
        raise RequestError(f"{path} is a {transformer.get('_class_name')}, not a {TRANSFORMER_CLASS}")
    vae = read_config(folder("vae"))
    if vae.get("_class_name") != VAE_CLASS:
        raise RequestError(f"{path}/vae is a {vae.get('_class_name')}, not a {VAE_CLASS}")
    scheduler = read_config(folder("scheduler"), "scheduler_config.json")
    elements = {part: weights.elements(folder(part)) for part in ("transformer", "vae")}
    if folder("text_encoder").is_dir():
        elements["text_encoder"] = weights.elements(folder("text_encoder"))
        read_config(folder("tokenizer"), "tokenizer_config.json")
    return Checkpoint(path, transformer, vae, scheduler, elements, index.get("_class_name"), lender)


@lru_cache(maxsize=8)
def read_file(path: Path, state: tuple) -> Checkpoint:
    """The checkpoint of a single file in one state."""
    return Checkpoint(path, *single_file.read(path))


def has_module(name: str) -> bool:
    """Whether a module can be imported, without importing more than its parent package."""
    try:
        return find_spec(name) is not None
    except ModuleNotFoundError:
        return False


def dtype_argument(cls) -> str:
    """What ``from_pretrained`` of a class calls the dtype: both libraries renamed it, at these versions."""
    from importlib.metadata import version

    from packaging.version import Version

    library = cls.__module__.partition(".")[0]
    renamed = {"diffusers": "0.42", "transformers": "4.56"}[library]
    return "dtype" if Version(version(library)) >= Version(renamed) else "torch_dtype"
