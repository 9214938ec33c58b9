"""What only GPUs can show: NCCL, offload, half precision. Skipped where there are too few.

One GPU is enough where NCCL is 2.30 or newer and `NCCL_MULTI_RANK_GPU_ENABLE=1 TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES=1` are set:
several ranks share it, in slices of time.
"""

import copy
from dataclasses import replace

import pytest
import torch
from packaging.version import Version

from benchmarks.attention import rows as attention_rows
from parallel_backend.cli.bench_table import distance, two_steps
from parallel_backend.cogvideox import offload
from parallel_backend.cogvideox.attention import choice, hopper_fp8, operands, registry, timings, trial
from parallel_backend.cogvideox.attention.function import Kind
from parallel_backend.cogvideox.attention.hopper import attend_own, own_attention
from parallel_backend.cogvideox.attention.hopper_fp8 import attend_in_fp8
from parallel_backend.cogvideox.attention.recomputed_tiles import pieces_on
from parallel_backend.cogvideox.checkpoint.checkpoint import Checkpoint
from parallel_backend.cogvideox.kernels import block_torch, int8_product
from parallel_backend.cogvideox.transformer import block, int8_choice, quantized_linear
from parallel_backend.cogvideox.vae import preview
from parallel_backend.devices import Devices, several_ranks_a_gpu
from parallel_backend.engine.engine import Engine
from parallel_backend.errors import Cancelled, OutOfMemory
from parallel_backend.executor.group import GroupExecutor
from parallel_backend.executor.local import LocalExecutor
from parallel_backend.jobs import DecodeJob, EncodeJob, SampleJob
from parallel_backend.model import DTYPES, Model
from parallel_backend.parallel import fsdp
from parallel_backend.parallel.rank import RankContext
from parallel_backend.plan import Plan

from .conftest import TOLERANCE, demo_job
from .test_cancel import KINDS as VAE_KINDS
from .test_cancel import Stop, vae_job
from .test_pipefusion import Patched

TWO_RANKS = ["cfg2", "ulysses2", "ring2", "tensor2", "cfg2-fsdp2", "ulysses2-fsdp2"]
FOUR_RANKS = ["cfg2-ulysses2", "ulysses2-ring2", "cfg2-ulysses2-fsdp4"]

one_gpu = pytest.mark.skipif(torch.cuda.device_count() < 1, reason="needs a GPU")
hopper = pytest.mark.skipif(
    torch.cuda.device_count() < 1 or torch.cuda.get_device_capability()[0] != 9, reason="needs a Hopper GPU"
)
two_gpus = pytest.mark.skipif(
    torch.cuda.device_count() < (1 if several_ranks_a_gpu() else 2), reason="needs two GPUs, or one that ranks may share"
)


def gpus_for(plan: str) -> Devices:
    """A GPU for each rank, or one for several of them."""
    ranks, gpus = Plan.parse(plan).world_size, torch.cuda.device_count()
    if ranks > gpus and not several_ranks_a_gpu():
        pytest.skip(f"needs {ranks} GPUs")
    return Devices("cuda", tuple(rank % gpus for rank in range(ranks)))


@pytest.fixture(scope="module")
def on_gpu() -> LocalExecutor:
    return LocalExecutor(torch.device("cuda", 0))


@pytest.fixture(scope="module", params=TWO_RANKS + FOUR_RANKS)
def group(request):
    executor = GroupExecutor(Plan.parse(request.param), gpus_for(request.param))
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
@pytest.mark.parametrize("like", ["2b", "5b"])
def test_every_plan_with_a_guidance_cache_equals_single_over_nccl(group, like, on_gpu, make_job, checkpoints):
    for settings in ({"scheduler": "ddim"}, {"scheduler": "dpm", "batch": 2}):
        model = Model(str(checkpoints[like]), dtype="fp32", guidance_cache=4)
        job = make_job(like, size=(80, 48, 13), steps=16, model=model, **settings)
        result = group.sample(job)
        assert (result.tensor - on_gpu.sample(job).tensor).abs().max() <= TOLERANCE
        (note,) = (note for note in result.report.notes if note.startswith("guidance cache"))
        shared = "ranks of both halves shared its tokens" in note
        assert shared == (group.plan.cfg > 1) and "8 of 16 forwards ran on the positive prompt only" in note


@two_gpus
@pytest.mark.parametrize("compile", ["off", "on"])
def test_a_pipeline_equals_single_while_it_warms_up_and_the_same_patches_on_one_gpu_later(
    compile, on_gpu, make_job, checkpoints
):
    model, patched = Model(str(checkpoints["5b"]), dtype="fp32", compile=compile), Engine(Patched(2, "cuda:0"))
    group = GroupExecutor(Plan.parse("pipefusion2"), gpus_for("pipefusion2"))
    try:
        for size in ((96, 64, 17), (80, 48, 13)):
            job = make_job("5b", size=size, model=model, scheduler="ddim", pipefusion_warmup=1)
            exact = group.sample(replace(job, pipefusion_warmup=job.steps)).tensor
            assert (exact - on_gpu.sample(job).tensor).abs().max() <= 10 * TOLERANCE
            for _ in range(2):
                assert (group.sample(job).tensor - patched.run(job).tensor).abs().max() <= 10 * TOLERANCE
    finally:
        group.close()


@two_gpus
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_half_precision_is_as_near_to_float32_in_every_plan_as_in_single(group, dtype, on_gpu, make_job, checkpoints):
    path = str(checkpoints["5b"])
    exact = on_gpu.sample(make_job("5b", model=Model(path, dtype="fp32"), scheduler="ddim")).tensor
    job = make_job("5b", model=Model(path, dtype=dtype), scheduler="ddim")
    rounding = (on_gpu.sample(job).tensor - exact).norm()
    assert (group.sample(job).tensor - exact).norm() <= 1.5 * rounding


