"""Plans that split weights give the latents of ``single``, each rank with its part of them alone."""

from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import pytest
import torch

from parallel_backend.cli.bench_table import distance
from parallel_backend.cogvideox import offload
from parallel_backend.cogvideox.checkpoint.checkpoint import Checkpoint
from parallel_backend.cogvideox.checkpoint.shards import BLOCKS, Shard
from parallel_backend.cogvideox.transformer import quantized_linear
from parallel_backend.devices import Devices
from parallel_backend.errors import RequestError
from parallel_backend.executor.group import GroupExecutor
from parallel_backend.executor.resolve import resolve
from parallel_backend.parallel.fsdp import check_dtypes
from parallel_backend.plan import Plan
from parallel_backend.workload import Workload

from .conftest import TOLERANCE
from .support.ranks import results_of

TWO = ["tensor2", "cfg2-fsdp2", "ulysses2-fsdp2", "ring2-fsdp2"]
FOUR = ["tensor4", "cfg2-tensor2", "tensor2-ulysses2", "tensor2-ring2", "cfg2-tensor2-fsdp2", "cfg2-ulysses2-fsdp4"]
CASES = [
    ("2b", {"size": (80, 48, 13), "scheduler": "dpm", "dynamic_cfg": True}),
    ("5b", {"size": (48, 48, 9), "scheduler": "ddim", "lora": 0.8}),
    ("5b", {"size": (80, 64, 9), "scheduler": "dpm", "batch": 2}),  # and without it again
    ("5b", {"size": (48, 48, 5), "scheduler": "ddim", "fp8": "linears", "lora": -1.5}),
    ("5b", {"size": (80, 48, 5), "scheduler": "ddim", "quantize": "int8", "lora": 0.8}),
    ("1.5-5b", {"size": (80, 48, 13), "scheduler": "dpm", "in_one_file": True, "lora": 0.5}),
    ("5b-i2v", {"size": (96, 64, 9), "scheduler": "dpm", "cfg": 1.0, "image": torch.randn(1, 16, 1, 8, 12)}),
]


@pytest.fixture(scope="module")
def jobs(make_job):
    made = []
    for like, settings in CASES:
        settings = {"steps": 3, **settings}
        kind = {name: settings.pop(name) for name in ("fp8", "quantize") if name in settings}
        job = make_job(like, **settings)
        made.append(replace(job, model=replace(job.model, **kind)))
    return made


@pytest.fixture(scope="module")
def single(jobs, local) -> list[torch.Tensor]:
    """What this process alone makes of each job."""
    return [local.sample(job).tensor for job in jobs]


@pytest.fixture(scope="module")
def exact(jobs, single, local) -> list[torch.Tensor]:
    """What this process makes of each job without quantization."""
    return [
        expected
        if job.model.quantization == "off"
        else local.sample(replace(job, model=replace(job.model, fp8="off", quantize="off"))).tensor
        for job, expected in zip(jobs, single)
    ]


@pytest.fixture(scope="module")
def ranks_made(jobs, tmp_path_factory) -> dict[str, tuple[list[torch.Tensor], list[list[int]]]]:
    """What processes make of the jobs under each plan, and the bytes of weights that each has."""
    return results_of(tmp_path_factory.mktemp("ranks"), jobs, [*TWO, *FOUR])


@pytest.mark.parametrize("plan", [*TWO, *FOUR])
@pytest.mark.slow
def test_a_plan_that_splits_weights_equals_single_and_each_rank_holds_its_part(plan, jobs, single, exact, ranks_made):
    made, held = ranks_made[plan]
    assert len(made) == len(held) == len(jobs)
    for job, found, expected, unrounded, bytes_held in zip(jobs, made, single, exact, held):
        if job.model.quantization == "off":
            assert (found - expected).abs().max() <= TOLERANCE, job
        else:  # a row's scale is that of a rank's columns, and a rounding that falls the other way is a step of 8 bits
            rounded = distance(expected, unrounded)
            assert distance(found, unrounded) < 1.5 * rounded and distance(found, expected) < 1.5 * rounded
        checkpoint = Checkpoint.open(job.model.path)
        whole, part = (
            offload.transformer_bytes(checkpoint, of, torch.float32, quantized=job.model.quantization != "off")
            for of in (Plan(), Plan.parse(plan))
        )
        assert part < 0.9 * whole
        if checkpoint.rotary:  # 2b has a table of positions, too
            assert all(count == pytest.approx(part, rel=0.05) for count in bytes_held)


