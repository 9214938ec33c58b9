"""The names that saved workflows depend on, and the workflows that are shipped."""

import ast
import json

import pytest

from workflows.headless import to_api

from .conftest import REPO
from .support.comfy_runtime import declared_nodes

WORKFLOWS = sorted((REPO / "workflows").glob("*.json"))


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


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_shipped_workflow_has_all_its_widgets_and_explains_itself(path, nodes):
    workflow = json.loads(path.read_text())
    if missing := {node["type"] for node in workflow["nodes"]} - {*nodes, "MarkdownNote"}:
        pytest.skip(f"{path.name} needs {', '.join(sorted(missing))} of a real ComfyUI; tests/test_comfyui.py runs it there")
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


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_the_nodes_of_a_shipped_workflow_do_not_overlap(path):
    boxes = [(*node["pos"], *node["size"]) for node in json.loads(path.read_text())["nodes"]]
    for index, (left, top, width, height) in enumerate(boxes):
        for other_left, other_top, other_width, other_height in boxes[:index]:
            apart = left >= other_left + other_width or other_left >= left + width
            title = 30  # a node's title stands above its position
            assert apart or top - title >= other_top + other_height or other_top - title >= top + height


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_comfyui_without_the_pack_can_name_it(path):
    """The front end and the manager read these properties of a node that is missing."""
    for node in json.loads(path.read_text())["nodes"]:
        expected = "comfyui-cogvideox-xdit" if node["type"].startswith("XDiT") else "comfy-core"
        assert node["properties"]["cnr_id"] == expected and node["properties"]["ver"], node["type"]
