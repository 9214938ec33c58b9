"""How nodes find who works for them, and what ComfyUI is told of the memory that is held."""

import shutil

import pytest

from .conftest import TOLERANCE
from .support.comfy_runtime import SHOWN


@pytest.mark.slow
def test_auto_keeps_the_group_that_is_warm_for_a_job_without_guidance_and_for_a_senseless_one(in_comfyui):
    shown, log = in_comfyui(
        SHOWN
        + """
backend = Handle("cpu:2", "auto")
guided = host.run(sample(), backend).report
group = host._groups.executor.address.folder
at("second", "5")
plain = host.run(sample(cfg=1.0), backend).report
why = [line for line in lines_of_last() if line.startswith("plan cfg2 on cpu:2: ")]
try:
    host.run(sample(latent=latent[:, :4]), Handle("cpu:2", "ulysses2"))
except errors.RequestError as error:
    refused = str(error)
show(plans=[guided.plan, plain.plan], same=host._groups.executor.address.folder == group, notes=plain.notes,
     refused=refused, why=why)
"""
    )
    assert len(shown["why"]) == 1  # the reason of the first choice is said again
    assert shown["plans"] == ["cfg2", "cfg2"] and shown["same"]
    assert "4 channels" in shown["refused"]  # another plan, but a job that makes no sense: nothing was touched
    assert shown["notes"] == ["cfg is 1.0: both halves of plan 'cfg2' compute the same"]
    assert "takes the place" not in log


@pytest.mark.parametrize(
    "python, reason", [("/nowhere/python", "/nowhere/python cannot be started"), ("/bin/false", "the group did not start")]
)
def test_a_backend_that_cannot_start_says_so_after_success_too_and_the_work_is_done_in_process(python, reason, in_comfyui):
    shown, log = in_comfyui(
        SHOWN
        + f"""
configure("parallel_backend.group.preflight", python={python!r})
at("first", "5")
plan = host.run(sample(), Handle("cpu:2", "cfg2")).report.plan
show(plan=plan, last=lines_of_last())
"""
    )
    assert shown["plan"] == "single"
    assert f"no group: {reason}" in log
    fallback, *_, cost = shown["last"]
    assert fallback.startswith(f"no group: {reason}") and fallback.endswith("; working in this process")
    assert cost.startswith("sample: plan single")


def test_what_this_machine_cannot_do_is_refused_before_anything_starts(in_comfyui):
    """The system would kill ComfyUI for the memory; hundreds of processes on a few cores stop everything else."""
    shown, _ = in_comfyui("""
feasible, resolve = part("parallel_backend.executor.feasible"), part("parallel_backend.executor.resolve")
fitting, feasible.whole_memory = host.run(sample()).report.plan, lambda: 2**20
refused = []
def refuse(run, *args):
    try:
        run(*args)
    except errors.RequestError as error:
        refused.append(str(error))
for backend in (None, Handle("cpu:2", "cfg2"), Handle("cpu", "auto"), Handle("cpu:900", "auto"), Handle("cpu:900", "cfg2-ring450")):
    refuse(host.run, sample(), backend)
for plan in ("auto", "cfg2-ring450"):
    refuse(resolve.check_strings, plan, "cpu:900")
show(fitting=fitting, refused=refused, group=host.has_group())
""")
    assert shown["fitting"] == "single" and not shown["group"]
    *memory, first, second, third, fourth = shown["refused"]
    assert [" with plan 'single', and 0.0 GiB" in one for one in memory] == [True, False, True]
    assert all("a step at 64x48 with 9 frames is predicted to need" in one for one in memory)
    assert all("'cpu:900' are 900 processes, and this machine has" in one for one in (first, second, third, fourth))


