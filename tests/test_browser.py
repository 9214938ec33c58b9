"""What a user sees: the pack in a real ComfyUI, in headless Chromium."""

import json
import os
import signal
import sys
import urllib.parse
import urllib.request
from contextlib import contextmanager

import pytest

from workflows.make import APPS, THUMBNAIL, app_path

from .conftest import REPO, wait_until, workers
from .support.browser import Page, find_chromium
from .support.comfyui_server import PACK_NAME, ComfyUIServer, find_comfyui
from .support.shipped import PATHS
from .test_locales import CHINESE, KEPT

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_comfyui() is None, reason="no ComfyUI here: set COMFYUI_PATH, or put it at ~/comfy/ComfyUI"),
    pytest.mark.skipif(find_chromium() is None, reason="no Chromium here: apt-get install chromium"),
]

READY = "window.app?.graph && app.extensionManager && app.extensionManager.workflow.activeWorkflow && app.graph.nodes.length"
"""The page has loaded its first workflow, which would replace another one."""


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
        for name, value in {"Comfy.TutorialCompleted": True, "Comfy.Window.UnloadConfirmation": False}.items():
            request = urllib.request.Request(f"{started.url}/settings/{name}", json.dumps(value).encode())
            urllib.request.urlopen(request)
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


@contextmanager
def renderer(page: Page, name: str):
    """Within, the page draws nodes with the renderer ``classic`` or ``vue``."""
    setting = "app.extensionManager.setting.set('Comfy.VueNodes.Enabled', {})"
    page.run(setting.format(json.dumps(name == "vue")))
    try:
        yield
    finally:
        page.run(setting.format("false"))


def check_lines(page: Page, *starts: str) -> None:
    """Waits until lines that start so are lines of their own in both renderers."""
    for rendered in ("classic", "vue"):
        with renderer(page, rendered):
            for start in starts:
                page.wait(f"{SHOWN}.split('\\n').some((line) => line.trim().startsWith('{start}'))")


def middle(element: str) -> str:
    """JavaScript for the middle of an element in the window."""
    return f"(({{ left, top, width, height }}) => [left + width / 2, top + height / 2])(({element}).getBoundingClientRect())"


def choose(page: Page, rendered: str, node: str, name: str, value: str) -> None:
    """Opens the list of a node's widget with the mouse, and clicks on a value."""
    widget = LIST_OF_CLASSIC.replace("NODE", node).replace("NAME", name)
    if rendered == "vue":
        widget = f"document.querySelector(`[data-node-id='${{({node}).id}}'] button[aria-label={name}]`)"
        page.wait(widget)
        widget = middle(widget)
    page.click(widget)
    entries = "[role=option]" if rendered == "vue" else ".litemenu-entry"
    entry = f"[...document.querySelectorAll('{entries}')].find((each) => each.innerText.trim() === '{value}')"
    page.wait(entry)
    page.click(middle(entry))


def show_plans(page: Page) -> None:
    """Opens the panel, and the table of plans for the workflow that is open."""
    if not page.run("!!document.querySelector('.xdit-panel')"):
        page.run("[...document.querySelectorAll('button')].find((each) => each.innerText.trim() === 'GPUs').click()")
    page.wait("document.querySelector('[data-action=plans]')")
    for _ in range(1 + page.run("!!document.querySelector('.xdit-plans')")):  # it may be open for another workflow
        page.run("document.querySelector('[data-action=plans]').click()")
    page.wait("document.querySelector('.xdit-plan')")


