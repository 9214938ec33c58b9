"""Load CogVideoX with a published model that is not here: listed, refused or downloaded, and found by its name afterwards."""

import threading

import pytest

from .conftest import TOLERANCE
from .support.hub_server import DECOYS, WEIGHTS, serving

NODES = """
from comfy_api.latest import io
loaders, submission = part("nodes.loaders"), part("nodes.comfy.submission")
def node():
    return loaders.LoadCogVideoX.PREPARE_CLASS_CLONE({"hidden_inputs": {io.Hidden.unique_id: "1"}})
def load(name=None, **inputs):
    return node().execute(model_name=name or offer(), dtype="auto", offload="auto", **inputs).result
def names():
    return loaders.LoadCogVideoX.define_schema().inputs[0].options
def offer():
    return next(name for name in names() if name.startswith("CogVideo/CogVideoX-5b ("))
def submit(**inputs):
    submission.remember({"prompt": {"1": {"inputs": inputs}}})
    return node().validate_inputs(inputs["model_name"])
def failure(**inputs):
    try:
        load(**inputs)
    except Exception as error:
        return [type(error).__name__, str(error)]
"""
COMMAND = (
    "CogVideoX-5b is not downloaded (21 GB, CogVideoX licence): set download in Load CogVideoX to huggingface or modelscope, or run "
    "python -m parallel_backend download 5b"
)


@pytest.fixture
def hub(checkpoints):
    with serving(checkpoints["5b"]) as (server, address):
        server.address = address
        yield server


@pytest.fixture
def call(in_comfyui, hub, tmp_path):
    """Runs code in a ComfyUI whose models folder is empty. Returns what it shows, and the log."""
    models = f"""
import os, time
models = Path({str(tmp_path / "models")!r})
folders = host.find_model.__globals__["folder_paths"]
folders.models_dir = str(models)
for paths, _ in folders.folder_names_and_paths.values():
    paths[:] = [path.replace({str(in_comfyui.__self__.folder)!r}, str(models)) for path in paths]
importlib.import_module("huggingface_hub.constants").HF_HUB_CACHE = {str(tmp_path / "cache")!r}
os.environ["HF_ENDPOINT"] = os.environ["MODELSCOPE_ENDPOINT"] = {hub.address!r}
time.sleep = lambda seconds: None
"""
    return lambda code: in_comfyui(models + NODES + code)


def test_published_models_are_listed_after_those_that_are_here_and_off_refuses_them_in_one_line(call, hub):
    shown, _ = call("""
short = "CogVideo/CogVideoX-5b"
table = part("nodes.comfy.plan_table").of_query({"model": offer(), "devices": "cpu:2"})
show(names=names(), model=table["model"], size=table["size"], plans=[row["plan"] for row in table["rows"]], default=next(each.default for each in loaders.LoadCogVideoX.define_schema().inputs if each.id == "download"), offer=offer(), ran=failure(),
     refused=[submit(model_name=name, download="off") for name in (offer(), short, "diffusers/cogvideox-5B", "nothing")],
     taken=[submit(model_name=name, download=word) for name, word in ((short, "huggingface"), (None, "off"), ("demo", "off"))])
""")  # fmt: skip
    assert shown["names"][:2] == ["demo", "demo-i2v"] and len(shown["names"]) == 13
    assert shown["names"][2] == "CogVideo/CogVideoX-2b (download: 13 GB, Apache 2.0)"
    assert shown["offer"] == "CogVideo/CogVideoX-5b (download: 21 GB, CogVideoX licence)"
    assert shown["default"] == "off" and shown["ran"][1] == COMMAND
    *same, unknown = shown["refused"]
    assert same == [COMMAND] * 3 and unknown.startswith("there is no model 'nothing'")
    assert shown["taken"] == [True] * 3
    assert shown["model"] == "zai-org/CogVideoX-5b" and shown["size"] == [720, 480, 49] and "cfg2" in shown["plans"]
    assert not hub.asked