def test_the_table_of_plans_counts_the_windows_of_a_long_video(in_comfyui):
    shown, _ = in_comfyui("""
table, gpus = part("nodes.comfy.plan_table"), part("parallel_backend.planner.gpu_table").KNOWN
table.machine_of = lambda devices: gpus["H100"]
def rows(**query):
    size = {"width": "96", "height": "64", "length": "49"}
    return {row["plan"]: [row["seconds"], row["memory"]] for row in table.of_query({"devices": "cpu:2", **size, **query})["rows"]}
windows = dict(window="17", overlap="8")
show(windows=rows(**windows), window=rows(length="17"), single=rows(length="17", devices="cpu")["single"], whole=rows(), one=rows(window="49"),
     alone=[rows(**windows, **each) for each in (dict(image="1"), dict(guidance_cache="2"), dict(step_cache="0.1"))],
     batch=rows(**windows, batch="2"), window_of_batch=rows(length="17", batch="2"))
""")
    windows, window, whole = shown["windows"], shown["window"], shown["whole"]
    count = 4  # 13 latent frames in windows of 5 that share 2: they start at 0, 3, 6 and 8
    for plan in window:
        assert windows[plan] == [pytest.approx(count * window[plan][0]), window[plan][1]] and window[plan][1] < whole[plan][1]
    assert windows["replicas2"][0] == pytest.approx(count / 2 * shown["single"][0])
    assert shown["one"] == whole
    pairs = [*((each, window) for each in shown["alone"]), (shown["batch"], shown["window_of_batch"])]
    for rows, one in pairs:  # replicas do not share these windows, and a step has all of them
        assert rows == {plan: [pytest.approx(count * seconds), memory] for plan, (seconds, memory) in one.items()}
    assert "replicas2" in shown["batch"] and "replicas2" not in window  # a batch is shared as whole videos


def test_the_table_of_plans_says_what_it_is_predicted_from_and_has_the_fastest_devices_first_as_auto(in_comfyui):
    shown, _ = in_comfyui("""
table, gpus = part("nodes.comfy.plan_table"), part("parallel_backend.planner.gpu_table").KNOWN
cpu = table.of_query({"devices": "cpu:2"})["rates"]
table.machine_of = lambda devices: gpus["H100"]
gpu = table.of_query({"devices": "cpu:2"})["rates"]
table.hardware.fastest_first = lambda devices: devices.first_of(1)
show(cpu=cpu, gpu=gpu, fastest=table.of_query({"devices": "cpu:2"})["devices"])
""")
    assert shown["cpu"] is None and shown["fastest"] == "cpu:1"
    assert (
        shown["gpu"].startswith("rates of H100: 767 TFLOP/s in products")
        and "(the table of known GPUs, measured)" in shown["gpu"]
    )


def test_a_query_for_the_table_of_plans_that_makes_no_sense_is_refused(in_comfyui):
    shown, _ = in_comfyui("""
table, refused = part("nodes.comfy.plan_table"), part("parallel_backend.errors").RequestError
def said(**query):
    try:
        table.of_query({"devices": "cpu", **query})
    except refused as error:
        return str(error)
show(said=[said(**each) for each in (dict(width="x"), dict(window="nan"), dict(guidance_cache="inf"), dict(window="10"))])
""")
    size, window, cache, frames = shown["said"]
    assert size.startswith("the size is no number") and frames.startswith("the window is 10 frames; it must be 4k+1")
    assert window.startswith("cfg, the windows or a cache is no number") and cache.startswith(
        "cfg, the windows or a cache is no number"
    )


def test_the_table_of_plans_counts_weights_in_eight_bits(in_comfyui):
    shown, _ = in_comfyui("""
table, gpus = part("nodes.comfy.plan_table"), part("parallel_backend.planner.gpu_table").KNOWN
table.machine_of = lambda devices: gpus["RTX 4090"]
def memory(**query):
    return table.of_query({"model": "CogVideo/CogVideoX-5b", "devices": "cpu", **query})["rows"][0]["memory"] / 2**30
show(off=memory(), int8=memory(quantize="int8"), linears=memory(fp8="linears"))
""")
    assert shown["int8"] == shown["linears"] < shown["off"] - 3


def test_the_lines_of_a_workflow_are_kept_by_node_until_the_node_runs_again(in_comfyui):
    shown, _ = in_comfyui(
        SHOWN
        + """
prompts = {"first": "a", "second": "b", "third": "a"}
running = {0: None}
PromptServer.instance.prompt_queue = types.SimpleNamespace(currently_running=running)
def at_prompt(prompt, node):
    running[0] = (0, prompt, {}, {"extra_pnginfo": {"workflow": {"id": prompts[prompt]}}}, [])
    at(prompt, node)
at_prompt("first", "5"), host.say("a note", level=WARNING), host.say("done")
at_prompt("first", "6:7"), host.say("in a subgraph")
at_prompt("second", "5"), host.say("another workflow")
before = [lines.kept.of_workflow(name) for name in ("a", "b", "c")]
at_prompt("third", "5"), host.say("run again")
show(before=before, after=lines.kept.of_workflow("a"))
"""
    )
    subgraph = [{"text": "in a subgraph", "level": "info"}]
    assert shown["before"] == [
        {"5": [{"text": "a note", "level": "warning"}, {"text": "done", "level": "info"}], "6:7": subgraph},
        {"5": [{"text": "another workflow", "level": "info"}]},
        {},
    ]
    assert shown["after"] == {"5": [{"text": "run again", "level": "info"}], "6:7": subgraph}


