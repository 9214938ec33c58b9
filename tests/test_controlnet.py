"""ControlNets: parity with their author's formula in every plan, what is refused, and what they cost."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import imageio.v3 as iio
import pytest
import torch
from accelerate import cpu_offload
from diffusers import CogVideoXImageToVideoPipeline, CogVideoXPipeline
from safetensors.torch import load_file, save_file

from benchmarks.random_weights import build_controlnet
from parallel_backend.cogvideox import offload
from parallel_backend.cogvideox.checkpoint.checkpoint import Checkpoint
from parallel_backend.cogvideox.checkpoint.controlnet import ControlNetFile, is_controlnet, weight_bytes
from parallel_backend.cogvideox.pipeline.denoise import Callbacks, denoise
from parallel_backend.cogvideox.pipeline.forward import Runtime
from parallel_backend.cogvideox.pipeline.image import cover
from parallel_backend.cogvideox.pipeline.validation import check, check_plan
from parallel_backend.cogvideox.transformer.controlnet import encode, load
from parallel_backend.errors import RequestError
from parallel_backend.executor.prepare import check_job
from parallel_backend.group.job_fields import join_fields, split_fields
from parallel_backend.jobs import SampleJob, WindowJob
from parallel_backend.media.reading import pictures
from parallel_backend.model import ControlNet, Windows
from parallel_backend.parallel.rank import RankContext
from parallel_backend.plan import Plan
from parallel_backend.planner.cost_model import weight_bytes as predicted_weight_bytes

from .conftest import NEGATIVE, PROMPT, TOLERANCE
from .support.controlnet_reference import controlled
from .support.diffusers_reference import reference
from .support.ranks import results_of

STEPS = 4
NETS = {
    "2b": {"like": "2b"},
    "5b": {"like": "5b", "seed": 1},
    "rotary": {"like": "5b", "seed": 2, "use_rotary_positional_embeddings": True, "out_proj_dim": 128, "num_layers": 3},
}
"""As its author trains one for 2b and for 5b; and one without positions of its own, with projectors."""
CASES = [
    ("2b", "2b", {"size": (64, 48, 13), "scheduler": "ddim"}, {}),
    ("2b", "2b", {"size": (80, 48, 9), "scheduler": "dpm", "batch": 2}, {"strength": 0.6, "start": 0.25, "end": 0.5}),
    ("5b", "5b", {"size": (48, 80, 9), "scheduler": "dpm", "cfg": 1.0}, {"strength": 1.5}),
    ("5b", "rotary", {"size": (48, 48, 5), "scheduler": "ddim"}, {}),
    ("5b-i2v", "5b", {"size": (96, 64, 5), "scheduler": "dpm"}, {"strength": 0.7, "end": 0.5}),
]
"""The model, the ControlNet, the job and the ControlNet's settings."""
PLANS = ["cfg2", "ulysses2", "ring2", "tensor2", "cfg2-fsdp2", "ulysses2-ring2"]


