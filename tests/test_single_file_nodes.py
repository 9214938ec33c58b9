"""Load CogVideoX with a transformer's file: listed, loaded, and its CLIP and VAE say where theirs come from."""

import torch
from safetensors.torch import save_file

from .support.single_files import save_as

NODES = """
from comfy_api.latest import io
loaders, sockets = part("nodes.loaders"), part("nodes.comfy.types")
def load(name):
    clone = loaders.LoadCogVideoX.PREPARE_CLASS_CLONE({"hidden_inputs": {io.Hidden.unique_id: "1"}})
    return clone.execute(model_name=name, dtype="auto", offload="auto").result
def refusal(call, *values, **named):
    try:
        call(*values, **named)
    except errors.RequestError as error:
        return str(error)
"""


def test_files_are_listed_beside_folders_and_only_cogvideox(in_comfyui, checkpoints, comfy_runtime):
    models = comfy_runtime.folder
    save_as(checkpoints["1.5-5b"], models / "diffusion_models" / "video" / "cog.safetensors", "core")
    save_as(checkpoints["5b"], models / "CogVideo" / "old.safetensors", "diffusers")
    save_file({"blocks.0.self_attn.q.weight": torch.zeros(2, 2)}, models / "diffusion_models" / "wan.safetensors")
    (models / "diffusion_models" / "broken.safetensors").write_bytes(b"\0" * 3)
    cut = save_as(checkpoints["5b"], models / "diffusion_models" / "cut.safetensors", "core")
    cut.write_bytes(cut.read_bytes()[:-5])
    shown, _ = in_comfyui(NODES + """
model, clip, vae = load("diffusion_models/video/cog.safetensors")
text = torch.zeros(1, 226, 32)
video = jobs.empty_latent(width=64, height=48, frames=13)
sampled = host.run(jobs.SampleJob(model.model, text, video, text, steps=2)).tensor
show(names=host.model_names(), shape=list(sampled.shape), path=model.model.path, said=model.checkpoint.describe,
     clip=refusal(clip.tokenize, "a ball"), decode=refusal(vae.decode, video), encode=refusal(vae.encode, torch.zeros(5, 32, 32, 3)),
     cut=refusal(load, "diffusion_models/cut.safetensors"), none=refusal(load, "diffusion_models/wan.safetensors"))
""")  # fmt: skip
    assert shown["names"] == [
        "demo",
        "demo-i2v",
        "CogVideo/old.safetensors",
        "diffusion_models/cut.safetensors",
        "diffusion_models/video/cog.safetensors",
    ]
    assert shown["shape"] == [1, 16, 4, 6, 8]
    assert shown["path"].endswith("video/cog.safetensors")
    assert shown["said"].startswith(
        "cog.safetensors: CogVideoX 1.5, text to video, 3 layers, 4 heads, rotary, fp32, ddim, made for 1360x768x81 at 16 fps"
    )
    assert shown["clip"] == "cog.safetensors has no text encoder; use the core's CLIPLoader (type cogvideox) for the text"
    assert shown["decode"] == shown["encode"] == "cog.safetensors has no VAE; use the core's VAELoader with CogVideoX's VAE"
    assert "it is cut off; download it again" in shown["cut"]
    assert "there is no model 'diffusion_models/wan.safetensors'; put a folder into" in shown["none"]


def test_what_the_wrapper_puts_on_the_same_sockets_is_named(in_comfyui):
    """Its VAE is diffusers' own object, its conditioning a bare tensor, its latent has frames before channels."""
    shown, _ = in_comfyui(NODES + """
from diffusers import AutoencoderKLCogVideoX
decoding, sampling, video = part("nodes.decoding"), part("nodes.sampling"), part("nodes.image_to_video")
def call(node, **inputs):
    return node.PREPARE_CLASS_CLONE({"hidden_inputs": {io.Hidden.unique_id: "1"}}).execute(**inputs)
handle, vae = sockets.ModelHandle(model, checkpoint), part("nodes.comfy.vae").VaeHandle(model)
theirs = AutoencoderKLCogVideoX(block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4)
prompt, frames_first = [[text, {}]], {"samples": torch.zeros(1, 3, 16, 6, 8)}
tiles = {"tiling": "auto", "tile_size": 256, "overlap": 64}
settings = {"seed": 3, "steps": 2, "cfg": 6.0, "scheduler": "auto", "dynamic_cfg": False, "denoise": 1.0}
size = {"width": 64, "height": 48, "length": 9, "batch_size": 1}
def sample(positive, negative, found):
    return refusal(call, sampling.CogVideoXSampler, model=handle, positive=positive, negative=negative, latent=found, **settings)
before = host.local().status()["loads"]
show(
    decoded=refusal(call, decoding.CogVideoXDecode, samples={"samples": latent}, vae=theirs, **tiles),
    latent_decoded=refusal(call, decoding.CogVideoXDecode, samples=frames_first, vae=vae, **tiles),
    latent_sampled=sample(prompt, prompt, frames_first),
    positive=sample(text, prompt, {"samples": latent}),
    negative=sample(prompt, text, {"samples": latent}),
    image=refusal(call, video.CogVideoXImageToVideo, positive=prompt, negative=prompt, vae=theirs, start_image=torch.zeros(1, 48, 64, 3), **size),
    loads=host.local().status()["loads"] - before,
)
""")  # fmt: skip
    assert shown.pop("loads") == 0
    assert all("CogVideoX wrapper" in line and "\n" not in line for line in shown.values()), shown
    assert shown["positive"].startswith("positive ") and shown["negative"].startswith("negative ")
    assert shown["decoded"] == shown["image"]
    assert "frames before channels" in shown["latent_sampled"] and shown["latent_sampled"] == shown["latent_decoded"]
