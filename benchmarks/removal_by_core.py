"""Times the steps of ComfyUI's own VOID nodes: ``python removal_by_core.py COMFYUI WEIGHTS GIVEN STEPS``; see benchmarks/removal.py."""

import json
import sys
import time

COMFYUI, WEIGHTS, GIVEN, STEPS = sys.argv[1:]
sys.path.insert(0, COMFYUI)
import torch  # noqa: E402

sys.argv = [sys.argv[0], *([] if torch.cuda.is_available() else ["--cpu"])]

import comfy.options  # noqa: E402

comfy.options.enable_args_parsing()
import comfy.sd  # noqa: E402
import comfy.utils  # noqa: E402
from comfy_extras import nodes_custom_sampler as sampling  # noqa: E402
from comfy_extras import nodes_void as void  # noqa: E402


def run(node, *given):
    """Returns what a node gives."""
    return node.execute(*given).args


def times(model, given: dict[str, torch.Tensor], steps: int) -> list[float]:
    """Returns the seconds of each step, from one forward's beginning to the next one's, or to the end."""
    began = []

    def note(*_):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        began.append(time.perf_counter())

    hook = model.model.diffusion_model.register_forward_pre_hook(note)
    condition = given["condition"]
    positive = [[given["states"], {"concat_latent_image": condition}]]
    (sigmas,) = run(sampling.BasicScheduler, model, "simple", steps, 1.0)
    (guider,) = run(sampling.CFGGuider, model, positive, positive, 1.0)
    (noise,) = run(sampling.RandomNoise, 11)
    latent = {"samples": torch.zeros_like(condition[:, :16])}
    run(sampling.SamplerCustomAdvanced, noise, guider, *run(void.VOIDSampler), sigmas, latent)
    note()
    hook.remove()
    return [after - before for before, after in zip(began, began[1:])]


with torch.inference_mode():
    loaded = comfy.sd.load_diffusion_model(WEIGHTS)
    tensors = comfy.utils.load_torch_file(GIVEN)
    times(loaded, tensors, 2)
    print(json.dumps(times(loaded, tensors, int(STEPS))))
