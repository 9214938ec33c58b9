"""The names that saved workflows depend on, and the workflows that are shipped."""

import ast
import json
import re
from pathlib import Path

import imageio.v3 as iio
import pytest

from parallel_backend.cogvideox.checkpoint.bundled import DEMO, DEMO_I2V
from parallel_backend.cogvideox.checkpoint.catalogue import MODELS
from workflows import headless, make
from workflows.headless import to_api

from .conftest import REPO
from .support.comfy_runtime import declared_nodes
from .support.shipped import NAMES, PATHS, shipped


@pytest.fixture(scope="module")
def listing(tmp_path_factory) -> dict:
    return declared_nodes(tmp_path_factory.mktemp("runtime"))


@pytest.fixture(scope="module")
def nodes(listing) -> dict:
    return listing["nodes"]


def inputs_of(info: dict) -> list[list]:
    """Name, type and default of each input, in the order that saved workflows store their values in."""
    found = []
    for group in ("required", "optional"):
        for name, spec in (info["input"].get(group) or {}).items():
            options = spec[1] if len(spec) > 1 else {}
            found.append([name, spec[0], group, options.get("default")])
    return found


EVERY_INPUT = {"id", "display_name", "optional", "tooltip", "lazy"}
WIDGET = EVERY_INPUT | {"default", "socketless", "force_input"}
NUMBER = WIDGET | {"min", "max", "step", "display_mode"}
OLDEST = {
    "Int.Input": NUMBER | {"control_after_generate"},
    "Float.Input": NUMBER | {"round"},
    "String.Input": WIDGET | {"multiline", "placeholder", "dynamic_prompts"},
    "Boolean.Input": WIDGET | {"label_on", "label_off"},
    "Combo.Input": EVERY_INPUT
    | {"default", "socketless", "options", "control_after_generate", "upload", "image_folder", "remote"},
    "Input": EVERY_INPUT | {"extra_dict"},
    "Output": {"id", "display_name", "tooltip", "is_output_list"},
    "Schema": {"node_id", "display_name", "category", "inputs", "outputs", "hidden", "description", "is_output_node"},
}
"""Arguments that ComfyUI 0.3.64 takes, with which one of a later version would keep the whole pack from loading."""


def test_nodes_are_declared_in_words_that_the_oldest_comfyui_knows():
    declared = 0
    for path in (REPO / "nodes").glob("*.py"):
        for call in ast.walk(ast.parse(path.read_text())):
            if (
                isinstance(call, ast.Call)
                and isinstance(call.func, ast.Attribute)
                and call.func.attr in ("Input", "Output", "Schema")
            ):
                own = ast.unparse(call.func).removeprefix("io.")
                known = OLDEST.get(own) or OLDEST[call.func.attr]
                used = {argument.arg for argument in call.keywords if argument.arg}
                assert used <= known, f"{path.name}:{call.lineno}: {used - known}"
                declared += 1
    assert declared > 60


def test_ids_inputs_outputs_and_their_order_are_frozen(nodes):
    """Inputs are only ever added, at the end, with defaults. A change of this file breaks somebody's workflow."""
    frozen = json.loads((REPO / "tests" / "frozen_nodes.json").read_text())
    for name, expected in frozen.items():
        assert name in nodes, f"{name} is gone"
        assert nodes[name]["output"] == expected["output"]
        found = inputs_of(nodes[name])
        for group in ("required", "optional"):
            before = [item for item in expected["inputs"] if item[2] == group]
            now = [item for item in found if item[2] == group]
            assert now[: len(before)] == before
            assert group == "optional" or len(now) == len(before), "a new input must be optional"
    ours = {name for name in nodes if name.startswith("XDiT")}
    assert ours == set(frozen), "a new node belongs into tests/frozen_nodes.json"


def test_every_node_and_input_explains_itself(nodes):
    for name in nodes:
        if name.startswith("XDiT"):
            assert nodes[name]["description"], name
            assert (REPO / "web" / "docs" / f"{name}.md").read_text().startswith("# "), name


def test_comfyui_starts_without_anything_slow(listing):
    assert listing["slow"] == []


@pytest.mark.parametrize("name", NAMES)
def test_a_shipped_workflow_has_all_its_widgets_and_explains_itself(name, nodes):
    workflow = shipped(name)
    if missing := {node["type"] for node in workflow["nodes"]} - {*nodes, "MarkdownNote"}:
        pytest.skip(f"{name} needs {', '.join(sorted(missing))} of a real ComfyUI; tests/test_comfyui.py runs it there")
    prompt = to_api(workflow, nodes)
    for name, node in prompt.items():
        for field, _, group, _ in inputs_of(nodes[node["class_type"]]):
            assert field in node["inputs"] or group == "optional", f"node {name} lacks {field}"
    notes = [node for node in workflow["nodes"] if node["type"] == "MarkdownNote"]
    assert notes and "Run" in notes[0]["widgets_values"][0]
    widgets = {"seed": 1}  # the front end keeps a value of its own behind a seed
    for node in workflow["nodes"]:
        if node["type"] in prompt_types(prompt):
            shown = [item["name"] for item in node["inputs"] if "widget" in item]
            expected = len(shown) + sum(widgets.get(name, 0) for name in shown)
            assert len(node["widgets_values"]) == expected, node["type"]


