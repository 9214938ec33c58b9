"""What a user sees: the pack in a real ComfyUI, in headless Chromium."""

import json
import sys
import urllib.request

import pytest

from .conftest import REPO, wait_until, workers
from .support.browser import Page, find_chromium
from .support.comfyui_server import ComfyUIServer, find_comfyui

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_comfyui() is None, reason="no ComfyUI here: set COMFYUI_PATH, or put it at ~/comfy/ComfyUI"),
    pytest.mark.skipif(find_chromium() is None, reason="no Chromium here: apt-get install chromium"),
]

READY = "window.app?.graph && app.extensionManager && document.querySelector('canvas') && true"


@pytest.fixture(scope="module")
def broken_python(tmp_path_factory):
    """A file that keeps groups from starting as long as it exists, and the interpreter that heeds it."""
    folder = tmp_path_factory.mktemp("python")
    flag, script = folder / "broken", folder / "python"
    script.write_text(f'#!/bin/sh\n[ -e {flag} ] && exit 1\nexec {sys.executable} "$@"\n')
    script.chmod(0o755)
    return flag, script


@pytest.fixture(scope="module")
def server(broken_python):
    with ComfyUIServer(env={"XDIT_PYTHON": str(broken_python[1])}) as started:
        body = json.dumps(True).encode()
        headers = {"Content-Type": "application/json"}
        urllib.request.urlopen(urllib.request.Request(f"{started.url}/settings/Comfy.TutorialCompleted", body, headers))
        yield started


@pytest.fixture(scope="module")
def page(server, tmp_path_factory):
    with Page(server.url, tmp_path_factory.mktemp("profile")) as opened:
        opened.wait(READY)
        yield opened


def load(page: Page, path, **changed) -> None:
    """Opens a workflow file, as dropping it into the page does, and changes widgets given as ``Node_type__widget``."""
    page.run(f"app.loadGraphData({path.read_text()}).then(() => true)")
    for name, value in changed.items():
        kind, _, widget = name.partition("__")
        find = f"app.graph.nodes.find((node) => node.type === '{kind}').widgets.find((one) => one.name === '{widget}')"
        page.run(f"({find}).value = {json.dumps(value)}")


def run(page: Page) -> None:
    """Presses Run and waits until the prompt has ended."""
    page.run("window.ended = undefined; app.queuePrompt(0).then(() => true)")
    page.wait("window.ended")


def listen(page: Page) -> None:
    """Has the page note how a prompt ends."""
    for event in ("execution_success", "execution_error"):
        page.run(f"app.api.addEventListener('{event}', () => {{ window.ended = '{event}'; }})")


T2V = REPO / "workflows" / "t2v.json"
TWO = {"XDiTBackend__devices": "cpu:2", "XDiTCogVideoXSampler__steps": 8}
SHOWN = "document.body.innerText"


BOXES = """app.graph.nodes.map((node) => {
  const shown = document.querySelector(`[data-node-id="${node.id}"]`);
  const { width, height } = shown?.getBoundingClientRect() ?? {};
  const [left, top] = [node.pos[0], node.pos[1] - 30];
  return shown
    ? [node.title, left, top, width / app.canvas.ds.scale, height / app.canvas.ds.scale]
    : [node.title, left, top, node.size[0], node.size[1] + 30];
})"""
"""Title, left, top, width and height of each node, with its title bar, which is 30 high."""
LINES = """for (const node of app.graph.nodes)
  if (node.type.startsWith('XDiT')) app.api.dispatchCustomEvent('progress_text', { nodeId: String(node.id), text: 'a line of text '.repeat(8) })
"""
"""Shows in each node of the pack what a run may say."""