T2V, I2V = PATHS["t2v"], PATHS["i2v"]
TWO = {"XDiTBackend__devices": "cpu:2", "XDiTCogVideoXSampler__steps": 8}
SHOWN = "document.body.innerText"
TOASTS = "[...document.querySelectorAll('.p-toast-detail')].map((each) => each.innerText)"
NOTES_OF_PANEL = "[...document.querySelectorAll('.xdit-panel .xdit-note')].map((each) => each.innerText)"
BACKEND = "app.graph.nodes.find((node) => node.type === 'XDiTBackend')"
NODES = json.loads((REPO / "tests" / "frozen_nodes.json").read_text())
ONE_OF_EACH = """(() => {
  app.graph.clear();
  for (const [place, type] of TYPES.entries()) {
    const node = LiteGraph.createNode(type);
    node.pos = [400 * (place % 4), 500 * Math.floor(place / 4)];
    app.graph.add(node);
  }
})()"""
LABELS = """app.graph.nodes.map((node) => [
  node.title,
  ...node.widgets?.map((widget) => widget.label ?? widget.name) ?? [],
  ...[...node.inputs, ...node.outputs].map((slot) => slot.label ?? slot.localized_name ?? slot.name),
])"""
"""What each node shows: its title, and the names of its widgets, inputs and outputs."""
LIST_OF_CLASSIC = """(({ canvas, ds }, node) => {
  const { left, top } = canvas.getBoundingClientRect();
  const y = node.widgets.find((widget) => widget.name === 'NAME').y + 10;
  const [x, down] = ds.convertOffsetToCanvas([node.pos[0] + node.size[0] / 2, node.pos[1] + y]);
  return [left + x, top + down];
})(app.canvas, NODE)"""
SUBGRAPH = f"""(() => {{
  const {{ node, subgraph }} = app.graph.convertToSubgraph(new Set([{BACKEND}]));
  const [inner] = subgraph.nodes;
  for (const name of ['plan', 'devices']) subgraph.addInput(name, 'STRING').connect(inner.inputs.find((slot) => slot.name === name), inner);
  app.canvas.centerOnNode(node);
  app.extensionManager.workflow.activeWorkflow.changeTracker.captureCanvasState();
}})()"""
"""Puts xDiT Backend into a subgraph that shows plan and devices as its own."""
HOST = "app.graph.nodes.find((node) => node.subgraph)"
NESTED = f"""(() => {{
  const inner = {HOST};
  const {{ node, subgraph }} = app.graph.convertToSubgraph(new Set([inner]));
  const [host] = subgraph.nodes;
  for (const name of ['plan', 'devices']) subgraph.addInput(name, 'STRING').connect(host.inputs.find((slot) => slot.name === name), host);
  app.canvas.centerOnNode(node);
  app.extensionManager.workflow.activeWorkflow.changeTracker.captureCanvasState();
}})()"""
"""Puts that subgraph into another one, which shows them as its own."""


BOXES = """app.graph.nodes.map((node) => {
  const shown = document.querySelector(`[data-node-id="${node.id}"]`);
  const { width, height } = shown?.getBoundingClientRect() ?? {};
  const [left, top] = [node.pos[0], node.pos[1] - 30];
  return shown
    ? [node.title, left, top, width / app.canvas.ds.scale, height / app.canvas.ds.scale]
    : [node.title, left, top, node.size[0], node.size[1] + 30];
})"""
"""Title, left, top, width and height of each node, with its title bar, which is 30 high."""
NOTE_FITS = """[...document.querySelectorAll('.tiptap, .comfy-markdown-content')].slice(0, 1).every(
  (note) => note.scrollHeight <= note.clientHeight + 1)"""
"""The note is the first node of each workflow."""
LINES = """for (const node of app.graph.nodes)
  if (node.type.startsWith('XDiT')) app.api.dispatchCustomEvent('progress_text', { nodeId: String(node.id), text: 'a line of text '.repeat(8) })
"""
"""Shows in each node of the pack what a run may say."""


@pytest.mark.parametrize("rendered", ["classic", "vue"])
def test_the_shipped_workflows_are_readable_when_they_are_dropped_and_with_lines(rendered, page):
    with renderer(page, rendered):
        for path in PATHS.values():
            load(page, path)
            count = len(json.loads(path.read_text())["nodes"])
            if rendered == "vue":
                page.wait(f"document.querySelectorAll('[data-node-id]').length >= {count}")
            assert page.run("app.graph.nodes.filter((node) => !LiteGraph.registered_node_types[node.type]).length") == 0, (
                path.name
            )
            page.run(LINES)
            page.run("app.canvas.draw(true, true)")
            page.run("new Promise((done) => setTimeout(done, 500))")  # the page lays the text out
            assert page.run(NOTE_FITS), path.name
            boxes = page.run(BOXES)
            assert len(boxes) == count
            for place, (title, left, top, width, height) in enumerate(boxes):
                for other, other_left, other_top, other_width, other_height in boxes[:place]:
                    apart = left >= other_left + other_width or other_left >= left + width
                    assert apart or top >= other_top + other_height or other_top >= top + height, (path.name, title, other)


