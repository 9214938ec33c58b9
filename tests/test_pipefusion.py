"""Pipelines equal ``single`` while they warm up, and then what one process makes of the same patches; each rank has its blocks."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from benchmarks.random_weights import build
from parallel_backend.cli.bench_table import distance
from parallel_backend.cli.parser import main
from parallel_backend.cogvideox import offload
from parallel_backend.cogvideox.attention.torch_attention import attend_torch
from parallel_backend.cogvideox.checkpoint.checkpoint import Checkpoint
from parallel_backend.cogvideox.checkpoint.shards import BLOCKS
from parallel_backend.engine.engine import Engine
from parallel_backend.errors import Cancelled, RequestError
from parallel_backend.executor.base import Executor
from parallel_backend.executor.group import GroupExecutor
from parallel_backend.group.job_loop import JobLoop
from parallel_backend.jobs import SampleJob, empty_latent
from parallel_backend.model import Model, Windows
from parallel_backend.notes import is_warning
from parallel_backend.parallel.pipefusion import KeptOfJob, PatchAttention, Pipe, Stage
from parallel_backend.parallel.rank import RankContext
from parallel_backend.plan import Plan
from parallel_backend.planner.cost_model import HEADROOM, predict
from parallel_backend.planner.gpu_table import KNOWN
from parallel_backend.planner.machine import Link
from parallel_backend.planner.planner import approximations, assumed, choose
from parallel_backend.planner.work import patches
from parallel_backend.workload import Workload

from .conftest import TOLERANCE, MadeWhenAsked, demo_job, workers
from .support.ranks import results_of

PLANS = {2: ["pipefusion2"], 4: ["pipefusion4", "cfg2-pipefusion2", "ulysses2-pipefusion2"]}
LAYERS = 5
"""Of the random models: no number of stages divides them."""
CASES = [
    ("2b", {"size": (80, 48, 13), "scheduler": "dpm", "dynamic_cfg": True}),
    ("5b", {"size": (48, 48, 9), "scheduler": "ddim", "lora": 0.8}),
    ("5b", {"size": (80, 64, 9), "scheduler": "dpm", "batch": 2}),  # and without it again
    ("5b", {"size": (48, 48, 5), "scheduler": "ddim", "fp8": "linears"}),
    ("5b", {"size": (80, 48, 25), "scheduler": "dpm", "cfg": 1.0, "windows": Windows(17, 12, riflex="finetuned")}),
    ("1.5-5b", {"size": (80, 48, 13), "scheduler": "dpm"}),
    ("5b-i2v", {"size": (96, 64, 9), "scheduler": "dpm", "cfg": 1.0, "image": torch.randn(1, 16, 1, 8, 12)}),
]
STEPS = 6
BOUND = 1.0
"""Of a late job's distance to ``single``, relative: further off than another seed's video is a mistake. See benchmarks/results."""


class OneStage:
    """The pipe of a process that has all blocks, and cuts a sequence as so many stages would."""

    is_first = is_last = True
    is_under_way = False
    blocks = range

    def __init__(self, stages: int):
        self.stages = stages

    def end(self) -> None:
        """Nothing was sent."""

    def from_last(self, tensor: torch.Tensor) -> torch.Tensor:
        """Its own."""
        return tensor


class Patched(RankContext):
    """One process that computes the patches of a pipeline, one after the other: what a pipeline is to make."""

    def __init__(self, stages: int, device: str = "cpu"):
        super().__init__(torch.device(device))
        self.pipe = OneStage(stages)

    def attach(self, transformer, **settings) -> None:
        self.stage = Stage(transformer, self.pipe)

    def caches(self, job: SampleJob) -> KeptOfJob:
        return KeptOfJob(job.pipefusion_warmup)


@pytest.fixture(scope="module")
def deep(tmp_path_factory, checkpoints):
    """The small random models, with more blocks than stages."""
    root = tmp_path_factory.mktemp("deep")
    return MadeWhenAsked(lambda like: str(build(root / like, like=like, layers=LAYERS)))


@pytest.fixture(scope="module")
def exact(deep, make_job) -> list[SampleJob]:
    """Jobs that warm up all the way."""
    made = []
    for like, settings in CASES:
        settings = {"steps": 2, "pipefusion_warmup": 2, **settings}
        kind = settings.pop("fp8", "off")
        job = make_job(like, **settings)
        made.append(replace(job, model=replace(job.model, path=deep[like], fp8=kind)))
    return made


@pytest.fixture(scope="module")
def late() -> SampleJob:
    """Of 128 tokens, which every plan here cuts alike."""
    return demo_job(96, 64, 13, steps=STEPS, pipefusion_warmup=1)


def own_bytes(checkpoint: Checkpoint, blocks: range) -> int:
    """Bytes in float32 of a checkpoint's weights outside of blocks, and of these blocks."""
    names = checkpoint.stored
    mine = [name for name in names if not name.startswith(BLOCKS) or int(name.split(".")[1]) in blocks]
    return sum(4 * torch.Size(names[name].shape).numel() for name in mine)