@two_gpus
def test_split_weights_leave_the_gpu_and_come_back_with_every_other_option(group, on_gpu, make_job, checkpoints):
    path, plan = str(checkpoints["5b"]), group.plan
    exact = on_gpu.sample(make_job("5b", model=Model(path, dtype="fp32"))).tensor
    part = offload.transformer_bytes(Checkpoint.open(path), plan, torch.float32)
    modes = ("none", "model") if plan.fsdp > 1 else ("none", "model", "group", "sequential")
    for mode, compile in [*((mode, "off") for mode in modes), ("none", "on"), ("model", "on")]:
        job = make_job("5b", model=Model(path, dtype="fp32", offload=mode, compile=compile))
        for _ in range(2):
            assert (group.sample(job).tensor - exact).abs().max() <= 10 * TOLERANCE, (mode, compile)
        on_device = group.status()["weights"]["transformer"]
        assert on_device < 1.05 * part and (on_device > 0.95 * part) == (mode == "none"), (mode, compile)
        assert group.decode(DecodeJob(job.model, torch.rand(1, 16, 1, 8, 8))).tensor.isfinite().all()
        assert (group.sample(job).tensor - exact).abs().max() <= 10 * TOLERANCE


@two_gpus
@pytest.mark.parametrize("compile", ["on", "off"])
def test_fp8_is_as_near_in_every_plan_as_in_single(compile, group, on_gpu, make_job, checkpoints):
    path = str(checkpoints["5b"])
    exact = on_gpu.sample(make_job("5b", model=Model(path, dtype="fp32"), steps=2, scheduler="ddim")).tensor
    job = make_job("5b", model=Model(path, dtype="bf16", fp8="linears", compile=compile), steps=2, scheduler="ddim")
    assert distance(group.sample(job).tensor, exact) <= 1.5 * distance(on_gpu.sample(job).tensor, exact)


@one_gpu
@pytest.mark.parametrize("compile", ["off", "on"])
@pytest.mark.parametrize("mode", ["none", "model", "group", "sequential"])
def test_offload_changes_memory_and_not_the_video(mode, compile, on_gpu, make_job, checkpoints):
    path = str(checkpoints["5b"])
    expected = on_gpu.sample(make_job("5b", model=Model(path, dtype="fp32", offload="none"))).tensor
    executor = LocalExecutor(torch.device("cuda", 0))
    job = make_job("5b", model=Model(path, dtype="fp32", offload=mode, compile=compile))
    for _ in range(2):  # the second job finds the weights where the first left them
        result = executor.sample(job)
        assert (result.tensor - expected).abs().max() <= 10 * TOLERANCE
        assert any("not compiled" in note for note in result.report.notes) == (mode == "sequential" and compile == "on")
    held = sum(weight.numel() * 4 for weight in executor.engine.cache.held["transformer"][1].parameters() if weight.is_cuda)
    whole = Checkpoint.open(path).weight_bytes("transformer", torch.float32)
    assert (held > 0.9 * whole) == (mode == "none")
    executor.close()