@pytest.mark.parametrize("rendered", ["classic", "vue"])
def test_devices_and_plan_are_chosen_from_lists_or_typed_and_kept_as_they_are(rendered, page):
    values = f"{BACKEND}.widgets.slice(0, 2).map((widget) => widget.value).join(' ')"
    with renderer(page, rendered):
        load(page, T2V)
        page.run(f"app.canvas.centerOnNode({BACKEND})")
        page.run("new Promise((done) => setTimeout(done, 500))")  # the page moves the canvas
        choose(page, rendered, BACKEND, "devices", "cpu:2")
        page.wait(f"{BACKEND}.widgets[1].options.values.includes('ring2')")  # it fits two devices
        choose(page, rendered, BACKEND, "plan", "ring2")
        page.wait(f"{values} === 'cpu:2 ring2'")
        choose(page, rendered, BACKEND, "plan", "other…")
        page.wait("document.activeElement.value === 'ring2'")  # in the dialog
        page.type("cfg2-fsdp2")
        page.wait(f"{values} === 'cpu:2 cfg2-fsdp2'")
        page.run("app.loadGraphData(app.graph.serialize()).then(() => true)")
        assert page.run(values) == "cpu:2 cfg2-fsdp2"
        sent = page.run(f"app.graphToPrompt().then(({{ output }}) => output[{BACKEND}.id].inputs)")
        assert (sent["devices"], sent["plan"]) == ("cpu:2", "cfg2-fsdp2")


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("rendered", ["classic", "vue"])
def test_a_subgraph_that_shows_the_plan_has_the_list_and_takes_other_text_too(rendered, depth, page):
    with renderer(page, rendered):
        load(page, T2V, XDiTBackend__devices="cpu:2")
        page.run(SUBGRAPH)
        if depth > 1:
            page.run(NESTED)
        page.wait(f"{HOST}.widgets[0].options.values.includes('ring2')")
        page.run("new Promise((done) => setTimeout(done, 500))")  # the page moves the canvas
        choose(page, rendered, HOST, "plan", "other…")
        page.wait("document.activeElement.value === 'auto'")  # in the dialog
        page.type("warp9")
        page.wait(f"{HOST}.widgets[0].value === 'warp9'")
        choose(page, rendered, HOST, "plan", "ring2")
        sent = page.run("app.graphToPrompt().then(({ output }) => Object.values(output))")
        assert [each["inputs"]["plan"] for each in sent if each["class_type"] == "XDiTBackend"] == ["ring2"]
        page.run(f"{HOST}.widgets[1].value = 'cpu:2'; {HOST}.subgraph.nodes[0].widgets[1].value = 'cpu'")
        show_plans(page)
        page.run("[...document.querySelectorAll('.xdit-plan')].find((row) => row.innerText.includes('cfg2')).click()")
        assert page.run(f"{HOST}.widgets.map((widget) => widget.value)") == ["cfg2", "cpu:2"]


def test_sockets_have_colours_in_both_renderers_and_keep_them_with_another_palette(page):
    both = """[
      app.canvas.default_connection_color_byType.COGVIDEOX_XDIT_MODEL,
      getComputedStyle(document.documentElement).getPropertyValue('--color-datatype-COGVIDEOX_XDIT_MODEL').trim(),
    ].every((colour) => colour === '#B39DDB')"""
    load(page, T2V)
    page.wait(both)
    for palette in ("light", "dark"):
        page.run(f"app.extensionManager.setting.set('Comfy.ColorPalette', '{palette}').then(() => true)")
        page.wait(both)


def test_a_fallback_is_in_the_node_after_success_and_after_a_reload(page, server, broken_python):
    broken_python[0].touch()
    listen(page)
    load(page, T2V, **TWO, XDiTBackend__plan="cfg2")
    run(page)
    assert page.run("ended") == "execution_success"
    page.wait(f"{SHOWN}.includes('no group: the group did not start')")
    check_lines(page, "no group: the group did not start", "sample: plan single")
    assert any("no group: the group did not start" in text for text in page.run(TOASTS))
    page.run("window.isOld = true")
    page.open(server.url)
    page.wait(f"!window.isOld && {READY} && {SHOWN}.includes('no group: the group did not start')")
    check_lines(page, "no group: the group did not start", "sample: plan single")


MARKUP = ["<lora:a_b_:1>", "[a:b]", "embedding:_*x*_~~y~~&lt;`z`"]
QUOTING = f"""[...document.querySelectorAll('.comfy-markdown-content, .dom-widget span')].some(
  ({{ innerText }}) => {json.dumps(MARKUP)}.every((words) => innerText.includes(words)))"""
