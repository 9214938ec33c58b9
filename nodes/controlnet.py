"""The node Load CogVideoX ControlNet."""

from comfy_api.latest import io

from ..parallel_backend.cogvideox.checkpoint import weights
from ..parallel_backend.cogvideox.checkpoint.controlnet import ControlNetFile
from ..parallel_backend.errors import RequestError
from .base import CogVideoXNode, schema
from .comfy import runtime
from .comfy.types import CATEGORY, ControlNetHandle, ControlNetSocket


class LoadCogVideoXControlNet(CogVideoXNode):
    """Opens a ControlNet. Its weights are read later, where the model runs."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="XDiTLoadCogVideoXControlNet",
            display_name="Load CogVideoX ControlNet",
            aliases="controlnet loader, load controlnet, canny, hed",
            category=CATEGORY,
            description="Opens a ControlNet for CogVideoX 1.0, such as TheDenk/cogvideox-5b-controlnet-canny-v1.",
            inputs=[
                io.Combo.Input(
                    "controlnet_name",
                    options=list(runtime.controlnets()),
                    tooltip="A folder with config.json, or a .safetensors file, in models/controlnet or models/CogVideo/ControlNet.",
                ),
            ],
            outputs=[ControlNetSocket.Output(display_name="controlnet")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, controlnet_name: str) -> tuple | None:
        """Makes ComfyUI run the node again if a file was replaced."""
        try:
            return weights.fingerprint(ControlNetFile.open(runtime.find_controlnet(controlnet_name)).files)
        except RequestError:  # execute() raises it again, and ComfyUI shows it
            return None

    @classmethod
    def execute(cls, controlnet_name: str) -> io.NodeOutput:
        file = ControlNetFile.open(runtime.find_controlnet(controlnet_name).resolve())
        runtime.say(file.describe, cls.hidden.unique_id)
        return io.NodeOutput(ControlNetHandle(file))
