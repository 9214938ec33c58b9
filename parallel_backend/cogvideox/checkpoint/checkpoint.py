"""A checkpoint, a folder or a single file, and the loading of its parts."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path

import torch

from ...devices import has_bf16
from ...errors import RequestError
from ...model import DTYPES, Model
from ...system.modules import has_module
from . import bundled, kinds, shards, single_file, tasks, weights
from .facts import SCHEDULER_CLASSES, CheckpointFacts
from .index import folder_of, lender_of, read_config, read_index, state
from .libraries import READING, dtype_argument, member

TRANSFORMER_CLASS = "CogVideoXTransformer3DModel"
VAE_CLASS = "AutoencoderKLCogVideoX"


@dataclass(frozen=True)
class Checkpoint(CheckpointFacts):
    """A folder in diffusers layout, or a transformer in one file, opened without reading weights.

    Create it with :meth:`open`, or with :meth:`of` for what a user asks of it.
    """

    @classmethod
    def of(cls, model: Model) -> "Checkpoint":
        """Opens a model's checkpoint with the user's choices of task and noise schedule; see :meth:`open`."""
        return cls.open(model.path, task=model.task, snr_shift=model.snr_shift)

    @classmethod
    def open(cls, path: str | Path, *, task: str = "auto", snr_shift: str = "auto") -> "Checkpoint":
        """Reads the configurations and checks that every weight file is present, complete, and safetensors.

        An unchanged folder is not read again, since one decode opens it several times. For a single file the configurations
        are derived from its header; see :mod:`.single_file`.

        Args:
            path: of the folder or the file.
            task, snr_shift: see :class:`parallel_backend.model.Model`.
        Raises:
            RequestError: if a file is missing, truncated, or of the wrong kind, or if the task does not fit.
        """
        path = Path(path)
        if path.is_file():
            return chosen(read_file, path, weights.fingerprint([path]), task, snr_shift)
        if not path.is_dir():
            raise RequestError(f"there is no checkpoint folder {path}")
        return chosen(read, path, state(path), task, snr_shift)

    @staticmethod
    def fingerprint(path: Path) -> str:
        """Returns a digest of the names, sizes and modification times of a checkpoint's files."""
        found = weights.fingerprint([path]) if path.is_file() else state(path)
        return hashlib.sha256(repr(found).encode()).hexdigest()

    @property
    def name(self) -> str:
        """The name shown to the user; see :func:`.bundled.name_of`."""
        return bundled.name_of(self.path)

    @property
    def is_file(self) -> bool:
        """Whether it is a transformer in one file. ComfyUI's own loaders then provide VAE and text encoder."""
        return self.path.is_file()

    @property
    def describe(self) -> str:
        """One line for the user."""
        width, height, frames = self.default_size
        positions = ("rotary" if self.rotary else "sincos") + (" and learned" if self.learned_positions else "")
        task = tasks.TASKS[self.task] if self.task else f"not supported yet ({self.in_channels} channels in)"
        return (
            f"{self.name}: CogVideoX {'1.0' if self.patch_size_t is None else '1.5'}, {task}, {self.layers} layers, "
            f"{self.heads} heads, {positions}, {self.native_dtype}{self.stored_otherwise}, {self.default_scheduler}, "
            f"made for {width}x{height}x{frames} at {self.default_fps} fps"
        )

    @cached_property
    def stored_dtype(self) -> str:
        """The dtype that most of the transformer's weights are stored in, by its safetensors name."""
        return single_file.stored_dtype(self.path) if self.is_file else weights.stored_dtype(self.folder("transformer"))

    @property
    def native_dtype(self) -> str:
        """The transformer's default compute dtype: ``fp32``, ``bf16`` or ``fp16``."""
        return weights.DTYPE_NAMES.get(self.stored_dtype, "bf16")

    @property
    def stored_otherwise(self) -> str:
        """A remark for :attr:`describe` if the stored dtype is not the compute dtype, as with FP8."""
        return "" if self.stored_dtype in weights.DTYPE_NAMES else f" (stored in {self.stored_dtype})"

    @cached_property
    def stored(self) -> dict[str, weights.Stored]:
        """The location of each of the transformer's weights, by diffusers' name."""
        return single_file.stored(self.path) if self.is_file else weights.stored(self.folder("transformer"))

    @property
    def unused_weights(self) -> set[str]:
        """The transformer's weights that CogVideoX does not have. A folder may have some; a file with some is refused."""
        return self.stored.keys() - kinds.expected_weights(self.transformer)

    @property
    def layer_shapes(self) -> dict[str, tuple[int, ...]]:
        """The weight shape of each linear or convolutional layer of the transformer, by the layer's name."""
        return {
            name.removesuffix(".weight"): where.shape
            for name, where in self.stored.items()
            if name.endswith(".weight") and len(where.shape) > 1
        }

    def dtype(self, asked: str, device: torch.device) -> torch.dtype:
        """Returns the dtype to compute in.

        Args:
            asked: ``fp32``, ``bf16``, ``fp16`` or ``auto``. ``auto`` is float32 on the CPU and the checkpoint's own dtype on a
                GPU, but fp16 if that GPU does not support bf16.
            device: to compute on.
        """
        if asked == "auto":
            asked = "fp32" if device.type == "cpu" else self.native_dtype
            if asked == "bf16" and not has_bf16(device):
                asked = "fp16"
        return DTYPES[asked]

    def folder(self, part: str) -> Path:
        """Returns the folder of a part, such as ``vae``."""
        return folder_of(self.path, part, self.lender)

    def files(self, part: str) -> list[Path]:
        """Returns the weight files of a part."""
        return [self.path] if self.is_file else weights.files(self.folder(part))

    def make_scheduler(self, name: str):
        """Creates a scheduler from the checkpoint's configuration; ``auto`` is the class that it names."""
        wanted = SCHEDULER_CLASSES[self.default_scheduler if name == "auto" else name]
        return member("diffusers", wanted).from_config({**self.scheduler, "snr_shift_scale": self.snr_shift_scale})

    def load_transformer(
        self,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        *,
        home: torch.device | str | None = None,
        shard: shards.Shard = shards.WHOLE,
        prepare: Callable[[torch.nn.Module], None] = lambda skeleton: None,
        look: Callable[[float], None] = lambda share: None,
    ):
        """Loads the transformer, in evaluation mode.

        Args:
            dtype: compute dtype.
            device: where weights are converted.
            home: where weights are stored; ``device`` by default.
            shard: the part of the weights that this rank reads and keeps.
            prepare: modifies the model before its weights are read.
            look: called before each weight with the share of weights read so far; may raise to cancel.
        """
        model = shards.skeleton(self.transformer, dtype)
        wanted = shards.find(model, self.stored)
        prepare(model)
        shards.fill(model, wanted, shard=shard, dtype=dtype, device=device, home=home or device, look=look)
        return model

    def load_vae(self, dtype: torch.dtype, device: torch.device | str = "cpu"):
        """Loads the VAE, in evaluation mode."""
        vae = member("diffusers", VAE_CLASS)
        model = shards.empty(lambda: vae.from_config(self.vae), dtype)
        wanted = shards.find(model, weights.stored(self.folder("vae")), "the VAE")
        shards.fill(model, wanted, dtype=dtype, device=device, home=device)
        return model

    def load_text_encoder(self, dtype: torch.dtype):
        """Loads the T5 encoder on the CPU, in evaluation mode.

        Raises:
            RequestError: if the checkpoint has none.
        """
        self.check_text()
        encoder = member("transformers", "T5EncoderModel")
        found = {"use_safetensors": True, "local_files_only": True, dtype_argument(encoder): dtype}
        with READING:
            return encoder.from_pretrained(self.folder("text_encoder"), **found).requires_grad_(False).eval()

    def check_text(self) -> None:
        """Raises RequestError if the checkpoint has no text encoder."""
        if not self.has_text:
            raise RequestError(f"{self.name} has no text encoder; use the core's CLIPLoader (type cogvideox) for the text")

    def check_vae(self) -> None:
        """Raises RequestError if the checkpoint has no VAE."""
        if "vae" not in self.elements:
            raise RequestError(f"{self.name} has no VAE; use the core's VAELoader with CogVideoX's VAE")

    def check_whole(self) -> None:
        """Raises RequestError if text encoder or VAE is missing: outside ComfyUI there are no other loaders for them."""
        lacking = [part.replace("_", " ") for part in ("text_encoder", "vae") if part not in self.elements]
        if lacking:
            raise RequestError(
                f"{self.name} has no {' and no '.join(lacking)}, which only ComfyUI's own loaders provide; "
                "outside ComfyUI give a complete folder in diffusers layout"
            )

    def load_tokenizer(self):
        """Loads the text encoder's tokenizer.

        Raises:
            RequestError: if the checkpoint has none, or a package that it needs is not installed.
        """
        self.check_text()
        if not (self.folder("tokenizer") / "tokenizer.json").exists():
            for package, module in (("sentencepiece", "sentencepiece"), ("protobuf", "google.protobuf")):
                if not has_module(module):
                    raise RequestError(f"the tokenizer of {self.name} needs {package}: pip install {package}")
        return member("transformers", "AutoTokenizer").from_pretrained(self.folder("tokenizer"), local_files_only=True)


@lru_cache(maxsize=16)
def chosen(read: Callable[[Path, tuple], Checkpoint], path: Path, state: tuple, task: str, snr_shift: str) -> Checkpoint:
    """Opens a checkpoint with ``read``, with the user's choices; cached, so that its own caches last."""
    checkpoint = read(path, state)
    tasks.check(checkpoint.name, task, checkpoint.possible_tasks, checkpoint.in_channels)
    return replace(checkpoint, asked_task=task, asked_snr_shift=snr_shift)


@lru_cache(maxsize=8)
def read(path: Path, state: tuple) -> Checkpoint:
    """Opens a checkpoint folder; cached by its fingerprint ``state``. Errors are not cached."""
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
    kinds.check(path.name, weights.stored(folder("transformer")))
    if folder("text_encoder").is_dir():
        elements["text_encoder"] = weights.elements(folder("text_encoder"))
        read_config(folder("tokenizer"), "tokenizer_config.json")
    return Checkpoint(path, transformer, vae, scheduler, elements, index.get("_class_name"), lender)


@lru_cache(maxsize=8)
def read_file(path: Path, state: tuple) -> Checkpoint:
    """Opens a single file; cached by its fingerprint ``state``."""
    return Checkpoint(path, *single_file.read(path))