@one_gpu
def test_auto_places_the_weights_anew_when_another_program_takes_the_room(on_gpu, make_job, checkpoints, monkeypatch):
    model = Model(str(checkpoints["5b"]), dtype="fp32")
    job, checkpoint = make_job("5b", model=model), Checkpoint.open(checkpoints["5b"])
    expected = on_gpu.sample(job).tensor
    weights = checkpoint.weight_bytes("transformer", torch.float32)
    work = offload.working_bytes(job, checkpoint, Plan(), torch.float32)
    rooms = {"none": 2**40, "model": weights + work, "group": 2 * weights // checkpoint.layers + work, "sequential": 0}
    executor = LocalExecutor(torch.device("cuda", 0))
    engine = executor.engine
    held = lambda: sum(offload.bytes_on(engine.device, module) for _, module in engine.cache.held.values())  # noqa: E731
    executor.decode(DecodeJob(model, torch.rand(1, 16, 1, 4, 4)))
    for mode in ("none", "group", "none", "sequential", "group", "model", "none", "model", "sequential", "none"):
        monkeypatch.setattr(
            offload, "free_bytes", lambda device, mode=mode: int(rooms[mode] / offload.HEADROOM) + 1000 - held()
        )
        assert (executor.sample(job).tensor - expected).abs().max() <= TOLERANCE
        assert engine.cache.offload == mode
        on_device = offload.bytes_on(engine.device, engine.cache.held["transformer"][1])
        assert (on_device > 0.9 * weights) == (mode == "none")
    monkeypatch.undo()
    assert executor.decode(DecodeJob(model, torch.rand(1, 16, 1, 4, 4))).tensor.isfinite().all()
    executor.close()


@one_gpu
def test_gpu_equals_cpu(on_gpu, local, make_job, checkpoints):
    job = make_job("5b", model=Model(str(checkpoints["5b"]), dtype="fp32"))
    assert (on_gpu.sample(job).tensor - local.sample(job).tensor).abs().max() <= 10 * TOLERANCE


@one_gpu
def test_previews_are_those_of_the_cpu_and_change_nothing(on_gpu, local, make_job, checkpoints, configure):
    configure(preview, preview_seconds=0.0)
    job = make_job("5b", model=Model(str(checkpoints["5b"]), dtype="fp32"), steps=12)
    shown, expected = [], []
    assert torch.equal(on_gpu.sample(job, on_picture=shown.append).tensor, on_gpu.sample(job).tensor)
    local.sample(job, on_picture=expected.append)
    assert len(shown) >= 3 and not shown[0].is_cuda
    for picture in shown:  # one that is not ready with the next step is shown later, and meanwhile none is made
        assert min((picture.int() - other.int()).abs().max() for other in expected) <= 2


@one_gpu
def test_frames_come_from_a_gpu_while_the_next_ones_are_decoded(on_gpu, local, checkpoints):
    latent, parts = torch.randn(2, 16, 6, 8, 12, generator=torch.Generator().manual_seed(6)), []
    job = DecodeJob(Model(str(checkpoints["5b"]), dtype="fp32"), latent)
    videos = on_gpu.decode(job, on_frames=lambda *part: parts.append((*part[:2], part[2].clone()))).tensor
    assert (videos - local.decode(job).tensor).abs().max() <= 10 * TOLERANCE
    assert [(video, start) for video, start, _ in parts] == [(video, start) for video in (0, 1) for start in (0, 5, 13)]
    assert all(torch.equal(frames, videos[video, start : start + len(frames)]) for video, start, frames in parts)


@one_gpu
def test_tiled_decode_shows_no_seam(on_gpu, make_job, checkpoints):
    model = Model(str(checkpoints["5b"]), dtype="fp32")
    latent = on_gpu.sample(make_job("5b", model=model, size=(192, 128, 9))).tensor
    whole = on_gpu.decode(DecodeJob(model, latent, "off")).tensor
    tiled = on_gpu.decode(DecodeJob(model, latent, "on", 64, 32)).tensor
    assert whole.shape == tiled.shape
    assert (whole - tiled).abs().mean() < 0.1


@pytest.fixture
def cap():
    """Lets this process have so many bytes of the GPU, or all, until the test ends."""
    total = torch.cuda.get_device_properties(0).total_memory

    def limit(size: int | None) -> None:
        offload.release(torch.device("cuda"))
        torch.cuda.set_per_process_memory_fraction(1.0 if size is None else size / total)

    yield limit
    limit(None)


@one_gpu
def test_a_step_that_does_not_fit_says_what_helps_and_the_next_job_works(make_job, checkpoints, cap):
    model = Model(str(checkpoints["5b"]), dtype="fp32", offload="none")
    small, large = (make_job("5b", model=model, size=size, steps=2) for size in ((96, 64, 17), (480, 320, 49)))
    executor = LocalExecutor(torch.device("cuda", 0))
    expected = executor.sample(small).tensor
    offload.release(torch.device("cuda"))
    cap(torch.cuda.memory_reserved() + 40 * 2**20)
    with pytest.raises(
        OutOfMemory, match="step 1 ran out of memory on cuda:0: it needs about .* use offload 'group' .now 'none'"
    ):
        executor.sample(large)
    assert torch.equal(executor.sample(small).tensor, expected)
    cap(None)
    assert executor.sample(large).tensor.isfinite().all()
    executor.close()


@one_gpu
def test_a_decode_that_does_not_fit_goes_on_in_tiles_and_the_next_job_works(make_job, checkpoints, cap):
    model = Model(str(checkpoints["5b"]), dtype="fp32", offload="none")
    executor = LocalExecutor(torch.device("cuda", 0))
    job = make_job("5b", model=model, steps=2, size=(480, 320, 17))
    latent = executor.sample(job).tensor
    frames, peaks = {}, {}
    for tiling in ("off", "on"):
        result = executor.decode(DecodeJob(model, latent, tiling, 64, 32))
        frames[tiling], peaks[tiling] = result.tensor, result.report.peak_memory[0]
    assert peaks["on"] < 0.6 * peaks["off"]
    cap((peaks["off"] + peaks["on"]) // 2)
    result = executor.decode(DecodeJob(model, latent, "auto", 64, 32))
    assert any("VAE whole ran out of memory" in note for note in result.report.notes)
    assert (result.tensor - frames["on"]).abs().max() <= 1e-3
    with pytest.raises(OutOfMemory, match="the VAE ran out of memory whole: .* use tiling auto"):
        executor.decode(DecodeJob(model, latent, "off"))
    cap(None)
    assert (executor.decode(DecodeJob(model, latent, "off")).tensor - frames["off"]).abs().max() <= 1e-3
    assert torch.equal(executor.sample(job).tensor, latent)
    executor.close()


def rounding(executor: LocalExecutor, job: SampleJob, **settings) -> float:
    """How far a job in bf16 with these settings is from the same in float32, relatively."""
    exact = two_steps(executor, replace(job, model=replace(job.model, dtype="fp32")), Checkpoint.open(job.model.path))
    latent = two_steps(
        executor, replace(job, model=replace(job.model, dtype="bf16", **settings)), Checkpoint.open(job.model.path)
    )
    return distance(latent, exact)


@one_gpu
@pytest.mark.parametrize("like", ["2b", "5b", "1.5-5b"])
def test_blocks_with_kernels_are_as_near_to_float32_as_others(like, on_gpu, make_job, checkpoints):
    for settings in ({}, {"batch": 2}, {"cfg": 1.0}, {"size": (80, 48, 13)}):
        job = make_job(like, model=Model(str(checkpoints[like])), **settings)
        assert rounding(on_gpu, job, compile="on") <= 1.1 * rounding(on_gpu, job, compile="off")
        single = replace(job.model, dtype="fp32", compile="on")
        difference = (
            on_gpu.sample(replace(job, model=single)).tensor
            - on_gpu.sample(replace(job, model=replace(single, compile="off"))).tensor
        )
        assert difference.abs().max() <= 10 * TOLERANCE


@one_gpu
@pytest.mark.parametrize("dtype", block.NEAR)
def test_kernels_are_tried_before_they_are_used(dtype, monkeypatch):
    class Wrong(block_torch.TorchBlockOps):
        def add(self, states, update, conditions, text):
            return super().add(states, update, conditions, text + 1)

    about = torch.device("cuda", 0), dtype, 192, 64, True
    trial = block.why_not_compiled.__wrapped__
    assert trial(*about) is None
    monkeypatch.setattr(block, "triton_kernels", Wrong)
    assert trial(*about) == "their results are wrong with this version of Triton"


@one_gpu
@pytest.mark.parametrize("scheduler", ["ddim", "dpm"])
def test_the_host_waits_for_the_device_nowhere_in_a_step(scheduler, make_job, checkpoints):
    engine = Engine(RankContext(torch.device("cuda", 0)))
    job = make_job("5b", model=Model(str(checkpoints["5b"]), dtype="bf16"), scheduler=scheduler, steps=5)

    def forbid(progress, steps: int) -> bool:
        # The last of these calls comes when all steps have been asked for.
        torch.cuda.set_sync_debug_mode("default" if progress.step == steps else "error")
        return True

    try:
        latent = engine.run(job, forbid).tensor
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(latent, engine.run(job).tensor)


@one_gpu
@pytest.mark.parametrize("compile", ["on", "off"])
def test_fp8_is_near_and_smaller(compile, on_gpu, make_job, checkpoints):
    job = make_job("5b", model=Model(str(checkpoints["5b"])))
    for fp8 in ("linears", "all"):
        assert rounding(on_gpu, job, compile="off") < rounding(on_gpu, job, compile=compile, fp8=fp8) < 0.1


@one_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(2, 1027, 5, 64), (1, 33, 48, 16)])
def test_norm_and_rotation_in_one_kernel_are_what_they_are_in_several(shape, dtype):
    states, angles = torch.randn(shape) * 3 + 1, torch.rand(shape[1], shape[-1]) * 6
    norm = torch.nn.LayerNorm(shape[-1])
    torch.nn.init.uniform_(norm.weight, 0.5, 1.5), torch.nn.init.normal_(norm.bias)
    there, on_gpu = states.to("cuda", dtype), copy.deepcopy(norm).to("cuda", dtype)
    ours, plain, exact = block.triton_kernels(), block_torch.TorchBlockOps(), copy.deepcopy(on_gpu).cpu().double()
    for tables in (None, (angles.cos(), angles.sin())):
        near = tables and tuple(table.cuda() for table in tables)
        expected = plain.normal_heads(there.cpu().double(), exact, tables, 0.18, fp8=False, parts=1)
        found = ours.normal_heads(there, on_gpu, near, 0.18, fp8=False, parts=1)
        assert distance(found.cpu().double(), expected) < (1e-6 if dtype == torch.float32 else 3e-3)
        rounded = ours.normal_heads(there, on_gpu, near, 0.42, fp8=True, parts=1)
        assert rounded.dtype == torch.float8_e4m3fn
        assert distance(rounded.cpu().double() / 0.42 * 0.18, expected) < 0.04


