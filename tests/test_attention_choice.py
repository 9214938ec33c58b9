"""Which attention function a job uses: what each needs, which are right, which is the fastest, what ranks agree on, what is refused."""

import json
import sys
import types
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from benchmarks import attention as benchmark
from parallel_backend import model as models
from parallel_backend.cli.bench_table import distance
from parallel_backend.cogvideox.attention import choice, registry, timings, trial
from parallel_backend.cogvideox.attention.choice import Ranks
from parallel_backend.cogvideox.attention.function import AttentionFunction, Kind, Needs
from parallel_backend.cogvideox.attention.timings import Timings
from parallel_backend.cogvideox.attention.torch_attention import attend_torch, torch_with_sums
from parallel_backend.cogvideox.checkpoint.checkpoint import Checkpoint
from parallel_backend.cogvideox.kernels.probe import once
from parallel_backend.errors import RequestError
from parallel_backend.executor.base import Executor
from parallel_backend.executor.local import LocalExecutor
from parallel_backend.executor.prepare import check_job, prepare
from parallel_backend.jobs import DecodeJob
from parallel_backend.model import ATTENTIONS, Model
from parallel_backend.notes import is_warning
from parallel_backend.parallel.group_rank import GroupRankContext
from parallel_backend.plan import AUTO, Plan
from parallel_backend.planner.machine import CPU as CPU_MACHINE
from parallel_backend.planner.planner import predictions
from parallel_backend.workload import work_of_job

from .support import rounded_attention
from .support.ranks import results_of

CPU = torch.device("cpu")
GPU = torch.device("cuda", 0)
KIND = Kind(CPU, torch.float32, 16)


class Registering:
    """Registers functions for the CPU, with times of their own: ``register("slow", 3.0, attend, …)``."""

    def __init__(self, monkeypatch):
        self.monkeypatch = monkeypatch
        self.seconds: dict[str, float] = {}
        self.timed: list[str] = []
        """The functions that were timed, a name for each round."""
        monkeypatch.setattr(registry, "FUNCTIONS", dict(registry.FUNCTIONS))
        monkeypatch.setattr(trial, "seconds_of", self.seconds_of)
        monkeypatch.setattr(trial, "HEADS", 1)  # on a CPU more take seconds
        self.forget()

    def __call__(self, name: str, milliseconds: float = 1.0, attend=attend_torch, **about) -> None:
        self.seconds[name] = milliseconds / 1e3
        registry.register(AttentionFunction(name, attend, **{"attend_with_sums": torch_with_sums, **about}))

    def seconds_of(self, function: AttentionFunction, operands) -> float:
        self.timed.append(function.name)
        return self.seconds[function.name]

    def forget(self) -> None:
        """Starts as a new process does: nothing has been tried or timed."""
        self.monkeypatch.setattr(trial, "why_not_right", once(trial.why_not_right.__wrapped__))
        trial.measured.cache_clear()
        self.timed.clear()


@pytest.fixture
def register(monkeypatch, tmp_path):
    """See :class:`Registering`."""
    monkeypatch.setattr(timings, "FILE", tmp_path / "new" / "attention.json")
    yield Registering(monkeypatch)
    trial.measured.cache_clear()


def wrong(query, key, value):
    return attend_torch(query, key, value) * 1.03


def wrong_if_long(query, key, value):
    return attend_torch(query, key, value) * (1.03 if key.shape[1] > 1000 else 1.0)


def not_a_number(query, key, value):
    result = attend_torch(query, key, value)
    result[0, 3, 1, 2] = torch.nan
    return result


def broken(query, key, value):
    raise RuntimeError("no kernel image is available\nat line 7")


def chosen(tokens: int = 900, name: str = AUTO, kind: Kind = KIND, ranks: Ranks | None = None) -> tuple[str, tuple[str, ...]]:
    found = choice.choose(name, kind, tokens, ranks or Ranks())
    return found.function.name, found.notes


def test_the_registry_has_what_the_user_can_name_and_auto_only_what_works_in_a_ring():
    assert set(registry.FUNCTIONS) == set(ATTENTIONS) - {AUTO}
    assert [name for name, function in registry.FUNCTIONS.items() if not function.is_exact] == ["int8", "sage", "fp8"]
    assert all(function.attend_with_sums for function in registry.FUNCTIONS.values() if function.is_exact)
    assert [name for name in ATTENTIONS if not registry.can_ring(name)] == ["int8", "sage"]