def test_comfyui_is_asked_for_room_for_the_work_and_not_only_for_the_weights(in_comfyui):
    shown, _ = in_comfyui("""
asked, load = [], host.management.load_models_gpu
def record(models, memory_required=0):
    asked.append(memory_required)
    load(models, memory_required=memory_required)
host.management.load_models_gpu = record
large = jobs.empty_latent(width=96, height=80, frames=9)
for job in (sample(), sample(cfg=1.0), sample(latent=large), jobs.DecodeJob(model, latent), jobs.DecodeJob(model, large),
            jobs.DecodeJob(model, large, "on", 64, 32), jobs.EncodeJob(model, torch.zeros(9, 48, 64, 3))):
    host.run(job)
parts = [checkpoint.weight_bytes(part, torch.float32) for part in ("transformer", "vae")]
show(asked=asked, parts=parts, work=host.working_bytes(sample(cfg=1.0), checkpoint, host.local().plan, torch.float32))
""")
    guided, plain, large, decode, large_decode, tiled, encode = shown["asked"]
    transformer, vae = shown["parts"]
    assert 0 < plain < guided < large and guided - plain == pytest.approx(shown["work"] / 0.9)
    # With what ComfyUI makes room for by itself, a tenth more than the weights, it is what a job wants to see free.
    assert plain + 1.1 * transformer >= (shown["work"] + vae + transformer) / 0.9
    assert 0 < decode == encode < large_decode and tiled < large_decode


def test_what_is_loaded_is_counted_by_part_and_nothing_after_a_failure(in_comfyui):
    shown, _ = in_comfyui("""
class Nobody:
    plan = part("parallel_backend.plan").Plan()
    freed = 0
    def free(self):
        self.freed += 1
executor, gpu = Nobody(), torch.device("cuda", 0)
held = memory.HeldWeights(executor, gpu)
decode, sizes = jobs.DecodeJob(model, latent), []
def count():
    sizes.append([held.model_size(), held.loaded_size(), str(held.current_loaded_device())])
held.expect(sample()), count(), held.partially_load(gpu), count()
held.expect(decode), count(), held.partially_load(gpu), count()
held.detach(unpatch_all=False), count(), held.detach(), count()
held.expect(decode), count(), held.partially_load(gpu), count()
held.forget(), count(), held.detach()
def gone():
    raise errors.RequestError("no Ray cluster answers")
executor.free = executor.status = gone
held.expect(decode), held.partially_load(gpu), held.recount(), count(), held.detach()
show(sizes=sizes, freed=executor.freed, parts=[checkpoint.weight_bytes(f, torch.float32) for f in ("transformer", "vae")])
""")
    transformer, vae = shown["parts"]
    both = transformer + vae
    assert shown["sizes"] == [
        [transformer, 0, "cpu"],
        [transformer, transformer, "cuda:0"],
        [both, transformer, "cuda:0"],
        [both, both, "cuda:0"],
        [both, both, "cuda:0"],  # ComfyUI sorts its list anew
        [0, 0, "cpu"],
        [vae, 0, "cpu"],  # the transformer is not expected back
        [vae, vae, "cuda:0"],
        [0, 0, "cpu"],
        [0, 0, "cpu"],  # its Ray cluster is gone
    ]
    assert shown["freed"] == 2  # what a failed job left loaded can still be unloaded


def test_a_job_that_fails_is_not_counted_as_loaded(in_comfyui):
    shown, _ = in_comfyui("""
executor = host.local()
def fail(*_):
    raise RuntimeError("no")
run = executor.engine.run
host.management.load_models_gpu = lambda held, **_: held[0].partially_load(held[0].load_device)  # as ComfyUI does
sizes = []
for engine_run in (run, fail):
    executor.engine.run = engine_run
    try:
        host.run(sample())
    except RuntimeError:
        pass
    sizes.append(host._held[executor].loaded_size() > 0)
show(sizes=sizes)
""")
    assert shown["sizes"] == [True, False]