@pytest.mark.parametrize("size", PLANS)
@pytest.mark.slow
def test_pipelines_equal_single_while_warming_up_and_one_process_with_the_same_patches_later(
    size, exact, late, local, tmp_path
):
    if size > 2:  # four processes take long to load a model
        exact = [job for job in exact if job.model.fp8 == "off" and job.windows is None and job.image is None]
    jobs = [*exact, late, replace(late, seed=2, pipefusion_warmup=2), late]
    single = [local.sample(job).tensor for job in jobs]
    for plan, (made, held) in results_of(tmp_path, jobs, PLANS[size]).items():
        parsed = Plan.parse(plan)
        for job, found, expected in zip(exact, made, single):
            assert (found - expected).abs().max() <= TOLERANCE, (plan, job)
        patched = Engine(Patched(parsed.pipefusion))
        for job, found, expected in zip(jobs[len(exact) :], made[len(exact) :], single[len(exact) :]):
            assert (found - patched.run(job).tensor).abs().max() <= TOLERANCE, plan
            assert 1e-3 < distance(found, expected) < BOUND, plan
        assert torch.equal(made[-1], made[-3])  # nothing of the job between is left
        for job, bytes_held in zip(jobs, held):
            checkpoint = Checkpoint.open(job.model.path)
            if job.model.fp8 != "off" or not checkpoint.rotary:  # 2b has a table of positions, too
                continue
            for rank, found in enumerate(bytes_held):
                stage = rank // parsed.ulysses % parsed.pipefusion
                blocks = Pipe.blocks(SimpleNamespace(stages=parsed.pipefusion, stage=stage), checkpoint.layers)
                assert found == own_bytes(checkpoint, blocks), (plan, rank)


def test_a_patch_attends_to_this_steps_keys_up_to_its_own_and_to_the_last_steps_behind():
    asked = PatchAttention()
    asked.whole, asked.tokens, asked.block, asked.kept = attend_torch, 10, "3", {}
    steps = [[torch.randn(2, 12, 4, 8) for _ in range(3)] for _ in range(2)]
    shown = [states[:, :10].clone() for states in steps[0][1:]]
    asked.place = slice(0, 10)
    assert torch.equal(asked.attend(*steps[0]), attend_torch(steps[0][0], *shown))
    for start in (0, 4, 8):  # the last patch ends in padding
        query, *own = (states[:, start : start + 4] for states in steps[1])
        asked.place = slice(start, min(start + 4, 10))
        for before, now in zip(shown, own):
            before[:, asked.place] = now[:, : asked.place.stop - start]
        assert torch.equal(asked.attend(query, *own), attend_torch(query, *shown))


def test_more_warm_up_is_nearer_and_the_person_is_told(late, local):
    expected, engine, distances = local.sample(late).tensor, Engine(Patched(2)), []
    for warmup in (1, 3, STEPS - 1):
        result = engine.run(replace(late, pipefusion_warmup=warmup))
        distances.append(distance(result.tensor, expected))
        (note,) = result.report.notes
        assert note.startswith(
            f"pipefusion: {STEPS - warmup} of {STEPS} forwards attended to keys and values of the step before"
        )
    assert distances == sorted(distances, reverse=True) and distances[-1] > 0
    result = engine.run(replace(late, pipefusion_warmup=STEPS))
    assert torch.equal(result.tensor, expected) and not result.report.notes


