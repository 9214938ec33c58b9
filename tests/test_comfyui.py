"""The pack in a real ComfyUI, driven over its HTTP API and websocket as the front end does.

Needs a ComfyUI at COMFYUI_PATH or ~/comfy/ComfyUI; elsewhere tests/test_workflows.py runs the same workflows.
"""

import json
import re
import shutil
import threading
import time
import urllib.error
import urllib.request
from contextlib import ExitStack

import av
import imageio.v3 as iio
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from parallel_backend.cogvideox.checkpoint.bundled import DEMO, find
from parallel_backend.executor.group import GroupExecutor
from parallel_backend.group.registry import running
from workflows.headless import apply_settings, to_api

from .conftest import REPO, TOLERANCE, Broken, made, wait_until, workers
from .support import core_nodes
from .support.comfyui_server import ComfyUIServer, find_comfyui
from .support.core_files import in_model_folders
from .support.hub_server import WEIGHTS, serving
from .support.lora_files import diffusers_layout, random_change, write
from .support.shipped import shipped
from .test_workflows import MODELS, SETTINGS, SHAPES, prepare

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_comfyui() is None, reason="no ComfyUI here: set COMFYUI_PATH, or put it at ~/comfy/ComfyUI"),
]

WORKFLOW = shipped("t2v")
TWO_PROCESSES = ("XDiTBackend.devices=cpu:2", "XDiTBackend.plan=cfg2")
FEW_STEPS = "XDiTCogVideoXSampler.steps=6"
SLOW = ("XDiTEmptyCogVideoXLatent.width=320", "XDiTEmptyCogVideoXLatent.height=192")


@pytest.fixture(scope="module")
def hub(checkpoints):
    """A hub on this machine, with a small model under the name of the 5b, and its address."""
    with serving(checkpoints["5b"]) as found:
        yield found


@pytest.fixture(scope="module")
def started(hub):
    """One ComfyUI for the whole file."""
    starting = ComfyUIServer(env={"HF_ENDPOINT": hub[1]})
    (starting.base / "custom_nodes").mkdir(parents=True)
    shutil.copy(REPO / "tests" / "support" / "narrow_core.py", starting.base / "custom_nodes")
    with ExitStack() as stack:
        try:
            found = stack.enter_context(starting)
        except RuntimeError as error:
            found = Broken([str(error)])
        yield found


@pytest.fixture
def server(started) -> ComfyUIServer:
    found = made(started)
    if found.process.poll() is not None:
        pytest.skip("ComfyUI ended in an earlier test of this file")
    return found


@pytest.fixture(scope="module")
def known_nodes() -> dict:
    """What ``object_info`` gave, once it was asked."""
    return {}


@pytest.fixture
def object_info(server, known_nodes) -> dict:
    if not known_nodes:
        known_nodes.update(server.object_info())
    return known_nodes


@pytest.fixture
def prompt_of(object_info):
    """The shipped workflow in API format with some settings changed."""

    def make(*settings: str) -> dict:
        prompt = to_api(WORKFLOW, object_info)
        apply_settings(prompt, [FEW_STEPS, *settings], object_info)
        return prompt

    return make


def group_status() -> dict:
    """What the one running group says of itself."""
    (address,) = running()
    return GroupExecutor.attach(address).status()


def node_of(prompt: dict, kind: str) -> str:
    """The id of the one node of a kind."""
    (name,) = [name for name, node in prompt.items() if node["class_type"] == kind]
    return name


def test_the_workflow_makes_a_video_on_two_processes(server, prompt_of):
    changed = ("Prompt.text=a blue square", "XDiTSaveVideo.filename_prefix=two", "XDiTCogVideoXSampler.steps=16")
    prompt = prompt_of(*TWO_PROCESSES, "XDiTEmptyCogVideoXLatent.width=160", "XDiTEmptyCogVideoXLatent.height=96", *changed)
    sampler = node_of(prompt, "XDiTCogVideoXSampler")
    prompt_id = server.queue(prompt, WORKFLOW)
    events = list(server.events(prompt_id))
    assert events[-1]["type"] == "execution_success", server.log_tail()
    progress = [event["data"] for event in events if event["type"] == "progress" and event["data"]["node"] == sampler]
    steps = [one["value"] for one in progress if one["max"] == 16]  # others are of weights that are read
    assert steps[-1] == 16 and len(steps) >= 5 and steps == sorted(steps)
    assert "plan cfg2 on cpu:2" in server.log()

    (shown,) = server.history(prompt_id)["outputs"][node_of(prompt, "XDiTSaveVideo")]["images"]
    path = server.base / "output" / shown["subfolder"] / shown["filename"]
    assert iio.imread(path, plugin="pyav").shape == (17, 96, 160, 3)
    with av.open(str(path)) as file:
        assert json.loads(file.metadata["workflow"]) == WORKFLOW
        assert json.loads(file.metadata["prompt"])[sampler]["class_type"] == "XDiTCogVideoXSampler"


def test_the_sampler_is_asked_before_the_text_is_encoded(server, prompt_of):
    prompt = prompt_of(*TWO_PROCESSES, "Prompt.text=a red star", "XDiTEmptyCogVideoXLatent.length=13")
    prompt_id = server.queue(prompt)
    order = [
        event["data"]["node"] for event in server.events(prompt_id) if event["type"] == "executing" and event["data"]["node"]
    ]
    kinds = [prompt[name]["class_type"] for name in order]
    assert "CLIPTextEncode" in kinds[kinds.index("XDiTCogVideoXSampler") :]


