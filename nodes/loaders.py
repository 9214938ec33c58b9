"""The node Load CogVideoX."""

from comfy_api.latest import io

from ..parallel_backend.cogvideox.checkpoint.checkpoint import Checkpoint
from ..parallel_backend.cogvideox.checkpoint.description import describe
from ..parallel_backend.errors import RequestError
from ..parallel_backend.model import (
    ATTENTIONS,
    COMPILES,
    DTYPES,
    FP8S,
    MAX_SPARED,
    OFFLOADS,
    QUANTIZES,
    SNR_SHIFTS,
    TASKS,
    Model,
)
from .base import CogVideoXNode, advanced, schema
from .comfy import errors, runtime, submission
from .comfy.clip import ClipHandle
from .comfy.downloads import OFF, SOURCES, downloaded, find_or_download
from .comfy.model_folders import NotDownloaded, offers
from .comfy.types import CATEGORY, ModelHandle, ModelSocket
from .comfy.vae import VaeHandle


def speed_inputs() -> list:
    """Returns inputs for what makes steps faster: compiled kernels, FP8, the step cache and attention."""
    return [
        io.Combo.Input(
            "compile",
            options=list(COMPILES),
            default="auto",
            optional=True,
            tooltip="Kernels compiled for this GPU make steps about a third shorter without loss of quality. The "
            "first time takes some seconds more. auto uses them if blocks of a large model run on a GPU.",
        ),
        io.Combo.Input(
            "fp8",
            options=list(FP8S),
            default="off",
            optional=True,
            tooltip="linears is an older form of quantize fp8. all rounds attention to FP8 too, and changes the video "
            "slightly, by about 6 % after 50 steps; it needs a Hopper GPU, and bf16 or fp16.",
        ),
        io.Float.Input(
            "step_cache",
            default=0.0,
            min=0.0,
            max=2.0,
            step=0.01,
            optional=True,
            tooltip="Faster, but changes the video. If the first block's residual has changed by less than this "
            "share since the last full step, the residual of the other blocks is extrapolated from the last two full "
            "steps, for at most three steps in a row. With the demo in 50 steps of DPM, 0.1 skips a quarter of the "
            "steps and changes the video by 3 %, 0.2 skips half and changes it by 6 %. 0 is off.",
        ),
        io.Combo.Input(
            "attention",
            options=list(ATTENTIONS),
            default="auto",
            optional=True,
            tooltip="What computes attention. auto: the fastest exact function on this GPU, measured once; with fp8 all the "
            "one in FP8. int8 (compute capability 7.5 or newer, with comfy-kitchen), sage (with sageattention) and fp8 "
            "(Hopper) change the video slightly. A function that cannot work here is refused.",
        ),
    ]


def choice_inputs() -> list:
    """Returns inputs that replace what is concluded from the checkpoint."""
    return [
        io.Combo.Input(
            "task",
            options=list(TASKS),
            default="auto",
            optional=True,
            tooltip="What the model makes a video from. auto concludes it from the configuration; the node says what and why. "
            "Set it if that is wrong, such as for a start-image finetune in one file.",
        ),
        io.Combo.Input(
            "snr_shift",
            options=list(SNR_SHIFTS),
            default="auto",
            optional=True,
            tooltip="Whether the noise schedule is shifted as the configuration says. auto: as the model was trained; "
            "CogVideoX-Fun 2b was trained without the shift that it is published with.",
        ),
    ]


def guidance_cache_input() -> io.Int.Input:
    """Returns the input for steps without an unconditional half."""
    return io.Int.Input(
        "guidance_cache",
        default=0,
        min=0,
        max=MAX_SPARED,
        optional=True,
        tooltip="Faster, but changes the video. After a third of the steps, up to this number of steps in a row run the model on the "
        "positive prompt only, and make the negative half from the last difference of the two (FasterCache, published with 4). "
        "With 4, half of 50 steps cost half. It has no effect at cfg 1, and goes together with step_cache. 0 is off.",
    )


def quantize_input() -> io.Combo.Input:
    """Returns the input for linear layers in 8 bits."""
    return io.Combo.Input(
        "quantize",
        options=list(QUANTIZES),
        default="off",
        optional=True,
        tooltip="Faster and with less memory: rounds the blocks' linear layers to 8 bits, and changes the video slightly. fp8 "
        "needs an Ada, Hopper or newer GPU. int8 needs a Turing or newer one. off leaves it to fp8 above.",
    )