def test_a_batch_is_spread_over_the_replicas_of_a_backend_and_unloading_reaches_all(in_comfyui):
    shown, log = in_comfyui("""
backend, batch = Handle("cpu:2", "replicas2"), torch.cat([latent, latent])
result, alone = host.run(sample(latent=batch), backend), host.run(sample(latent=batch))
executor = host._groups.executor
held = [one["held"] for one in executor.status()["replicas"]]
host._held[executor].detach()
freed = [one["state"] for one in executor.status()["replicas"]]
asked = [host.working_bytes(sample(latent=batch), checkpoint, plan, torch.float32) for plan in (executor.plan, executor.plan.replica)]
show(plan=result.report.plan, off=(result.tensor - alone.tensor).abs().max().item(), held=held, freed=freed, asked=asked)
""")
    assert shown["plan"] == "replicas2" and shown["off"] <= TOLERANCE
    assert shown["held"] == [["transformer"]] * 2 and shown["freed"] == ["absent"] * 2
    assert 2 * shown["asked"][0] == shown["asked"][1]  # each has one video at a time


def test_a_group_counts_against_the_gpu_of_comfyui_only_where_it_uses_it(in_comfyui):
    shown, _ = in_comfyui("""
torch.cuda.device_count = lambda: 4
host.management.get_torch_device = lambda: torch.device("cuda", 1)
Group, Plan = part("parallel_backend.executor.group").GroupExecutor, part("parallel_backend.plan").Plan
def counted(devices):
    devices = host.Devices.parse(devices)
    return str(host.counted_on(Group(Plan(ring=devices.count), devices)))
show(devices=[counted(words) for words in ("auto", "1,3", "2,3", "cpu:2")], own=str(host.counted_on(host.local(torch.device("cpu")))))
""")
    assert shown == {"devices": ["cuda:1", "cuda:1", "cuda:2", "cpu"], "own": "cpu"}


@pytest.mark.slow
def test_a_group_starts_once_its_plan_is_known_and_before_there_is_any_text(nodes):
    shown, _ = nodes("""
kept = lambda: host._groups.executor and [str(host._groups.executor.plan), host._groups.executor.is_there()]
at_hand, steps = {"latent": {"samples": latent}}, []
for plan, given in ((None, {}), ("auto", {}), ("auto", at_hand), ("auto", {}), ("ulysses2", {}), ("cfg2", prompts | at_hand)):
    steps.append([asks_for(plan, **given), kept()])
begun = host._groups.executor.address.folder
made, = call(Sampler, model=handles(text_model)[0], **settings, **prompts, **at_hand, backend=Handle("cpu:2", "auto"))
same = host._groups.executor.address.folder == begun and host._groups.executor.status()["jobs"] == 1
show(steps=steps, same=same, made=list(made["samples"].shape))
""")
    everything, text = ["latent", "positive", "negative"], ["positive", "negative"]
    assert shown["steps"] == [
        [everything, None],
        [["latent"], None],
        [text, ["cfg2", True]],
        [everything, ["cfg2", True]],
        [everything, ["cfg2", True]],  # what is warm stays until there is a whole job for another plan
        [[], ["cfg2", True]],
    ]
    assert shown["same"] and shown["made"] == [1, 16, 3, 6, 8]


def test_a_plan_by_hand_starts_without_a_latent_unless_windows_are_cut_from_it(nodes):
    shown, _ = nodes("""
from dataclasses import replace
plain, _ = handles(text_model)
windowed = replace(plain, windows=jobs.Windows(9, 4))
first = asks_for("ulysses2", model=windowed), host.has_group()
show(windowed=first, plain=(asks_for("ulysses2", model=plain), host.has_group()), plan=str(host._groups.executor.plan))
""")
    assert shown["windowed"] == [["latent"], False]
    assert shown["plain"] == [["latent", "positive", "negative"], True] and shown["plan"] == "ulysses2"


@pytest.mark.parametrize("plan, python", [("ulysses3", ""), ("cfg2", "/nowhere/python")])
def test_what_hinders_a_start_is_said_by_the_job_alone(plan, python, nodes):
    shown, log = nodes(f"""
configure("parallel_backend.group.preflight", python={python!r})
show(asked=asks_for({plan!r}), there=host.has_group() and host._groups.executor.is_there())
""")
    assert shown == {"asked": ["latent", "positive", "negative"], "there": False} and "cannot be started" not in log