def test_another_prompt_reloads_nothing_and_another_workflow_finds_the_group_warm(server, prompt_of):
    server.run(prompt_of(*TWO_PROCESSES))
    before, processes = group_status(), sorted(workers())
    server.run(prompt_of(*TWO_PROCESSES, "Prompt.text=a green star", "XDiTCogVideoXSampler.seed=7"))
    other = prompt_of(*TWO_PROCESSES, "XDiTEmptyCogVideoXLatent.length=9", "XDiTCogVideoXSampler.scheduler=ddim")
    server.run(
        {f"9{name}": json.loads(re.sub(r'\["(\d+)", (\d)\]', r'["9\1", \2]', json.dumps(node))) for name, node in other.items()}
    )
    after = group_status()
    assert after["jobs"] >= before["jobs"] + 2
    assert after["loads"] == before["loads"]
    assert sorted(workers()) == processes


def test_the_sampler_shows_previews_where_they_are_turned_on(server, prompt_of):
    if "preview_method" not in (server.comfyui / "execution.py").read_text():
        pytest.skip("this ComfyUI has previews on or off as a whole")
    prompt = prompt_of(*TWO_PROCESSES, "XDiTCogVideoXSampler.seed=21", "XDiTCogVideoXSampler.steps=12")
    events = list(server.events(server.queue(prompt, preview_method="auto")))
    assert events[-1]["type"] == "execution_success", server.log_tail()
    shown = [iio.imread(event["data"]["image"]) for event in events if event["type"] == "preview"]
    assert shown and shown[0].shape == (341, 512, 3)  # 2 x 2 moments of 96 x 64, as large as ComfyUI makes them
    events = list(server.events(server.queue(prompt_of(*TWO_PROCESSES, "XDiTCogVideoXSampler.seed=22"))))
    assert not [event for event in events if event["type"] == "preview"]


def test_cancel_stops_within_a_step_and_the_group_stays_warm(server, prompt_of):
    server.run(prompt_of(*TWO_PROCESSES))
    processes = sorted(workers())
    prompt_id = server.queue(prompt_of(*TWO_PROCESSES, *SLOW, "XDiTCogVideoXSampler.steps=900", "XDiTCogVideoXSampler.seed=1"))
    asked = None
    for event in server.events(prompt_id):
        if event["type"] == "progress" and event["data"]["value"] >= 2 and asked is None:
            asked = time.monotonic()
            server.interrupt()
    assert event["type"] == "execution_interrupted"
    assert wait_until(lambda: group_status()["state"] == "ready")
    server.run(prompt_of(*TWO_PROCESSES, "XDiTCogVideoXSampler.seed=2"))
    assert sorted(workers()) == processes
    done = [line for line in server.log().splitlines() if "sample: plan cfg2" in line]
    assert not any("900 steps" in line for line in done)


def frames_of(server, prefix: str) -> np.ndarray:
    """The images that a Save Image node wrote, in order."""
    paths = [path for path in server.output_files() if path.name.startswith(f"{prefix}_")]
    return np.stack([iio.imread(path) for path in paths]).astype(int)


def with_images(prompt: dict, prefix: str, source: str | None = None) -> dict:
    """The prompt with a Save Image node behind a decoder, ours by default: a video file is lossy."""
    images = [source or node_of(prompt, "XDiTCogVideoXVAEDecode"), 0]
    node = {"class_type": "SaveImage", "inputs": {"images": images, "filename_prefix": prefix}}
    return {**prompt, f"save {prefix}": node}


def test_without_a_backend_the_work_is_done_in_comfyui_itself_with_the_same_frames(server, prompt_of):
    alone = with_images(prompt_of(), "alone")
    for node in alone.values():
        node["inputs"].pop("backend", None)
    server.run(alone)
    assert "sample: plan single" in server.log()
    server.run(with_images(prompt_of(*TWO_PROCESSES), "together"))
    assert np.abs(frames_of(server, "alone") - frames_of(server, "together")).max() <= 1


def test_a_backend_that_cannot_start_falls_back_and_says_so(server, prompt_of):
    server.run(prompt_of("XDiTCogVideoXSampler.seed=11"))  # auto, and this machine has one CPU device
    assert "plan single on cpu:1: one device: nothing to split" in server.log()


def test_nodes_are_found_by_the_words_that_users_search_for(object_info):
    if not any("search_aliases" in info for info in object_info.values()):
        pytest.skip("this ComfyUI knows no search aliases")
    ours = {name: info["search_aliases"] for name, info in object_info.items() if info["category"] == "CogVideoX xDiT"}
    assert set(ours) == set(json.loads((REPO / "tests" / "frozen_nodes.json").read_text())) and all(ours.values())
    assert {"multi gpu", "ulysses", "tensor parallel"} <= set(ours["XDiTBackend"]) and "i2v" in ours[
        "XDiTCogVideoXImageToVideo"
    ]
    advanced = {
        name
        for node in ours
        for group in object_info[node]["input"].values()
        if isinstance(group, dict)
        for name, (_, *about) in group.items()
        if about and about[0].get("advanced")
    }
    assert advanced == {"pipefusion_warmup", "task", "snr_shift", "timesteps"}


