"""The text states of the empty prompt as a file, as super-resolution models are published with: they need no text encoder then."""

import hashlib
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from ...errors import RequestError
from .checkpoint import Checkpoint

FILE = Path("prompt_embeddings") / f"{hashlib.sha256(b'').hexdigest()}.safetensors"
"""CogVideoX's training names a prompt's file by its digest (zai-org/CogVideo, ``finetune``)."""
NAME = "prompt_embedding"


def find(checkpoint: Checkpoint) -> Path | None:
    """Returns the file: in the model's folder, or next to it, as in DOVE's ``pretrained_models``. None if there is none."""
    path = checkpoint.path
    return next((each / FILE for each in (path, path / "pretrained_models", path.parent) if (each / FILE).is_file()), None)


def read(checkpoint: Checkpoint) -> torch.Tensor | None:
    """Returns the text states ``[1, tokens, features]`` of the file, float32; None if there is none.

    Raises:
        RequestError: for a file without them.
    """
    path = find(checkpoint)
    if path is None:
        return None
    try:
        states = load_file(path)[NAME]
    except (OSError, SafetensorError, KeyError) as error:
        raise RequestError(f"{path} has no readable {NAME}; replace or remove the file") from error
    return states.float().reshape(1, *states.shape[-2:])