@pytest.mark.parametrize("renderer", ["classic", "vue"])
def test_the_shipped_workflows_are_readable_when_they_are_dropped_and_with_lines(renderer, page):
    page.run(f"app.extensionManager.setting.set('Comfy.VueNodes.Enabled', {json.dumps(renderer == 'vue')})")
    try:
        for path in sorted((REPO / "workflows").glob("*.json")):
            load(page, path)
            count = len(json.loads(path.read_text())["nodes"])
            if renderer == "vue":
                page.wait(f"document.querySelectorAll('[data-node-id]').length >= {count}")
            assert page.run("app.graph.nodes.filter((node) => !LiteGraph.registered_node_types[node.type]).length") == 0, (
                path.name
            )
            page.run(LINES)
            page.run("app.canvas.draw(true, true)")
            page.run("new Promise((done) => setTimeout(done, 500))")  # the page lays the text out
            boxes = page.run(BOXES)
            assert len(boxes) == count
            for place, (title, left, top, width, height) in enumerate(boxes):
                for other, other_left, other_top, other_width, other_height in boxes[:place]:
                    apart = left >= other_left + other_width or other_left >= left + width
                    assert apart or top >= other_top + other_height or other_top >= top + height, (path.name, title, other)
    finally:
        page.run("app.extensionManager.setting.set('Comfy.VueNodes.Enabled', false)")


def test_a_fallback_is_in_the_node_after_success_and_after_a_reload(page, server, broken_python):
    broken_python[0].touch()
    listen(page)
    load(page, T2V, **TWO, XDiTBackend__plan="cfg2")
    run(page)
    assert page.run("ended") == "execution_success"
    page.wait(f"{SHOWN}.includes('no group: the group did not start')")
    page.wait(f"{SHOWN}.includes('sample: plan single')")
    page.run("window.isOld = true")
    page.open(server.url)
    page.wait(f"!window.isOld && {READY} && {SHOWN}.includes('no group: the group did not start')")


def test_the_panel_shows_the_group_fills_the_node_and_stops_the_group(page, broken_python):
    broken_python[0].unlink(missing_ok=True)
    before = len(workers())
    listen(page)
    load(page, T2V, **TWO, XDiTBackend__plan="ulysses2")  # not the plan whose failure is remembered
    page.run("[...document.querySelectorAll('button')].find((each) => each.innerText.trim() === 'GPUs').click()")
    page.wait("document.querySelector('.xdit-badge')")
    run(page)
    assert page.run("ended") == "execution_success"
    page.wait("document.querySelector('.xdit-badge').innerText === 'idle'")
    assert len(workers()) == before + 2
    cards = page.run("[...document.querySelectorAll('.xdit-card')].map((card) => card.innerText).join('|')")
    assert "rank 0 · cpu" in cards and "sequence 2/2" in cards
    page.wait(f"{SHOWN}.includes('2 ranks, warm, ulysses2')")

    page.run("document.querySelector('[data-action=plans]').click()")
    page.wait("document.querySelector('.xdit-plan')")
    page.run("[...document.querySelectorAll('.xdit-plan')].find((row) => row.innerText.includes('cfg2')).click()")
    backend = "app.graph.nodes.find((node) => node.type === 'XDiTBackend')"
    assert page.run(f"{backend}.widgets.slice(0, 2).map((widget) => widget.value)") == ["cpu:2", "cfg2"]

    page.run("document.querySelector('[data-action=stop]').click()")
    page.wait("document.querySelector('.xdit-badge').innerText === 'absent'")
    assert wait_until(lambda: len(workers()) == before)


def test_a_refused_input_and_a_failed_node_say_why_in_the_page(page):
    listen(page)
    load(page, T2V, XDiTBackend__devices="cpu:3", XDiTBackend__plan="cfg2")
    page.run("app.queuePrompt(0).then(() => true)")
    page.wait(f"{SHOWN}.includes(\"plan 'cfg2' needs 2 devices\")")
    load(page, T2V, XDiTEmptyCogVideoXLatent__length=10)
    run(page)
    assert page.run("ended") == "execution_error"
    page.wait(f"{SHOWN}.split('length is 10; it must be 4k+1').length > 2")  # in the node and in a toast