def model_input() -> io.Combo.Input:
    """Returns the input for the model: those that are here, and then those that can be downloaded."""
    here = runtime.model_names()
    return io.Combo.Input(
        "model_name",
        options=[*here, *offers(here)],
        tooltip="A folder in models/CogVideo or models/diffusers, a model in the Hugging Face cache, or a "
        ".safetensors file in models/diffusion_models or models/CogVideo. A file has no text encoder and no VAE: "
        "use the core's CLIPLoader (type cogvideox) and VAELoader. 'demo' is a small model that is part of the "
        "pack. Names with a size are not here yet: set download.",
    )


def download_input() -> io.Combo.Input:
    """Returns the input for downloading a model that is not here."""
    return io.Combo.Input(
        "download",
        options=list(SOURCES),
        default=OFF,
        optional=True,
        tooltip="Where to download the model from if it is not here yet, into models/CogVideo, when the workflow runs. "
        "Read its licence first. A cancelled or interrupted download goes on where it stopped. HF_ENDPOINT names a mirror of "
        "Hugging Face. A model that is here is never downloaded again.",
    )


class LoadCogVideoX(CogVideoXNode):
    """Opens a checkpoint folder, or a transformer's file, as model, CLIP and VAE. Weights are read later, where they run."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="XDiTLoadCogVideoX",
            display_name="Load CogVideoX",
            aliases="checkpoint loader, model loader, diffusers loader, cogvideo, t2v, i2v",
            category=CATEGORY,
            description="Opens a CogVideoX model in diffusers layout from models/CogVideo or models/diffusers, or a "
            "transformer alone from a file in models/diffusion_models.",
            inputs=[
                model_input(),
                io.Combo.Input(
                    "dtype",
                    display_name="weight_dtype",
                    options=["auto", *DTYPES],
                    default="auto",
                    tooltip="Precision of the weights. auto: the checkpoint's own on a GPU, fp32 on the CPU. fp32 needs "
                    "twice the memory of bf16 and fp16, and is slower on a GPU.",
                ),
                io.Combo.Input(
                    "offload",
                    options=list(OFFLOADS),
                    default="auto",
                    tooltip="Where weights wait. none: on the GPU. model: on the CPU between jobs. group: on the CPU, loaded "
                    "block by block. sequential: on the CPU, loaded layer by layer, with least memory and most time. auto "
                    "decides by free memory for each job.",
                ),
                *speed_inputs(),
                *map(advanced, choice_inputs()),
                quantize_input(),
                download_input(),
                guidance_cache_input(),
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
        """Makes ComfyUI run the node and those after it again if a file of the model was replaced.

        A model that is downloaded by the first run is the same to the second one, or that would sample everything again.
        """
        if model_name in downloaded:
            return None
        try:
            return Checkpoint.fingerprint(runtime.find_model(model_name))
        except RequestError:  # execute() raises it again, and ComfyUI shows it
            return None

    @classmethod
    def validate_inputs(cls, model_name: str | None = None) -> bool | str:
        """Refuses a model that does not exist or is not downloaded, before the workflow runs.

        With this ComfyUI does not hold the name to the list, so a workflow stays valid after its model is downloaded. ComfyUI reports
        what this returns once for each argument, so there is one only. The name is None if it comes from another node.
        """
        node_id = cls.hidden.unique_id
        try:
            if model_name is not None:
                runtime.find_model(str(model_name))
        except NotDownloaded as missing:
            if submission.value_of(node_id, "download") == OFF:
                return errors.refuse(str(missing), node_id)
        except RequestError as error:
            return errors.refuse(str(error), node_id)
        return True

    @classmethod
    def execute(
        cls,
        model_name: str,
        dtype: str,
        offload: str,
        compile: str = "auto",
        fp8: str = "off",
        step_cache: float = 0.0,
        task: str = "auto",
        snr_shift: str = "auto",
        attention: str = "auto",
        quantize: str = "off",
        download: str = OFF,
        guidance_cache: int = 0,
    ) -> io.NodeOutput:
        """Opens and checks the checkpoint, which is downloaded first if it is not here and the user wants that."""
        fast = {"compile": compile, "fp8": fp8, "step_cache": step_cache, "attention": attention, "quantize": quantize}
        taken = {"task": task, "snr_shift": snr_shift, "guidance_cache": guidance_cache}
        path = find_or_download(model_name, download, cls.hidden.unique_id)
        model = Model(str(path), dtype=dtype, offload=offload, **fast, **taken)
        checkpoint = Checkpoint.of(model)
        for line in describe(checkpoint):
            runtime.say(line, cls.hidden.unique_id)
        return io.NodeOutput(ModelHandle(model, checkpoint), ClipHandle(checkpoint, dtype), VaeHandle(model))
