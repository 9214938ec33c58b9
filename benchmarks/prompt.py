"""Where the seconds of a warm prompt go in a real ComfyUI: ``python -m benchmarks.prompt``, from the repository's root.

The workflow *CogVideoX text to video* runs several times with other seeds; the first run is left out. ``--model PATH`` takes any
text-to-video checkpoint in diffusers layout, at its own size unless options say otherwise, and all GPUs unless ``--devices`` does. It
needs a ComfyUI at COMFYUI_PATH or ~/comfy/ComfyUI (its Python at COMFYUI_PYTHON), and the package websockets; no network.
"""

import argparse
import json
import re
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from statistics import median

import torch

from parallel_backend.cli.console import Table, show
from parallel_backend.cogvideox.checkpoint import bundled
from parallel_backend.cogvideox.checkpoint.checkpoint import Checkpoint
from tests.support.comfyui_server import ComfyUIServer
from workflows.headless import apply_settings, find, to_api

SAMPLER, DECODER, SAVER = "XDiTCogVideoXSampler", "XDiTCogVideoXVAEDecode", "XDiTSaveVideo"
COST = re.compile(r"(sample|decode): plan (\S+), .*load ([\d.]+) s, run ([\d.]+) s")
"""The line of a node that says what its job cost."""
PAUSE = 1.0
"""Seconds before each prompt: ComfyUI collects garbage after one, which the next would wait for."""
BEFORE, OTHERS = "before the first node", "other nodes"


def measure(server: ComfyUIServer, prompt: dict) -> dict[str, float]:
    """Runs a prompt. Returns its parts in seconds."""
    logged, began = len(server.log()), time.perf_counter()
    spent: dict[str, float] = defaultdict(float)
    part, since = BEFORE, began
    for event in server.events(server.queue(prompt), timeout=3600):
        now = time.perf_counter()
        if event["type"] in ("execution_error", "execution_interrupted"):
            raise SystemExit(f"the prompt failed: {event['data']}\n{server.log_tail()}")
        if event["type"] == "executing":
            spent[part] += now - since
            kind = prompt.get(event["data"]["node"], {}).get("class_type")
            part, since = kind if kind in (SAMPLER, DECODER, SAVER) else OTHERS, now
    total = now - began
    spent[part] += now - since
    found = {kind: (float(load), float(run)) for kind, _, load, run in COST.findall(server.log()[logged:])}
    (load, steps), (load_vae, decode) = found["sample"], found["decode"]
    return {
        BEFORE: spent[BEFORE],
        "steps": steps,
        "sampler, without its steps": spent[SAMPLER] - steps,
        "of that, loading": load,
        "decode": decode,
        "decoder, without its decode": spent[DECODER] - decode,
        "of that, loading the VAE": load_vae,
        "saving": spent[SAVER],
        OTHERS: spent[OTHERS],
        "**beside steps and decode**": total - steps - decode,
        "**total**": total,
    }


def prepared(server: ComfyUIServer, args: argparse.Namespace, name: str) -> dict:
    """Returns the prompt, with the options in it."""
    info = server.object_info()
    prompt = to_api(json.loads(find("t2v").read_text()), info)
    width, height, frames = Checkpoint.open(bundled.find(args.model)).default_size
    settings = {
        "XDiTLoadCogVideoX.model_name": name,
        "XDiTEmptyCogVideoXLatent.width": args.width or width,
        "XDiTEmptyCogVideoXLatent.height": args.height or height,
        "XDiTEmptyCogVideoXLatent.length": args.frames or frames,
        "XDiTBackend.devices": args.devices,
        "XDiTBackend.plan": args.plan,
        f"{SAMPLER}.steps": args.steps,
    }
    apply_settings(prompt, [*(f"{key}={value}" for key, value in settings.items()), *args.set], info)
    return prompt


def main() -> None:
    """The command of the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=bundled.DEMO)
    parser.add_argument("--devices", default="auto")
    parser.add_argument("--plan", default="auto")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--width", type=int)
    parser.add_argument("--height", type=int)
    parser.add_argument("--frames", type=int)
    parser.add_argument("--prompts", type=int, default=5, help="after the first, which loads the model")
    parser.add_argument("--set", action="append", default=[], metavar="NODE.INPUT=VALUE", help="another input of the workflow")
    parser.add_argument("--cpu", action="store_true", default=not torch.cuda.is_available(), help="start ComfyUI with --cpu")
    parser.add_argument("--preview", default="none", help="ComfyUI's preview method, such as latent2rgb")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        base, name = Path(folder), args.model
        if name not in bundled.shipped():
            link = base / "models" / "CogVideo" / bundled.find(name).name
            link.parent.mkdir(parents=True)
            link.symlink_to(bundled.find(name).resolve())
            name = f"CogVideo/{link.name}"
        with ComfyUIServer(base, args=["--preview-method", args.preview], cpu=args.cpu) as server:
            prompt, found = prepared(server, args, name), []
            sampler = next(node for node in prompt.values() if node["class_type"] == SAMPLER)
            for seed in range(args.prompts + 1):
                sampler["inputs"]["seed"] = seed
                time.sleep(PAUSE)
                found.append(measure(server, prompt))
        size = next(path.stat().st_size for path in (base / "output").rglob("*.mp4"))
    warm = found[1:]
    rows = [[part, *(f"{figure([one[part] for one in warm]):.2f}" for figure in (median, min, max))] for part in warm[0]]
    show(f"{args.model}, {args.steps} steps, {len(warm)} warm prompts, seconds; a file has {size / 1e6:.2f} MB")
    table = Table.of(["part", "median", "least", "most"], rows)
    table.show_titles()
    for row in rows:
        table.show(row)


if __name__ == "__main__":
    main()