@pytest.mark.parametrize(
    "capability, dtype, head_dim, able",
    [
        ((7, 5), torch.float16, 64, "efficient torch int8"),
        ((8, 6), torch.bfloat16, 64, "cudnn flash efficient flash2 torch int8 sage"),
        ((8, 9), torch.float32, 64, "efficient torch int8"),
        ((9, 0), torch.bfloat16, 64, "hopper cudnn flash efficient flash3 flash2 torch int8 sage fp8"),
        ((9, 0), torch.float16, 48, "cudnn flash efficient flash2 torch int8 sage"),
        ((12, 0), torch.float16, 32, "cudnn flash efficient flash2 torch int8 sage"),
        ("amd", torch.bfloat16, 64, "flash efficient flash2 torch int8 sage"),
    ],
)
def test_functions_are_offered_where_their_needs_are_met(capability, dtype, head_dim, able, monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "6.4" if capability == "amd" else None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0) if capability == "amd" else capability)
    kind = Kind(GPU, dtype, head_dim)
    monkeypatch.setattr("parallel_backend.cogvideox.attention.function.has_module", lambda name: True)
    assert [function.name for function in registry.usable(kind)] == able.split()
    assert {each.name for each in registry.to_time(kind)} == set(able.split()) - {"hopper", "torch", "int8", "sage", "fp8"}
    monkeypatch.setattr("parallel_backend.cogvideox.attention.function.has_module", lambda name: False)
    assert {each.name for each in registry.usable(kind)} == set(able.split()) - {"flash3", "flash2", "int8", "sage"}


def test_on_the_cpu_it_is_torch_s_and_nothing_is_timed_or_noted(register):
    assert chosen() == ("torch", ()) and not register.timed and not timings.FILE.exists()


def test_the_fastest_right_function_is_chosen_and_named(register):
    register("slow", 3.0), register("fast", 1.0), register("middle", 2.0)
    name, (note,) = chosen()
    assert (name, note) == ("fast", "attention: fast, the fastest of 3 exact functions here") and not is_warning(note)
    assert set(register.timed) == {"slow", "fast", "middle"}


@pytest.mark.parametrize(
    "attend, reason",
    [
        (wrong, trial.WRONG), (not_a_number, trial.WRONG), (broken, "no kernel image is available (details in the log)"), (wrong_if_long, trial.WRONG),
        (lambda *states: attend_torch(*states).double(), trial.WRONG), (lambda *states: attend_torch(*states)[:, :1], trial.WRONG),
    ],
)  # fmt: skip
def test_one_that_raises_or_is_wrong_is_never_chosen_however_fast_it_is(attend, reason, register):
    register("slow", 3.0), register("fast", 1.0), register("bad", 0.1, attend)
    note = f"attention: fast, the fastest of 2 exact functions here; without bad: {reason}"
    assert chosen() == ("fast", (note,)) and is_warning(chosen()[1][0])
    register.forget()
    assert chosen() == ("fast", (note,))


