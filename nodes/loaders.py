"""Load CogVideoX."""

from comfy_api.latest import io

from ..parallel_backend.cogvideox.checkpoint.checkpoint import Checkpoint
from ..parallel_backend.errors import RequestError
from ..parallel_backend.model import COMPILES, DTYPES, FP8S, OFFLOADS, Model
from .base import CogVideoXNode
from .comfy import runtime
from .comfy.clip import ClipHandle
from .comfy.types import CATEGORY, ModelHandle, ModelSocket
from .comfy.vae import VaeHandle


class LoadCogVideoX(CogVideoXNode):
    """A checkpoint folder, or a transformer's file, to model, CLIP and VAE. Reads no weights: they are read where they run."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="XDiTLoadCogVideoX",
            display_name="Load CogVideoX",
            category=CATEGORY,
            description="Loads a CogVideoX in diffusers layout from models/CogVideo or models/diffusers, or its transformer alone "
            "from a file in models/diffusion_models.",
            inputs=[
                io.Combo.Input(
                    "model_name",
                    options=runtime.model_names(),
                    tooltip="A folder in models/CogVideo or models/diffusers, or a .safetensors file in models/diffusion_models "
                    "or models/CogVideo: for that take the core's CLIPLoader (type cogvideox) and VAELoader. 'demo' is small "
                    "and always there.",
                ),
                io.Combo.Input(
                    "dtype",
                    options=["auto", *DTYPES],
                    default="auto",
                    tooltip="auto: the checkpoint's own on a GPU, fp32 on the CPU.",
                ),
                io.Combo.Input(
                    "offload",
                    options=list(OFFLOADS),
                    default="auto",
                    tooltip="Where weights wait: none keeps them on the GPU; model moves them off after each job; "
                    "group brings them block by block; sequential layer by layer. auto decides by free memory.",
                ),
                io.Combo.Input(
                    "compile",
                    options=list(COMPILES),
                    default="auto",
                    optional=True,
                    tooltip="Kernels compiled for this GPU make steps about a third shorter and the video no worse. The first time "
                    "takes some seconds more. auto uses them where blocks of a large model run on a GPU.",
                ),
                io.Combo.Input(
                    "fp8",
                    options=list(FP8S),
                    default="off",
                    optional=True,
                    tooltip="Faster and smaller, and another video: linears rounds the blocks' linear layers to FP8 (18 % from lossless "
                    "after four steps of a 5b with random weights), all attention too (18 % as well, 6 % after 50). Needs an "
                    "Ada, Hopper or newer GPU; attention a Hopper one and bf16 or fp16.",
                ),
                io.Float.Input(
                    "step_cache",
                    default=0.0,
                    min=0.0,
                    max=2.0,
                    step=0.01,
                    optional=True,
                    tooltip="Faster, and another video: while the first block's work has changed by less than this share since "
                    "a whole step, what the other blocks would add is told from the last two whole steps, for three steps in a row "
                    "at most. With the demo in 50 steps of DPM, 0.1 spares a quarter of the steps and ends 3 % from the video "
                    "without, 0.2 half and 6 %. 0 is off.",
                ),
            ],
            outputs=[
                ModelSocket.Output(display_name="model"),
                io.Clip.Output(display_name="CLIP"),
                io.Vae.Output(display_name="VAE"),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, model_name: str, **kwargs) -> str | None:
        """Has ComfyUI run the node, and the nodes after it, again when a file of the model was replaced."""
        try:
            return Checkpoint.fingerprint(runtime.find_model(model_name))
        except RequestError:  # which running the node says
            return None

    @classmethod
    def execute(
        cls, model_name: str, dtype: str, offload: str, compile: str = "auto", fp8: str = "off", step_cache: float = 0.0
    ) -> io.NodeOutput:
        """Opens and checks the checkpoint."""
        checkpoint = Checkpoint.open(runtime.find_model(model_name))
        runtime.say(checkpoint.describe, cls.hidden.unique_id)
        fast = {"compile": compile, "fp8": fp8, "step_cache": step_cache}
        model = Model(str(checkpoint.path), dtype=dtype, offload=offload, **fast)
        return io.NodeOutput(ModelHandle(model, checkpoint), ClipHandle(checkpoint, dtype), VaeHandle(model))
