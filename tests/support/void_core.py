"""Runs ComfyUI's own VOID nodes (0.33, comfy_extras/nodes_void.py) on small weights, in ComfyUI's interpreter.

``python void_core.py COMFYUI GIVEN TRANSFORMER VAE RESULT``; GIVEN and RESULT are safetensors files. Three things are not as shipped:
VAE and optical flow are the tests' (tests/support/narrow_core.py), the VAE has no norms, and the latents have the scale of 5b, which
the core chooses for 48 heads.
"""

import sys

COMFYUI, GIVEN, TRANSFORMER, VAE, RESULT = sys.argv[1:]
sys.path.insert(0, COMFYUI)
sys.argv = [sys.argv[0], "--cpu"]

import comfy.options  # noqa: E402
import torch  # noqa: E402

comfy.options.enable_args_parsing()
import comfy.latent_formats  # noqa: E402
import comfy.model_patcher  # noqa: E402
import comfy.sd  # noqa: E402
import comfy.utils  # noqa: E402
import narrow_core  # noqa: E402
from comfy_extras import nodes_custom_sampler as sampling  # noqa: E402
from comfy_extras import nodes_void as void  # noqa: E402
from norms import without_norms  # noqa: E402

TRAINED_SIGMA = 1e7
"""Instead of the core's first sigma, 4518.6: of a noise schedule that ends at no signal at all, as was trained."""


class Kept:
    """A VAE that keeps the pixels that it encodes."""

    def __init__(self, vae):
        self.vae, self.pixels = vae, []

    def encode(self, pixels):
        self.pixels.append(pixels)
        return self.vae.encode(pixels)


def run(node, *given, **named):
    """Returns what a node gives."""
    return node.execute(*given, **named).args


def sample(model, noise, conditioned, *, cfg: float, steps: int, first_sigma: float | None):
    """Samples as the core's blueprint "Video Inpaint (VOID)" does."""
    positive, negative, latent = conditioned
    (sigmas,) = run(sampling.BasicScheduler, model, "simple", steps, 1.0)
    sigmas[0] = first_sigma or sigmas[0]
    (guider,) = run(sampling.CFGGuider, model, positive, negative, cfg)
    return run(sampling.SamplerCustomAdvanced, noise, guider, *run(void.VOIDSampler), sigmas, latent)[0]["samples"]


@torch.inference_mode()
def main() -> None:
    given, found = comfy.utils.load_torch_file(GIVEN), {}
    model = comfy.sd.load_diffusion_model(TRANSFORMER)
    model.model.latent_format = comfy.latent_formats.CogVideoX1_5()
    vae = Kept(comfy.sd.VAE(sd=comfy.utils.load_torch_file(VAE)))
    without_norms(vae.vae.first_stage_model)
    (mask,) = run(void.VOIDQuadmaskPreprocess, given["stored mask"], 0)
    frames, height, width, _ = given["video"].shape
    size = (width, height, frames, 1)
    prompts = [[[given[name], {}]] for name in ("positive", "negative")]
    conditioned = run(void.VOIDInpaintConditioning, *prompts, vae, given["video"], mask, *size)
    found |= {"mask": mask, "condition": conditioned[0][0][1]["concat_latent_image"]}
    found |= dict(zip(("mask pixels", "video pixels"), vae.pixels))
    flow = comfy.model_patcher.ModelPatcher(narrow_core.Flow(), torch.device("cpu"), torch.device("cpu"))
    torch.manual_seed(7)
    (warped,) = run(void.VOIDWarpedNoise, flow, given["video"], *size)
    (drawn,), (source,) = run(sampling.RandomNoise, 11), run(void.VOIDWarpedNoiseSource, warped)
    for name, noise, cfg, steps, first_sigma in (
        ("first pass", drawn, 1.0, 4, TRAINED_SIGMA),
        ("second pass", source, 6.0, 4, TRAINED_SIGMA),
        ("as shipped", drawn, 1.0, 4, None),
        ("three steps", drawn, 1.0, 3, TRAINED_SIGMA),
    ):
        found[f"noise of {name}"] = noise.generate_noise(conditioned[2])
        found[name] = sample(model, noise, conditioned, cfg=cfg, steps=steps, first_sigma=first_sigma)
    comfy.utils.save_torch_file({name: value.float().contiguous() for name, value in found.items()}, RESULT)


main()
