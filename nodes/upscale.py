"""The node CogVideoX Upscale."""

import logging
from dataclasses import replace
from functools import partial

import torch
from comfy_api.latest import io

from ..parallel_backend.cogvideox.checkpoint import empty_prompt
from ..parallel_backend.cogvideox.checkpoint.checkpoint import Checkpoint
from ..parallel_backend.cogvideox.pipeline.upscaling import describe, taken_for
from ..parallel_backend.executor.prepare import check_job
from ..parallel_backend.jobs import UpscaleJob
from .base import CogVideoXNode, schema
from .comfy import runtime
from .comfy.clip import ClipHandle
from .comfy.types import BACKEND, CATEGORY, BackendSocket, ModelHandle, ModelSocket
from .conditioning import text_fields


def tile_inputs() -> list:
    """Returns inputs for the tiles that the video is divided into."""
    return [
        io.Int.Input(
            "tile_size",
            default=UpscaleJob.tile,
            min=64,
            max=4096,
            step=16,
            tooltip="Most rows and columns of a tile in the enlarged video, in pixels. Smaller tiles need less memory.",
        ),
        io.Int.Input(
            "overlap",
            default=UpscaleJob.overlap,
            min=0,
            max=2048,
            step=8,
            tooltip="Pixels that neighbouring tiles share and blend, at least. More takes more time and hides seams better.",
        ),
        io.Int.Input(
            "tile_frames",
            default=UpscaleJob.frames,
            min=1,
            max=257,
            step=8,
            tooltip="Most frames of a tile, 8k+1. Fewer need less memory; more keep details steadier in time.",
        ),
        io.Int.Input(
            "overlap_frames",
            default=UpscaleJob.frame_overlap,
            min=0,
            max=128,
            tooltip="Frames that successive tiles share and blend, at least.",
        ),
    ]


class CogVideoXUpscale(CogVideoXNode):
    """Enlarges a video with a super-resolution model, in tiles that the devices of a backend share."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="XDiTCogVideoXUpscale",
            display_name="CogVideoX Upscale",
            aliases="upscaler, super resolution, video upscale, enlarge, restore, dove, sparkvsr",
            category=CATEGORY,
            description="Enlarges and restores a video with DOVE, or with SparkVSR without reference frames: one step for each tile. With an "
            "xDiT Backend replicas share the tiles, or devices split each of them.",
            inputs=[
                ModelSocket.Input("model"),
                io.Image.Input("images", tooltip="The frames of the video to enlarge, or one image."),
                io.Int.Input(
                    "scale",
                    default=UpscaleJob.scale,
                    min=1,
                    max=8,
                    tooltip="How many times as wide and high. The models were trained with 4. 1 restores details and keeps the size.",
                ),
                *tile_inputs(),
                io.Conditioning.Input(
                    "positive",
                    optional=True,
                    tooltip="The text that the model sees. Leave it out: the models were trained with the empty prompt, which this node makes.",
                ),
                BackendSocket.Input("backend", optional=True, tooltip=BACKEND),
            ],
            outputs=[io.Image.Output(display_name="images")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls, model, images, scale, tile_size, overlap, tile_frames, overlap_frames, positive=None, backend=None
    ) -> io.NodeOutput:
        """Makes a job of the inputs and runs it."""
        node_id = cls.hidden.unique_id
        job = UpscaleJob(
            model.model,
            images,
            model.checkpoint.blank_text(),
            scale=scale,
            tile=tile_size,
            overlap=overlap,
            frames=tile_frames,
            frame_overlap=overlap_frames,
        )
        check_job(job)  # before the text encoder is read
        for line in (describe(job), taken_for(model.checkpoint)):
            runtime.say(line, node_id)
        job = replace(job, positive=text_of(model, positive, node_id))
        return io.NodeOutput(runtime.run(job, backend, node_id).tensor)


def text_of(model: ModelHandle, positive: list | None, node_id: str | None) -> torch.Tensor:
    """Returns the text states of a conditioning, or else of the empty prompt."""
    if positive is None:
        return empty_states(model)
    say = partial(runtime.say, node_id=node_id, level=logging.WARNING)
    if len(positive) > 1:
        say(f"positive has {len(positive)} prompts; the first is used")
    return text_fields(positive[:1], "positive", limit=model.checkpoint.text_tokens, say=say)["positive"]


_states: dict[str, torch.Tensor] = {}
"""Those of the empty prompt, by the digest of the last model: its text encoder takes seconds to read."""


def empty_states(model: ModelHandle) -> torch.Tensor:
    """Returns the text states of the empty prompt: from a file that is published with the model, or of its text encoder."""
    checkpoint = model.checkpoint
    states = empty_prompt.read(checkpoint)
    if states is not None:
        return states
    digest = Checkpoint.fingerprint(checkpoint.path)
    if digest not in _states:
        states = ClipHandle(checkpoint, model.model.dtype).encode("")
        _states.clear()
        _states[digest] = states
    return _states[digest]