@pytest.mark.parametrize("source", ["huggingface", "modelscope"])
def test_a_download_is_shown_and_the_model_is_used_and_found_by_every_name(source, call, hub, checkpoints, tmp_path):
    shown, _ = call(f"""
lines, downloads, bars = part("nodes.comfy.lines"), part("nodes.comfy.downloads"), []
class Bar:
    def __init__(self, total, node_id):
        bars.append([total, node_id])
    def update_absolute(self, value):
        bars.append(value)
true, downloads.comfy.utils.ProgressBar = downloads.comfy.utils.ProgressBar, Bar
said, kept = [], []
lines.show = lambda line, level, node_id: kept.append(line)
lines.show_for_now = lambda line, node_id: said.append(line)
first = offer()
loaded, *_ = load(download={source!r})
downloads.comfy.utils.ProgressBar = true
again = [load(name)[0].model.path for name in (first, "CogVideo/CogVideoX-5b", "diffusers/CogVideoX-5b")]
one, other = (host.run(jobs.SampleJob(jobs.Model(path), text, latent, text, steps=2)).tensor for path in (loaded.model.path, {str(checkpoints["5b"])!r}))
show(bars=bars, said=said, kept=kept[:2], path=loaded.model.path, again=again, names=names(), off=(one - other).abs().max().item(),
     checked=[submit(model_name=name, download="off") for name in (first, "CogVideo/CogVideoX-5b")])
""")
    folder = tmp_path / "models" / "CogVideo" / "CogVideoX-5b"
    assert shown["path"] == str(folder) and shown["again"] == [str(folder)] * 3 and shown["checked"] == [True, True]
    assert shown["names"][2] == "CogVideo/CogVideoX-5b" and len(shown["names"]) == 13
    assert shown["off"] <= TOLERANCE
    (total, node), *done = shown["bars"]
    assert node == "1" and done == sorted(done) and done[-1] == total
    assert total == sum(len(text) for name, text in hub.files.items() if name not in DECOYS)
    assert shown["said"][0].startswith("downloading: 0.0 of 0.0 GB")
    assert len(hub.asked) == len({name for name, _ in hub.asked})  # nothing twice
    before, after = shown["kept"]
    assert (
        before.startswith("downloading ")
        and f"/CogVideoX-5b from {hub.address}: 0.0 GB in " in before
        and "; licence: " in before
    )
    assert after == "downloaded into CogVideo/CogVideoX-5b, and checked"


def test_a_cut_and_a_wrong_hash_are_one_line_and_the_next_run_goes_on(call, hub):
    hub.cuts[WEIGHTS] = [1000, *[0] * 20]
    hub.swapped["model_index.json"] = bytes(len(hub.files["model_index.json"]))
    shown, _ = call("""
importlib.import_module("huggingface_hub.constants").DOWNLOAD_CHUNK_SIZE = 100
cut = failure(download="huggingface")
for _ in range(30):
    wrong = failure(download="huggingface")
    if "is not what" in wrong[1]:
        break
show(cut=cut, wrong=wrong, offer=offer())
""")
    kind, words = shown["cut"]
    assert "try again: it goes on where it stopped" in words and len(words.splitlines()) == 1
    assert "model_index.json is not what http" in shown["wrong"][1] and "try again" in shown["wrong"][1]
    assert "(download: " in shown["offer"]
    assert (WEIGHTS, 1000) in hub.asked
    hub.swapped.clear(), hub.asked.clear()
    shown, _ = call("show(path=load(download='huggingface')[0].model.path)")
    assert shown["path"].endswith("CogVideoX-5b") and WEIGHTS not in dict(hub.asked)


def test_a_download_is_cancelled_while_the_hub_says_nothing_and_writes_nothing_more(call, hub, tmp_path):
    """The library would wait for a minute, and the node would fail with what the library says then."""
    hub.held[WEIGHTS] = threading.Event()
    shown, _ = call("""
import threading
def interrupt():
    while not list(models.rglob("*.partial")):
        threading.Event().wait(0.05)
    host.management.interrupt_current_processing()
threading.Thread(target=interrupt, daemon=True).start()
kind, _ = failure(download="huggingface")
host.management.interrupt_current_processing(False)
show(kind=kind)
""")
    hub.held.pop(WEIGHTS).set()
    assert shown["kind"] == "InterruptProcessingException"
    (partial,) = (tmp_path / "models").rglob("*.partial")
    assert partial.stat().st_size == 0


def test_a_hub_that_does_not_answer_names_the_other_ways(call, hub):
    shown, _ = call("os.environ['HF_ENDPOINT'] = 'http://127.0.0.1:9'; show(found=failure(download='huggingface'))")
    assert "http://127.0.0.1:9 does not answer as expected" in shown["found"][1]
    assert "ModelScope or a mirror in HF_ENDPOINT" in shown["found"][1]
