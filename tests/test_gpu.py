"""What only GPUs can show: NCCL, offload, half precision. Skipped where there are too few."""

import pytest
import torch

from parallel_backend.cogvideox import memory
from parallel_backend.cogvideox.checkpoint import Checkpoint
from parallel_backend.devices import Devices
from parallel_backend.group.client import GroupExecutor
from parallel_backend.jobs import DecodeJob, Model
from parallel_backend.local import LocalExecutor
from parallel_backend.plans import Plan

from .conftest import TOLERANCE

one_gpu = pytest.mark.skipif(torch.cuda.device_count() < 1, reason="needs a GPU")
two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


@pytest.fixture(scope="module")
def on_gpu() -> LocalExecutor:
    return LocalExecutor(torch.device("cuda", 0))


@pytest.fixture(scope="module", params=["cfg2", "ulysses2", "ring2"])
def group(request):
    executor = GroupExecutor(Plan.parse(request.param), Devices("cuda", (0, 1)))
    yield executor
    executor.close()


@two_gpus
@pytest.mark.parametrize("like", ["2b", "5b"])
@pytest.mark.parametrize("size", [(96, 64, 17), (80, 48, 13)])
def test_every_plan_equals_single_over_nccl(group, like, size, on_gpu, make_job, checkpoints, capsys):
    for settings in ({"scheduler": "ddim"}, {"scheduler": "dpm"}, {"cfg": 1.0}, {"dynamic_cfg": True}, {"batch": 2}):
        job = make_job(like, size=size, model=Model(str(checkpoints[like]), dtype="fp32"), **settings)
        difference = (group.sample(job).tensor - on_gpu.sample(job).tensor).abs().max().item()
        with capsys.disabled():
            print(f"nccl {group.plan} {like} {size} {settings}: max difference {difference:.2g}")
        assert difference <= TOLERANCE


@two_gpus
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_half_precision_is_as_near_to_float32_in_every_plan_as_in_single(group, dtype, on_gpu, make_job, checkpoints):
    path = str(checkpoints["5b"])
    exact = on_gpu.sample(make_job("5b", model=Model(path, dtype="fp32"), scheduler="ddim")).tensor
    job = make_job("5b", model=Model(path, dtype=dtype), scheduler="ddim")
    rounding = (on_gpu.sample(job).tensor - exact).norm()
    assert (group.sample(job).tensor - exact).norm() <= 1.5 * rounding


@one_gpu
@pytest.mark.parametrize("offload", ["none", "model", "group", "sequential"])
def test_offload_changes_memory_and_not_the_video(offload, on_gpu, make_job, checkpoints):
    path = str(checkpoints["5b"])
    expected = on_gpu.sample(make_job("5b", model=Model(path, dtype="fp32", offload="none"))).tensor
    executor = LocalExecutor(torch.device("cuda", 0))
    job = make_job("5b", model=Model(path, dtype="fp32", offload=offload))
    for _ in range(2):  # the second job finds the weights where the first left them
        result = executor.sample(job)
        assert (result.tensor - expected).abs().max() <= TOLERANCE
    held = sum(weight.numel() * 4 for weight in executor.engine._held["transformer"][1].parameters() if weight.is_cuda)
    whole = Checkpoint.open(path).weight_bytes("transformer", torch.float32)
    assert (held > 0.9 * whole) == (offload == "none")
    executor.close()


@one_gpu
def test_auto_places_the_weights_anew_when_another_program_takes_the_room(on_gpu, make_job, checkpoints, monkeypatch):
    model = Model(str(checkpoints["5b"]), dtype="fp32")
    job, checkpoint = make_job("5b", model=model), Checkpoint.open(checkpoints["5b"])
    expected = on_gpu.sample(job).tensor
    weights = checkpoint.weight_bytes("transformer", torch.float32)
    work = memory.working_bytes(job, checkpoint, Plan(), torch.float32)
    rooms = {"none": 2**40, "model": weights + work, "group": 2 * weights // checkpoint.layers + work, "sequential": 0}
    executor = LocalExecutor(torch.device("cuda", 0))
    engine = executor.engine
    held = lambda: sum(memory.bytes_on(engine.device, module) for _, module in engine._held.values())  # noqa: E731
    executor.decode(DecodeJob(model, torch.rand(1, 16, 1, 4, 4)))
    for mode in ("none", "group", "none", "sequential", "group", "model", "none", "model", "sequential", "none"):
        monkeypatch.setattr(memory, "free_bytes", lambda device, mode=mode: int(rooms[mode] / memory.HEADROOM) + 1000 - held())
        assert (executor.sample(job).tensor - expected).abs().max() <= TOLERANCE
        assert engine._offload == mode
        on_device = memory.bytes_on(engine.device, engine._held["transformer"][1])
        assert (on_device > 0.9 * weights) == (mode == "none")
    monkeypatch.undo()
    assert executor.decode(DecodeJob(model, torch.rand(1, 16, 1, 4, 4))).tensor.isfinite().all()
    executor.close()


@one_gpu
def test_gpu_equals_cpu(on_gpu, local, make_job, checkpoints):
    job = make_job("5b", model=Model(str(checkpoints["5b"]), dtype="fp32"))
    assert (on_gpu.sample(job).tensor - local.sample(job).tensor).abs().max() <= 10 * TOLERANCE


@one_gpu
def test_tiled_decode_shows_no_seam(on_gpu, make_job, checkpoints):
    model = Model(str(checkpoints["5b"]), dtype="fp32")
    latent = on_gpu.sample(make_job("5b", model=model, size=(192, 128, 9))).tensor
    whole = on_gpu.decode(DecodeJob(model, latent, "off")).tensor
    tiled = on_gpu.decode(DecodeJob(model, latent, "on", 64, 32)).tensor
    assert whole.shape == tiled.shape
    assert (whole - tiled).abs().mean() < 0.1
