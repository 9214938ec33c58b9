"""The node Load CogVideoX LoRA."""

import logging
from dataclasses import replace

from comfy_api.latest import io

from ..parallel_backend.cogvideox.transformer.lora import LoraFile
from ..parallel_backend.model import MAX_STRENGTH, Lora
from .base import CogVideoXNode, schema
from .comfy import runtime
from .comfy.types import CATEGORY, ModelSocket


class LoadCogVideoXLora(CogVideoXNode):
    """Adds a LoRA to a model. Its weights are read and merged later, where the model runs."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="XDiTCogVideoXLoRA",
            display_name="Load CogVideoX LoRA",
            aliases="lora loader, load lora",
            category=CATEGORY,
            description="Adds a LoRA to a model, in the layout of diffusers, CogVideoX-Fun or ComfyUI. Chain the node for "
            "several.",
            inputs=[
                ModelSocket.Input("model"),
                io.Combo.Input(
                    "lora_name",
                    options=list(runtime.lora_files()),
                    tooltip="A .safetensors file in models/loras or models/CogVideo/loras. It is merged into the weights, so "
                    "steps take no longer.",
                ),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=-MAX_STRENGTH,
                    max=MAX_STRENGTH,
                    step=0.01,
                    round=0.0001,
                    tooltip="How much the LoRA changes the model; 0 leaves the model as it is.",
                ),
            ],
            outputs=[ModelSocket.Output(display_name="model")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, lora_name: str, **kwargs) -> float | None:
        """Makes ComfyUI run the node again if the file was replaced."""
        path = runtime.lora_files().get(lora_name)
        return path and path.stat().st_mtime

    @classmethod
    def execute(cls, model, lora_name: str, strength: float) -> io.NodeOutput:
        """Checks that the file fits the checkpoint, and adds it to the model."""
        lora = Lora(str(runtime.find_lora(lora_name).resolve()), strength)
        opened = LoraFile.open(lora, model.checkpoint)
        for line in opened.notes or [opened.describe]:
            runtime.say(line, cls.hidden.unique_id, level=logging.WARNING if opened.notes else logging.INFO)
        return io.NodeOutput(replace(model, model=replace(model.model, loras=(*model.model.loras, lora))))
