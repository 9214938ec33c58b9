"""The node CogVideoX Image To Video."""

import logging

from comfy_api.latest import io

from ..parallel_backend.cogvideox.pipeline import conditions, validation
from ..parallel_backend.cogvideox.pipeline.image import cover
from ..parallel_backend.jobs import IMAGE_SCALES, empty_latent
from .base import CogVideoXNode, schema
from .comfy import runtime
from .comfy.types import CATEGORY
from .conditioning import CONCAT, IMAGE, with_values
from .videos import (
    AS_TRAINED,
    COVERED,
    checkpoint_of,
    conditioned_inputs,
    conditioned_outputs,
    inpaint_values,
    model_input,
    noise_input,
    strength_inputs,
)


class CogVideoXImageToVideo(CogVideoXNode):
    """Adds a start image, an end image or both to the conditioning and returns an empty latent of the video's size."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="XDiTCogVideoXImageToVideo",
            display_name="CogVideoX Image To Video",
            aliases="i2v, image to video, start image, first last frame, flf2v",
            category=CATEGORY,
            description="Encodes a start image for an image-to-video model, such as CogVideoX-5b-I2V or CogVideoX1.5-5B-I2V, "
            "or a start and an end image for an inpaint model, such as CogVideoX-Fun-V1.1-5b-InP, or for CogvideoX-Interpolation.",
            inputs=[
                *conditioned_inputs(),
                io.Image.Input(
                    "start_image",
                    optional=True,
                    tooltip=f"The video's first frame. {COVERED} If there are several images, an image-to-video model gets the "
                    "first one, and an inpaint model gets all of them as its first frames.",
                ),
                io.Image.Input(
                    "end_image",
                    optional=True,
                    tooltip="The video's last frame; for inpaint models, or with a start image for CogvideoX-Interpolation. An inpaint model "
                    f"takes several. {COVERED}",
                ),
                io.Combo.Input(
                    "image_scale",
                    options=list(IMAGE_SCALES),
                    default="auto",
                    optional=True,
                    tooltip="The factor for the latent of an image-to-video model's start image. auto follows the "
                    "checkpoint. If videos of CogVideoX1.5-5B-I2V are dim or blurred, try another one: inverse (diffusers), "
                    "raw (the CogVideoX wrapper), scaled (ComfyUI).",
                ),
                model_input(),
                noise_input(),
                *strength_inputs(
                    strength="How strongly the video follows the images: 1 is as trained, 0 is none. Less leaves more to the prompt.",
                    start="Share of the steps after which the model is shown the images. 0: at once.",
                    end="Share of the steps after which the model is no longer shown the images. Below 1 there can be more motion.",
                    optional=True,
                ),
            ],
            outputs=conditioned_outputs(),
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls,
        positive,
        negative,
        vae,
        width,
        height,
        length,
        batch_size,
        start_image=None,
        end_image=None,
        image_scale="auto",
        model=None,
        noise_aug_strength=AS_TRAINED,
        strength=1.0,
        start_percent=0.0,
        end_percent=1.0,
    ) -> io.NodeOutput:
        """Encodes the images once, for both prompts and every video of the batch.

        The checkpoint of the model or of the VAE determines the kind of model. Without one an end image means an inpaint model.
        Of several images an image-to-video model gets the first start image and the last end image.
        """
        latent = {"samples": empty_latent(width=width, height=height, frames=length, batch=batch_size)}
        if start_image is None and end_image is None:
            return io.NodeOutput(positive, negative, latent)
        checkpoint = checkpoint_of(vae, model)
        if end_image is not None and checkpoint:
            validation.check_end_image(checkpoint, has_start=start_image is not None)
        start, end = (one if one is None else cover(one, width=width, height=height) for one in (start_image, end_image))
        shown = {"image_strength": strength, "image_start": start_percent, "image_end": end_percent}
        if checkpoint.task != "inpaint" if checkpoint else end is None:
            ends = {} if end is None else {"end_image": vae.encode(end[-1:])}
            values = {CONCAT: vae.encode(start[:1]), IMAGE: {**shown, **ends, "image_scale": image_scale}}
            return io.NodeOutput(*with_values(positive, negative, values), latent)
        if image_scale != "auto":
            line = "image_scale is for image-to-video models; an inpaint model's images are always scaled"
            runtime.say(line, cls.hidden.unique_id, level=logging.WARNING)
        video, mask = conditions.between_images(start, end, frames=length)
        values = inpaint_values(vae, video, mask, noise_aug_strength, checkpoint, cls.hidden.unique_id) | {IMAGE: shown}
        return io.NodeOutput(*with_values(positive, negative, values), latent)
