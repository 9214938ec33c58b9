"""The node CogVideoX Upscale: where its text is from, what it gives, and what it says."""

import re
import shutil

from .support.comfy_runtime import NODES, SHOWN


def test_the_node_makes_the_job_with_the_empty_prompt_and_says_what_it_did(in_comfyui, checkpoints, tmp_path):
    path = tmp_path / "DOVE"
    shutil.copytree(checkpoints["1.5-5b"], path)
    shown, _ = in_comfyui(
        NODES
        + SHOWN
        + f"""
from safetensors.torch import save_file
Upscale, Clip = part("nodes.upscale").CogVideoXUpscale, part("nodes.comfy.clip").ClipHandle
empty_prompt = part("parallel_backend.cogvideox.checkpoint.empty_prompt")
path = Path({str(path)!r})
at("prompt", "1")
clip = torch.rand(3, 8, 12, 3, generator=torch.Generator().manual_seed(5))
tiles = {{"scale": 2, "tile_size": 64, "overlap": 16, "tile_frames": 9, "overlap_frames": 1}}
def made(**inputs):
    return call(Upscale, model=handles(str(path))[0], images=clip, **tiles, **inputs)[0]
def expected(states):
    job = jobs.UpscaleJob(jobs.Model(str(path)), clip, states, scale=2, tile=64, overlap=16, frames=9, frame_overlap=1)
    global last
    last = job
    return host.local().run(job).tensor
encoded = Clip(Checkpoint.open(path), "auto").encode("")
first = made()
equal = {{"encoded": torch.equal(first, expected(encoded))}}
said = [text for _, text in shown]
given = [[encoded / 2, {{}}], [encoded, {{}}]]
equal["given"] = torch.equal(made(positive=given), expected(encoded / 2))
several = any("positive has 2 prompts; the first is used" in text for _, text in shown)
for folder in (path, path.parent):
    stored = folder / empty_prompt.FILE
    stored.parent.mkdir()
    save_file({{empty_prompt.NAME: encoded[0] / 3}}, stored)
    equal[folder.name] = torch.equal(made(), expected(encoded / 3))
    save_file({{"other": encoded}}, stored)
    broken = refusal(Upscale, model=handles(str(path))[0], images=clip, **tiles)
    stored.unlink()
before = len(shown)
refused = refusal(Upscale, model=handles({str(checkpoints["5b"])!r})[0], images=clip, **tiles), len(shown) - before
state = part("nodes.comfy.state")
def label(step, doing):
    job = {{"step": step, "steps": 4}}
    name, doing = state.state_of({{"state": "busy", "ranks": [], "doing": doing}}, types.SimpleNamespace(kind="upscale", **job))
    return state.label_of(name, job, doing)
with part("nodes.comfy.progress").jobs.running(host.local(), last, "1") as running:
    steps = running.steps
show(labels=[label(0, None), label(0, "reading weights: 43%"), label(0, "first step"), label(1, None)], steps=steps, refused=refused, equal=list(equal.values()), changed=not torch.equal(first, expected(encoded / 3)), said=said, several=several, broken=broken,
     held=host.local().status()["held"])
"""
    )
    assert shown["equal"] == [True] * 4 and shown["changed"] and shown["several"]
    assert shown["labels"] == ["upscaling 0 of 4", "loading 43%", "upscaling 0 of 4", "upscaling 1 of 4"]
    assert shown["steps"] == 1
    sentence, lines = shown["refused"]
    assert "5b has the shape of CogVideoX 1.0" in sentence and lines <= 1  # it says nothing else
    said = "\n".join(shown["said"])
    assert "3 frames of 12x8 to 24x16 in one tile of 9 frames of 32x16" in said
    assert "DOVE is taken for DOVE, whose configuration is that of CogVideoX1.5-5B" in said
    assert re.search(r"upscale: plan single, one tile, [\d.]+ s a tile, load", said)
    assert shown["broken"].endswith("has no readable prompt_embedding; replace or remove the file")
    assert shown["held"] == ["transformer", "vae"]


def test_the_table_of_plans_has_seconds_a_tile_with_replicas_and_without_a_pipeline(in_comfyui, checkpoints):
    shown, _ = in_comfyui(f"""
table, gpus = part("nodes.comfy.plan_table"), part("parallel_backend.planner.gpu_table").KNOWN
table.machine_of = lambda devices: gpus["H100"]
table.checkpoint_of = lambda name: Checkpoint.open({str(checkpoints["1.5-5b"])!r})
def rows(**query):
    return {{row["plan"]: row["seconds"] for row in table.of_query({{"devices": "cpu:2", **query}})["rows"]}}
size = dict(width="1024", height="1024", length="33")
show(tile=rows(kind="upscale", **size), alone=rows(kind="upscale", **size | {{"devices": "cpu"}}), batch=rows(batch="4", **size), one=rows(**size))
""")
    tile = shown["tile"]
    assert set(tile) == {"replicas2", "ulysses2", "ring2"}
    assert tile["replicas2"] == shown["alone"]["single"] / 2 < tile["ulysses2"]
    assert "replicas2" in shown["batch"] and "pipefusion2" in shown["batch"] and "replicas2" not in shown["one"]