def test_a_widget_is_called_as_the_core_calls_the_same_thing(object_info):
    called = {
        "XDiTCogVideoXSampler": ("KSampler", {"scheduler": "sampler_name"}),
        "XDiTLoadCogVideoX": ("UNETLoader", {"dtype": "weight_dtype"}),
        "XDiTCogVideoXContextWindows": (
            "ContextWindowsManual",
            {
                "window": "context_length",
                "overlap": "context_overlap",
                "schedule": "context_schedule",
                "shuffle_noise": "freenoise",
            },
        ),
    }
    is_new = any("search_aliases" in info for info in object_info.values())
    later = set() if is_new else {"freenoise"}  # 0.3.64 lacks it
    for node, (core_node, labels) in called.items():
        found = {
            name: spec[1].get("display_name") for name, spec in object_info[node]["input"]["required"].items() if len(spec) > 1
        }
        assert {name: label for name, label in found.items() if label} == labels
        assert set(labels.values()) - object_info[core_node]["input"]["required"].keys() <= later


def test_core_nodes_fit_in_between(server, prompt_of, object_info):
    """CLIP Text Encode is in the workflow already; VAE Decode, tiled too, VAE Encode and Save Video come in here."""
    prompt = prompt_of()
    sampler, loader = node_of(prompt, "XDiTCogVideoXSampler"), node_of(prompt, "XDiTLoadCogVideoX")
    ours = node_of(prompt, "XDiTCogVideoXVAEDecode")
    prompt |= {
        "20": {"class_type": "VAEDecode", "inputs": {"samples": [sampler, 0], "vae": [loader, 2]}},
        "21": {
            "class_type": "VAEDecodeTiled",
            "inputs": {"samples": [sampler, 0], "vae": [loader, 2], "tile_size": 64, "overlap": 32, "temporal_size": 64, "temporal_overlap": 8},
        },
        "22": {"class_type": "VAEEncode", "inputs": {"pixels": [ours, 0], "vae": [loader, 2]}},
        "23": {"class_type": "VAEDecode", "inputs": {"samples": ["22", 0], "vae": [loader, 2]}},
        "24": {"class_type": "CreateVideo", "inputs": {"images": ["20", 0], "fps": 8.0}},
        "25": {"class_type": "SaveVideo", "inputs": {"video": ["24", 0], "filename_prefix": "core", **save_video_options(object_info)}},
    }  # fmt: skip
    sources = {"ours": ours, "core": "20", "tiled": "21", "again": "23"}
    for name, source in sources.items():
        prompt = with_images(prompt, f"frames_{name}", source)
    server.run(prompt)
    frames = {name: frames_of(server, f"frames_{name}") for name in sources}
    assert {value.shape for value in frames.values()} == {(17, 64, 96, 3)}
    assert (frames["ours"] == frames["core"]).all()
    assert [path for path in server.output_files() if path.name.startswith("core") and path.suffix == ".mp4"]


def test_save_video_takes_what_core_nodes_give_and_finds_a_bad_name_before_anything_runs(server):
    prompt = {
        "1": {"class_type": "EmptyImage", "inputs": {"width": 64, "height": 48, "batch_size": 1, "color": 0xFF0000}},
        "2": {"class_type": "SolidMask", "inputs": {"value": 0.5, "width": 64, "height": 48}},
        "3": {"class_type": "JoinImageWithAlpha", "inputs": {"image": ["1", 0], "alpha": ["2", 0]}},
        "7": {"class_type": "RepeatImageBatch", "inputs": {"image": ["3", 0], "amount": 6}},
        "4": {"class_type": "PrimitiveFloat", "inputs": {"value": 12.0}},
        "5": {"class_type": "PrimitiveInt", "inputs": {"value": 3}},
        "6": {
            "class_type": "XDiTSaveVideo",
            "inputs": {"images": ["7", 0], "fps": ["4", 0], "filename_prefix": "alpha", "videos": ["5", 0]},
        },
    }
    shown = server.run(prompt)["outputs"]["6"]["images"]
    assert [one["filename"] for one in shown] == [f"alpha_0000{number}_.mp4" for number in (1, 2, 3)]
    for one in shown:
        made = iio.imread(server.base / "output" / one["filename"], plugin="pyav")
        assert made.shape == (2, 48, 64, 3) and np.abs(made[0, 24, 32].astype(int) - (255, 0, 0)).max() < 4
    prompt["4"]["inputs"]["value"] = 0.0
    with pytest.raises(RuntimeError, match="fps is 0.0; use 1.0 to 120.0"):
        server.run(prompt)
    prompt["6"]["inputs"]["filename_prefix"] = "x" * 300
    with pytest.raises(RuntimeError, match="File name too long"):
        server.queue(prompt)


