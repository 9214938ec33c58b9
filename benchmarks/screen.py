"""The README's moving picture: a run in a real ComfyUI with the panel GPUs. ``python -m benchmarks.screen --output docs/comfyui.webp``

Needs a ComfyUI and Chromium, as tests/test_browser.py does.
"""

import argparse
import io
import json
import tempfile
import time
import urllib.request
from pathlib import Path

from PIL import Image

from tests.support.browser import Page
from tests.support.comfyui_server import ComfyUIServer
from workflows.headless import find

WORKFLOW = find("t2v")
CHANGES = {
    "XDiTBackend": {"devices": "cpu:2", "plan": "cfg2"},
    "XDiTCogVideoXSampler": {"seed": 12, "steps": 100},
}
PROMPTS = ("a blue square moves left on a white background", "a red circle moves right on a black background")
"""Of a run that starts the group, and of the one in the picture."""
READY = "window.app?.graph?.nodes.length && app.extensionManager && document.querySelector('canvas') && true"
"""The page shows its own first workflow."""
FIT = """(() => {
  const panel = document.querySelector(".xdit-badge").closest(".p-splitterpanel, .side-bar-panel")?.getBoundingClientRect();
  const edge = (panel?.right ?? 380) + 20, nodes = app.graph.nodes;
  const left = Math.min(...nodes.map((node) => node.pos[0])), top = Math.min(...nodes.map((node) => node.pos[1]));
  const right = Math.max(...nodes.map((node) => node.pos[0] + node.size[0]));
  const bottom = Math.max(...nodes.map((node) => node.pos[1] + node.size[1]));
  const scale = Math.min((window.innerWidth - edge - 20) / (right - left), (window.innerHeight - 200) / (bottom - top));
  app.canvas.ds.scale = scale;
  app.canvas.ds.offset = [edge / scale - left, 150 / scale - top];
  app.canvas.setDirty(true, true);
})()"""
"""Moves the nodes to the right of the panel, and as large as they fit."""
WIDTH, SHOWN_SECONDS, LAST_SHOTS = 1500, 0.16, 14
"""Pixels of the picture, seconds that a shot is shown, and how many shots show the finished video."""
LARGEST = 1_500_000
"""Bytes that the README's picture may have."""


def open_workflow(page: Page) -> None:
    """Opens the workflow and the panel, and lets the nodes fill the window."""
    page.wait(READY)
    page.run(f"app.loadGraphData({WORKFLOW.read_text()}).then(() => true)")
    page.wait("app.graph.nodes.some((node) => node.type === 'XDiTBackend')")
    for kind, values in CHANGES.items():
        for name, value in values.items():
            find = f"app.graph.nodes.find((node) => node.type === '{kind}').widgets.find((one) => one.name === '{name}')"
            page.run(f"({find}).value = {json.dumps(value)}")
    page.run("app.graph.nodes.filter((node) => node.type.includes('Note')).forEach((node) => app.graph.remove(node))")
    page.run("[...document.querySelectorAll('button')].find((each) => each.innerText.trim() === 'GPUs').click()")
    page.wait("document.querySelector('.xdit-badge')")
    page.run("app.extensionManager.setting.set('Comfy.Minimap.Visible', false).then(() => true)")
    page.run(FIT)
    page.run("app.api.addEventListener('execution_success', () => { window.ended = true; })")


def start(page: Page, prompt: str) -> None:
    """Writes a prompt and presses Run."""
    find = "app.graph.nodes.find((node) => node.type === 'CLIPTextEncode' && node.title === 'Prompt').widgets[0]"
    page.run(f"({find}).value = {json.dumps(prompt)}")
    page.run("window.ended = false; app.queuePrompt(0).then(() => true)")


def shots_of(page: Page, folder: Path) -> list[Image.Image]:
    """Returns what the window shows from the start of a run to a little after its end."""
    shots, last = [], LAST_SHOTS
    start(page, PROMPTS[1])
    while last:
        began = time.monotonic()
        path = folder / "shot.png"
        page.screenshot(path)
        shot = Image.open(io.BytesIO(path.read_bytes())).convert("RGB")
        shots.append(shot.resize((WIDTH, WIDTH * shot.height // shot.width), Image.Resampling.LANCZOS))
        last -= bool(page.run("window.ended"))
        time.sleep(max(0.0, SHOWN_SECONDS - (time.monotonic() - began)))
    return shots


def main() -> None:
    """The command of the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("docs/comfyui.webp"))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, ComfyUIServer(args=["--preview-method", "latent2rgb"]) as server:
        seen = urllib.request.Request(
            f"{server.url}/settings/Comfy.TutorialCompleted", b"true", {"Content-Type": "application/json"}
        )
        urllib.request.urlopen(seen)
        with Page(server.url, Path(folder) / "profile") as page:
            open_workflow(page)
            start(page, PROMPTS[0])
            page.wait("window.ended")
            shots = shots_of(page, Path(folder))
    shots[0].save(
        args.output,
        save_all=True,
        append_images=shots[1:],
        duration=round(SHOWN_SECONDS * 1000),
        loop=0,
        quality=55,
        method=4,
    )
    size = args.output.stat().st_size
    print(f"{args.output}: {len(shots)} pictures, {size / 1e6:.2f} MB")
    if size > LARGEST:
        raise SystemExit(f"{args.output} is larger than {LARGEST / 1e6:.1f} MB: take fewer steps")


if __name__ == "__main__":
    main()