def test_the_imports_of_a_group_begin_with_its_backend_or_with_comfyui_if_the_user_wants_that(in_comfyui):
    shown, log = in_comfyui("""
import asyncio, dataclasses
extension, server = part("nodes"), part("parallel_backend.group.fork_server_client").ForkServerProcess
def begins(devices, plan):
    part("nodes.backend").XDiTBackend.execute(devices, plan)
    return server._kept is not None
begun = [begins("cpu", "single"), begins("cpu", "auto"), begins("cpu:3", "ulysses3"), begins("cpu:2", "cfg2")]
server._kept.close(); server._kept = None
extension.runtime.Devices.parse = classmethod(lambda cls, text: cls("cpu", (0, 1)))
at_start = []
for preload in (0.0, 1.0):
    extension.CONFIG = dataclasses.replace(extension.CONFIG, preload=preload)
    asyncio.run(extension.CogVideoXExtension().get_node_list())
    at_start.append(server._kept is not None)
show(begun=begun, at_start=at_start)
""")
    assert shown == {"begun": [False, False, True, True], "at_start": [False, True]}, log


def test_what_has_left_the_device_is_counted_no_longer(in_comfyui):
    shown, _ = in_comfyui("""
def counts(backend, *changes):
    found = []
    for change in changes:
        host.run(sample(), backend)
        executor = host._groups.executor if backend else host.local()
        host._held[executor].partially_load(None)  # as ComfyUI does before the job
        change(executor)
        host._held[executor].recount()
        found.append(host._held[executor].loaded_size() > 0)
    return found
stay, free, close = (lambda executor: None), (lambda executor: executor.free()), (lambda executor: executor.close())
show(alone=counts(None, stay, free), group=counts(Handle("cpu:2", "cfg2"), stay, free, stay, close))
""")
    assert shown == {"alone": [True, False], "group": [True, False, True, False]}


def test_dates_in_a_file_s_name_are_filled_in(in_comfyui):
    shown, _ = in_comfyui("""
from datetime import datetime
with_dates, now = part("nodes.saving").with_dates, datetime(2026, 3, 9, 7, 5, 1)
show(names=[with_dates(name, now) for name in ("video/%date:yyyy-MM-dd%/x_%date:hhmmss%", "%date:d.M.yy h:m:s%", "a_%year%", "plain")])
""")
    assert shown["names"] == ["video/2026-03-09/x_070501", "9.3.26 7:5:1", "a_%year%", "plain"]


def test_the_lines_of_one_execution_stay_in_the_node_warnings_first(in_comfyui):
    shown, log = in_comfyui(
        SHOWN
        + """
at("first", "5")
host.say("plan"), host.say("cut off", level=WARNING), host.say("plan"), host.say("done", "5"), host.say("other", "6")
at("second", "5")
host.say("again"), host.lines.show_for_now("reading weights: 43%", "5"), host.say("read")
context.clear()
host.say("no prompt, no node", level=WARNING), host.say("alone", "5"), host.say("alone, too", "5")
show(shown=shown)
"""
    )
    assert shown["shown"] == [
        ["5", "plan"],
        ["5", "cut off  \nplan"],
        ["5", "cut off  \nplan"],
        ["5", "cut off  \nplan  \ndone"],
        ["6", "other"],
        ["5", "again"],
        ["5", "again  \nreading weights: 43%"],
        ["5", "again  \nread"],
        ["5", "alone"],
        ["5", "alone, too"],
    ]
    assert "no prompt, no node" in log


def test_weights_that_are_read_are_shown_as_a_bar_which_leaves_that_of_the_steps_alone(in_comfyui):
    shown, _ = in_comfyui(
        SHOWN
        + """
import time
import comfy.utils
part("nodes.comfy.stage_watch").STAGE_SECONDS = 0.01
seen, now, executor, job = [], [None], host.local(torch.device("cpu")), sample()
comfy.utils.set_progress_bar_global_hook(lambda value, total, preview, node_id=None: seen.append([value, total, node_id]))
run_checked, executor.stage = executor.run_checked, lambda: now[0]
def slowly(checked, on_step, should_stop, *listeners):
    deadline = time.monotonic() + 100
    for now[0] in ("starting 2 processes", "reading weights: 43%", "reading weights: 98%", "first step"):
        while shown[-1:] != [["5", now[0]]]:
            assert not should_stop() and time.monotonic() < deadline
        should_stop()
    return run_checked(checked, on_step, should_stop, *listeners)
executor.run_checked = slowly
at("first", "5")
host.run(job, node_id="5", device=torch.device("cpu"))
show(seen=seen)
"""
    )
    assert shown["seen"] == [[43, 100, "5"], [98, 100, "5"], [0, 100, "5"], [1, 2, "5"], [2, 2, "5"]]