def test_prompts_take_turns_and_what_is_not_used_stays_in_the_node(server, prompt_of):
    prompt = prompt_of("XDiTCogVideoXSampler.steps=2")
    sampler, loader = node_of(prompt, "XDiTCogVideoXSampler"), node_of(prompt, "XDiTLoadCogVideoX")
    del prompt[sampler]["inputs"]["backend"]

    def encode(text: str) -> dict:
        return {"class_type": "CLIPTextEncode", "inputs": {"clip": [loader, 1], "text": text}}

    def ranged(name: str, start: float, end: float) -> dict:
        return {"class_type": "ConditioningSetTimestepRange", "inputs": {"conditioning": [name, 0], "start": start, "end": end}}

    prompt |= {
        "30": encode("a (red circle:1.3) " + "moves left " * 20),
        "31": encode("a blue square"),
        "32": ranged("30", 0.0, 0.5),
        "33": ranged("31", 0.4, 1.0),
        "34": {"class_type": "ConditioningCombine", "inputs": {"conditioning_1": ["32", 0], "conditioning_2": ["33", 0]}},
        "35": {"class_type": "ConditioningSetAreaStrength", "inputs": {"conditioning": ["34", 0], "strength": 0.5}},
    }
    prompt[sampler]["inputs"]["positive"] = ["35", 0]
    events = list(server.events(server.queue(prompt)))
    assert events[-1]["type"] == "execution_success"
    shown = {event["data"]["node"]: event["data"]["text"].split("  \n") for event in events if event["type"] == "text"}
    assert [line.split(";")[0].split(",")[1] for line in shown["30"]] == [" 32 are used"] and "31" not in shown
    *warnings, cost = shown[sampler]
    assert warnings == [
        "positive: several prompts are set for 40 to 50 % of the steps; the first of them is used",
        "positive carries strength, which CogVideoX does not use",
    ]
    assert cost.startswith("sample: plan single, 2 steps")


def save_video_options(object_info: dict) -> dict:
    """The core's Save Video has other widgets in each version; the first choice of each is fine."""
    chosen = {}
    for group in ("required", "optional"):
        for name, spec in object_info["SaveVideo"]["input"].get(group, {}).items():
            if name in ("format", "codec"):
                options = spec[0] if isinstance(spec[0], list) else spec[1]["options"]
                chosen[name] = options[0]["key"] if isinstance(options[0], dict) else options[0]
    return chosen


def test_an_image_and_a_video_become_videos_with_the_shipped_workflows(server):
    info = server.object_info()
    for name in ("i2v", "v2v"):
        workflow = shipped(name)
        prompt = to_api(workflow, info)
        apply_settings(prompt, [*TWO_PROCESSES, FEW_STEPS, f"XDiTSaveVideo.filename_prefix={name}"], info)
        outputs = server.run(prompt, workflow=workflow)["outputs"]
        (shown,) = outputs[node_of(prompt, "XDiTSaveVideo")]["images"]
        path = server.base / "output" / shown["subfolder"] / shown["filename"]
        made = iio.imread(path, plugin="pyav")
        assert made.shape == (17, 64, 96, 3)
        assert iio.immeta(path, plugin="pyav")["fps"] == 8  # every second frame of the video, at 16
        if name == "i2v":  # a red square on black, at the left
            assert made[0, 32, 23, 0] > 150 and made[0, 32, 80, 0] < 80
    prompt = to_api(shipped("i2v"), info)
    apply_settings(prompt, ["XDiTLoadCogVideoX.model_name=demo"], info)
    with pytest.raises(RuntimeError, match="makes videos from text alone; for a start image use an image-to-video model"):
        server.run(prompt)


@pytest.fixture
def prepared(server, checkpoints):
    """The models and the input of every shipped workflow; the models are there for one test alone."""
    prepare(server.base, checkpoints)
    yield server.object_info()
    for name in MODELS:
        shutil.rmtree(server.base / "models" / "CogVideo" / name)


def test_the_workflows_for_other_models_run_as_they_are_dragged_in(server, prepared):
    """Every task that the demo models do not do; the rest of the shipped workflows run in tests of their own."""
    for name in ("first-last-frame", "inpaint", "control", "controlnet", "long-video", "four-steps", "upscale"):
        workflow = shipped(name)
        prompt = to_api(workflow, prepared)
        settings = SETTINGS.get(name, ["XDiTEmptyCogVideoXLatent.length=33"])
        few = [f"XDiTSaveVideo.filename_prefix={name}", *([] if name == "upscale" else ["XDiTCogVideoXSampler.steps=2"])]
        apply_settings(prompt, [*TWO_PROCESSES, *few, *settings], prepared)
        outputs = server.run(prompt, workflow=workflow)["outputs"]
        (shown,) = outputs[node_of(prompt, "XDiTSaveVideo")]["images"]
        made = iio.imread(server.base / "output" / shown["subfolder"] / shown["filename"], plugin="pyav")
        assert made.shape == ((33, 64, 96, 3) if name == "long-video" else SHAPES[name]), name


def test_a_lora_is_listed_merged_and_read_again_when_its_file_changes(server, prompt_of):
    folder = server.base / "models" / "loras"
    folder.mkdir(exist_ok=True)
    workflow = shipped("lora")
    few = ["XDiTCogVideoXSampler.steps=3", "XDiTEmptyCogVideoXLatent.length=5", "Prompt.text=a circle", "Negative prompt.text="]
    for seed in (1, 2):
        write(folder / "cogvideox-lora.safetensors", diffusers_layout(random_change(find(DEMO), seed=seed)))
        info = server.object_info()
        prompt = to_api(workflow, info)
        apply_settings(prompt, [*SETTINGS["lora"], *few], info)
        server.run(with_images(prompt, f"lora_{seed}"))
    for node in workflow["nodes"]:
        if node["type"] == "XDiTCogVideoXLoRA":
            node["mode"] = 4  # bypassed
    prompts = to_api(workflow, info), prompt_of()
    without = [setting for setting in SETTINGS["lora"] if not setting.startswith("XDiTCogVideoXLoRA")]
    for name, prompt in zip(("bypassed", "plain"), prompts):
        apply_settings(prompt, [*without, *few], info)
        server.run(with_images(prompt, name))
    frames = {name: frames_of(server, name) for name in ("lora_1", "lora_2", "bypassed", "plain")}
    assert (frames["bypassed"] == frames["plain"]).all()
    assert len({value.tobytes() for value in frames.values()}) == 3
    assert "cogvideox-lora.safetensors: LoRA for" in server.log()