"""A node's lines have the words; the prompt itself is in a text area."""


def test_words_of_a_prompt_are_not_taken_for_markup_in_lines_also_after_a_reload(page, server):
    listen(page)
    load(page, T2V, CLIPTextEncode__text=" ".join(MARKUP), XDiTBackend__devices="cpu", XDiTCogVideoXSampler__steps=2)
    run(page)
    for _ in range(2):
        for rendered in ("classic", "vue"):
            with renderer(page, rendered):
                page.wait(QUOTING)
        page.run("window.isOld = true")
        page.open(server.url)
        page.wait(f"!window.isOld && {READY}")


def test_the_panel_shows_the_group_fills_the_node_and_stops_the_group(page, broken_python):
    broken_python[0].unlink(missing_ok=True)
    before = len(workers())
    listen(page)
    asked = {"XDiTLoadCogVideoX__guidance_cache": 2}
    load(page, T2V, **TWO | asked, XDiTBackend__plan="ulysses2")  # not the plan whose failure is remembered
    if not page.run("!!document.querySelector('.xdit-panel')"):
        page.run("[...document.querySelectorAll('button')].find((each) => each.innerText.trim() === 'GPUs').click()")
    page.wait("document.querySelector('.xdit-badge')")
    run(page)
    assert page.run("ended") == "execution_success"
    page.wait("document.querySelector('.xdit-badge').innerText === 'idle'")
    assert len(workers()) == before + 2
    page.wait(f"{SHOWN}.includes('guidance cache 2: ')")
    page.run("new Promise((done) => setTimeout(done, 500))")  # a toast may come late
    assert not [text for text in page.run(TOASTS) if "guidance cache" in text] and not page.run(NOTES_OF_PANEL)
    cards = page.run("[...document.querySelectorAll('.xdit-card')].map((card) => card.innerText).join('|')")
    assert "rank 0 · cpu" in cards and "sequence 2/2" in cards
    page.wait(f"{SHOWN}.includes('2 ranks, warm, ulysses2')")

    show_plans(page)
    page.run("[...document.querySelectorAll('.xdit-plan')].find((row) => row.innerText.includes('cfg2')).click()")
    assert page.run(f"{BACKEND}.widgets.slice(0, 2).map((widget) => widget.value)") == ["cpu:2", "cfg2"]

    page.run("document.querySelector('[data-action=stop]').click()")
    page.wait("document.querySelector('.xdit-badge').innerText === 'absent'")
    assert wait_until(lambda: len(workers()) == before)


def test_the_panel_says_so_where_comfyui_does_not_answer(page):
    load(page, T2V)
    show_plans(page)
    page.run("(window.fetchApi = app.api.fetchApi, app.api.fetchApi = () => Promise.reject(new TypeError('gone')), true)")
    try:
        page.run("document.querySelector('[data-action=free]').click()")
        page.wait("document.querySelector('.xdit-said').innerText.startsWith('ComfyUI does not answer')")
        for _ in range(2):  # closes the table, and opens it again
            page.run("document.querySelector('[data-action=plans]').click()")
        page.wait("document.querySelector('.xdit-panel .xdit-note')?.innerText.startsWith('ComfyUI does not answer')")
        page.run("document.querySelector('[data-action=plans]').click()")  # closed, as the next test expects it
    finally:
        page.run("(app.api.fetchApi = window.fetchApi, true)")


def test_the_planner_is_asked_for_a_tile_where_a_workflow_only_upscales(page, server):
    load(
        page,
        PATHS["upscale"],
        XDiTCogVideoXUpscale__tile_size=96,
        XDiTLoadCogVideoX__model_name="demo",
        XDiTBackend__devices="cpu:2",
    )
    asked = page.run("import('/extensions/ComfyUI-CogVideoX-xDiT/js/graph.js').then(({ question }) => question())")
    tile = {"width": 96, "height": 96, "length": 33, "cfg": 1, "kind": "upscale"}
    assert asked == {"model": "demo", "quantize": "off", "fp8": "off", "attention": "auto", "devices": "cpu:2", **tile}
    found = server.request(f"/cogvideox-xdit/plans?{urllib.parse.urlencode(asked)}")
    assert found["size"] == [96, 96, 33]
    assert [row["plan"] for row in found["rows"] if row["chosen"]] == ["replicas2"]
    show_plans(page)
    assert "tiles of 96×96, 33 frames" in page.run("document.querySelector('.xdit-plans').innerText")
    listed = page.run("[...document.querySelectorAll('.xdit-plan b')].map((each) => each.innerText)")
    assert sorted(listed) == ["replicas2", "ring2", "ulysses2"]