@one_gpu
@pytest.mark.parametrize("fp8", [False, True])
def test_heads_are_laid_out_for_ranks_as_several_copies_would(fp8):
    states, norm = torch.randn(2, 33, 6, 64, device="cuda").bfloat16(), torch.nn.LayerNorm(64).cuda()
    ours, plain = block.triton_kernels(), block_torch.TorchBlockOps()
    together = ours.normal_heads(states, norm, None, 1.0, fp8=fp8, parts=1)[:, 0]
    for ranks in (2, 3):
        found = ours.normal_heads(states, norm, None, 1.0, fp8=fp8, parts=ranks)
        assert torch.equal(found.float(), plain.spread(together, ranks).float())
        assert torch.equal(ours.join(found).view(together.shape).float(), together.float())
        own = block_torch.Own(torch.empty_like(found[:, :1]), ranks - 1)
        found[:, :-1] = ours.normal_heads(states, norm, None, 1.0, fp8=fp8, parts=ranks, own=own)[:, :-1]
        assert torch.equal(torch.cat([found[:, :-1], own.memory], dim=1).float(), plain.spread(together, ranks).float())


@one_gpu
@pytest.mark.parametrize("features", [128, 1920, 3072, 12288])
def test_tokens_are_added_modulated_and_rounded_in_one_kernel_as_in_several(features):
    norm, text = torch.nn.LayerNorm(features), 5
    torch.nn.init.uniform_(norm.weight, 0.5, 1.5), torch.nn.init.normal_(norm.bias)
    states, update = torch.randn(2, 67, features).bfloat16() * 3, torch.randn(2, 67, features).bfloat16()
    first, second = torch.randn(2, 6 * features).bfloat16(), torch.randn(2, 6 * features).bfloat16()
    there = [part.cuda() for part in (states, update, first, second)]
    ours, plain, exact = (
        block.triton_kernels(),
        block_torch.TorchBlockOps(),
        [part.double() for part in (states, update, first, second)],
    )
    norm_there, layer = copy.deepcopy(norm).cuda(), torch.nn.Identity()
    expected, (seen,) = plain.add_and_modulate(*exact[:3], norm.double(), exact[3], text, rounded=None)
    total, (found,) = ours.add_and_modulate(*there[:3], norm_there, there[3], text, rounded=None)
    assert distance(total.cpu().double(), expected) < 3e-3 and distance(found.cpu().double(), seen) < 3e-3
    (gelu,) = plain.gelu(layer, (exact[0],), "tanh", rounded=None)
    for to, most in ((block_torch.FP8, 0.04), (block_torch.INT8, 0.02)):
        for (rows, scales), right in (
            (ours.add_and_modulate(*there[:3], norm_there, there[3], text, rounded=to)[1], seen),
            (ours.inputs(there[0], rounded=to), exact[0]),
            (ours.gelu(layer, (there[0],), "tanh", rounded=to), gelu),
        ):
            assert rows.dtype == to
            assert (scales.cpu() - block_torch.quantize_rows(right.flatten(0, 1), to)[1]).abs().max() <= 1e-3 * scales.max()
            assert distance((rows.flatten(0, 1).float() * scales).cpu().double(), right.flatten(0, 1)) < most
    (rows, scales), levels = (
        ours.inputs(there[0], rounded=block_torch.INT8),
        block_torch.quantize_rows(states.flatten(0, 1), block_torch.INT8),
    )
    assert torch.equal(rows.cpu().flatten(0, 1), levels[0]) and torch.equal(scales.cpu(), levels[1])