SMALL = [
    *TWO_PROCESSES, "XDiTCogVideoXSampler.steps=6", "XDiTCogVideoXSampler.seed=5", "Prompt.text=a red ball over the sea",
    "Negative prompt.text=rain",
]  # fmt: skip
SINGLE_FILES = ["CLIPLoader.clip_name=t5.safetensors", "VAELoader.vae_name=1.5-5b.safetensors"]
SMALL_LATENT = [f"XDiTEmptyCogVideoXLatent.{name}" for name in ("width=96", "height=64", "length=17")]


def latent_of(server, prompt: dict, name: str) -> torch.Tensor:
    """What the sampler of a prompt gives, as the core's Save Latent writes it."""
    samples = [node_of(prompt, "XDiTCogVideoXSampler"), 0]
    node = {"class_type": "SaveLatent", "inputs": {"samples": samples, "filename_prefix": name}}
    server.run({**prompt, "save latent": node})
    (path,) = [path for path in server.output_files() if path.name.startswith(f"{name}_") and path.suffix == ".latent"]
    return load_file(path)["latent_tensor"]


@pytest.fixture
def core_knows_cogvideox(object_info):
    if "cogvideox" not in object_info["CLIPLoader"]["input"]["required"]["type"][0]:
        pytest.skip("the core of this ComfyUI has no CogVideoX")


@pytest.mark.usefixtures("core_knows_cogvideox")
def test_a_workflow_of_the_core_s_loaders_and_decoder_makes_the_video_that_ours_makes(
    server, object_info, prompt_of, core_models
):
    """core-nodes.json: transformer, T5 and VAE are single files; beside it the same weights as a folder."""
    workflow = shipped("core-nodes")
    with in_model_folders(core_models, server.base / "models"):
        info = server.object_info()
        mixed = to_api(workflow, info)
        model = "XDiTLoadCogVideoX.model_name=diffusion_models/1.5-5b.safetensors"
        apply_settings(mixed, [*SMALL, *SINGLE_FILES, *SMALL_LATENT, model, "XDiTSaveVideo.filename_prefix=core-nodes"], info)
        mixed_latent = latent_of(server, with_images(mixed, "mixed", node_of(mixed, "VAEDecode")), "latent_mixed")
        ours = prompt_of(*SMALL, *SMALL_LATENT, "XDiTLoadCogVideoX.model_name=CogVideo/1.5-5b")
        # The core's decoder on both: its norms take other chunks of frames than diffusers' (tests/test_core_parts.py).
        vae = {"class_type": "VAELoader", "inputs": {"vae_name": "1.5-5b.safetensors"}}
        ours[node_of(ours, "XDiTCogVideoXVAEDecode")]["inputs"]["vae"] = ["vae", 0]
        ours_latent = latent_of(server, with_images({**ours, "vae": vae}, "ours"), "latent_ours")
    assert mixed_latent.shape == (1, 16, 5, 8, 12) and mixed_latent.std() > 0.1
    assert (mixed_latent - ours_latent).abs().max() <= TOLERANCE
    assert frames_of(server, "mixed").shape == (17, 64, 96, 3)
    assert np.abs(frames_of(server, "mixed") - frames_of(server, "ours")).max() <= 1
    assert [path for path in server.output_files() if path.name.startswith("core-nodes") and path.suffix == ".mp4"]
    assert "1.5-5b.safetensors: CogVideoX 1.5, text to video, 3 layers, 2 heads, rotary, fp32" in server.log()


@pytest.mark.usefixtures("core_knows_cogvideox")
def test_a_start_image_through_the_core_s_vae_gives_what_ours_gives(server, core_models):
    workflow, latents = shipped("i2v"), {}
    vae = {"class_type": "VAELoader", "inputs": {"vae_name": "1.5-5b-i2v.safetensors"}}
    clip = {"class_type": "CLIPLoader", "inputs": {"clip_name": "t5.safetensors", "type": "cogvideox"}}
    with in_model_folders(core_models, server.base / "models"):
        info = server.object_info()
        for name in ("CogVideo/1.5-5b-i2v", "diffusion_models/1.5-5b-i2v.safetensors"):
            prompt = to_api(workflow, info)
            apply_settings(prompt, [*SMALL, f"XDiTLoadCogVideoX.model_name={name}"], info)
            if name.endswith(".safetensors"):
                loader = node_of(prompt, "XDiTLoadCogVideoX")
                prompt = json.loads(
                    json.dumps(prompt).replace(f'["{loader}", 1]', '["clip", 0]').replace(f'["{loader}", 2]', '["vae", 0]')
                )
                prompt |= {"vae": vae, "clip": clip}
            latents[name] = latent_of(server, prompt, f"i2v{len(latents)}")
    ours, core = latents.values()
    assert ours.shape == (1, 16, 5, 8, 12)
    assert (ours - core).abs().max() <= TOLERANCE