@pytest.fixture(scope="module")
def nets(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("controlnets")
    return {name: build_controlnet(root / name, **settings) for name, settings in NETS.items()}


def video_of(width: int, height: int, frames: int, seed: int = 7) -> torch.Tensor:
    """A control video of white lines on black."""
    return (torch.rand(frames, height, width, 3, generator=torch.Generator().manual_seed(seed)) > 0.8).float()


@pytest.fixture(scope="module")
def make_controlled(make_job, nets) -> Callable[..., SampleJob]:
    """Makes a job with a ControlNet for each name."""

    def make(like: str, *names: str, size, about: dict | None = None, **settings) -> SampleJob:
        encoded = [encode(ControlNetFile.open(nets[name]), video_of(*size, seed=7 + n)) for n, name in enumerate(names)]
        controlnets = tuple(ControlNet(str(nets[name]), **about or {}) for name in names)
        return make_job(
            like,
            size=size,
            controlnets=controlnets,
            controlnet_videos=torch.cat(encoded, dim=1),
            **{"steps": STEPS, **settings},
        )

    return make


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.rand(1, 3, 64, 96, generator=torch.Generator().manual_seed(2))


@pytest.fixture(scope="module")
def jobs(make_controlled, local, checkpoints, images) -> list[SampleJob]:
    made = []
    for like, net, settings, about in CASES:
        given = {"image": image_latent(checkpoints[like], images)} if like == "5b-i2v" else {}
        made.append(make_controlled(like, net, about=about, **settings, **given))
    return made


def image_latent(folder: Path, image: torch.Tensor) -> torch.Tensor:
    """The mean of what diffusers' VAE makes of an image, before it is scaled."""
    with torch.no_grad():
        return Checkpoint.open(folder).load_vae(torch.float32).encode(image[:, :, None] * 2 - 1).latent_dist.mode()


@pytest.fixture(scope="module")
def expected(checkpoints, nets, images) -> list[torch.Tensor]:
    """What diffusers' pipelines make with the author's formula."""
    made = []
    for like, net, settings, about in CASES:
        pipeline = (CogVideoXImageToVideoPipeline if like == "5b-i2v" else CogVideoXPipeline).from_pretrained(checkpoints[like])
        pipeline.set_progress_bar_config(disable=True)
        given = {"image": images} if like == "5b-i2v" else {}
        width, height, frames = settings["size"]
        with controlled(pipeline, nets[net], video_of(width, height, frames), steps=STEPS, **about):
            made.append(reference(pipeline, steps=STEPS, num_frames=frames, **settings, **given))
    return made


@pytest.fixture(scope="module")
def single(jobs, local) -> list[torch.Tensor]:
    return [local.sample(job).tensor for job in jobs]


def test_latents_equal_the_authors_formula(single, expected):
    for case, found, wanted in zip(CASES, single, expected):
        assert (found - wanted).abs().max() <= TOLERANCE, case


@pytest.fixture(scope="module")
def ranks_made(jobs, tmp_path_factory) -> dict[str, tuple[list[torch.Tensor], list[list[int]]]]:
    """What processes make of the jobs under each plan."""
    return results_of(tmp_path_factory.mktemp("ranks"), jobs, PLANS)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.slow
def test_a_plan_equals_the_authors_formula(plan, expected, ranks_made):
    for case, found, wanted in zip(CASES, ranks_made[plan][0], expected):
        assert (found - wanted).abs().max() <= TOLERANCE, case


def test_controlnets_add_up_and_one_without_strength_changes_nothing(make_controlled, make_job, local):
    settings = {"size": (48, 48, 5), "scheduler": "ddim"}
    plain = local.sample(make_job("5b", steps=STEPS, **settings)).tensor
    one, both = (local.sample(make_controlled("5b", *names, **settings)).tensor for names in (("5b",), ("5b", "rotary")))
    assert (one - plain).abs().max() > 0.01 and (both - one).abs().max() > 0.01
    off = make_controlled("5b", "5b", "rotary", about={"strength": 0.0}, **settings)
    assert torch.equal(local.sample(off).tensor, plain)
    with pytest.raises(RequestError, match="go together"):
        replace(off, controlnets=())


def test_a_job_without_its_controlnet_frees_it(make_controlled, make_job, local):
    job = make_controlled("5b", "5b", size=(48, 48, 5), steps=1)
    local.sample(job)
    held, loads = local.engine.cache.held, local.engine.cache.loads
    branch = held["controlnets"][1]
    local.sample(replace(job, seed=8))
    assert held["controlnets"][1] is branch
    local.sample(make_job("5b", size=(48, 48, 5), steps=1))
    assert "controlnets" not in held and local.engine.cache.loads == loads


def test_a_step_cache_starts_again_where_a_controlnet_ends(make_controlled, local):
    job = make_controlled("5b", "5b", size=(48, 48, 5), steps=8, scheduler="ddim")
    job = replace(job, model=replace(job.model, step_cache=2.0))
    notes = []
    for end in (1.0, 0.25):
        until = replace(job, controlnets=(replace(job.controlnets[0], end=end),))
        notes += [note for note in local.sample(until).report.notes if "step cache" in note]
    # A full step, three in a row that skip, and again. Where control ends after the third step, the fourth is a full one.
    assert [note.split(": ")[1][:6] for note in notes] == ["6 of 8", "5 of 8"]


def test_windows_take_their_frames_of_the_control_video_wherever_they_are_predicted(make_controlled, local, checkpoints):
    """Here as replicas predict them: each window is a message of its own."""
    job = make_controlled(
        "5b", "5b", "rotary", about={"end": 0.3}, size=(48, 48, 13), scheduler="ddim", windows=Windows(9, 4, "static", False)
    )

    def elsewhere(parts, prompts, timestep, scale, nets) -> list[torch.Tensor]:
        negative, positive = prompts
        made = [WindowJob(job.model, part.contiguous(), positive, timestep, scale, negative, nets) for part in parts]
        sent.extend(through_json(window) for window in made)
        return [local.run(window).tensor for window in sent[-len(made) :]]

    sent, checkpoint, cpu = [], Checkpoint.open(checkpoints["5b"]), torch.device("cpu")
    runtime, callbacks = Runtime(cpu, torch.float32, RankContext(cpu)), Callbacks(lambda progress, total: True, lambda: True)
    found = denoise(None, checkpoint, job, runtime, callbacks, caches=runtime.context.caches(job), elsewhere=elsewhere)
    assert (found - local.sample(job).tensor).abs().max() <= TOLERANCE
    strengths = [[net.strength for net in window.controlnets] for window in sent]
    assert strengths == [[1.0, 1.0]] * 4 + [[0.0, 0.0]] * 4  # two windows in each of four steps
    whole = local.sample(replace(job, windows=None)).tensor
    assert (whole - found).abs().max() > 0.01
    with pytest.raises(RequestError, match="a window has 112 channels and 3 frames; 5b takes 16 channels"):
        check(checkpoint, replace(sent[0], controlnets=()))


def through_json(job: SampleJob | WindowJob):
    plain, tensors = split_fields(job)
    return join_fields(job.kind, json.loads(json.dumps(plain)), tensors)


def test_a_job_and_its_controlnets_survive_the_socket(make_controlled):
    job = make_controlled("5b", "5b", "rotary", about={"strength": 0.5, "start": 0.1, "end": 0.9}, size=(48, 48, 5))
    found = through_json(job)
    assert found.controlnets == job.controlnets and torch.equal(found.controlnet_videos, job.controlnet_videos)


def test_offload_by_blocks_loads_a_controlnet_layer_by_layer_and_says_so(make_controlled, local, monkeypatch):
    job = make_controlled("5b", "rotary", size=(48, 48, 5), steps=2)
    expected, placed = local.sample(job).tensor, []

    def place(module, mode, device, *, ranks=1) -> None:
        """As on a GPU, except that the transformer stays."""
        placed.append(mode)
        if mode == "sequential":
            cpu_offload(module, execution_device=device)

    monkeypatch.setattr(offload, "place", place)
    result = local.sample(replace(job, model=replace(job.model, offload="group")))
    assert placed == ["group", "sequential"]
    assert all(weight.is_meta for weight in local.engine.cache.held["controlnets"][1].parameters())
    assert torch.equal(result.tensor, expected)
    assert "offload 'group': the ControlNet's weights are loaded layer by layer" in " ".join(result.report.notes)
    monkeypatch.undo()
    assert torch.equal(local.sample(job).tensor, expected)  # read again, without hooks


def test_the_planner_and_offload_count_the_weights_that_are_loaded(make_controlled, nets):
    job, dtype = make_controlled("5b", "5b", "rotary", size=(48, 48, 5)), torch.float32
    checked, plain = check_job(job), check_job(replace(job, controlnets=(), controlnet_videos=None))
    files = [ControlNetFile.open(net.path) for net in job.controlnets]
    encoders = sum(file.stored[name].size for file in files for name in file.stored if name.startswith("controlnet_encode"))
    loaded = sum(weight.nbytes for file in files for weight in load(file, dtype, "cpu").parameters())
    assert weight_bytes(job.controlnets, dtype) == loaded + 4 * encoders
    for plan in map(Plan.parse, ("single", "tensor2", "cfg2-fsdp2")):  # whole on every rank
        own = [
            (
                offload.job_weight_bytes(one.job, one.checkpoint, plan, dtype),
                predicted_weight_bytes(plan, one.workload().work(torch.device("cpu"))),
            )
            for one in (checked, plain)
        ]
        assert [with_nets - without for with_nets, without in zip(*own)] == [loaded + 4 * encoders] * 2
    work, without = (one.workload().work(torch.device("cpu")) for one in (checked, plain))
    assert work.products / without.products == work.attention / without.attention == (3 + 2 + 3) / 3  # blocks
    working, less = (offload.working_bytes(one.job, one.checkpoint, Plan(), dtype) for one in (checked, plain))
    assert working > less


def test_a_pipeline_is_refused_with_the_plan_to_use(make_controlled, checkpoints):
    job = make_controlled("5b", "5b", size=(48, 48, 5))
    with pytest.raises(RequestError, match="plan 'cfg2-pipefusion2': a ControlNet's blocks .* use plan 'cfg2-ulysses2'"):
        check_plan(Checkpoint.open(checkpoints["5b"]), Plan.parse("cfg2-pipefusion2"), job)


def test_a_file_alone_is_what_its_folder_is(nets, tmp_path):
    for name in ("5b", "rotary"):
        path = nets[name] / "diffusion_pytorch_model.safetensors"
        alone, folder = ControlNetFile.open(path), ControlNetFile.open(nets[name])
        for what in ("layers", "heads", "head_dim", "channels", "latent_channels", "projected", "shapes"):
            assert getattr(alone, what) == getattr(folder, what)
        assert is_controlnet(path) and is_controlnet(nets[name]) and not is_controlnet(nets[name].parent)
        assert "sinusoidal positions (as its author trains them" in alone.describe
    assert "no positions of its own" in ControlNetFile.open(nets["rotary"]).describe


def changed(folder: Path, to: Path, config: dict | None = None, *, without: str = "none", **tensors) -> Path:
    """Copies a ControlNet with another configuration, without some weights, or with other ones."""
    to.mkdir()
    found = json.loads((folder / "config.json").read_text()) | (config or {})
    (to / "config.json").write_text(json.dumps(found))
    state = load_file(folder / "diffusion_pytorch_model.safetensors")
    state = {name: weight for name, weight in state.items() if without not in name} | tensors
    save_file(state, to / "diffusion_pytorch_model.safetensors")
    return to


def test_what_is_no_controlnet_or_not_whole_is_refused_in_one_line(nets, checkpoints, tmp_path):
    whole = nets["5b"]
    (tmp_path / "net.pt").touch()
    (tmp_path / "broken.safetensors").write_bytes(b"\x10")
    cases = {
        tmp_path / "gone": "there is no ControlNet .*gone; give a folder with config.json and weights, or a .safetensors file",
        tmp_path / "net.pt": "the ControlNet net.pt is not a .safetensors file",
        tmp_path / "broken.safetensors": "truncated or not a safetensors file",
        checkpoints["5b"] / "transformer": "is a CogVideoXTransformer3DModel, not a ControlNet for CogVideoX",
        checkpoints["5b"] / "vae" / "diffusion_pytorch_model.safetensors": "is not a ControlNet for CogVideoX but a VAE",
        changed(whole, tmp_path / "half", without="encode_second.0"): "half is incomplete: download it again .it lacks controlnet_encode_second",
        changed(whole, tmp_path / "bias", without="encode_second.1.bias"): "bias is incomplete: it lacks controlnet_encode_second.1",
        changed(whole, tmp_path / "grey", {"in_channels": 1}, **{"controlnet_encode_first.0.weight": torch.zeros(96, 64, 1, 1)}): (
            "grey encodes 64 channels of 8x8 pixels; only ControlNets for videos in colour"
        ),
        changed(whole, tmp_path / "coarse", {"downscale_coef": 4}): "coarse encodes 192 channels of 4x4 pixels",
    }  # fmt: skip
    for path, words in cases.items():
        with pytest.raises(RequestError, match=words):
            ControlNetFile.open(path)
    short = ControlNetFile.open(changed(whole, tmp_path / "short", without="transformer_blocks.1.ff.net.2.bias"))
    with pytest.raises(
        RequestError, match="short lacks 1 weights, such as transformer_blocks.1.ff.net.2.bias; download it again"
    ):
        load(short, torch.float32, "cpu")
    narrow = ControlNetFile.open(changed(whole, tmp_path / "narrow", **{"transformer_blocks.1.ff.net.2.bias": torch.zeros(3)}))
    with pytest.raises(
        RequestError, match=r"narrow has transformer_blocks.1.ff.net.2.bias in the shape \(3,\) and .* asks for \("
    ):
        load(narrow, torch.float32, "cpu")


@pytest.mark.parametrize(
    "like, changes, words",
    [
        ("5b", {"num_attention_heads": 3}, "net has 3 heads and 5b has 4; use a ControlNet made for 5b"),
        ("5b", {"attention_head_dim": 16}, "net has 16 features of a head and 5b has 32"),
        ("5b", {"out_proj_dim": 64}, "net has 64 features of a block's output and 5b has 128"),
        ("5b", {"vae_channels": 32}, "net has 32 channels of the latent and 5b has 16"),
        ("5b", {"max_text_seq_length": 226}, "net has 226 text tokens and 5b has 32"),
        ("5b", {"num_layers": 4}, "net has 4 blocks and 5b only 3"),
        ("1.5-5b", {}, "net is for CogVideoX 1.0 and 1.5-5b is CogVideoX 1.5; use CogVideoX-2b, 5b or 5b-I2V with it"),
    ],
)
def test_a_controlnet_of_another_model_is_refused_before_anything_is_loaded(like, changes, words, make_job, tmp_path):
    net = ControlNet(str(build_controlnet(tmp_path / "net", like="5b", **changes)))
    job = make_job(like, size=(48, 48, 5), controlnets=(net,), controlnet_videos=torch.zeros(1, 48, 2, 6, 6))
    with pytest.raises(RequestError, match=words):
        check_job(job)


@pytest.mark.parametrize(
    "shape, words",
    [
        ((1, 40, 2, 6, 6), "the ControlNets' videos have 40 channels and the ControlNets take 48"),
        ((1, 48, 3, 6, 6), "the ControlNet's video is 48x48 with 3 latent frames and the video is 48x48 with 2"),
        ((3, 48, 2, 6, 6), "it must be .1 or 1, 48, frames"),
    ],
)
def test_a_control_video_of_another_size_is_refused(shape, words, make_job, nets):
    about = {"controlnets": (ControlNet(str(nets["5b"])),), "controlnet_videos": torch.zeros(shape)}
    with pytest.raises(RequestError, match=words):
        check_job(make_job("5b", size=(48, 48, 5), **about))


@pytest.mark.parametrize(
    "change, words", [({"strength": -1.0}, "strength is -1"), ({"start": 0.6, "end": 0.5}, "end is 0.5; use 0.6")]
)
def test_a_value_that_makes_no_sense_is_refused(change, words):
    with pytest.raises(RequestError, match=f"ControlNet {words}"):
        ControlNet("net", **change)


def test_the_command_line_makes_the_same_latents(run, nets, checkpoints, make_controlled, local, tmp_path):
    lines = (video_of(48, 48, 9)).mul(255).byte().numpy()
    iio.imwrite(tmp_path / "lines.mp4", lines, plugin="pyav", codec="libx264", fps=8)
    video = torch.cat([cover(picture, width=48, height=48) for picture in pictures(str(tmp_path / "lines.mp4"), "video")])
    common = ["generate", "--model", checkpoints["5b"], "--prompt", PROMPT, "--negative-prompt", NEGATIVE, "--width", 48, "--height", 48,
              "--steps", 2, "--seed", 3, "--scheduler", "ddim", "--devices", "cpu", "--output", tmp_path / "out.mp4"]  # fmt: skip
    options = ["--controlnet", nets["5b"], "--controlnet-video", tmp_path / "lines.mp4", "--controlnet-strength", 0.5]
    options += ["--controlnet-end", 0.4]
    done = run(*common, *options, "--save-latents", tmp_path / "out.latent")
    assert done.returncode == 0, done.stderr
    job = make_controlled("5b", "5b", about={"strength": 0.5, "end": 0.4}, size=(48, 48, 9), steps=2, scheduler="ddim")
    job = replace(job, controlnet_videos=encode(ControlNetFile.open(nets["5b"]), video))
    assert (load_file(tmp_path / "out.latent")["latent_tensor"] - local.sample(job).tensor).abs().max() <= TOLERANCE
    for alone in (options[:2], options[2:4]):
        done = run(*common, *alone)
        assert (done.returncode, "--controlnet and --controlnet-video go together" in done.stderr) == (2, True)