def test_functions_are_tried_in_float32_while_another_thread_reads_a_text_encoder_in_bf16(register, monkeypatch):
    """transformers changes torch's default dtype meanwhile, for all threads."""
    tried = []

    def attend(*states):
        tried.append({part.dtype for part in states})
        return attend_torch(*states)

    monkeypatch.setattr(trial, "attend_torch", attend)  # the reference
    register("slow", 3.0), register("fast", 1.0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert chosen()[0] == "fast"
    finally:
        torch.set_default_dtype(torch.float32)
    assert tried == [{torch.float32}] * 3  # of each function with few tokens, and of all with many


def test_one_whose_log_sum_exp_is_wrong_is_not_chosen(register):
    register("slow", 3.0), register("fast", 1.0)
    register("bad", 0.1, attend_with_sums=lambda *states: (torch_with_sums(*states)[0], torch_with_sums(*states)[1] * 1.44))
    assert chosen()[0] == "fast"


def test_a_log_sum_exp_is_not_asked_for_where_there_are_no_rings(register, monkeypatch):
    register("fast", 1.0, attend_with_sums=broken)
    assert chosen()[0] == "torch"
    register.forget()
    monkeypatch.setattr(trial, "WITH_RINGS", ("cuda",))
    assert chosen()[0] == "fast"


def test_one_alone_is_not_timed_and_where_none_is_right_torch_s_is_left(register):
    register("bad", 0.1, wrong)
    assert chosen() == ("torch", (f"attention: torch; without bad: {trial.WRONG}",))
    register.forget()
    register("only")
    assert chosen() == ("only", (f"attention: only; without bad: {trial.WRONG}",))
    assert not register.timed and not timings.FILE.exists()


def test_auto_takes_no_approximate_function_and_a_preferred_one_without_timing(register):
    register("rough", 0.1, is_exact=False), register("slow", 3.0), register("fast", 2.0)
    assert chosen()[0] == "fast"
    register("ours", 9.0, comes_first=True)
    before = len(register.timed)
    assert chosen() == ("ours", ()) and len(register.timed) == before
    register("ours", 9.0, broken, comes_first=True, needs=Needs(head_dims=(16, 17)))  # of 17 features it has not been tried
    name, notes = chosen(kind=replace(KIND, head_dim=17))
    assert (
        name == "fast"
        and notes[0] == "attention is not this pack's own, which is faster: no kernel image is available (details in the log)"
    )
    name, notes = chosen(kind=replace(KIND, head_dim=18))  # which it is not meant for
    assert name == "fast" and len(notes) == 1


def test_a_named_function_is_taken_as_it_is(register):
    tried = []
    register("ours", attend=lambda *states: tried.append("ours") or attend_torch(*states), comes_first=True)
    register("rough", 9.0, is_exact=False), register("fast", 1.0)
    assert chosen(name="rough") == ("rough", ()) and not register.timed and not tried
    choice.check("rough", KIND, Ranks())


def test_times_are_measured_once_for_a_kind_a_length_and_versions_and_read_again(register, monkeypatch):
    register("slow", 3.0), register("fast", 1.0)
    for tokens, kind, is_new in (
        (900, KIND, True), (1000, KIND, False), (1025, KIND, True), (900, replace(KIND, head_dim=32), True), (900, KIND, False),
        (20000, KIND, True), (50000, KIND, False),
    ):  # fmt: skip
        register.forget()
        assert chosen(tokens, kind=kind)[0] == "fast" and bool(register.timed) == is_new, tokens
        register.timed.clear()
        assert chosen(tokens, kind=kind)[0] == "fast" and not register.timed
    register.forget()
    register("new", 0.5)
    assert chosen()[0] == "new" and register.timed  # of these functions nothing is known
    monkeypatch.setattr(torch, "__version__", "3.0")
    register.forget()
    assert chosen()[0] == "new" and register.timed
    kept = json.loads(timings.FILE.read_text())["timings"]
    assert len(kept) == 4 and "torch 3.0" in kept["cpu, fp32, heads of 16, 1024 tokens"]["versions"]


def test_timing_ends_after_half_a_second(register, monkeypatch):
    register("slow", 3.0), register("fast", 1.0)
    ticks = iter(range(100))
    monkeypatch.setattr(trial, "time", SimpleNamespace(monotonic=lambda: 0.2 * next(ticks)))
    assert chosen()[0] == "fast" and register.timed == ["slow", "fast"] * 3


def test_what_is_kept_counts_only_for_functions_that_are_right_today(register):
    register("slow", 3.0), register("fast", 1.0), register("middle", 2.0)
    assert chosen()[0] == "fast"
    register.forget()
    register("fast", 1.0, broken)
    name, (note,) = chosen()
    assert name == "middle" and note.endswith(
        "of 2 exact functions here; without fast: no kernel image is available (details in the log)"
    )
    assert not register.timed


@pytest.mark.parametrize(
    "spoil, said",
    [
        (lambda kept: "{", "cannot be read"),
        (lambda kept: json.dumps({**kept, "version": 0}), "are from another version"),
        (lambda kept: json.dumps({**kept, "timings": 3}), "are broken"),
        (lambda kept: json.dumps({**kept, "timings": dict.fromkeys(kept["timings"], 3)}), None),
        (lambda kept: json.dumps(kept).replace("1.0", "NaN"), None),
        (lambda kept: json.dumps(kept).replace('"left_out": {}', '"left_out": 3'), None),
    ],
)
def test_a_file_that_is_broken_is_measured_again(spoil, said, register, caplog):
    register("slow", 3.0), register("fast", 1.0)
    assert chosen()[0] == "fast" and register.timed
    timings.FILE.write_text(spoil(json.loads(timings.FILE.read_text())))
    register.forget()
    assert chosen()[0] == "fast" and register.timed
    assert all(said in message and "\n" not in message for message in caplog.messages) if said else not caplog.messages
    register.forget()
    assert chosen()[0] == "fast" and not register.timed


def test_a_folder_that_cannot_be_written_costs_nothing_but_the_time(register, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(timings, "FILE", tmp_path / "file" / "attention.json")
    register("slow", 3.0), register("fast", 1.0)
    assert chosen()[0] == "fast"


def beside(*others, mine=lambda values: values) -> Ranks:
    """A rank whose group has another one, which answers each collective with the next of these."""
    answers = iter(others)
    return Ranks(lambda value: [value, next(answers)], mine)


def test_ranks_agree_on_what_is_the_fastest_for_the_slowest_of_them(register):
    register("first", 1.0), register("second", 2.0), register("third", 0.5)
    other = Timings({"first": 4.0, "second": 3.0, "fourth": 0.1}, {"third": "no room"})
    expected = ("second", ("attention: second, the fastest of 2 exact functions here; without third: no room",))
    assert chosen(ranks=beside({}, other)) == expected
    assert chosen(ranks=beside({}, Timings({"fourth": 1.0})))[0] == "torch"  # which every rank has
    register("ours", comes_first=True)
    assert chosen(ranks=beside({"ours": None}, None)) == ("ours", ())
    name, notes = chosen(ranks=beside({"ours": "it is wrong"}, other))
    assert name == "second" and notes[0].endswith("faster: another rank cannot use it: it is wrong")
    apart = beside({"ours": "it is wrong"}, other, mine=lambda values: values[:1])  # the other half of guidance, on another GPU
    assert chosen(ranks=apart) == ("ours", ())


def test_halves_of_guidance_choose_apart_only_if_their_gpus_differ():
    def alike(half: int, *gpus: str) -> list[int]:
        halves = [number // (len(gpus) // 2) for number in range(len(gpus))]
        context = SimpleNamespace(guidance=SimpleNamespace(half=half), _gpus=[*zip(halves, gpus)])
        return GroupRankContext.alike(context, [*range(len(gpus))])

    assert alike(0, "H100", "H100") == alike(1, "H100", "H100") == [0, 1]
    assert alike(0, "H100", "A100") == [0] and alike(1, "H100", "A100") == [1]
    assert alike(1, "H100", "A100", "A100", "H100") == [0, 1, 2, 3]
    assert alike(1, "H100", "H100", "A100", "A100") == [2, 3]


def test_a_function_that_cannot_be_used_is_refused_in_one_line_on_every_rank(register):
    register("rough", attend=wrong, is_exact=True)
    for name, reason in (("rough", trial.WRONG), ("int8", "it needs a GPU of NVIDIA or AMD"), ("fp8", "it needs a Hopper GPU")):
        with pytest.raises(RequestError) as error:
            choice.check(name, KIND, Ranks())
        said = str(error.value)
        assert (
            said.startswith(f"attention '{name}' cannot be used for heads of 16 in fp32 on cpu: {reason}") and "\n" not in said
        )
        assert said.endswith("use one of auto, torch, rough")
    with pytest.raises(RequestError, match="^the other rank's reason$"):
        choice.check("torch", KIND, beside("the other rank's reason"))
    choice.check(AUTO, KIND, Ranks())


def test_it_is_refused_before_anything_starts_or_loads(make_job, run, tmp_path):
    job = make_job("5b")
    job = replace(job, model=replace(job.model, attention="int8"))
    with pytest.raises(RequestError, match="^attention 'int8' cannot be used for heads of 32 in fp32 on cpu: it needs a GPU"):
        prepare(check_job(job), "cfg2", "cpu:2")
    assert prepare(check_job(DecodeJob(job.model, job.latent)), "cfg2", "cpu:2").plan == Plan(cfg=2)  # which attends to nothing
    executor = LocalExecutor(CPU)
    with pytest.raises(RequestError, match="use one of auto, torch$"):
        executor.sample(job)
    assert executor.engine.cache.loads == 0
    asked = ["generate", "--model", "demo", "--prompt", "x", "--devices", "cpu", "--output", tmp_path / "x.mp4"]
    done = run(*asked, "--attention", "sage")
    assert done.returncode == 2 and "attention 'sage' cannot be used for heads of 48 in fp32 on cpu" in done.stderr
    with pytest.raises(RequestError, match="^attention is 'best'; use one of auto, hopper"):
        Model("/nowhere", attention="best")


def test_a_ring_takes_only_functions_that_give_the_log_sum_exp(make_job):
    job = make_job("5b")

    def check(plan: str, attention: str) -> None:
        Executor.check(SimpleNamespace(plan=Plan.parse(plan)), replace(job, model=replace(job.model, attention=attention)))

    for name in ("int8", "sage"):
        with pytest.raises(RequestError) as error:
            check("cfg2-ring2", name)
        said = str(error.value)
        assert said.startswith(
            f"plan 'cfg2-ring2': a ring adds up results by their log-sum-exp, which attention '{name}' does not"
        )
        assert said.endswith("torch, fp8, or plan 'cfg2-ulysses2'") and "\n" not in said
        for plan in ("single", "cfg2", "ulysses2", "tensor2", "pipefusion2", "cfg2-fsdp2"):
            check(plan, name)
    check("cfg2-ring2", "cudnn"), check("ring2", "fp8"), check("ring2", AUTO)
    plans = {}
    for name in (AUTO, "int8"):
        asked = replace(job, model=replace(job.model, attention=name))
        work = work_of_job(asked, Checkpoint.open(job.model.path), CPU)
        plans[name] = {str(each.plan) for each in predictions(work, CPU_MACHINE, 2)}
    assert plans[AUTO] - plans["int8"] == {"ring2"} and plans["int8"]


def test_fp8_all_asks_for_attention_in_fp8_unless_one_is_named(make_job):
    assert Model("/nowhere", fp8="all").attention_function == "fp8" == Model("/nowhere", attention="fp8").attention_function
    assert Model("/nowhere", fp8="all", attention="cudnn").attention_function == "cudnn"
    assert Model("/nowhere", fp8="linears").attention_function == AUTO
    job, executor = make_job("5b", steps=1), LocalExecutor(CPU)
    made = {}
    for attention in (AUTO, "torch"):
        result = executor.sample(replace(job, model=replace(job.model, fp8="all", attention=attention)))
        made[attention] = result.tensor
        assert [*result.report.notes] == ["attention is not in FP8: it needs a Hopper GPU, such as an H100"] * (
            attention == AUTO
        )
    assert torch.equal(*made.values()) and executor.engine.cache.loads == 1


@pytest.fixture
def rounded(monkeypatch):
    """The approximate function of tests/support, in this process and, by ``ranks.py``, in others."""
    monkeypatch.setattr(models, "ATTENTIONS", ATTENTIONS)
    monkeypatch.setattr(registry, "FUNCTIONS", registry.FUNCTIONS)
    rounded_attention.register()
    yield rounded_attention.NAME
    del registry.FUNCTIONS[rounded_attention.NAME]


SPLITS = ["cfg2", "ulysses2", "tensor2", "pipefusion2", "cfg2-ulysses2", "tensor2-ulysses2"]


def test_an_approximate_function_gives_the_latents_of_single_in_every_plan_that_takes_it(rounded, make_job, tmp_path):
    job = make_job("5b", size=(80, 48, 9), steps=2, scheduler="ddim", pipefusion_warmup=2)
    rough, local = replace(job, model=replace(job.model, attention=rounded)), LocalExecutor(CPU)
    alone = local.sample(rough).tensor
    rounding = distance(alone, local.sample(job).tensor)
    assert 1e-4 < rounding < 0.1
    for plan, ((found,), _) in results_of(tmp_path, [rough], SPLITS).items():
        assert distance(found, alone) < 0.5 * rounding, plan  # a rounding that falls the other way is one of int8's levels


def test_the_function_changes_from_job_to_job_and_the_weights_stay(rounded, make_job, local):
    executor, job = LocalExecutor(CPU), make_job("5b", steps=2)
    expected = local.sample(job).tensor
    rough = executor.sample(replace(job, model=replace(job.model, attention=rounded)))
    assert not torch.equal(rough.tensor, expected) and not rough.report.notes
    assert torch.equal(executor.sample(job).tensor, expected) and executor.engine.cache.loads == 1


def test_the_benchmark_lists_every_function_and_what_is_chosen(register, capsys):
    register("fast", 0.1), register("bad", 0.1, wrong), register("rough", 0.1, wrong, is_exact=False, near=0.05)
    benchmark.main("--device cpu --dtype fp32 --tokens 300 --heads 2 --head-dim 16 --seconds 0.01".split())
    head, *lines = capsys.readouterr().out.splitlines()
    assert head == "CPU, fp32, 2 heads of 16 features, 300 tokens" and len(lines) == len(registry.FUNCTIONS) + 1
    found = {line.removeprefix("->").split()[0]: line for line in lines[:-1]}
    assert list(found) == list(registry.FUNCTIONS)
    assert [name for name, line in found.items() if line.startswith("->")] == ["fast"]
    assert "exact        error 0.0000, of near ones 0.0000" in found["fast"] and " ms (" in found["fast"]
    assert "approximate  error 0.0300, of near ones 0.0300" in found["rough"]
    assert found["bad"].endswith(f"not used: {trial.WRONG}") and found["fp8"].endswith("it needs a Hopper GPU, such as an H100")
    assert lines[-1] == f"attention: fast; without bad: {trial.WRONG}"


def test_a_stand_in_of_another_pack_for_a_package_is_not_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "flash_attn", types.ModuleType("flash_attn"))
    sys.modules["flash_attn"].__spec__ = None
    assert "flash-attn, which is not installed" in registry.FUNCTIONS["flash2"].needs.missing_package()