VOID = [
    "XDiTBackend.devices=cpu:2", "XDiTCogVideoXInpaint.width=64", "XDiTCogVideoXInpaint.height=48", "CLIPLoader.clip_name=t5.safetensors",
    "VAELoader.vae_name=1.5-5b-void.safetensors",
]  # fmt: skip
ITS_MODEL = "diffusion_models/1.5-5b-void.safetensors"


@pytest.mark.usefixtures("core_knows_cogvideox")
def test_an_object_is_removed_in_one_pass_and_in_two_with_the_core_s_noise(server, core_models):
    """The second time the condition is the core's own too."""
    flow = server.base / "models" / "optical_flow" / "raft.safetensors"
    flow.parent.mkdir(exist_ok=True)
    parts = ("feature_encoder", "context_encoder", "update_block")
    save_file(
        {f"{part}.{name}": torch.zeros(1, *[1] * (name == "weight")) for part in parts for name in ("weight", "bias")}, flow
    )
    with in_model_folders(core_models, server.base / "models"):
        prepare(server.base, {})
        info = server.object_info()
        if "VOIDWarpedNoise" not in info:
            pytest.skip("the core of this ComfyUI has no nodes for VOID")
        one, two = shipped("remove-object"), shipped("remove-object-twice")
        once, twice = to_api(one, info), to_api(two, info)
        few = [*VOID, f"XDiTLoadCogVideoX.model_name={ITS_MODEL}", "XDiTCogVideoXSampler.steps=2"]
        apply_settings(once, [*few, "XDiTBackend.plan=ulysses2", "XDiTSaveVideo.filename_prefix=removed"], info)
        server.run(once, workflow=one)
        for node in twice.values():
            settings = {"XDiTLoadCogVideoX": {"model_name": ITS_MODEL}, "XDiTCogVideoXSampler": {"steps": 2}}
            node["inputs"] |= settings.get(node["class_type"], {})
        apply_settings(
            twice, [*VOID, "XDiTSaveVideo.filename_prefix=twice", "OpticalFlowLoader.model_name=raft.safetensors"], info
        )
        inpaint = twice[node_of(twice, "XDiTCogVideoXInpaint")]
        theirs = {"quadmask": inpaint["inputs"]["mask"], "width": 64, "height": 48, "length": 13, "batch_size": 1}
        kept = {name: inpaint["inputs"][name] for name in ("positive", "negative", "vae", "video")}
        twice[node_of(twice, "XDiTSaveVideo")]["inputs"]["fps"] = 12.0
        inpaint |= {"class_type": "VOIDInpaintConditioning", "inputs": kept | theirs}
        server.run(twice)
    assert frames_of_video(server, "removed").shape == (29, 48, 64, 3)  # 8k+5 of the 33 that the example has
    assert frames_of_video(server, "twice").shape == (13, 48, 64, 3)
    assert "1.5-5b-void.safetensors: CogVideoX 1.5, object removal, 3 layers, 2 heads, rotary, fp32" in server.log()


def frames_of_video(server, name: str) -> np.ndarray:
    """The frames of the one video whose name starts so."""
    (path,) = [path for path in server.output_files() if path.name.startswith(f"{name}_") and path.suffix == ".mp4"]
    return iio.imread(path, plugin="pyav")


def test_a_checkpoint_in_the_model_folders_is_listed_and_runs(server, prompt_of, checkpoints):
    for kind, like in (("CogVideo", "2b"), ("diffusers", "1.5-5b")):
        (server.base / "models" / kind).mkdir(exist_ok=True)
        shutil.copytree(checkpoints[like], server.base / "models" / kind / f"my {like}")
    options = server.object_info("XDiTLoadCogVideoX")["XDiTLoadCogVideoX"]["input"]["required"]["model_name"][1]["options"]
    assert options[:4] == ["demo", "demo-i2v", "CogVideo/my 2b", "diffusers/my 1.5-5b"]
    assert all(" GB, " in option for option in options[4:])
    for name in options[2:4]:
        server.run(prompt_of(f"XDiTLoadCogVideoX.model_name={name}"))
    assert (
        "my 2b: CogVideoX 1.0, text to video, 3 layers, 4 heads, sincos, fp32, ddim, made for 96x64x17 at 8 fps" in server.log()
    )
    assert "my 1.5-5b: CogVideoX 1.5" in server.log()
    weights = server.base / "models" / "CogVideo" / "my 2b" / "vae" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-9])
    with pytest.raises(RuntimeError, match="it is cut off; download it again"):
        server.run(prompt_of("XDiTLoadCogVideoX.model_name=CogVideo/my 2b", "XDiTLoadCogVideoX.dtype=fp32"))