def test_what_is_kept_is_what_was_planned_and_goes_with_the_job(late, deep, make_job, monkeypatch):
    seen = []
    monkeypatch.setattr(KeptOfJob, "notes", property(lambda self: seen.append([*self._windows.values()]) or []))
    long = make_job("5b", size=(80, 48, 25), steps=2, windows=Windows(17, 12))
    for job in (late, replace(late, cfg=1.0), replace(long, model=Model(deep["5b"]))):
        engine = Engine(Patched(2))
        engine.run(job)
        checkpoint = Checkpoint.open(job.model.path)
        less, more = (offload.working_bytes(job, checkpoint, plan, torch.float32) for plan in (Plan(), Plan(pipefusion=4)))
        share = -(-checkpoint.layers // 4) / checkpoint.layers
        kept = seen.pop()
        assert sum(window.nbytes for window in kept) * share == pytest.approx(more - less, rel=1e-6)
        assert len(kept) == (2 if job.windows else 1) and {window.forwards for window in kept} == {job.steps}
        assert engine.context.stage.attention.kept == {} and not engine.context.pipe.is_under_way


def test_a_job_that_goes_on_warms_up_again_and_says_so(late):
    engine, kept = Engine(Patched(2)), []
    engine.run(late, lambda progress, steps: kept.append(progress) or True)
    result = engine.run(replace(late, progress=kept[-2]))
    assert result.report.notes == (
        "pipefusion warmed up again on the way, so this is not quite the video of an undisturbed run",
    )


def test_a_cancelled_job_leaves_a_warm_group_and_no_trace(late, start_group):
    group = start_group("pipefusion2")
    expected, loads, seen = group.sample(late).tensor, group.status()["loads"], []
    slow = replace(late, latent=empty_latent(width=480, height=320, frames=17), steps=200)
    with pytest.raises(Cancelled):
        group.sample(slow, on_step=lambda step, _: seen.append(step), should_stop=lambda: len(seen) >= 2)
    assert seen[-1] <= 3
    result = group.sample(late)
    assert torch.equal(result.tensor, expected) and group.status()["loads"] == loads
    (note,) = result.report.notes
    assert result.report.plan == "pipefusion2" and not is_warning(note)


def test_a_rank_that_fails_in_a_forward_ends_the_group_whose_patches_would_be_the_next_jobs(late, monkeypatch):
    engine = Engine(Patched(2))
    engine.run(late)
    assert not engine.context.pipe.is_under_way
    monkeypatch.setattr(engine.context.pipe, "end", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        engine.run(late)
    assert engine.context.pipe.is_under_way

    def leave(status):
        raise SystemExit(status)

    monkeypatch.setattr("parallel_backend.group.job_loop.os._exit", leave)
    met = []
    context = SimpleNamespace(rank=1, is_in_step=False, meet=met.append, collect=lambda failure: [failure])
    left = []
    loop = SimpleNamespace(context=context, heart=SimpleNamespace(report_failure=left.append))
    with pytest.raises(SystemExit):
        JobLoop.compare(loop, {"error": "OutOfMemory"}, together=True)
    assert [words["error"] for words in left] == ["OutOfMemory"] and not met
    context.is_in_step = True
    assert JobLoop.compare(loop, {"error": "Cancelled"}, together=True) == [{"error": "Cancelled"}] and met


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"offload": "group"}, "offload 'group' would load .*; use plan 'ulysses2', or offload 'auto', 'none' or 'model'"),
        ({"step_cache": 0.1}, "a step cache decides after the first block, .*; use step_cache 0, or plan 'ulysses2'"),
        ({"guidance_cache": 4}, "each stage keeps .* of both prompts, .*; use guidance_cache 0, or plan 'ulysses2'"),
        (
            {"windows": Windows(13, 4, "uniform")},
            "windows of the schedule 'uniform' move, .*; use the schedule 'static', or plan",
        ),
    ],
)
def test_what_does_not_go_with_a_pipeline_is_refused_before_processes_start(settings, words, make_job):
    windows = {"windows": settings.pop("windows")} if "windows" in settings else {}
    job = make_job("5b", size=(80, 48, 25), **windows)
    with pytest.raises(RequestError, match=f"^plan 'pipefusion2': {words}") as error:
        Executor.check(SimpleNamespace(plan=Plan.parse("pipefusion2")), replace(job, model=replace(job.model, **settings)))
    assert "\n" not in str(error.value)