@pytest.mark.parametrize("server", ["None", "types.ModuleType('server')"])
def test_where_there_is_no_front_end_lines_are_logged(server, in_comfyui):
    _, log = in_comfyui(f"""
sys.modules["comfy_execution.utils"], sys.modules["server"] = None, {server}
host.say("a line", level=30), host.say("and one", "5", level=30)
show()
""")
    assert "a line" in log and "and one" in log


def test_a_job_s_notes_stand_before_what_it_cost_and_a_plan_that_was_set_is_not_news(in_comfyui):
    shown, _ = in_comfyui(
        SHOWN
        + """
at("first", "5")
host.run(sample(windows=jobs.Windows()), Handle("cpu:1", "single"))
set_by_hand = lines_of_last()
at("second", "5")
host.run(sample(), Handle("cpu:1", "auto"))
show(set_by_hand=set_by_hand, auto=lines_of_last())
"""
    )
    note, cost = shown["set_by_hand"]
    assert note.startswith("the video of 9 frames fits in one window") and cost.startswith("sample: plan single")
    assert shown["auto"][0] == "plan single on cpu:1: one device: nothing to split"


def test_what_the_user_asked_for_is_no_warning_and_what_has_no_effect_is_one(in_comfyui):
    shown, _ = in_comfyui(
        SHOWN
        + """
at("first", "5")
asked = dataclasses.replace(sample(windows=jobs.Windows()), model=jobs.Model(path, step_cache=0.1, guidance_cache=1))
host.run(asked)
show(levels={line["text"].partition(":")[0]: line["level"] for line in lines.kept.of_workflow(None)["5"]})
"""
    )
    fits = "the video of 9 frames fits in one window of 49"
    assert shown["levels"] == {fits: "warning", "sample": "info", "step cache 0.1": "info", "guidance cache 1": "info"}


def test_clip_text_encode_says_in_its_node_what_of_a_prompt_is_not_used(nodes):
    shown, _ = nodes(
        SHOWN
        + """
clip = part("nodes.comfy.clip").ClipHandle(Checkpoint.open(text_model), "auto")
at("first", "7")
[[states, options]] = clip.encode_from_tokens_scheduled(clip.tokenize("red " * 40))
again = clip.encode_from_tokens(clip.tokenize("a (red circle:1.3)"))
expected = clip.encoder.encode_prompt("a (red circle:1.3)")
plain = clip.encode_from_tokens(clip.tokenize("a red circle"))
show(shown=shown, options=options, same=torch.equal(again, expected), weighted=not torch.equal(again, plain))
"""
    )
    [[node, line]] = shown["shown"]
    assert node == "7" and line.startswith("the prompt has ") and "32 are used; cut off: 'red" in line
    assert shown["same"] and shown["weighted"] and shown["options"] == {"pooled_output": None}


def test_load_cogvideox_runs_again_when_a_file_of_its_model_was_replaced(in_comfyui, checkpoints, tmp_path):
    folder = shutil.copytree(checkpoints["5b"], tmp_path / "5b")
    shown, _ = in_comfyui(f"""
loader, folder, models = part("nodes.loaders").LoadCogVideoX, Path({str(folder)!r}), part("parallel_backend.cogvideox.checkpoint.bundled")
part("nodes.comfy.model_folders").model_folders = lambda: {{"CogVideo/5b": folder}}
def state():
    return loader.fingerprint_inputs(model_name="CogVideo/5b", dtype="auto")
states = [state(), state()]
for part_of in ("text_encoder", "vae", "transformer"):
    weights = sorted((folder / part_of).glob("*.safetensors"))[0]
    os.utime(weights, (1, 1))
    states.append(state())
show(states=states, demo=loader.fingerprint_inputs(model_name="demo"), gone=loader.fingerprint_inputs(model_name="CogVideo/gone"))
""")
    first, same, *changed = shown["states"]
    assert first == same and len({first, *changed}) == 4
    assert isinstance(shown["demo"], str) and shown["gone"] is None