def test_a_model_is_downloaded_if_the_user_says_so_and_a_cancelled_download_goes_on(server, hub, object_info):
    served, _ = hub
    offer = "CogVideo/CogVideoX-5b (download: 21 GB, CogVideoX licence)"
    assert (
        offer in server.object_info("XDiTLoadCogVideoX")["XDiTLoadCogVideoX"]["input"]["required"]["model_name"][1]["options"]
    )
    prompt = to_api(WORKFLOW, object_info)
    apply_settings(prompt, ["XDiTCogVideoXSampler.steps=2", *SMALL_LATENT], object_info)
    loader = node_of(prompt, "XDiTLoadCogVideoX")
    prompt[loader]["inputs"]["model_name"] = offer
    with pytest.raises(RuntimeError, match="CogVideoX-5b is not downloaded .*set download in Load CogVideoX to huggingface or"):
        server.queue(prompt)
    assert not served.asked

    prompt[loader]["inputs"]["download"] = "huggingface"
    served.held[WEIGHTS] = threading.Event()
    prompt_id = server.queue(prompt)
    wait_until(lambda: (WEIGHTS, 0) in served.asked)
    server.interrupt()
    served.held.pop(WEIGHTS).set()
    assert list(server.events(prompt_id))[-1]["type"] == "execution_interrupted"
    folder = server.base / "models" / "CogVideo" / "CogVideoX-5b"
    assert list(folder.rglob("*.partial")) and not (folder / "transformer" / "config.json").exists()
    asked = list(served.asked)

    events = list(server.events(server.queue(prompt)))
    assert events[-1]["type"] == "execution_success", server.log_tail()
    bars = [event["data"] for event in events if event["type"] == "progress" and event["data"]["node"] == loader]
    assert bars and bars[-1]["value"] == bars[-1]["max"] > 1_000_000
    texts = [event["data"]["text"] for event in events if event["type"] == "text" and event["data"]["node"] == loader]
    assert "downloaded into CogVideo/CogVideoX-5b, and checked" in texts[-1]
    before, after = ({name for name, _ in some} for some in (asked, served.asked[len(asked) :]))
    assert before & after <= {WEIGHTS}

    served.asked.clear()
    prompt[loader]["inputs"]["download"] = "off"
    for name in (offer, "CogVideo/CogVideoX-5b"):
        prompt[loader]["inputs"]["model_name"] = name
        server.run(prompt)
    assert not served.asked
    shutil.rmtree(folder)


@pytest.mark.parametrize(
    "settings, words",
    [
        (["XDiTBackend.plan=warp9"], "'warp9' is not understood"),
        (["XDiTBackend.devices=99"], "there is no GPU 99"),
        (["XDiTBackend.devices=cpu:3", "XDiTBackend.plan=cfg2"], "needs 2 devices.*3 were given"),
    ],
)
def test_a_backend_that_makes_no_sense_is_refused_once_before_anything_runs(settings, words, server, prompt_of):
    prompt = prompt_of(*settings)
    with pytest.raises(RuntimeError, match=words) as error:
        server.queue(prompt)
    answer = json.loads(str(error.value).partition("answered 400: ")[2])
    assert list(answer["node_errors"]) == [node_of(prompt, "XDiTBackend")]
    (found,) = answer["node_errors"][node_of(prompt, "XDiTBackend")]["errors"]
    while (message := server.messages.get(timeout=60))["type"] != "cogvideox-xdit.refused":
        pass
    assert found["details"] == f"plan - {message['data']['text']}"


@pytest.mark.parametrize(
    "settings, words",
    [
        (("XDiTEmptyCogVideoXLatent.length=10",), "length is 10.*4k"),
        (("XDiTEmptyCogVideoXLatent.width=100",), "width is 100.*multiple of 16"),
        (("XDiTBackend.devices=cpu:3", "XDiTBackend.plan=ulysses3"), "does not divide this model's 4 heads"),
    ],
)
def test_bad_input_is_named_in_the_node_in_one_line(settings, words, server, prompt_of):
    with pytest.raises(RuntimeError) as error:
        server.run(prompt_of(*settings, "XDiTCogVideoXSampler.seed=5"))
    (line,) = [
        line for line in str(error.value).splitlines() if re.search(words, line) and not line.startswith("parallel_backend")
    ][:1]
    assert "in node" in line


def test_an_error_has_a_plain_name_and_its_sentence_is_in_the_node(server, prompt_of):
    prompt = prompt_of("XDiTEmptyCogVideoXLatent.length=10", "XDiTCogVideoXSampler.seed=6")
    latent = node_of(prompt, "XDiTEmptyCogVideoXLatent")
    events = list(server.events(server.queue(prompt, WORKFLOW)))
    assert events[-1]["type"] == "execution_error" and events[-1]["data"]["exception_type"] == "CogVideoXError"
    sentence = "length is 10; it must be 4k+1, such as 9"
    assert {"node": latent, "text": sentence} in [event["data"] for event in events if event["type"] == "text"]
    kept = server.request(f"/cogvideox-xdit/lines?workflow={WORKFLOW['id']}")
    assert kept[latent] == [{"text": sentence, "level": "error"}]


@pytest.mark.usefixtures("core_knows_cogvideox")
def test_every_core_node_works_with_our_objects_or_is_refused_in_one_sentence(server, core_models, loras):
    (server.base / "models" / "loras").mkdir(exist_ok=True)
    write(server.base / "models" / "loras" / "small.safetensors", {"nothing": torch.zeros(1)})
    with in_model_folders({"1.5-5b": core_models["1.5-5b"]}, server.base / "models"):
        info = server.object_info()
        endings = {name: core_nodes.ending(server, name, info) for name in core_nodes.names(info)}
    assert len(endings) > 100
    assert {name: ended for name, ended in endings.items() if not core_nodes.is_expected(name, ended)} == {}