def test_the_command_line_refuses_it_too_before_anything_starts(tmp_path, capsys):
    asked = ["generate", "--model", "demo", "--prompt", "x", "--devices", "cpu:2", "--output", str(tmp_path / "x.mp4")]
    for options, words in (
        (["--plan", "pipefusion2", "--step-cache", "0.1"], "use step_cache 0, or plan 'ulysses2'"),
        (["--plan", "ring2-pipefusion2"], "use 'ulysses2-pipefusion2', or 'ring2'"),
        (["--plan", "pipefusion2", "--pipefusion-warmup", "0"], "pipefusion_warmup is 0; use 1 to 1000"),
    ):
        assert main([*asked, *options]) == 2
        assert words in capsys.readouterr().err and not workers()


def test_a_stage_needs_a_block(make_job):
    with pytest.raises(RequestError, match="pipefusion4 is 4 stages and this model has 3 blocks; use 'cfg2-pipefusion3'"):
        Executor.check(SimpleNamespace(plan=Plan.parse("cfg2-pipefusion4")), make_job("5b"))


@pytest.mark.parametrize("warmup", [0, -1, 1001])
def test_a_warm_up_that_makes_no_sense_is_refused(warmup, make_job):
    with pytest.raises(RequestError, match=f"pipefusion_warmup is {warmup}; use 1 to 1000"):
        make_job("5b", pipefusion_warmup=warmup)


@pytest.mark.parametrize("tokens", [1, 5, 33, 128, 17776])
@pytest.mark.parametrize("stages, ranks", [(2, 1), (4, 2), (3, 5)])
def test_every_patch_has_tokens(tokens, stages, ranks):
    count = patches(tokens, stages, ranks)
    length = -(-tokens // (count * ranks)) * ranks
    assert (count - 1) * length < tokens <= count * length and count <= max(8, 2 * stages)


@pytest.mark.parametrize("layers, stages", [(42, 2), (42, 4), (7, 4), (5, 5)])
def test_stages_have_all_blocks_in_order_and_differ_by_one(layers, stages):
    parts = [Pipe.blocks(SimpleNamespace(stages=stages, stage=stage), layers) for stage in range(stages)]
    assert [number for part in parts for number in part] == list(range(layers))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_the_planner_counts_what_is_kept_and_knows_what_pipelines_are_for():
    work = assumed(48, True)
    half = replace(work, guided=False, prompts=1)
    states = work.tokens * work.features * work.itemsize
    more = predict(Plan.parse("pipefusion2"), half, KNOWN["H100"]).needed - predict(Plan(), half, KNOWN["H100"]).needed
    assert more * HEADROOM == pytest.approx(42 * states - (half.matrices + half.vectors) / 2, rel=1e-3)
    assert 42 * states == pytest.approx(4.6e9, rel=0.01)  # keys and values of half the blocks
    slow = replace(KNOWN["H100"], link=Link(1e9, 1e-4))
    found = {str(each.plan): each.seconds for each in approximations(half, slow, 2)}
    assert found["pipefusion2"] < min(predict(Plan.parse(plan), half, slow).seconds for plan in ("ulysses2", "ring2", "single"))
    plan, _ = choose(half, slow, 2)
    assert plan.is_exact  # auto keeps the video, whatever is faster


def test_a_kept_group_of_a_pipeline_is_not_what_auto_means(monkeypatch):
    from parallel_backend.devices import Devices
    from parallel_backend.executor.factory import ExecutorCache

    keeper, devices = ExecutorCache(), Devices("cpu", (0, 1))
    monkeypatch.setattr("parallel_backend.executor.factory.open_executor", GroupExecutor)  # starts nothing
    for plan, found in (("cfg2", True), ("pipefusion2", False)):
        keeper.get(Plan.parse(plan), devices)
        assert (keeper.on(devices, Workload(4)) is not None) == found
    keeper.close()
