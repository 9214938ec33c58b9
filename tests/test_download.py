"""Downloads from a server that speaks the hubs' routes: what is asked for, resumed, checked and said."""

import resource
import shutil
import signal
from pathlib import Path

import pytest

from parallel_backend.cogvideox.checkpoint import bundled, catalogue, download, hubs, published
from parallel_backend.cogvideox.checkpoint.checkpoint import Checkpoint
from parallel_backend.errors import Cancelled

from .support.hub_server import COMMIT, DECOYS, NAME, WEIGHTS, serving


@pytest.fixture
def hub(checkpoints, monkeypatch, tmp_path):
    """The server, with a small model under the name of the 5b and with files that nobody needs."""
    with serving(checkpoints["5b"]) as (server, address):
        monkeypatch.setenv("HF_ENDPOINT", address)
        monkeypatch.setenv("MODELSCOPE_ENDPOINT", address)
        monkeypatch.setattr(bundled.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        (tmp_path / "ComfyUI" / "models").mkdir(parents=True)
        yield server


def content(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("source", ["huggingface", "modelscope"])
def test_only_what_is_needed_is_downloaded_into_comfyui_and_can_be_opened(source, hub, run, tmp_path):
    done = run("download", "5b", "--comfyui", tmp_path / "ComfyUI", "--source", source)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "ComfyUI" / "models" / "CogVideo" / "CogVideoX-5b"
    assert content(folder) == {name: text for name, text in hub.files.items() if name not in DECOYS}
    assert sorted(hub.asked) == sorted((name, 0) for name in content(folder))
    assert hub.asked[-1][0] == "transformer/config.json"  # until then no list of models shows the folder
    Checkpoint.open(folder).check_whole()
    first, second, *_, last = done.stdout.splitlines()
    assert f"in {len(hub.asked)} files; licence: " in first and first.endswith(
        {"huggingface": "licence: cogvideox LICENSE", "modelscope": "licence: Apache License 2.0"}[source]
    )
    assert second == f"into {folder}" and f"choose CogVideo/CogVideoX-5b in Load CogVideoX, or give --model {folder}" in last
    hub.asked.clear()
    assert run("download", "5b", "--comfyui", tmp_path / "ComfyUI", "--source", source).returncode == 0
    assert not hub.asked


def test_without_a_folder_the_hugging_face_cache_has_it_and_commands_find_it_by_its_short_name(hub, run, tmp_path):
    asked = ("generate", "--model", "5b", "--prompt", "x", "--output", tmp_path / "x.mp4", "--steps", 0)
    assert "the model 5b is not downloaded: run python -m parallel_backend download 5b" in run(*asked).stderr
    assert run("download", "5b").returncode == 0
    found = bundled.find("5b")
    assert found == bundled.find("ZAI-org/cogvideox-5B") == bundled.find(NAME)
    assert found == tmp_path / "cache" / "models--zai-org--CogVideoX-5b" / "snapshots" / COMMIT
    from huggingface_hub import snapshot_download

    assert Path(snapshot_download(NAME, cache_dir=tmp_path / "cache", local_files_only=True)) == found
    assert "steps is 0" in run(*asked).stderr
    other = run("generate", "--model", "some-org/Other", "--prompt", "x", "--output", tmp_path / "x.mp4")
    assert other.returncode == 2 and "run python -m parallel_backend download some-org/Other" in other.stderr


def test_the_comfyui_that_the_pack_is_in_gets_the_model(hub, run, tmp_path, monkeypatch):
    monkeypatch.setattr(bundled, "PACK", tmp_path / "ComfyUI" / "custom_nodes" / "pack")
    done = run("download", "5b")
    assert done.returncode == 0, done.stderr
    assert bundled.find("5b") == tmp_path / "ComfyUI" / "models" / "CogVideo" / "CogVideoX-5b"
    assert done.stdout.splitlines()[-1].endswith("choose CogVideo/CogVideoX-5b in Load CogVideoX, or give --model 5b")


def test_a_cut_connection_is_resumed_in_the_same_run_or_in_the_next(hub, run, tmp_path, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # between the library's attempts
    monkeypatch.setattr(bundled.constants, "DOWNLOAD_CHUNK_SIZE", 100)  # of a chunk that is cut off, nothing is kept
    hub.cuts[WEIGHTS] = [1000, 0, 500, *[0] * 20]
    ask = ("download", "5b", "--output", tmp_path / "model")
    cut = run(*ask)
    assert cut.returncode == 1 and "try again: it goes on where it stopped" in cut.stderr and "Traceback" not in cut.stderr
    done = tmp_path / "model" / f"{WEIGHTS}.partial"
    there = done.stat().st_size
    assert there == 1500 and {(WEIGHTS, 1000), (WEIGHTS, 1500)} < set(hub.asked)
    assert not (tmp_path / "model" / "transformer" / "config.json").exists()
    hub.cuts.clear()
    hub.asked.clear()
    assert run(*ask).returncode == 0
    assert (WEIGHTS, there) in hub.asked and (WEIGHTS, 0) not in hub.asked
    assert content(tmp_path / "model")[WEIGHTS] == hub.files[WEIGHTS]


def test_each_chunk_is_reported_and_a_cancelled_download_goes_on_where_it_stopped(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(bundled.constants, "DOWNLOAD_CHUNK_SIZE", 100)
    wanted = download.prepare(hubs.HuggingFace(), NAME, tmp_path / "model")
    limit, done = len(hub.files[WEIGHTS]) // 2, []

    def report(there: int) -> None:
        done.append(there)
        if there >= limit:
            raise Cancelled

    with pytest.raises(Cancelled):
        download.download(wanted, report)
    assert done == sorted(done) and len(done) > limit // 100 / 2 and done[-1] - done[-2] <= 100
    hub.asked.clear()
    limit, before = wanted.size + 1, done[-1]
    done.clear()
    download.download(wanted, report)
    assert done == sorted(done) and done[0] >= before and done[-1] == wanted.size
    assert 0 < hub.asked[0][1] < len(hub.files[hub.asked[0][0]])


def test_the_size_in_the_catalogue_is_that_of_the_weights():
    for model in {model.base: model for model in catalogue.MODELS.values()}.values():
        assert catalogue.GIGABYTES[model.base] == round(sum(published.unread(model).elements.values()) * 2 / 1e9)


@pytest.mark.parametrize("name", [WEIGHTS, "model_index.json"])
@pytest.mark.parametrize("source", ["huggingface", "modelscope"])
def test_a_file_with_a_wrong_hash_is_refused_and_removed(source, name, hub, run, tmp_path):
    hub.swapped[name] = bytes(len(hub.files[name]))
    done = run("download", "5b", "--output", tmp_path / "model", "--source", source)
    assert done.returncode == 1 and f"download: {name} is not what http" in done.stderr.splitlines()[-1]
    assert not (tmp_path / "model" / name).exists() and not (tmp_path / "model" / f"{name}.partial").exists()
    hub.swapped.clear()
    assert run("download", "5b", "--output", tmp_path / "model", "--source", source).returncode == 0
    (tmp_path / "model" / name).write_bytes(bytes(len(hub.files[name])))  # damaged on the disk
    assert run("download", "5b", "--output", tmp_path / "model", "--source", source).returncode == 0
    assert content(tmp_path / "model")[name] == hub.files[name]


def test_too_little_space_is_said_before_anything_is_asked_for(hub, run, tmp_path, monkeypatch):
    size = sum(len(hub.files[name]) for name in hub.files if name not in DECOYS)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=size - 1))
    done = run("download", "5b", "--output", tmp_path / "model")
    assert done.returncode == 1 and not hub.asked
    assert done.stderr.startswith("download: zai-org/CogVideoX-5b needs ") and "free space" in done.stderr
    assert "make its folder a link to another disk (or --output)" in done.stderr  # a node has no options
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=size))
    assert run("download", "5b", "--output", tmp_path / "model").returncode == 0