def heads_of(batch: int, queries: int, keys: int, heads: int, features: int) -> list[torch.Tensor]:
    """Normalised queries and keys, and values, in float64 on the GPU."""
    generator = torch.Generator().manual_seed(queries * keys)
    shapes = (batch, queries, heads, features), (batch, keys, heads, features), (batch, keys, heads, features)
    states = [torch.randn(shape, generator=generator, dtype=torch.float64).cuda() for shape in shapes]
    return [*(torch.nn.functional.layer_norm(part, (features,)) for part in states[:2]), states[2]]


def attend_exactly(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention and its log-sum-exp ``[batch, heads, tokens]`` in float64."""
    scores = torch.einsum("bqhd,bkhd->bhqk", query, key) / query.shape[-1] ** 0.5
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), value), scores.logsumexp(-1)


def attend_with_own(query, key, value, *, dtype=torch.bfloat16, fp8: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """This pack's attention of states in float64, and its log-sum-exp."""
    factors = operands.factors(query.shape[-1], base_two=True, fp8=fp8)
    query, key = ((part * factor).to(torch.float8_e4m3fn if fp8 else dtype) for part, factor in zip((query, key), factors))
    return own_attention(query, key, value.to(dtype))


ERRORS = {torch.bfloat16: 0.005, torch.float16: 0.001}


@hopper
@pytest.mark.parametrize("dtype", ERRORS)
@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("shape", [(2, 777, 1111, 3, 64), (1, 64, 128, 1, 64), (1, 200, 70, 2, 64), (2, 193, 384, 4, 32)])
def test_own_attention_is_attention_at_any_size(shape, fp8, dtype, monkeypatch):
    monkeypatch.setattr(hopper_fp8, "why_not", lambda device: "values in 16 bits are asked for")
    states = heads_of(*shape)
    expected, sums = attend_exactly(*states)
    found, log_sums = attend_with_own(*states, fp8=fp8, dtype=dtype)
    assert distance(found.double(), expected) < (0.06 if fp8 else ERRORS[dtype]) and found.dtype == dtype
    assert (log_sums - sums).abs().max() < (0.3 if fp8 else 0.02)
    assert choice.note_of_twice(found.device) is None


@hopper
def test_own_attention_takes_keys_that_are_part_of_something():
    query, key, value = heads_of(2, 300, 640, 3, 64)
    expected, _ = attend_exactly(query, key[:, :600], value[:, :600])
    factor, _ = operands.factors(64, base_two=True, fp8=False)
    near, whole = (query * factor).bfloat16(), [part.bfloat16() for part in (key, value)]
    turned = [part.transpose(1, 2).contiguous().transpose(1, 2) for part in whole]
    for keys, values in (whole, turned, (whole[0], turned[1])):
        assert distance(attend_own(near, keys[:, :600], values[:, :600]).double(), expected) < 0.005


@pytest.fixture
def pieces():
    """What is known of this GPU's attention, forgotten again at the end."""
    known = pieces_on(torch.device("cuda", 0))
    choice.note_of_twice(known.twice.device)
    yield known
    known.needs_maximum = False


@hopper
@pytest.mark.parametrize("dtype", ERRORS)
def test_rows_whose_scores_are_far_from_zero_are_attended_to_again(dtype, pieces):
    query, key, value = heads_of(1, 500, 700, 2, 64)
    query[:, 70:200] *= 60
    key += query[:, :1].mean()  # no two rows alike
    expected, sums = attend_exactly(query, key, value)
    found, log_sums = attend_with_own(query, key, value, dtype=dtype)
    assert (log_sums - sums).abs().max() < 0.02 * sums.abs().max() and distance(found.double(), expected) < 0.1
    assert distance(found[:, :64].double(), expected[:, :64]) < ERRORS[dtype]  # a piece that nothing was wrong with
    assert "of attention was computed twice" in choice.note_of_twice(value.device)
    value[0, 3, 1, 0] = torch.nan
    assert attend_with_own(query, key, value, dtype=dtype)[0].isnan().any()


@hopper
@pytest.mark.parametrize("running", [False, True])
def test_in_fp16_every_tile_of_keys_may_have_larger_scores_than_those_before(running, pieces):
    query, key, value = heads_of(1, 200, 1200, 2, 64)
    slope = torch.linspace(-12, 12, 1200, dtype=torch.float64, device="cuda")[:, None]
    pieces.needs_maximum = running
    # Twice the largest are known before, as neighbours or in the tile that comes first; in the middle they are not.
    for peak, is_known in ((-slope, True), (slope, True), (12 - slope.abs(), False)):
        query[..., 0], key[..., 0] = 12, peak
        expected, sums = attend_exactly(query, key, value)
        found, log_sums = attend_with_own(query, key, value, dtype=torch.float16)
        assert distance(found.double(), expected) < 0.01 and (log_sums - sums).abs().max() < 0.05
        assert (choice.note_of_twice(value.device) is None) == (running or is_known)


@hopper
@pytest.mark.parametrize("dtype", ERRORS)
def test_scores_far_from_zero_bring_a_running_maximum_after_a_forward_or_two(dtype, pieces):
    query, key, value = heads_of(1, 500, 700, 2, 64)
    states = torch.zeros(1, device="cuda", dtype=dtype)
    forwards = []
    for _ in range(3):
        choice.begin(registry.FUNCTIONS["hopper"], states.device)
        forwards.append((pieces.needs_maximum, attend_with_own(query * 60, key, value, dtype=dtype)))
        torch.cuda.synchronize()
    assert [needed for needed, _ in forwards] == [False, False, True]
    expected, sums = attend_exactly(query * 60, key, value)
    for _, (found, log_sums) in forwards:
        assert distance(found.double(), expected) < 0.1 and (log_sums - sums).abs().max() < 0.02 * sums.abs().max()
    note = choice.note_of_twice(value.device)
    assert "of attention was computed twice" in note and "until the kernel for such scores took over" in note


def rounded_heads(query: torch.Tensor, key: torch.Tensor) -> list[torch.Tensor]:
    """Queries and keys as e4m3 has them, in float64: what is left between two attentions of them is from what comes later."""
    factors = operands.factors(query.shape[-1], base_two=True, fp8=True)
    return [(part * factor).to(torch.float8_e4m3fn).double() / factor for part, factor in zip((query, key), factors)]


def attend_all_in_fp8(query, key, value, raises: bool, dtype=torch.bfloat16) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention with values in FP8 of states in float64, and its log-sum-exp."""
    factors = operands.factors(query.shape[-1], base_two=True, fp8=True)
    query, key = ((part * factor).to(torch.float8_e4m3fn) for part, factor in zip((query, key), factors))
    found, log_sums = attend_in_fp8(query, key, value.to(dtype), raises=raises)
    return found.double(), log_sums


@hopper
@pytest.mark.parametrize("raises", [False, True])
@pytest.mark.parametrize("shape", [(2, 777, 1111, 3, 64), (1, 64, 128, 1, 64), (1, 200, 70, 2, 64), (2, 193, 384, 4, 32)])
def test_attention_with_values_in_fp8_is_attention_at_any_size(shape, raises):
    query, key, value = heads_of(*shape)
    middle = 3 * torch.randn(shape[3:], dtype=torch.float64).cuda()  # which centers take out
    expected, sums = attend_exactly(*rounded_heads(query, key), value)
    for dtype in ERRORS:
        found, log_sums = attend_all_in_fp8(query, key, value + middle, raises, dtype)
        error = (found - middle - expected).norm()  # the result is rounded with its middle
        assert error < 0.07 * expected.norm() + ERRORS[dtype] * (expected + middle).norm()
        assert (log_sums - sums).abs().max() < 0.05


@hopper
@pytest.mark.parametrize("raises", [False, True])
def test_with_values_in_fp8_one_key_is_what_is_seen(raises):
    query, key, value = heads_of(1, 65, 1, 2, 64)
    _, sums = attend_exactly(*rounded_heads(query, key), value)
    found, log_sums = attend_all_in_fp8(query, key, value, raises)
    assert (found - value).abs().max() < 0.02 and (log_sums - sums).abs().max() < 0.1


@hopper
@pytest.mark.parametrize("raises", [False, True])
def test_with_values_in_fp8_references_follow_the_scores(raises):
    query, key, value = heads_of(1, 200, 1200, 2, 64)
    query[..., 0], key[..., 0] = 12, torch.linspace(12, 0, 1200, dtype=torch.float64, device="cuda")[:, None]
    choice.note_of_twice(value.device)
    for turned in (key, key.flip(1)):
        expected, sums = attend_exactly(*rounded_heads(query, turned), value)
        found, log_sums = attend_all_in_fp8(query, turned, value, raises)
        assert distance(found, expected) < 0.07 and (log_sums - sums).abs().max() < 0.1
        assert choice.note_of_twice(value.device) is None or not raises


@hopper
@pytest.mark.parametrize("raises", [False, True])
def test_with_values_in_fp8_rows_that_fail_are_attended_to_again(raises):
    query, key, value = heads_of(1, 500, 700, 2, 64)
    query[:, 70:200] *= 60
    key += query[:, :1].mean()
    expected, sums = attend_exactly(*rounded_heads(query, key), value)
    choice.note_of_twice(value.device)
    found, log_sums = attend_all_in_fp8(query, key, value, raises)
    assert "of attention was computed twice" in choice.note_of_twice(value.device)
    assert distance(found[:, 70:200], expected[:, 70:200]) < 0.1 and distance(found[:, :64], expected[:, :64]) < 0.07
    assert (log_sums - sums).abs().max() < 0.02 * sums.abs().max()
    value[0, 3, 1, 0] = torch.nan
    assert attend_all_in_fp8(query, key, value, raises)[0].isnan().any()


@hopper
def test_with_values_in_fp8_keys_and_values_may_be_part_of_something():
    query, key, value = heads_of(2, 300, 640, 3, 64)
    expected, _ = attend_exactly(query, key[:, :600], value[:, :600])
    factor, _ = operands.factors(64, base_two=True, fp8=False)
    query, key = operands.in_fp8((query * factor).bfloat16(), key.bfloat16())
    assert hopper_fp8.why_not(query.device) is None
    turned = value.bfloat16().transpose(1, 2).contiguous().transpose(1, 2)
    for values in (value.bfloat16(), turned):
        assert distance(attend_own(query, key[:, :600], values[:, :600]).double(), expected) < 0.08


@one_gpu
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("name", registry.FUNCTIONS)
def test_every_attention_function_that_can_be_used_is_near_float64(name, dtype):
    kind, function = Kind(torch.device("cuda", 0), DTYPES[dtype], 64), registry.FUNCTIONS[name]
    if missing := function.missing(kind):
        pytest.skip(missing)
    assert trial.why_not(kind, function) is None
    states = heads_of(2, 777, 1111, 3, 64)
    expected, sums = attend_exactly(*states)
    found = function.attend(*function.operands(*states, kind.dtype))
    assert found.dtype == kind.dtype and distance(found.double(), expected) < function.near
    if function.attend_with_sums:
        found, log_sums = function.attend_with_sums(*function.operands(*states, kind.dtype, in_ring=True))
        assert distance(found.double(), expected) < function.near
        assert (log_sums - sums).abs().max() < (0.05 if function.is_exact else 0.3)


@one_gpu
def test_auto_takes_the_fastest_exact_function_of_the_benchmarks_table():
    found = [*attention_rows(Kind(torch.device("cuda", 0), torch.bfloat16, 64), tokens=16384, heads=8)]
    times = {row.function.name: row.milliseconds for row in found if row.function.is_exact and not row.reason}
    (chosen,) = (row.function.name for row in found if row.is_chosen)
    assert times[chosen] <= 1.2 * min(times.values()), times  # two that are equally fast may change places


@two_gpus
@pytest.mark.parametrize("name", ["cudnn", "flash", "efficient", "int8", "sage", "fp8"])
def test_named_attention_is_as_near_in_every_plan_as_in_single(name, group, on_gpu, make_job, checkpoints):
    path = str(checkpoints["5b"])
    kind = Kind(torch.device("cuda", 0), torch.bfloat16, Checkpoint.open(path).head_dim)
    if reason := trial.why_not(kind, registry.FUNCTIONS[name]):
        pytest.skip(reason)
    if group.plan.ring > 1 and not registry.can_ring(name):
        pytest.skip("it does not work in a ring")
    exact = on_gpu.sample(make_job("5b", model=Model(path, dtype="fp32"), steps=2, scheduler="ddim")).tensor
    job = make_job("5b", model=Model(path, dtype="bf16", attention=name), steps=2, scheduler="ddim")
    assert distance(group.sample(job).tensor, exact) <= 1.5 * distance(on_gpu.sample(job).tensor, exact)


@two_gpus
@pytest.mark.parametrize("fp8", ["off", "linears", "all"])
def test_compiled_and_fp8_plans_are_as_near_to_float32_as_single(fp8, group, on_gpu, make_job, checkpoints):
    job = make_job("5b", model=Model(str(checkpoints["5b"])))
    assert rounding(group, job, compile="on", fp8=fp8) <= 1.2 * rounding(on_gpu, job, compile="on", fp8=fp8)


@two_gpus
def test_strips_over_nccl_equal_one_gpu(group, on_gpu, checkpoints):
    model = Model(str(checkpoints["5b"]), dtype="fp32")
    latent = torch.randn(1, 16, 5, 14, 10, generator=torch.Generator().manual_seed(0))
    pixels = torch.rand(9, 112, 80, 3, generator=torch.Generator().manual_seed(0))
    for run, asked in (("decode", DecodeJob(model, latent)), ("encode", EncodeJob(model, pixels))):
        difference = (getattr(group, run)(asked).tensor - getattr(on_gpu, run)(asked).tensor).abs().max()
        assert difference <= 10 * TOLERANCE


@one_gpu
@pytest.mark.parametrize("kind", VAE_KINDS)
def test_a_gpu_stops_the_vae_at_the_next_batch_of_frames(kind, on_gpu, checkpoints):
    job, whole = vae_job(kind, checkpoints, rows=12, columns=18, frames=9), Stop()
    expected = on_gpu.run(job, should_stop=whole).tensor
    assert whole.asked >= 4
    for after in (1, whole.asked // 2 + 1):
        with pytest.raises(Cancelled, match="while the VAE was at work"):
            on_gpu.run(job, should_stop=Stop(after))
    assert torch.equal(on_gpu.run(job).tensor, expected)


@two_gpus
@pytest.mark.parametrize("kind", VAE_KINDS)
def test_a_group_on_gpus_stops_the_vae_on_all_ranks_and_stays_warm(kind, group, checkpoints):
    small = vae_job(kind, checkpoints, rows=12, columns=18, frames=5)
    large = vae_job(kind, checkpoints, rows=60, columns=90, frames=41)
    expected, address = group.run(small).tensor, group.address
    with pytest.raises(Cancelled, match="while the VAE was at work"):
        group.run(large, should_stop=lambda: group.status()["state"] == "busy")
    assert torch.equal(group.run(small).tensor, expected) and group.address == address


@one_gpu
@pytest.mark.parametrize("frames", [3, 4])
def test_the_vae_s_kernels_are_exact_in_float32_and_as_near_to_it_in_16_bit_as_torch_s(frames, on_gpu, local, checkpoints):
    latent = torch.randn(1, 16, frames, 12, 18, generator=torch.Generator().manual_seed(7))
    model = Model(str(checkpoints["5b"]), dtype="fp32")
    exact = local.decode(DecodeJob(model, latent, "off")).tensor
    encoded = local.encode(EncodeJob(model, exact[0])).tensor
    for setting in ("on", "off"):
        asked = replace(model, compile=setting)
        result = on_gpu.decode(DecodeJob(asked, latent, "off"))
        assert not result.report.notes and (result.tensor - exact).abs().max() <= 10 * TOLERANCE
        assert (on_gpu.encode(EncodeJob(asked, exact[0])).tensor - encoded).abs().max() <= 10 * TOLERANCE
    distances = [
        distance(on_gpu.decode(DecodeJob(replace(model, dtype="bf16", compile=setting), latent, "off")).tensor, exact)
        for setting in ("on", "off")
    ]
    assert distances[0] <= 1.1 * distances[1]


int8 = pytest.mark.skipif(
    torch.cuda.device_count() < 1 or quantized_linear.missing("int8", torch.device("cuda", 0)) is not None,
    reason="needs a GPU from Turing on",
)


@int8
@pytest.mark.parametrize("dtype, rows", [(torch.bfloat16, 1027), (torch.float16, 64), (torch.float32, 2)])
@pytest.mark.parametrize("way", ["fused", "torch"])
def test_torch_multiplies_in_int8_exactly_and_in_parts(way, dtype, rows, monkeypatch):
    linear, states = torch.nn.Linear(384, 256, dtype=dtype), torch.randn(2, rows, 384, dtype=dtype)
    layer = quantized_linear.Int8Linear(linear)
    rounded, there = layer(states), states.cuda()
    layer.cuda()
    monkeypatch.setattr(int8_product, "AT_ONCE", 256 * 128)
    if way == "torch":
        found = layer.product(there.flatten(0, 1)).unflatten(0, there.shape[:2])
    else:
        found = layer(*block.triton_kernels().inputs(there, rounded=torch.int8))
    assert (
        found.dtype == dtype
        and distance(found.cpu(), rounded) < {torch.bfloat16: 5e-3, torch.float16: 1e-3, torch.float32: 1e-5}[dtype]
    )


@int8
@pytest.mark.parametrize("features", [128, 1920, 3072])
def test_rounded_tokens_give_a_feed_forward_that_layers_give_which_round_them_themselves(features):
    device = torch.device("cuda", 0)
    assert int8_choice.why_not_rounded(device, torch.float16, features) is None
    with torch.inference_mode():
        sample = int8_choice.Sample(device, torch.float16, features, 300)
        found, expected = sample.run(block.triton_kernels(), torch.int8), sample.run(block_torch.TorchBlockOps(), None)
    assert all(distance(ours.float(), other.float()) < 0.03 for ours, other in zip(found, expected))


@int8
def test_int8_products_are_timed_once_on_a_gpu(tmp_path, monkeypatch):
    if quantized_linear.why_no_kitchen(torch.device("cuda", 0)):
        pytest.skip("needs comfy-kitchen")
    monkeypatch.setattr(timings, "FILE", tmp_path / "attention.json")
    about = torch.device("cuda", 0), torch.float16, 1920
    found = int8_choice.measured.__wrapped__(*about)
    assert found.milliseconds.keys() == {int8_choice.TORCH, int8_choice.KITCHEN} and min(found.milliseconds.values()) > 0
    assert int8_choice.measured.__wrapped__(*about) == found


@int8
@pytest.mark.parametrize("dtype, rows", [(torch.bfloat16, 1027), (torch.float16, 64), (torch.float32, 2)])
def test_comfy_kitchen_s_product_is_that_of_the_rounded_numbers_on_a_gpu_too(dtype, rows):
    """comfy-kitchen rounds a token's scale, and what it divides, to the dtype of the states: in bf16 that costs as much as int8 itself."""
    if quantized_linear.why_no_kitchen(torch.device("cuda", 0)):
        pytest.skip("needs comfy-kitchen")
    linear, states = torch.nn.Linear(384, 256, dtype=dtype), torch.randn(2, rows, 384, dtype=dtype)
    exact = linear.float()(states.float())
    layer = quantized_linear.Int8Linear(linear.to(dtype))
    rounded, found = layer(states).float(), layer.cuda()(states.cuda())
    assert found.dtype == dtype and found.shape == exact.shape
    most = 1.2 if dtype == torch.bfloat16 else 0.5
    assert distance(found.float().cpu(), rounded) < most * distance(rounded, exact)
    assert distance(found.float().cpu(), exact) < 1.6 * distance(rounded, exact)


@int8
@pytest.mark.parametrize("compile", ["on", "off"])
def test_int8_is_nearer_than_fp8_and_as_small(compile, on_gpu, make_job, checkpoints):
    job = make_job("5b", model=Model(str(checkpoints["5b"])))
    assert rounding(on_gpu, job, compile="off") < rounding(on_gpu, job, compile=compile, quantize="int8") < 0.05
    held = on_gpu.status()["weights"]["transformer"]
    plain = Checkpoint.open(checkpoints["5b"]).weight_bytes("transformer", torch.bfloat16)
    assert held < 0.8 * plain


@int8
@pytest.mark.parametrize("mode", ["group", "sequential"])
def test_int8_is_offloaded_in_parts(mode, on_gpu, make_job, checkpoints):
    model = Model(str(checkpoints["5b"]), dtype="bf16", quantize="int8", compile="off")
    found = [on_gpu.sample(make_job("5b", model=replace(model, offload=offload))).tensor for offload in ("none", mode)]
    assert torch.equal(*found)


@int8
@two_gpus
def test_int8_is_as_near_in_every_plan_as_in_single(group, on_gpu, make_job, checkpoints):
    if group.plan.fsdp > 1 and Version(torch.__version__) < fsdp.INTEGERS:
        pytest.skip(f"fsdp needs torch {fsdp.INTEGERS} for integers")
    job = make_job("5b", model=Model(str(checkpoints["5b"])))
    assert rounding(group, job, quantize="int8") <= 1.5 * rounding(on_gpu, job, quantize="int8")


@one_gpu
def test_the_demo_s_kernels_are_compiled_and_give_the_same_video(on_gpu):
    plain = demo_job(96, 64, 17, steps=4)
    plain = replace(plain, model=replace(plain.model, dtype="fp32", compile="off"))
    job = replace(plain, model=replace(plain.model, compile="on"))
    results = [on_gpu.sample(each) for each in (plain, job)]
    results += [on_gpu.decode(DecodeJob(each.model, results[0].tensor)) for each in (plain, job)]
    expected = ("attention: ", "offload was ")
    assert not [note for result in results for note in result.report.notes if not note.startswith(expected)]
    for one, other in (results[:2], results[2:]):
        assert (one.tensor - other.tensor).abs().max() <= 10 * TOLERANCE