def test_below_the_table_of_plans_stands_what_it_is_predicted_from(page):
    """Of a CPU nothing is known, so the server's answer is given what it has for GPUs."""
    load(page, PATHS["t2v"], XDiTBackend__devices="cpu:2")
    show_plans(page)
    assert "rates of" not in page.run("document.querySelector('.xdit-plans').innerText")
    page.run("""window.fetched = app.api.fetchApi;
        app.api.fetchApi = async (route, ...rest) => {
            const answer = await fetched.call(app.api, route, ...rest);
            if (!route.includes("/plans")) return answer;
            return Response.json({ ...(await answer.json()), rates: "rates of a GPU" });
        };
        true""")
    try:
        show_plans(page)
        page.wait("document.querySelector('.xdit-plans')?.lastElementChild.innerText === 'rates of a GPU'")
    finally:
        page.run("app.api.fetchApi = fetched; true")


def test_the_planner_is_asked_for_the_windows_of_a_long_video(page):
    load(page, PATHS["long-video"], XDiTBackend__devices="cpu:2")
    show_plans(page)
    listed = "[...document.querySelectorAll('.xdit-plan b')].map((each) => each.innerText)"
    assert "replicas2" in page.run(listed)
    page.run("app.graph.nodes.find((node) => node.type === 'XDiTCogVideoXContextWindows').mode = 4")  # bypassed
    show_plans(page)
    assert "replicas2" not in page.run(listed)


def test_an_image_to_video_that_loses_a_rank_succeeds_and_says_so(page, server):
    before = set(workers())
    listen(page)
    slow = {"XDiTCogVideoXImageToVideo__width": 160, "XDiTCogVideoXSampler__steps": 100}
    load(page, I2V, **TWO | slow, XDiTBackend__plan="ulysses2")
    page.run("window.ended = undefined; app.queuePrompt(0).then(() => true)")
    # The server is asked: on a loaded machine the page hears of a step when the job has almost ended.
    assert wait_until(lambda: (server.request("/cogvideox-xdit/status").get("job") or {}).get("step"))
    os.kill(max(set(workers()) - before), signal.SIGKILL)
    page.wait("window.ended")
    assert page.run("ended") == "execution_success"
    page.wait(f"/rank . was killed.*the group was started again and (went on after step|the job began again)/.test({SHOWN})")


def test_a_refused_input_and_a_failed_node_say_why_in_the_page(page):
    listen(page)
    load(page, T2V, XDiTBackend__devices="cpu:3", XDiTBackend__plan="cfg2")
    page.run("app.queuePrompt(0).then(() => true)")
    page.wait(f"{SHOWN}.includes(\"plan 'cfg2' needs 2 devices\")")
    load(page, T2V, XDiTEmptyCogVideoXLatent__length=10)
    run(page)
    assert page.run("ended") == "execution_error"
    page.wait(f"{SHOWN}.split('length is 10; it must be 4k+1').length > 2")  # in the node and in a toast


LISTED = "(app.extensionManager.workflow.activeWorkflow.pendingWarnings?.missingModelCandidates ?? [])"
"""ComfyUI's own list of missing models."""
SAID = "[...document.querySelectorAll('.p-toast-detail')].map(({ innerText }) => innerText.split(' is missing (')).filter((one) => one[1])"
FUN = "CogVideo/CogVideoX-Fun-V1.1-5b"
T5, VAE = ["text_encoders", True], ["vae", True]