def prompt_types(prompt: dict) -> set[str]:
    return {node["class_type"] for node in prompt.values()}


@pytest.mark.parametrize("name", NAMES)
def test_the_nodes_of_a_shipped_workflow_do_not_overlap(name):
    boxes = [(*node["pos"], *node["size"]) for node in shipped(name)["nodes"]]
    for index, (left, top, width, height) in enumerate(boxes):
        for other_left, other_top, other_width, other_height in boxes[:index]:
            apart = left >= other_left + other_width or other_left >= left + width
            title = 30  # a node's title stands above its position
            assert apart or top - title >= other_top + other_height or other_top - title >= top + height


@pytest.mark.parametrize("name", NAMES)
def test_a_comfyui_without_the_pack_can_name_it(name):
    """The front end and the manager read these properties of a node that is missing."""
    version = re.search(r'^version = "(.+)"', (REPO / "pyproject.toml").read_text(), re.MULTILINE)[1]
    for node in shipped(name)["nodes"]:
        pack, release = node["properties"]["cnr_id"], node["properties"]["ver"]
        if node["type"].startswith("XDiT"):
            assert (pack, release) == ("comfyui-cogvideox-xdit", version), node["type"]
        else:
            assert pack == "comfy-core" and release, node["type"]


@pytest.mark.parametrize("name", NAMES)
def test_a_shipped_workflow_says_which_models_it_needs_and_where_they_belong(name):
    """The front end reads ``properties.models``: its list of missing models has the files, and web/js/models.js says the folders."""
    workflow = shipped(name)
    published = {model.repository for model in MODELS.values()}
    listed = {}
    for node in workflow["nodes"]:
        for model in node["properties"].get("models", ()):
            assert model["url"].startswith("https://huggingface.co/") and not set(model) - {"name", "url", "directory"}
            folder, last = model["url"].removeprefix("https://huggingface.co/"), Path(model["name"]).name
            if last.endswith(".safetensors"):
                assert folder.endswith(f"/resolve/main/{last}") or folder.endswith(f"/{model['directory']}/{last}")
                assert model["name"] in node["widgets_values"], "the front end compares it with the widget"
            else:
                assert folder.partition("/")[2] == last
                assert model["directory"] == "controlnet" or model["name"] == f"CogVideo/{last}" and folder in published
            listed[model["name"]] = model["url"]
    loaders = [node for node in workflow["nodes"] if node["type"] == "XDiTLoadCogVideoX"]
    assert all(node["widgets_values"][0] in (DEMO, DEMO_I2V, *listed) for node in loaders)
    note = workflow["nodes"][0]["widgets_values"][0]
    assert all(url in note for url in listed.values()), "the note links to what the workflow needs"
    assert "`" not in note, "some themes show code in colours that cannot be read"


def test_the_files_beside_the_workflows_are_those_that_the_command_makes():
    """``python workflows/make.py`` makes the app versions, and a thumbnail for each file of the template browser."""
    for name in make.APPS:
        workflow = shipped(name)
        assert json.loads(make.app_path(name).read_text(encoding="utf-8")) == make.app_of(workflow)
        ids = {str(node["id"]): node for node in workflow["nodes"]}
        data = workflow["extra"]["linearData"]
        for node, widget, *_ in data["inputs"]:
            assert widget in [item["name"] for item in ids[node]["inputs"] if "widget" in item]
        assert [ids[node]["type"] for node in data["outputs"]] == ["XDiTSaveVideo"]
    files = sorted((REPO / "workflows").glob("*.json"))
    assert files == sorted([*PATHS.values(), *map(make.app_path, make.APPS)])
    for path in files:
        picture = path.with_suffix(".jpg")  # the name and kind that the template browser asks for
        assert iio.imread(picture).shape == (make.THUMBNAIL, make.THUMBNAIL, 3) and picture.stat().st_size < 20_000
    for readme in ("README.md", "README.zh-CN.md"):
        rows = re.findall(r"^\| (.+?) \| `(.+?)` \| .+ \| .+ \|$", (REPO / readme).read_text(encoding="utf-8"), re.MULTILINE)
        assert {short: title for title, short in rows} == headless.FILES


def test_the_server_and_the_page_write_the_lines_of_a_node_in_the_same_way():
    """The page shows lines of its own too, so it cannot ask the server."""
    server, page = (REPO / "nodes" / "comfy" / "events.py").read_text(), (REPO / "web" / "js" / "lines.js").read_text()
    markup = re.search(r'^MARKUP = re\.compile\(r"(.+)", re\.MULTILINE \| re\.ASCII\)$', server, re.MULTILINE)[1]
    assert re.search(r"^const MARKUP = /(.+)/gm;", page, re.MULTILINE)[1] == markup
    line_break = re.search(r"^LINE_BREAK = (.+)$", server, re.MULTILINE)[1]
    assert re.search(r"^const LINE_BREAK = (.+?);", page, re.MULTILINE)[1] == line_break
    assert '"&#{ord(found[0])};"' in server and "`&#${found.charCodeAt()};`" in page