def test_the_examples_are_put_into_the_input_folder_and_replace_no_other_file(in_comfyui):
    shown, _ = in_comfyui("""
import folder_paths
examples, folder = part("nodes.comfy.examples"), Path(folder_paths.get_input_directory())
targets = {source: folder / source.name for source in examples.EXAMPLES.iterdir()}
for target in targets.values():
    target.unlink(missing_ok=True)
(folder / "example.mp4").write_bytes(b"the user's own")
examples.offer()
copied = sorted(target.name for source, target in targets.items() if target.read_bytes() == source.read_bytes())
show(copied=copied, kept=(folder / "example.mp4").read_bytes() == b"the user's own")
for target in targets.values():
    target.unlink()
""")
    assert shown == {"copied": [f"cogvideox-{name}.png" for name in ("end", "mask", "start")], "kept": True}


def test_no_group_starts_while_comfyui_ends(in_comfyui):
    """Its worker thread goes on meanwhile: it took the group that was closed for one that was lost, and started it again."""
    shown, _ = in_comfyui("""
executors, registry = part("nodes.comfy.executors"), part("parallel_backend.group.registry")
executors.end()
try:
    executors.start_group(part("parallel_backend.plan").Plan(cfg=2), part("parallel_backend.devices").Devices("cpu", (0, 1)))
except errors.GroupUnavailable as error:
    show(said=str(error), interrupted=host.management.processing_interrupted(), owners=len(registry.entries("owner")))
""")
    assert shown == {"said": "this process is ending", "interrupted": True, "owners": 0}


def test_the_panel_may_ask_while_a_job_ends(in_comfyui):
    shown, _ = in_comfyui("""
state = part("nodes.comfy.state")
class Jobs:
    executor, ended, seen = None, None, [types.SimpleNamespace(executor=host.local())]
    current = property(lambda self: self.seen.pop() if self.seen else None)  # it ends after the first look
state.jobs = Jobs()
show(state=state.status()["state"])
""")
    assert shown == {"state": "idle"}


@pytest.mark.slow
def test_a_job_that_starts_a_group_again_that_the_panel_ended_leaves_none_behind(in_comfyui):
    shown, _ = in_comfyui("""
executors, registry = part("nodes.comfy.executors"), part("parallel_backend.group.registry")
find = host.executor_for
def found_and_ended(*given):
    executor = find(*given)
    executors.close_group()
    return executor
host.executor_for = found_and_ended
plan = host.run(sample(), Handle("cpu:2", "cfg2")).report.plan
show(plan=plan, left=[len(registry.entries(kind)) for kind in ("group", "owner")], kept=host.has_group())
""")
    assert shown == {"plan": "cfg2", "left": [0, 0], "kept": False}


def test_the_panel_says_that_a_group_of_serve_goes_on(in_comfyui):
    shown, _ = in_comfyui("""
state, executors = part("nodes.comfy.state"), part("nodes.comfy.executors")
class Group(part("parallel_backend.executor.group").GroupExecutor):
    plan, devices, is_owner = part("parallel_backend.plan").Plan(cfg=2), "cpu:2", False
    def __init__(self):
        self.address = None
executors.groups.executor, said = Group(), []
for action in (state.stop, state.restart):
    try:
        action()
    except errors.RequestError as error:
        said.append(str(error))
show(said=said, kept=host.has_group())
executors.groups.executor = None
""")
    assert shown["kept"] and len(shown["said"]) == 2
    assert all(line.startswith("serve keeps this group, for other processes too; to end it, run") for line in shown["said"])


def test_the_panel_may_stop_a_group_while_another_one_takes_its_place(in_comfyui):
    shown, _ = in_comfyui("""
class Group:
    def start(self, expected):
        pass
class Held(dict):
    def __iter__(self):
        executors = list(super().__iter__())
        self.clear()  # as if the panel's thread stopped the group now
        return iter(executors)
group, host._held = Group(), Held({Group(): None})
host._groups.get = lambda *given, **settings: group
checked = part("parallel_backend.executor.prepare").check_job(sample())
show(same=host.executor_for(Handle("cpu:2", "cfg2"), checked, None) is group, held=len(host._held))
""")
    assert shown == {"same": True, "held": 0}
