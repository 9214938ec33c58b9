"""Encodes videos for Save Video (MP4) while CogVideoX VAE Decode still decodes them."""

from typing import Any

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from ...parallel_backend.errors import RequestError
from ...parallel_backend.media.encoding import Encoding, Encodings
from ...parallel_backend.media.video import checked_fps

SAVER = "XDiTSaveVideo"
_kept = WeakTensorKeyDictionary()
"""The encodings of each decoder's images, for as long as ComfyUI keeps these."""


def begin(prompt: dict[str, Any] | None, node_id: str | None) -> Encodings | None:
    """Returns what encodes the images of a node, if the prompt saves them with a frame rate that is known now.

    Args:
        prompt: in ComfyUI's API format.
        node_id: the node whose first output are the images.
    """
    for node in (prompt or {}).values():
        inputs = node.get("inputs", {})
        if node.get("class_type") == SAVER and inputs.get("images") == [node_id, 0]:
            try:
                return Encodings(checked_fps(inputs.get("fps")))
            except RequestError:  # it is another node's, or Save Video says what is wrong with it
                continue
    return None


def keep(images: torch.Tensor, encodings: Encodings | None) -> None:
    """Keeps the encodings of a node's images until they are saved."""
    if encodings:
        encodings.finish()
        _kept[images] = encodings


def of(images: torch.Tensor, videos: int) -> list[Encoding | None]:
    """Returns the encoding of each of the videos that images are; None for those without one."""
    known = _kept.get(images) if isinstance(images, torch.Tensor) else None
    if known is None or len(known.videos) != videos:
        return [None] * videos
    return [known.videos[number] for number in sorted(known.videos)]