@pytest.mark.parametrize(
    "name, folder, files",
    [
        *((name, "", []) for name in ("t2v", "i2v", "v2v", "long-video")),
        ("lora", f"{FUN}-InP", [["loras", True]]),
        ("four-steps", "CogVideo/CogVideoX-2b", [["", False]]),
        ("first-last-frame", f"{FUN}-InP", []),
        ("inpaint", f"{FUN}-InP", []),
        ("control", f"{FUN}-Control", []),
        ("controlnet", "CogVideo/CogVideoX-5b", []),
        ("remove-object", "", [["diffusion_models", True], T5, VAE]),
        ("remove-object-twice", "", [["diffusion_models", True], T5, VAE, ["diffusion_models", True], ["optical_flow", True]]),
        ("upscale", "CogVideo/SparkVSR", []),
        ("core-nodes", "", [["diffusion_models", True], T5, VAE]),
    ],
)
def test_missing_models_are_named_before_run_and_the_demo_misses_none(name, folder, files, page):
    load(page, PATHS[name])
    page.run("new Promise((done) => setTimeout(done, 500))")  # a false alarm may come late
    page.wait(f"{SAID}.map((one) => one[0]).join() === '{folder}'")
    page.wait(f"{LISTED}.length === {len(files)}")
    assert sorted(page.run(f"{LISTED}.map((one) => [one.directory ?? '', !!one.url])")) == sorted(files)


def test_the_template_browser_shows_every_workflow_with_its_picture(page):
    page.run("app.extensionManager.command.execute('Comfy.BrowseTemplates').then(() => true)")
    pack = f"[...document.querySelectorAll('[role=dialog] *')].find((each) => !each.children.length && each.innerText === '{PACK_NAME}')"
    page.wait(pack)
    page.run(f"{pack}.click()")
    for path in (*PATHS.values(), *map(app_path, APPS)):
        card = f"document.querySelector('[data-testid=\"template-workflow-{path.stem}\"]')"
        page.wait(f"{card}.scrollIntoView() ?? {card}.querySelector('img').naturalWidth === {THUMBNAIL}")
        assert ("App" in page.run(f"{card}.innerText").split()) == path.stem.endswith(".app")
    page.run(f"document.querySelector('[data-testid=\"template-workflow-{T2V.stem}\"]').click()")
    page.wait(f"!document.querySelector('[role=dialog]') && document.title.includes('{T2V.stem}')")


SIZE = ["width", "height", "length", "seed"]


@pytest.mark.parametrize("name, shown", [("t2v", ["prompt", *SIZE]), ("i2v", ["image", "prompt", *SIZE])])
def test_an_app_shows_its_inputs_and_the_video(name, shown, page):
    load(page, app_path(name), XDiTCogVideoXSampler__steps=4)
    page.wait("document.querySelector('[data-testid=linear-run-button]')")
    labels = page.run("[...document.querySelectorAll('[data-testid=builder-widget-label]')].map((label) => label.innerText)")
    assert labels == shown
    button = (
        "[...document.querySelectorAll('[data-testid=linear-run-button] button')].find((one) => one.innerText.trim() === 'Run')"
    )
    page.run(f"{button}.click()")
    page.wait("document.querySelector('video')?.videoWidth === 96")
    load(page, T2V)  # leaves App mode


def test_a_chinese_user_finds_no_english_label_on_a_node_and_a_chinese_panel(page, server):
    settings = "app.extensionManager.setting"
    page.run(f"{settings}.set('Comfy.Node.AlwaysShowAdvancedWidgets', true)")
    page.run(f"{settings}.set('Comfy.Locale', 'zh').then(() => {{ window.isOld = true; }})")
    page.open(server.url)
    page.wait(f"!window.isOld && {READY} && app.graph.nodes.length")  # the page has loaded the last workflow again
    page.run(ONE_OF_EACH.replace("TYPES", json.dumps(list(NODES))))
    labels = page.run(LABELS)
    assert len(labels) == len(NODES) and sum(map(len, labels)) > 100
    assert [label for label in sum(labels, []) if not is_chinese(label)] == []
    with renderer(page, "vue"):
        page.wait(
            f"document.querySelectorAll('[data-node-id]').length === {len(NODES)} && {SHOWN}.includes('pipefusion 预热步数')"
        )
        shown = page.run("[...document.querySelectorAll('[data-node-id]')].map((node) => node.innerText).join('\\n')")
    assert not set(shown.splitlines()) & {name for node in NODES.values() for name, *_ in node["inputs"]}
    page.run("document.querySelector('.pi-server').closest('button').click()")
    page.wait("document.querySelector('.xdit-panel .xdit-badge')")
    texts = page.run("[...document.querySelectorAll('.xdit-panel :is(h3, .xdit-badge, button)')].map((each) => each.innerText)")
    assert len(texts) >= 6 and all(map(is_chinese, texts))


def is_chinese(label: str) -> bool:
    return label in KEPT | {"CLIP"} or CHINESE.search(label) is not None