def test_a_disk_that_becomes_full_is_one_line(hub, run, tmp_path, monkeypatch):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(hub.files[WEIGHTS]) // 2, limits[1]))
    try:
        done = run("download", "5b", "--output", tmp_path / "model")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    last = done.stderr.splitlines()[-1]
    assert done.returncode == 1 and "cannot be written in" in last and "free space, and try again" in last


@pytest.mark.parametrize(
    "arguments, status, words",
    [
        (("7b",), 2, "there is no model '7b'; use one of 2b, 5b, "),
        (("some-org/Other",), 2, "there is no repository some-org/Other at http"),
        (("some-org/Other", "--source", "modelscope", "--output", "x"), 2, "there is no repository some-org/Other at http"),
        (("5b", "--comfyui", "/nowhere"), 2, "there is no folder /nowhere/models"),
        (("5b", "--source", "modelscope"), 2, "from ModelScope give a folder: --comfyui PATH"),
    ],
    ids=str,
)
def test_what_cannot_be_downloaded_is_one_line(arguments, status, words, hub, run):
    done = run("download", *arguments)
    assert done.returncode == status and words in done.stderr and len(done.stderr.splitlines()) == 1


def test_a_repository_of_another_layout_is_refused(hub, run, tmp_path):
    for name in [name for name in hub.files if name.endswith(".safetensors")]:
        del hub.files[name]
    assert "has no safetensors in transformer/" in run("download", "5b", "--output", tmp_path / "x").stderr
    del hub.files["transformer/config.json"]
    assert "not in diffusers layout" in run("download", "5b", "--output", tmp_path / "x").stderr


def test_a_hub_that_is_not_there_is_one_line(run, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    done = run("download", "5b", "--output", tmp_path / "x")
    assert done.returncode == 1 and "http://127.0.0.1:9 does not answer as expected: " in done.stderr.splitlines()[-1]


def test_weights_in_another_dtype_are_left_out_only_if_others_are_there():
    shards = [f"vae/model.{kind}{number}-of-2.safetensors" for kind in ("", "fp16-") for number in (1, 2)]
    only = ["text_encoder/model.fp16.safetensors", "text_encoder/model.safetensors.index.fp16.json"]
    indices = ["vae/model.safetensors.index.json", "vae/model.safetensors.index.fp16.json"]
    found = [file.path for file in download.needed(hubs.RemoteFile(path, 1) for path in [*shards, *only, *indices])]
    assert sorted(found) == sorted([*shards[:2], *only, indices[0]])


def test_every_published_model_has_a_name_on_both_hubs():
    for name, model in catalogue.MODELS.items():
        assert catalogue.repository_of(name) == model.repository == catalogue.repository_of(model.repository.upper())
        if name != "sparkvsr":  # only on the Hugging Face hub
            assert catalogue.on_modelscope(model.repository).partition("/")[0] in ("ZhipuAI", "PAI")
    assert catalogue.repository_of("/a/b") is catalogue.repository_of("../b") is catalogue.repository_of("a/b/c") is None
