"""The node of a LoRA: which files it lists, and what it hands to the sampler."""

from .support.lora_files import core_layout, diffusers_layout, random_change, write


def test_files_of_both_folders_are_listed_chained_and_sampled_with(nodes, checkpoints, comfy_runtime):
    for folder, name, seed in (("loras/styles", "one", 1), ("CogVideo/loras", "two", 2)):
        (comfy_runtime.folder / folder).mkdir(parents=True)
        write(
            comfy_runtime.folder / folder / f"{name}.safetensors", diffusers_layout(random_change(checkpoints["5b"], seed=seed))
        )
        (comfy_runtime.folder / folder / "pickled.ckpt").touch()
    write(
        comfy_runtime.folder / "loras" / "large.safetensors", core_layout(random_change(checkpoints["5b"], layers="proj_out"))
    )
    (comfy_runtime.folder / "loras" / "broken.safetensors").touch()
    shown, _ = nodes("""
Lora, Load = part("nodes.lora").LoadCogVideoXLora, part("nodes.loaders").LoadCogVideoX
listed = Lora.define_schema().inputs[1].options
base = handles(text_model)[0]
def sample_with(model):
    latent = {"samples": jobs.empty_latent(width=48, height=32, frames=5)}
    return call(Sampler, model=model, **prompts, latent=latent, **settings)[0]["samples"]
one = call(Lora, model=base, lora_name="styles/one.safetensors", strength=0.5)[0]
both = call(Lora, model=one, lora_name="CogVideo/loras/two.safetensors", strength=-1.0)[0]
latents = [sample_with(model) for model in (base, one, both, base)]
refused = [refusal(Lora, model=base, lora_name=name, strength=1.0) for name in ("gone.safetensors", "broken.safetensors")]
refused.append(refusal(Lora, model=handles(image_model)[0], lora_name="large.safetensors", strength=float("nan")))
show(listed=listed, loras=[[lora.path, lora.strength] for lora in both.model.loras], refused=refused,
     kept=base.model.loras == (), same=torch.equal(latents[0], latents[3]),
     apart=[(a - b).abs().max().item() for a, b in zip(latents, latents[1:])],
     changes=[Lora.fingerprint_inputs(model=None, lora_name=name, strength=1.0) for name in ("large.safetensors", "gone")])
""")
    assert shown["listed"] == [
        "broken.safetensors",
        "large.safetensors",
        "styles/one.safetensors",
        "CogVideo/loras/two.safetensors",
    ]
    one, two = comfy_runtime.folder / "loras/styles/one.safetensors", comfy_runtime.folder / "CogVideo/loras/two.safetensors"
    assert shown["loras"] == [[str(one), 0.5], [str(two), -1.0]]
    assert shown["kept"] and shown["same"] and min(shown["apart"]) > 0.01
    gone, broken, senseless = shown["refused"]
    assert gone == (
        "there is no LoRA 'gone.safetensors' in models/loras or models/CogVideo/loras; put its .safetensors file there"
    )
    assert "not a safetensors file" in broken and senseless == "strength is nan; use -10.0 to 10.0"
    assert shown["changes"] == [(comfy_runtime.folder / "loras/large.safetensors").stat().st_mtime, None]
