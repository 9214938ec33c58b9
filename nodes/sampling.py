"""The node CogVideoX Sampler."""

import logging
from functools import partial

from comfy_api.latest import io

from ..parallel_backend.jobs import MAX_SEED, SCHEDULERS, SampleJob
from ..parallel_backend.plan import AUTO
from ..parallel_backend.validation import timesteps_of
from .base import CogVideoXNode, advanced, schema
from .comfy import runtime
from .comfy.types import BACKEND, CATEGORY, BackendSocket, ModelSocket
from .conditioning import conditions_of, text_fields


class CogVideoXSampler(CogVideoXNode):
    """Denoises a latent, in this process or on every GPU of a backend."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="XDiTCogVideoXSampler",
            display_name="CogVideoX Sampler",
            aliases="ksampler, t2v, text to video, multi gpu, ddim, dpm",
            category=CATEGORY,
            description="Samples a video. With an xDiT Backend every step is split over its devices. The same seed gives the "
            "same video with every plan except pipefusion, whose video is close to it.",
            inputs=[
                ModelSocket.Input("model"),
                io.Conditioning.Input("positive", lazy=True),
                io.Conditioning.Input("negative", lazy=True),
                io.Latent.Input("latent", lazy=True),
                io.Int.Input("seed", default=0, min=0, max=MAX_SEED, control_after_generate=True),
                io.Int.Input(
                    "steps", default=50, min=1, max=1000, tooltip="Denoising steps. Time grows with them; memory does not."
                ),
                io.Float.Input(
                    "cfg",
                    default=6.0,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    tooltip="Guidance scale: how strongly the video follows the prompt. 1 turns the negative prompt off and "
                    "halves the work of a step.",
                ),
                io.Combo.Input(
                    "scheduler",
                    display_name="sampler_name",
                    options=list(SCHEDULERS),
                    default="auto",
                    tooltip="auto is the checkpoint's own. ddim and dpm make different videos.",
                ),
                io.Boolean.Input(
                    "dynamic_cfg",
                    default=False,
                    tooltip="The guidance scale follows a cosine over the steps, as in diffusers. This changes the video.",
                ),
                io.Float.Input(
                    "denoise",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="How much of the latent is replaced. 1 starts from noise. 0.6 runs only the last 60 % of the "
                    "steps on the latent, in 60 % of the time.",
                ),
                BackendSocket.Input("backend", optional=True, tooltip=BACKEND),
                advanced(
                    io.String.Input(
                        "timesteps",
                        default="",
                        optional=True,
                        tooltip="The noise levels of the steps by hand, descending from at most 999, instead of the scheduler's own; steps "
                        "then has no effect. For LoRAs of few steps: TDM's for 2b was trained at 999, 856, 665, 399, with cfg 1.",
                    )
                ),
                io.Noise.Input(
                    "noise",
                    optional=True,
                    tooltip="Where to start instead of noise from the seed, such as warped noise. The seed then draws only what dpm adds.",
                ),
            ],
            outputs=[io.Latent.Output(display_name="latent")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def check_lazy_status(cls, model, positive, negative, latent, cfg, backend=None, **others) -> list[str]:
        """Starts the backend's group, so that it comes up while the text is encoded. Returns the inputs that are missing."""
        given = {"latent": latent, "positive": positive, "negative": negative}
        missing = [name for name, value in given.items() if value is None]
        if not missing or backend is None or runtime.has_group():
            return missing
        if latent is None and (backend.plan == AUTO or model.windows):
            return ["latent"]  # its size and batch decide the plan
        runtime.begin(model, backend, latent and latent["samples"], cfg, cls.hidden.unique_id)
        return missing

    @classmethod
    def execute(
        cls,
        model,
        positive,
        negative,
        latent,
        seed,
        steps,
        cfg,
        scheduler,
        dynamic_cfg,
        denoise,
        backend=None,
        timesteps="",
        noise=None,
    ) -> io.NodeOutput:
        """Makes a sampling job of the inputs and runs it."""
        node_id = cls.hidden.unique_id
        say = partial(runtime.say, node_id=node_id, level=logging.WARNING)
        by_hand = timesteps_of(timesteps)
        text = {"limit": model.checkpoint.text_tokens, "say": say}
        job = SampleJob(
            model.model,
            latent=latent["samples"],
            **text_fields(positive, "positive", **text),
            **text_fields(negative, "negative", **text),
            seed=seed,
            steps=len(by_hand) or steps,
            timesteps=by_hand,
            noise=None if noise is None else noise.generate_noise(latent).float().cpu(),
            cfg=cfg,
            scheduler=scheduler,
            dynamic_cfg=dynamic_cfg,
            denoise=denoise,
            windows=model.windows,
            pipefusion_warmup=backend.pipefusion_warmup if backend else SampleJob.pipefusion_warmup,
            **conditions_of(positive, "positive", say),
        )
        if "noise_mask" in latent:
            say("the latent's mask is not used; use CogVideoX Inpaint with an inpaint model")
        return io.NodeOutput({"samples": runtime.run(job, backend, node_id).tensor})