ROUTES = ["GET status", "GET lines", "GET plans", "GET choices", "GET log/0", "POST free", "POST stop", "POST restart"]


@pytest.mark.parametrize("route", ROUTES)
def test_a_page_of_another_origin_is_refused(route, server):
    method, _, name = route.partition(" ")
    url = f"{server.url}/cogvideox-xdit/{name}"
    request = urllib.request.Request(url, method=method, headers={"Origin": "http://example.com"})
    with pytest.raises(urllib.error.HTTPError, match="403"):
        urllib.request.urlopen(request, timeout=60)


def test_the_state_of_the_group_can_be_read_and_the_group_stopped_and_started(server, prompt_of):
    prompt = prompt_of(*TWO_PROCESSES, "XDiTCogVideoXSampler.seed=41")
    events = list(server.events(server.queue(prompt)))
    assert events[-1]["type"] == "execution_success", server.log_tail()
    told = [
        event["data"] for event in events if event["type"] == "cogvideox-xdit.progress" and event["data"]["kind"] == "sample"
    ]
    sampler = node_of(prompt, "XDiTCogVideoXSampler")
    assert (told[-1]["step"], told[-1]["steps"], told[-1]["node"]) == (6, 6, sampler) and told[-1]["seconds_left"] == 0

    state = server.request("/cogvideox-xdit/status")
    assert (state["label"], state["plan"], state["devices"], state["job"]) == ("idle", "cfg2", "cpu:2", None)
    assert [(rank["rank"], rank["device"], rank["share"]) for rank in state["ranks"]] == [
        (0, "cpu", "cfg −"),
        (1, "cpu", "cfg +"),
    ]
    assert all(0 < rank["memory"]["used"] < rank["memory"]["total"] for rank in state["ranks"])
    assert state["link"] > 0 and 0 < state["warm_minutes"] <= 30
    (address,) = running()
    texts = [json.dumps(state)]
    with urllib.request.urlopen(f"{server.url}/cogvideox-xdit/log/1", timeout=60) as answer:
        texts.append(answer.read().decode())
    for text in texts:
        assert text and str(address.folder) not in text and str(REPO) not in text and address.key.hex() not in text

    server.request("/cogvideox-xdit/restart", {})
    (started,) = running()
    assert started != address
    server.run(prompt_of(*TWO_PROCESSES, "XDiTCogVideoXSampler.seed=42"))
    assert list(running()) == [started]
    server.request("/cogvideox-xdit/stop", {})
    assert not running() and server.request("/cogvideox-xdit/status")["state"] == "absent"
    with pytest.raises(RuntimeError, match="409.*no group was started yet"):
        server.request("/cogvideox-xdit/restart", {})
    server.run(prompt_of(*TWO_PROCESSES, "XDiTCogVideoXSampler.seed=43"))


def test_the_planner_s_table_is_that_of_the_model_and_the_devices(server):
    table = server.request("/cogvideox-xdit/plans?model=demo&devices=cpu:2&width=96&height=64&length=17")
    assert {row["plan"] for row in table["rows"]} >= {"cfg2", "ulysses2", "ring2"}
    (chosen,) = [row for row in table["rows"] if row["chosen"]]
    assert chosen["plan"] == "cfg2" and table["reason"].startswith("cfg2 is predicted")
    with pytest.raises(RuntimeError, match="409.*length is 10"):
        server.request("/cogvideox-xdit/plans?length=10")


def test_the_lists_of_the_backend_have_the_devices_that_are_here_and_the_plans_that_fit_them(server):
    choices = server.request("/cogvideox-xdit/choices?model=demo&devices=cpu:2&width=96&height=64&length=17")
    assert choices["plan"] == ["auto", "cfg2", "ulysses2", "ring2", "pipefusion2"]
    assert choices["devices"][:2] == (["auto", "0"] if torch.cuda.is_available() else ["auto", "cpu"])
    assert server.request("/cogvideox-xdit/choices?devices=cpu")["plan"] == ["auto", "single"]
    assert server.request("/cogvideox-xdit/choices?devices=99")["plan"] == ["auto"]


def test_unload_models_makes_the_group_let_go(server, prompt_of):
    server.run(prompt_of(*TWO_PROCESSES, "XDiTCogVideoXSampler.seed=21"))
    assert "transformer" in group_status()["held"]

    def is_free() -> bool:
        # Asked each time: ComfyUI 0.33 hears of it up to 1000 s later where its worker, done with a prompt, just collects garbage.
        server.free()
        return wait_until(lambda: not running(), 5)

    assert wait_until(is_free)
    server.run(prompt_of(*TWO_PROCESSES, "XDiTCogVideoXSampler.seed=22"))
    assert "transformer" in group_status()["held"]


def test_the_group_goes_when_comfyui_is_killed(server, prompt_of):
    """Last in this file: it ends the server."""
    server.run(prompt_of(*TWO_PROCESSES, "XDiTCogVideoXSampler.seed=31"))
    (address,) = running()
    server.kill()
    assert server.wait_for_processes(0) == []
    assert wait_until(lambda: not address.folder.exists())