@pytest.mark.slow
def test_a_group_that_shards_weights_takes_every_kind_of_job(start_group, jobs, single):
    group = start_group("cfg2-fsdp2")
    for job, expected in zip(jobs[1:3], single[1:3]):
        result = group.sample(job)
        assert (result.tensor - expected).abs().max() <= TOLERANCE
        assert (result.report.plan, result.report.world_size) == ("cfg2-fsdp2", 2)
    weights = group.status()["weights"]
    group.free()
    assert group.status()["state"] == "absent"
    assert (group.sample(jobs[2]).tensor - single[2]).abs().max() <= TOLERANCE
    assert group.status()["weights"] == weights


def test_what_a_plan_cannot_do_is_refused_before_processes_start(jobs):
    group = GroupExecutor(Plan.parse("cfg2-fsdp2"), Devices("cpu", (0, 1)))
    for mode in ("group", "sequential"):
        with pytest.raises(RequestError, match=f"offload '{mode}' keeps weights on the CPU.* use plan 'cfg2', or") as error:
            group.check(replace(jobs[0], model=replace(jobs[0].model, offload=mode)))
        assert "\n" not in str(error.value)
        with pytest.raises(RequestError, match="use plan 'cfg2', or"):
            resolve("cfg2-fsdp2", "cpu:2", Workload(4, offload=mode))


@pytest.mark.parametrize("tensor, fsdp", [(1, 1), (2, 1), (4, 1), (1, 3), (2, 2)])
def test_ranks_read_every_weight_once_and_no_more_of_it_than_they_keep(tensor, fsdp, checkpoints):
    stored = Checkpoint.open(checkpoints["5b"]).stored
    whole = dict(Shard().read(stored))
    ranks = [[dict(Shard(tensor, left, fsdp, right).read(stored)) for right in range(fsdp)] for left in range(tensor)]
    for name, weight in whole.items():
        columns = [torch.cat([rank[name] for rank in row]) if name.startswith(BLOCKS) else row[0][name] for row in ranks]
        if columns[0].shape == weight.shape:
            brought = sum(columns) if name.endswith(("to_out.0.bias", "net.2.bias")) else columns[-1]
        else:
            brought = torch.cat(columns, dim=int(columns[0].shape[0] == weight.shape[0]))
        assert torch.equal(brought, weight), name
    if tensor * fsdp > 1:
        assert sum(weight.numel() for weight in ranks[0][0].values()) < 0.8 * sum(weight.numel() for weight in whole.values())


@pytest.mark.parametrize("kind", ["off", "fp8", "int8"])
def test_the_estimate_of_weights_is_what_is_loaded(kind, checkpoints):
    checkpoint = Checkpoint.open(checkpoints["1.5-5b"])
    prepare = (lambda skeleton: None) if kind == "off" else partial(quantized_linear.convert, kind=kind)
    loaded = checkpoint.load_transformer(torch.bfloat16, prepare=prepare)
    assert sum(weight.nbytes for weight in loaded.parameters()) == offload.transformer_bytes(
        checkpoint, Plan(), torch.bfloat16, quantized=kind != "off"
    )


def test_splitting_frees_room_and_gathering_takes_some_back(jobs):
    job = jobs[1]
    checkpoint = Checkpoint.open(job.model.path)

    def working(plan: str) -> int:
        return offload.working_bytes(job, checkpoint, Plan.parse(plan), torch.float32)

    block = offload.block_bytes(checkpoint, Plan(), torch.float32) // checkpoint.layers
    assert working("cfg2-fsdp2") - working("cfg2") == pytest.approx(offload.GATHERED * block, abs=10)
    assert working("single") > working("tensor2") > working("tensor4") > working("single") / 2
    settings = {"weights": 2**30, "others": 0, "layers": 42, "free": 2**30, "in_parts": False}
    assert offload.choose_offload("auto", working=2**20, **{**settings, "free": 2**31}) == ("none", None)
    mode, note = offload.choose_offload("auto", working=2**20, **settings)
    assert mode == "model" and "use more fsdp" in note


INT8 = {torch.bfloat16, torch.float32, torch.int8}
FP8 = {torch.bfloat16, torch.float32, torch.float8_e4m3fn}


@pytest.mark.parametrize(
    "version, dtypes, words",
    [
        ("2.7.1", {torch.bfloat16}, None),
        ("2.7.1", FP8, "torch 2.8 or newer for weights in FP8, this is 2.7.1; use quantize off, or tensor"),
        ("2.8.0+cu126", FP8, None),
        ("2.11.0+cu130", INT8, "torch 2.12 or newer for weights in int8, this is 2.11.0"),
        ("2.12.0", INT8, None),
    ],
)
def test_quantised_weights_are_sharded_only_by_a_torch_that_can(version, dtypes, words, monkeypatch):
    monkeypatch.setattr(torch, "__version__", version)
    with pytest.raises(RequestError, match=words) if words else nullcontext():
        check_dtypes(dtypes)
