"""The nodes of a ControlNet: which files are listed, and what the sampler gets."""

import shutil

from benchmarks.random_weights import build_controlnet

from .support.comfy_runtime import SHOWN


def test_controlnets_of_both_folders_are_listed_applied_in_a_chain_and_sampled_with(
    nodes, checkpoints, comfy_runtime, tmp_path
):
    one, two = (build_controlnet(tmp_path / str(seed), like="5b", seed=seed) for seed in (1, 2))
    other = build_controlnet(tmp_path / "other", like="5b", num_attention_heads=2)
    for source, to in ((one, "controlnet/edges"), (two, "CogVideo/ControlNet/hed"), (other, "controlnet/kinds/other")):
        shutil.copytree(source, comfy_runtime.folder / to)
    shutil.copy(one / "diffusion_pytorch_model.safetensors", comfy_runtime.folder / "controlnet" / "alone.safetensors")
    (comfy_runtime.folder / "controlnet" / "flux.safetensors").write_bytes(b"\2\0\0\0\0\0\0\0{}")
    (comfy_runtime.folder / "controlnet" / "broken.safetensors").touch()
    shown, _ = nodes(
        SHOWN
        + f"""
root = {str(comfy_runtime.folder)!r}
Load, Apply = part("nodes.controlnet").LoadCogVideoXControlNet, part("nodes.apply_controlnet").ApplyCogVideoXControlNet
nets, record = part("parallel_backend.cogvideox.transformer.controlnet"), part("parallel_backend.model").ControlNet
"""
        + """
at("prompt", "1")
listed = Load.define_schema().inputs[0].options
edges, hed, other = (call(Load, controlnet_name=name)[0] for name in ("edges", "CogVideo/ControlNet/hed", "kinds/other"))
clip = torch.rand(11, 40, 100, 3, generator=torch.Generator().manual_seed(5))
base = {"samples": torch.zeros(1, 16, 5, 4, 6)}
def apply(net, positive, negative, latent, **about):
    about = {"strength": 0.5, "start_percent": 0.0, "end_percent": 0.4, "control_video": clip, **about}
    return call(Apply, positive=positive, negative=negative, controlnet=net, latent=latent, **about)
first = apply(edges, positive, negative, base)
both = apply(hed, *first[:3], strength=0.8, end_percent=1.0, source_fps=8.0)
def sampled(found):
    return call(Sampler, model=handles(text_model)[0], positive=found[0], negative=found[1], latent=found[2], **settings)[0]["samples"]
covered = image.cover(clip[:9], width=48, height=32)
def expected(*given):
    about = {"controlnets": tuple(net for net, _ in given)}
    about["controlnet_videos"] = torch.cat([nets.encode(handle.file, covered) for _, handle in given], dim=1)
    latent = jobs.empty_latent(width=48, height=32, frames=9)
    return host.local().sample(jobs.SampleJob(jobs.Model(text_model), positive[0][0], latent, negative[0][0], seed=3, steps=2, **about)).tensor
edges_net = record(root + "/controlnet/edges", 0.5, 0.0, 0.4)
hed_net = record(root + "/CogVideo/ControlNet/hed", 0.8)
equal = [torch.equal(sampled(first), expected((edges_net, edges)))]
equal.append(torch.equal(sampled(both), expected((edges_net, edges), (hed_net, hed))))
split = apply(hed, *first[:2], {"samples": torch.zeros(1, 16, 2, 4, 6)})
refused = [refusal(Load, controlnet_name="gone"), refusal(Apply, positive=positive, negative=negative, controlnet=5, latent=base,
           control_video=clip, strength=1.0, start_percent=0.0, end_percent=1.0)]
for found in (apply(other, positive, negative, base), [*split[:2], base]):
    refused.append(refusal(Sampler, model=handles(text_model)[0], positive=found[0], negative=found[1], latent=found[2], **settings))
show(listed=listed, equal=equal, refused=refused, length=both[2]["samples"].shape[2], rates=[first[3], both[3]], lines=shown,
     kept=positive[0][1].keys() == {"pooled_output"}, change=[Load.fingerprint_inputs(name) for name in ("edges", "gone")])
"""
    )
    assert shown["listed"] == ["alone.safetensors", "edges", "kinds/other", "CogVideo/ControlNet/hed"]
    assert shown["equal"] == [True, True] and shown["kept"]
    assert (shown["length"], shown["rates"]) == (3, [8.0, 8.0])
    gone, wrong, misfit, sizes = shown["refused"]
    assert gone.startswith(
        "there is no ControlNet 'gone' in models/controlnet or models/CogVideo/ControlNet; put its folder there"
    )
    assert wrong == "controlnet is 5; connect Load CogVideoX ControlNet"
    assert misfit == "other has 2 heads and 5b has 4; use a ControlNet made for 5b"
    assert "different sizes or lengths; connect the latent of each" in sizes
    lines = " ".join(text for _, text in shown["lines"])
    assert "edges: ControlNet of 2 blocks, 4 heads, sinusoidal positions" in lines
    assert "9 of the video's 11 frames are used, not 17" in lines
    assert shown["change"][1] is None and str(comfy_runtime.folder / "controlnet/edges") in str(shown["change"][0])
