"""The command line: what it makes, what it prints, and with which status it ends."""

import io
import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from argparse import SUPPRESS
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from parallel_backend.cli import generate as generating
from parallel_backend.cli import inputs, serve, stop
from parallel_backend.cli.console import Progress, Table
from parallel_backend.cli.parser import build_parser, main
from parallel_backend.cluster import nodes
from parallel_backend.cogvideox.checkpoint.checkpoint import Checkpoint
from parallel_backend.devices import Devices
from parallel_backend.errors import GroupError, NotFinite, OutOfMemory, RequestError, WriteFailure
from parallel_backend.executor import feasible
from parallel_backend.executor.resolve import resolve
from parallel_backend.group import launcher, preflight
from parallel_backend.group.registry import GroupAddress, Home
from parallel_backend.workload import Workload

from .conftest import PATIENCE, REPO, TOLERANCE, Done, command, wait_until, workers
from .support.measures import look


def generate(run, checkpoint, output, *more):
    return run(
        "generate", "--model", checkpoint, "--prompt", "a red circle", "--width", 64, "--height", 48, "--frames", 9,
        "--steps", 6, "--seed", 7, "--output", output, *more,
    )  # fmt: skip


@pytest.mark.slow
def test_a_prompt_becomes_a_video_and_a_latent_file_with_every_plan(run, checkpoints, tmp_path):
    latents = {}
    for plan, devices in (("single", "cpu"), ("ulysses2", "cpu:2")):
        output = tmp_path / f"{plan}.mp4"
        done = generate(
            run if plan == "single" else command,  # for once as a person does, in a process of its own
            checkpoints["5b"],
            output,
            "--plan",
            plan,
            "--devices",
            devices,
            "--save-latents",
            tmp_path / f"{plan}.latent",
            "--json",
        )
        assert done.returncode == 0, done.stderr
        report = json.loads(done.stdout.splitlines()[-1])
        assert (report["plan"], report["world_size"], report["seed"]) == (plan, len(report["peak_memory"]), 7)
        for name in ("load_seconds", "step_seconds", "sample_seconds", "decode_seconds", "total_seconds"):
            assert report[name] > 0
        assert (0 < report["start_seconds"] < report["total_seconds"]) == (plan != "single")
        assert re.findall(r"^step (\d+)/6$", done.stderr, re.M) == [str(step) for step in range(1, 7)]
        assert iio.imread(output, plugin="pyav").shape == (9, 48, 64, 3)
        assert iio.immeta(output, plugin="pyav")["fps"] == 8
        latents[plan] = load_file(tmp_path / f"{plan}.latent")
    assert latents["single"]["latent_tensor"].shape == (1, 16, 3, 6, 8)
    assert "latent_format_version_0" in latents["single"]
    difference = latents["single"]["latent_tensor"] - latents["ulysses2"]["latent_tensor"]
    assert difference.abs().max() <= TOLERANCE
    assert not workers()


def test_a_file_of_prompts_and_a_count_of_seeds_become_numbered_videos_over_replicas(run, checkpoints, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle\n\na blue square\n")
    size = ("--model", checkpoints["5b"], "--width", 64, "--height", 48, "--frames", 9, "--steps", 2)
    many = ("--prompts-file", prompts, "--count", 2, "--seed", 7, "--plan", "replicas2", "--devices", "cpu:2", "--json")
    done = run("generate", *size, *many, "--output", tmp_path / "out.mp4", "--save-latents", tmp_path / "out.latent")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert [(one["seed"], one["plan"]) for one in report["videos"]] == [(seed, "replicas2") for seed in (7, 8, 7, 8)]
    assert [one["output"] for one in report["videos"]] == [str(tmp_path / f"out-{number}.mp4") for number in (1, 2, 3, 4)]
    assert all((tmp_path / f"out-{number}.mp4").stat().st_size for number in (1, 2, 3, 4))
    assert re.findall(r"^step (\d+)/8$", done.stderr, re.M)[-1] == "8"
    alone = ("--prompt", "a blue square", "--seed", 8, "--devices", "cpu", "--output", tmp_path / "alone.mp4")
    assert run("generate", *size, *alone, "--save-latents", tmp_path / "alone.latent").returncode == 0
    found, expected = (load_file(tmp_path / f"{name}.latent")["latent_tensor"] for name in ("out-4", "alone"))
    assert (found - expected).abs().max() <= TOLERANCE
    assert wait_until(lambda: not workers())


@pytest.fixture
def four(run, checkpoints, tmp_path) -> Callable[[], Done]:
    """Makes four small videos, ``out-1.mp4`` and so on."""
    small = ("--width", 32, "--height", 32, "--frames", 5, "--steps", 2, "--devices", "cpu", "--count", 4)
    return lambda: run("generate", "--model", checkpoints["5b"], "--prompt", "x", *small, "--output", tmp_path / "out.mp4")


def test_a_video_is_written_while_the_next_ones_are_made(four, tmp_path, monkeypatch):
    there = {}
    look = lambda step, _: there.update({step: (tmp_path / "out-1.mp4").exists()})  # noqa: E731
    monkeypatch.setattr(generating, "Progress", lambda: nullcontext(look))
    monkeypatch.setattr(generating.video, "encode", None)  # each is encoded while it is decoded
    assert four().returncode == 0
    assert (there[1], there[7]) == (False, True)  # one is written, one may wait, and the fourth would be one too many
    assert len(list(tmp_path.glob("out-*.mp4"))) == 4


def test_a_video_that_cannot_be_written_ends_the_others(four, monkeypatch):
    def full(path, *others, **settings):
        raise WriteFailure(f"cannot write {path}: No space left on device")

    monkeypatch.setattr(generating.video, "save_or_rescue", full)
    done = four()
    assert done.returncode == 1 and "out-1.mp4: No space left on device" in done.stderr
    assert "step 8/8" not in done.stderr


@pytest.mark.parametrize(
    "more, jobs, unit",
    [
        ((), 1, "videos"),
        (("--window", 17, "--overlap", 8), 4, "windows"),
        (("--window", 17, "--overlap", 8, "--count", 2), 2, "videos"),
    ],
)
def test_the_planner_knows_what_replicas_can_share(more, jobs, unit, run, checkpoints, tmp_path, monkeypatch):
    asked = []

    def resolve(plan, devices, workload):
        asked.append(workload)
        raise RequestError("that is enough")

    monkeypatch.setattr("parallel_backend.executor.prepare.resolve", resolve)
    size = ("--width", 32, "--height", 32, "--frames", 49, "--output", tmp_path / "x.mp4")
    assert run("generate", "--model", checkpoints["5b"], "--prompt", "x", *size, *more).returncode == 2
    assert [(workload.jobs, workload.unit) for workload in asked] == [(jobs, unit)]


@pytest.mark.parametrize(
    "more, words",
    [
        (("--count", "0"), "count is 0; use 1 or more"),
        (("--width", "100"), "width is 100.*multiple of 16"),
        (("--width", "0"), "width is 0"),
        (("--frames", "0"), "frames is 0"),
        (("--frames", "8"), "frames is 8.*4k\\+1"),
        (("--fps", "0"), "fps is 0"),
        (("--fps", "-1"), "fps is -1"),
        (("--devices", "cpu:500"), "'cpu:500' are 500 processes, and this machine has \\d+ cores; use cpu:\\d+"),
        (("--plan", "warp9"), "'warp9' is not understood"),
        (("--plan", "ulysses3", "--devices", "cpu:3"), "ulysses3 does not divide this model's 4 heads"),
        (("--plan", "cfg2", "--devices", "cpu:3"), "needs 2 devices.*3 were given"),
        (("--plan", "cfg2", "--devices", "cpu:1"), "needs 2 devices but 1 was given"),
        (("--devices", "7"), "there is no GPU 7"),
        (("--devices", "gpu"), "not understood"),
        (("--scheduler", "euler"), "scheduler.*euler"),
        (("--steps", "0"), "steps is 0"),
        (("--modle", "5b"), "there is no option --modle; did you mean --model\\?"),
        (("--warp=9",), "there is no option --warp; --help lists all"),
        (("--output", "/nowhere/at/all.mp4"), "there is no folder /nowhere/at"),
        (("--output", "/tmp/video.avi"), "must end in .mp4"),
        (("--model", "/nowhere"), "no checkpoint folder /nowhere"),
        (("--lora", "/nowhere/a.safetensors"), "there is no LoRA file /nowhere/a.safetensors"),
        (("--lora", "a.safetensors:0.5:much"), "'much' is not a number; write FILE:STRENGTH, such as a.safetensors:0.5:0.8"),
        (("--lora", "a.safetensors:nan"), "LoRA strength is nan; use -10"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_a_request_that_makes_no_sense_ends_with_2_and_one_line(more, words, checkpoints, tmp_path, capsys):
    arguments = ["generate", "--model", str(checkpoints["5b"]), "--prompt", "x", "--output", str(tmp_path / "out.mp4"), *more]
    try:
        status = main(arguments)
    except SystemExit as end:
        status = end.code
    error = capsys.readouterr().err
    assert status == 2
    assert re.search(words, error)
    assert len(error.strip().splitlines()) == 1, error
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "memory, words",
    [
        (
            2**30,
            r"4096x4096 with 49 frames is predicted to need [\d.]+ GiB of main memory with plan 'single', and 1.0 GiB are there",
        ),
        (
            2**50,
            r"4096x4096 with 49 frames is predicted to take about \d+ hours on 2 cores, and 50 steps \d+ days; use a smaller",
        ),
    ],
)
def test_a_size_that_cannot_work_is_refused_with_the_planners_numbers(memory, words, checkpoints, run, tmp_path, monkeypatch):
    monkeypatch.setattr(feasible, "usable_memory", lambda: memory)
    monkeypatch.setattr(feasible, "usable_cores", lambda: 2)
    monkeypatch.setattr(generating, "produce", lambda *_: pytest.fail("it was not refused"))
    size = ("--width", 4096, "--height", 4096, "--frames", 49, "--devices", "cpu", "--output", tmp_path / "x.mp4")
    done = run("generate", "--model", checkpoints["5b"], "--prompt", "x", *size)
    assert done.returncode == 2 and re.search(words, done.stderr) and len(done.stderr.splitlines()) == 1, done.stderr


@pytest.mark.parametrize("cached", [(), ("--guidance-cache", 2)])  # replicas could share the windows, or could not
def test_days_on_a_cpu_are_those_of_all_windows(cached, checkpoints, run, tmp_path, monkeypatch):
    monkeypatch.setattr(feasible, "usable_cores", lambda: 2)
    monkeypatch.setattr(feasible, "DAY", 1e-3)  # every job takes too long
    size = ("--width", 64, "--height", 48, "--steps", 50, "--devices", "cpu", "--output", tmp_path / "x.mp4")

    def days(*more) -> float:
        said = run("generate", "--model", checkpoints["5b"], "--prompt", "x", *size, *cached, *more).stderr
        return float(re.search(r"50 steps (\d+) days", said)[1])

    assert days("--frames", 49, "--window", 17, "--overlap", 8) == pytest.approx(4 * days("--frames", 17), rel=0.01)


def test_loras_are_given_as_files_with_strengths(checkpoints, loras, tmp_path):
    file = shutil.copy(loras["5b"], tmp_path / "a:1.safetensors")  # a colon may also be the name's own
    latents = []
    for given in ((), (file,), (f"{file}:0.75", f"{file}:0.25")):
        options = ["--width", 32, "--height", 32, "--frames", 5, "--steps", 2, "--devices", "cpu"]
        options += ["--save-latents", tmp_path / "a.latent", "--output", tmp_path / "a.mp4"]
        words = [
            "generate",
            "--model",
            checkpoints["5b"],
            "--prompt",
            "x",
            *options,
            *(word for lora in given for word in ("--lora", lora)),
        ]
        assert main([str(word) for word in words]) == 0
        latents.append(load_file(tmp_path / "a.latent")["latent_tensor"])
    without, whole, parts = latents
    assert (whole - without).abs().max() > 0.01
    assert (whole - parts).abs().max() <= TOLERANCE


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, str]:
    """A wide picture, a video of ten frames, and what is neither."""
    folder = tmp_path_factory.mktemp("files")
    colours = np.random.default_rng(0).integers(0, 256, (10, 48, 80, 3), dtype=np.uint8)
    iio.imwrite(folder / "image.png", colours[0])
    iio.imwrite(folder / "video.mp4", colours, plugin="pyav", codec="libx264", fps=8)
    iio.imwrite(folder / "two.mp4", colours[:2], plugin="pyav", codec="libx264", fps=8)
    (folder / "text.png").write_text("not a picture")
    (folder / "text.mp4").write_text("not a video")
    (folder / "empty.mp4").touch()
    return {path.name: str(path) for path in folder.iterdir()} | {"none": str(folder / "none.png")}


@pytest.mark.parametrize("plan, devices", [("single", "cpu"), ("ulysses2", "cpu:2")])
def test_an_image_becomes_a_video(plan, devices, run, checkpoints, files, tmp_path):
    common = ("--width", 96, "--height", 64, "--steps", 2, "--plan", plan, "--devices", devices, "--json")
    done = generate(run, checkpoints["5b-i2v"], tmp_path / "out.mp4", "--image", files["image.png"], *common)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["plan"] == plan
    assert iio.imread(tmp_path / "out.mp4", plugin="pyav").shape == (9, 64, 96, 3)


@pytest.mark.parametrize("like, frames", [("5b", 9), ("1.5-5b", 5)])  # ten frames: 4k+1, and what 1.5 need not pad
def test_a_video_becomes_another_with_as_many_of_its_frames_as_fit(like, frames, run, checkpoints, files, tmp_path):
    done = run(
        "generate", "--model", checkpoints[like], "--prompt", "x", "--video", files["video.mp4"], "--denoise", 0.5,
        "--steps", 6, "--width", 64, "--height", 48, "--output", tmp_path / "out.mp4",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert re.findall(r"^step (\d+)/3$", done.stderr, re.M) == ["1", "2", "3"]
    assert iio.imread(tmp_path / "out.mp4", plugin="pyav").shape == (frames, 48, 64, 3)
    assert iio.immeta(tmp_path / "out.mp4", plugin="pyav")["fps"] == 8  # as fast as the video that was given


def test_a_video_is_enlarged_in_tiles_that_replicas_share(run, checkpoints, files, tmp_path, capsys):
    common = (
        "upscale",
        "--model",
        checkpoints["1.5-5b"],
        "--video",
        files["two.mp4"],
        "--scale",
        1,
        "--output",
        tmp_path / "out.mp4",
    )
    tiles = ("--tile-size", 64, "--overlap", 16)
    done = run(*common, *tiles, "--plan", "replicas2", "--devices", "cpu:2", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert (found["plan"], found["tiles"], len(found["peak_memory"])) == ("replicas2", 2, 2)
    assert iio.imread(tmp_path / "out.mp4", plugin="pyav").shape == (2, 48, 80, 3)
    assert iio.immeta(tmp_path / "out.mp4", plugin="pyav")["fps"] == 8
    assert "2 frames of 80x48 to 80x48 in 2 tiles of 9 frames of 48x48" in done.stderr and "step 2/2" in done.stderr
    refused = run(*common, "--tile-frames", 10)
    assert refused.returncode == 2 and refused.stderr == "upscale: a tile has 10 frames; it must be 8k+1, such as 9\n"
    assert main([*map(str, common), "--fps", "0"]) == 2
    assert "fps is 0.0; use a number from 1 to 240" in capsys.readouterr().err


@pytest.mark.parametrize(
    "like, asked, source, step",
    [
        ("5b", (), 24, 3),
        ("5b", (), 30, 4),
        ("1.5-5b", (), 30, 2),
        ("1.5-5b-inp", (), 24, 3),  # VideoX-Fun's 1.5 was trained at 8
        ("5b", (), 8, 1),
        ("5b", (), 6, 1),
        ("5b", ("--source-fps", "16"), 24, 2),
        ("5b", ("--source-fps", "0"), 24, 1),
    ],
    ids=str,
)
def test_frames_of_a_clip_are_thinned_out_to_the_rate_that_the_model_was_trained_at(
    like, asked, source, step, checkpoints, tmp_path, caplog
):
    shades = np.arange(0, 250, 10, dtype=np.uint8)[:, None, None, None] * np.ones((1, 32, 32, 3), dtype=np.uint8)
    clip = tmp_path / "clip.mp4"
    iio.imwrite(clip, shades, plugin="pyav", codec="libx264", fps=source)
    arguments = ["generate", "--model", "x", "--prompt", "x", "--output", "x.mp4", "--video", str(clip), *asked]
    size, checkpoint = {"width": 32, "height": 32, "frames": 5}, Checkpoint.open(checkpoints[like])
    args = build_parser().parse_args(arguments)
    with caplog.at_level(logging.INFO):
        pixels, _ = inputs.read(args, size, checkpoint)
    found = (pixels["latent"].mean(dim=(1, 2, 3)) * 25.5).round().int().tolist()
    assert found == [step * place for place in range(5)]
    rate = float(asked[1]) if asked and asked[1] != "0" else source
    assert inputs.rate_of(str(clip), args, checkpoint).fps == pytest.approx(rate / step)
    assert f"{'every frame' if step == 1 else f'1 of {step} frames'} of the clip ({rate:g} fps) is used" in caplog.text


def test_a_plan_is_chosen_for_the_length_and_windows_that_are_sampled(run, checkpoints, files, tmp_path, monkeypatch):
    works = []

    def resolve(plan, devices, workload):
        works.append(workload.work(torch.device("cpu")))
        raise RequestError("enough")

    monkeypatch.setattr("parallel_backend.executor.prepare.resolve", resolve)
    size = ("--width", 48, "--height", 32, "--steps", 4, "--output", tmp_path / "out.mp4", "--prompt", "x")
    lengths = (("--video", files["video.mp4"]), ("--frames", 9), ("--frames", 49, "--window", 9, "--overlap", 4), ())
    for more in lengths:  # the file has ten frames, the model's own length is 49
        assert "enough" in run("generate", "--model", checkpoints["5b"], *size, *more).stderr
    assert works[0] == works[1] == works[2] and works[0].tokens < works[3].tokens


@pytest.mark.parametrize(
    "like, more, encoded, frames",
    [
        ("5b-inp", ("--image", "image.png", "--end-image", "image.png"), ["masked_video"], 17),
        ("1.5-5b-inp", ("--end-image", "image.png", "--frames", "5"), ["masked_video"], 5),
        ("5b-inp", ("--video", "video.mp4", "--mask", "image.png"), ["masked_video"], 9),
        ("5b-inp", ("--video", "video.mp4", "--mask", "video.mp4", "--denoise", "0.5"), ["masked_video", "latent"], 9),
        ("5b-inp", ("--video", "video.mp4", "--image", "image.png"), ["masked_video", "latent"], 9),
        ("1.5-5b-inp", ("--video", "video.mp4"), ["latent"], 5),
        ("1.5-5b-void", ("--video", "video.mp4", "--mask", "video.mp4"), ["masked_video", "mask"], 5),
        ("1.5-5b-control", ("--control-video", "video.mp4"), ["control"], 5),
        ("5b-control", ("--control-video", "video.mp4", "--video", "video.mp4"), ["control", "latent"], 9),
        ("5b-i2v", ("--image", "image.png"), ["image"], 17),
    ],
    ids=str,
)
def test_files_are_read_for_the_fields_that_the_model_takes(like, more, encoded, frames, checkpoints, files):
    arguments = ["generate", "--model", "x", "--prompt", "x", "--output", "x.mp4"]
    args = build_parser().parse_args([*arguments, *(files.get(word, word) for word in more)])
    size = {"width": 48, "height": 32, "frames": args.frames or 17}
    pixels, ready = inputs.read(args, size, Checkpoint.open(checkpoints[like]))
    assert set(pixels) == set(encoded) and size["frames"] == frames
    assert set(ready) == ({"mask"} if "masked_video" in encoded else set()) - set(encoded)
    assert {video.shape for video in pixels.values()} == {(1 if encoded == ["image"] else frames, 32, 48, 3)}
    for mask in ready.values():
        assert mask.shape == (1, 1, (frames - 1) // 4 + 1, 4, 6)


def test_a_mask_may_be_the_other_way_round(checkpoints, files):
    arguments = ["generate", "--model", "x", "--prompt", "x", "--output", "x.mp4", "--video", files["video.mp4"]]
    shown = []
    for more in ([], ["--invert-mask"]):
        args = build_parser().parse_args([*arguments, "--mask", files["image.png"], *more])
        size = {"width": 48, "height": 32, "frames": 5}
        shown.append(inputs.read(args, size, Checkpoint.open(checkpoints["1.5-5b-void"]))[0]["mask"] * 2 - 1)
    levels = [sorted({*(255 - mask * 255).round().int().flatten().tolist()}) for mask in shown]
    assert all(set(found) <= {0, 63, 127, 255} and len(found) > 1 for found in levels)
    assert not torch.equal(*shown)
    assert ((shown[0] + shown[1] - 1).abs() <= 0.26).all()  # they add up to 1, but for the levels


@pytest.mark.parametrize(
    "like, more",
    [
        ("1.5-5b-void", ("--video", "video.mp4", "--mask", "image.png")),
        ("5b-inp", ("--image", "image.png", "--end-image", "image.png")),
        ("5b-control", ("--control-video", "video.mp4", "--control-strength", "0.5")),
    ],
    ids=str,
)
def test_images_and_control_videos_become_a_video(like, more, checkpoints, files, tmp_path, capsys):
    arguments = ["generate", "--model", checkpoints[like], "--prompt", "x", "--output", tmp_path / "out.mp4"]
    small = ["--steps", 1, "--width", 32, "--height", 32, "--frames", 5, "--plan", "single", "--devices", "cpu"]
    status = main([*map(str, [*arguments, *small]), *(files.get(word, word) for word in more)])
    assert status == 0, capsys.readouterr().err
    assert iio.imread(tmp_path / "out.mp4", plugin="pyav").shape == (5, 32, 32, 3)


@pytest.mark.parametrize(
    "like, more, words",
    [
        ("5b-i2v", ("--image", "none"), "there is no image file .*none.png"),
        ("5b-i2v", ("--image", "text.png"), "text.png cannot be read as image"),
        ("5b", ("--video", "none"), "there is no video file"),
        ("5b", ("--video", "text.mp4"), "text.mp4 cannot be read as video"),
        ("5b", ("--video", "empty.mp4"), "empty.mp4 cannot be read as video"),
        ("5b", ("--video", "text.png"), "text.png (holds no|cannot be read as) video"),
        ("5b", ("--video", "video.mp4", "--denoise", "1"), "denoise 1 keeps nothing"),
        ("5b", ("--video", "video.mp4", "--denoise", "2"), "denoise is 2.0; use 0.0 to 1.0"),
        ("5b", ("--video", "video.mp4", "--frames", "13"), "has 10 frames at the model.s rate, and --frames is 13"),
        ("1.5-5b", ("--video", "video.mp4", "--frames", "9"), "multiple of 2 latent frames and the video has 3: use 13"),
        ("5b", ("--denoise", "0.5"), "the latent is empty; encode a video"),
        ("5b", ("--image", "image.png"), "makes videos from text alone; .* such as CogVideoX-5b-I2V"),
        ("5b-i2v", (), "needs a start image .* such as CogVideoX-2b"),
        ("5b-i2v", ("--image", "image.png", "--width", "80"), "learned positions for 96x64 only .* 80x64; use 96x64"),
        ("5b-i2v", ("--image", "image.png", "--width", "81"), "width is 81"),
        (
            "5b-i2v",
            ("--end-image", "image.png"),
            "needs a start image with the end image; .* such as CogVideoX-Fun-V1.1-5b-InP",
        ),
        ("5b", ("--end-image", "image.png"), "takes no end image; for an end image or a mask use an inpaint model"),
        ("5b", ("--control-video", "video.mp4"), "text alone; for a control video use a control model"),
        ("5b", ("--video", "video.mp4", "--mask", "image.png"), "text alone; for an end image or a mask use an inpaint model"),
        ("5b-inp", ("--mask", "image.png"), "there is no video; give --video too"),
        ("5b-inp", ("--video", "video.mp4", "--mask", "none"), "there is no image file"),
        ("5b-inp", ("--video", "video.mp4", "--mask", "two.mp4"), "the mask has 2 frames and the video 9; give one for all"),
        ("5b-inp", ("--video", "video.mp4", "--mask", "image.png", "--image", "image.png"), "give one of them"),
        ("5b-inp", ("--control-video", "video.mp4"), "what is missing of a video; for a control video use a control model"),
        ("1.5-5b-inp", ("--image", "image.png", "--frames", "9"), "multiple of 2 latent frames and the video has 3: use 13"),
        ("5b-control", (), "needs a control video .*--control-video"),
        ("5b-control", ("--control-video", "text.mp4"), "text.mp4 cannot be read as video"),
        ("5b-control", ("--control-video", "video.mp4", "--control-end", "2"), "control_end is 2.0; use 0.0 to 1.0"),
        (
            "5b-control",
            ("--control-video", "video.mp4", "--frames", "13"),
            "has 10 frames at the model.s rate, and --frames is 13",
        ),
    ],
    ids=str,
)
def test_files_and_models_that_do_not_fit_end_with_2_and_one_line(like, more, words, checkpoints, files, tmp_path, capsys):
    output = tmp_path / "out.mp4"
    arguments = ["generate", "--model", str(checkpoints[like]), "--prompt", "x", "--output", str(output)]
    capsys.readouterr()  # what making the checkpoint said
    assert main([*arguments, *(files.get(word, word) for word in more)]) == 2
    error = capsys.readouterr().err
    assert re.search(words, error) and len(error.strip().splitlines()) == 1, error
    assert not output.exists()


def test_a_broken_checkpoint_ends_with_2_and_starts_no_group(run, checkpoints, tmp_path):
    broken = shutil.copytree(checkpoints["5b"], tmp_path / "broken")
    weights = broken / "transformer" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    done = generate(run, broken, tmp_path / "out.mp4", "--plan", "cfg2", "--devices", "cpu:2")
    assert done.returncode == 2 and "it is cut off" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert "starting" not in done.stderr


def test_where_the_group_cannot_start_auto_works_alone_and_a_plan_that_was_asked_for_fails(
    run, checkpoints, tmp_path, configure
):
    configure(preflight, python="/bin/false")
    common = (run, checkpoints["5b"], tmp_path / "out.mp4", "--devices", "cpu:2")
    failed = generate(*common, "--plan", "cfg2")
    assert failed.returncode == 1 and "generate: the group did not start" in failed.stderr
    assert not (tmp_path / "out.mp4").exists()
    alone = generate(*common, "--plan", "auto", "--json")
    assert alone.returncode == 0, alone.stderr
    assert len([line for line in alone.stderr.splitlines() if line.startswith("no group: the group did not start")]) == 1
    assert json.loads(alone.stdout.splitlines()[-1])["plan"] == "single" and (tmp_path / "out.mp4").exists()


def test_an_output_that_cannot_be_written_is_refused_before_any_work(checkpoints, tmp_path, capsys):
    common = ["generate", "--model", str(checkpoints["5b"]), "--prompt", "x"]
    assert main([*common, "--output", str(tmp_path / "a.mp4"), "--save-latents", str(tmp_path / "none" / "x")]) == 2
    assert "there is no folder" in capsys.readouterr().err
    (tmp_path / "folder.mp4").mkdir()
    assert main([*common, "--output", str(tmp_path / "folder.mp4")]) == 2
    assert "it is a folder" in capsys.readouterr().err
    assert main([*common, "--output", "/proc/x.mp4"]) == 2  # where permissions let root write
    assert "cannot write /proc/x.mp4: " in capsys.readouterr().err
    bench = ["bench", "--model", str(checkpoints["5b"]), "--output", str(tmp_path / "none" / "rows.json")]
    assert main(bench) == 2
    assert "there is no folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    "failure",
    [OutOfMemory("step 1 ran out of memory"), NotFinite("step 1 is not finite"), WriteFailure("no room"), GroupError("rank 1")],
    ids=lambda failure: type(failure).__name__,
)
def test_a_failure_is_one_line_and_exit_status_1(failure, run, checkpoints, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise failure

    monkeypatch.setattr(generating, "produce", fail)
    done = run("generate", "--model", checkpoints["5b"], "--prompt", "x", "--output", tmp_path / "out.mp4", "--plan", "single")
    assert done.returncode == 1 and done.stderr.splitlines()[-1] == f"generate: {failure}"
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_the_demo_model_is_always_there_and_does_what_it_is_told(run, tmp_path):
    prompt = "a red circle moves right on a white background"
    done = run("generate", "--model", "demo", "--prompt", prompt, "--steps", 20, "--output", tmp_path / "demo.mp4")
    assert done.returncode == 0, done.stderr
    clip = torch.from_numpy(iio.imread(tmp_path / "demo.mp4", plugin="pyav")) / 255
    assert clip.shape == (17, 64, 96, 3)
    background, (thing,) = look(clip, things=1)
    assert (background, thing.colour, thing.motion) == ("white", "red", "right")


def test_plan_says_what_every_plan_costs_which_one_auto_would_choose_and_why(run, checkpoints):
    done = run("plan", "--model", checkpoints["5b"], "--gpus", 8)
    assert done.returncode == 0
    assert "-> cfg2-ulysses4 " in done.stdout
    assert done.stdout.splitlines()[-1].startswith("8 GPUs (unknown): cfg2-ulysses4 is predicted to be the fastest, ")
    (marked, *_) = (line for line in done.stdout.splitlines() if "cfg2-ulysses2-pipefusion2" in line)
    assert marked.endswith("not exact: auto leaves it to you")
    short = run("plan", "--model", checkpoints["5b"], "--gpus", 2, "--memory-gib", 0.0001)
    assert "cfg2-fsdp2" in short.stdout and "no plan fits into 0.0001 GiB" in short.stdout.splitlines()[-2]
    assert short.stdout.splitlines()[-1].startswith("a forward pass does not fit into the memory of a GPU: ")
    for option, room, fits in (("--memory-gib", 0.1, "no"), ("--memory-gib", 0.5, "yes"), ("--memory-gb", 0.1, "no")):
        shown = run("plan", "--model", checkpoints["5b"], "--gpus", 1, option, room).stdout
        _, peak, needs, said = re.search(r"-> single +(\S+) +(\S+) +(\S+) +(\w+)", shown).groups()
        assert said == fits == ("yes" if float(needs) <= room else "no") and float(peak) < float(needs)
    assert run("plan", "--model", checkpoints["5b"], "--memory-gib", "inf").returncode == 2


def test_plan_is_asked_about_gpus_that_are_not_here(run, checkpoints):
    size = ("--width", 2048, "--height", 2048, "--frames", 97)  # for less the small model is not worth two GPUs
    asked = ("plan", "--model", checkpoints["5b"], "--gpus", 2, "--gpu", "4090", *size)
    done = run(*asked, "--cfg", 1, "--link", "nvlink", "--fp8", "linears", "--json")
    found = json.loads(done.stdout)
    assert (found["gpu"], found["plan"]) == ("RTX 4090", "ulysses2")
    assert {each["plan"]: each["exact"] for each in found["plans"]} == {"ulysses2": True, "ring2": True, "pipefusion2": False}
    several = json.loads(run(*asked, "--cfg", 1, "--count", 4, "--json").stdout)
    assert (
        several["plan"] == "replicas2" and several["plans"][0]["total_step_seconds"] == 2 * several["plans"][0]["step_seconds"]
    )
    assert "4 videos" in several["reason"] and run(*asked, "--count", 0).returncode == 2
    assert all(each["fits"] and each["step_seconds"] > 0 and each["peak_memory"] > 0 for each in found["plans"])
    assert found["reason"].startswith("ulysses2 is predicted at ")
    twice = run(*asked, "--fp8", "linears", "--quantize", "int8")
    assert twice.returncode == 2 and "both round the linear layers; set one of them to 'off'" in twice.stderr
    in_int8 = json.loads(run(*asked, "--cfg", 1, "--quantize", "int8", "--json").stdout)
    assert in_int8["plans"][0]["step_seconds"] != several["plans"][0]["step_seconds"]
    wrong = run("plan", "--model", checkpoints["5b"], "--gpu", "GTX 970")
    assert wrong.returncode == 2 and "gpu 'GTX 970' is not known; use one of H200, H100, " in wrong.stderr


def test_plan_gives_object_removal_no_guidance_unless_it_is_asked_for(run):
    chosen = {}
    for more in ((), ("--cfg", 6)):
        asked = run("plan", "--model", "void", "--gpu", "H100", "--gpus", 2, "--json", *more)
        found = json.loads(asked.stdout)
        chosen[more] = found["plan"], any("cfg" in each["plan"] for each in found["plans"])
    assert chosen == {(): ("ulysses2", False), ("--cfg", 6): ("cfg2", True)}
    assert "netflix/void-model: CogVideoX 1.5, object removal, 42 layers" in run("plan", "--model", "void", "--gpus", 1).stdout
    assert "void is published as transformers in single files" in run("download", "void").stderr


def test_plan_answers_for_a_model_that_is_not_downloaded_and_says_how_it_fits(run):
    shown = run("plan", "--model", "5b", "--gpu", "rtx 3060", "--gpus", 1).stdout.splitlines()
    assert shown[0].startswith("zai-org/CogVideoX-5b: ") and shown[1].startswith("not downloaded: ")
    assert shown[0].endswith(", made for 720x480x49 at 8 fps") and shown[2] == "predicted for 720x480x49, cfg 6"
    assert shown[-1].startswith("with plan single: offload 'group', ") and "decode in tiles" in shown[-1]
    small = ("plan", "--model", "5b", "--gpu", "3060", "--gpus", 1, "--width", 480, "--height", 320, "--frames", 25, "--cfg", 1)
    assert "\npredicted for 480x320x25, cfg 1\n" in run(*small).stdout
    asked = json.loads(run(*small, "--json").stdout)
    assert [asked[name] for name in ("width", "height", "frames", "cfg")] == [480, 320, 25, 1]
    found = json.loads(run("plan", "--model", "zai-org/CogVideoX-2b", "--gpu", "4090", "--gpus", 2, "--json").stdout)
    assert (found["model"], found["gpu"], found["fit"]["plan"], found["fit"]["offload"]) == (
        "zai-org/CogVideoX-2b", "RTX 4090", "cfg2", "none",
    )  # fmt: skip


@pytest.mark.slow
def test_serve_is_used_by_generate_shown_by_status_and_ended_by_stop(run, checkpoints, tmp_path, caplog):
    assert "no group is running" in run("status").stdout
    server = subprocess.Popen(
        [sys.executable, "-m", "parallel_backend", "serve", "--plan", "cfg2", "--devices", "cpu:2"],
        cwd=REPO, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=dict(os.environ),
    )  # fmt: skip
    try:
        assert server.stdout.readline().startswith("serving plan cfg2 on cpu:2")
        done = generate(run, checkpoints["5b"], tmp_path / "out.mp4", "--plan", "cfg2", "--devices", "cpu:2")
        assert done.returncode == 0 and "using the group that serve keeps" in caplog.text
        assert re.search(r", total [\d.]+ s\n$", done.stdout)  # nothing was started
        (group,) = json.loads(run("status", "--json").stdout)["groups"]
        assert (group["plan"], group["devices"], group["jobs"], group["loads"]) == (
            "cfg2",
            "cpu:2",
            3,
            2,
        )  # load, sample, decode
        assert re.search("^cfg2 +cpu:2 +ready +", run("status").stdout, re.M)
        assert re.match(r"ended plan cfg2 on cpu:2 after \d+ s and 3 jobs ", run("stop").stdout)
        assert server.wait(PATIENCE) == 0
        assert wait_until(lambda: not workers())
        assert "no group is running" in run("status").stdout
    finally:
        server.kill()


@pytest.mark.slow
def test_ctrl_c_ends_a_run_and_leaves_nothing(checkpoints, tmp_path):
    run = subprocess.Popen(
        [
            sys.executable, "-m", "parallel_backend", "generate", "--model", checkpoints["5b"], "--prompt", "x",
            "--steps", "1000", "--plan", "cfg2", "--devices", "cpu:2", "--output", tmp_path / "out.mp4",
        ],
        cwd=REPO, stderr=subprocess.PIPE, text=True, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    try:
        for line in run.stderr:
            if line.startswith("step 2/"):
                break
        run.send_signal(signal.SIGINT)
        assert run.wait(PATIENCE) == 1
        assert "stopped" in run.stderr.read()
        assert wait_until(lambda: not workers())
        assert not (tmp_path / "out.mp4").exists()
    finally:
        run.kill()


@pytest.mark.slow
def test_bench_states_ours_beside_diffusers_and_xdit(run, checkpoints, loras, tmp_path):
    done = run(
        "bench", "--model", checkpoints["5b"], "--devices", "cpu:2", "--width", 64, "--height", 48, "--frames", 9, "--steps", 4,
        "--decode", "--lora", loras["5b"], "--precisions", "lossless,fp8,lossless+cache0.9+guidance1", "--float32", "--xdit", "cfg2",
        "--output", tmp_path / "rows.json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[1].startswith("auto: cfg2 is predicted")
    rows = json.loads((tmp_path / "rows.json").read_text())
    ours = [
        ("ours", plan, precision)
        for plan in ("single", "cfg2")
        for precision in ("lossless", "fp8", "lossless+cache0.9+guidance1")
    ]
    theirs = [("diffusers", "single", "eager"), ("xdit", "cfg2", "eager")]
    assert [(row["name"], row["plan"], row["precision"]) for row in rows] == [*ours, *theirs]
    for row in rows:
        assert row["seconds_per_step"] > 0, row["notes"]
        if row["name"] == "xdit":
            continue
        assert row["decode_seconds"] > 0
        if row["precision"] == "fp8":
            assert 1e-3 < row["from_first"] < 0.1 and 1e-3 < row["from_float32"] < 0.1
        elif "guidance1" in row["precision"]:
            assert row["from_first"] > 0.01 and "guidance cache 1: 1 of 4 forwards" in "".join(row["notes"])
        else:
            assert row["from_first"] <= TOLERANCE
            assert row["name"] == "diffusers" or row["from_float32"] <= 1e-5
        assert ("step cache 0.9" in "".join(row["notes"])) == ("+cache0.9" in row["precision"])
    bad = run("bench", "--model", checkpoints["5b"], "--precisions", "fast")
    assert bad.returncode == 2 and "'fast' is not understood; use some of lossless, eager, fp8" in bad.stderr


def test_bench_takes_the_first_devices_for_each_plan_and_goes_on_where_the_group_of_auto_cannot_start(
    run, checkpoints, tmp_path, configure
):
    configure(preflight, python="/bin/false")
    common = ("bench", "--model", checkpoints["5b"], "--devices", "cpu:2", "--diffusers", "none", "--repeat", 1)
    common += ("--width", 64, "--height", 48, "--frames", 9, "--steps", 2, "--output", tmp_path / "rows.json")
    done = run(*common)
    assert done.returncode == 0, done.stderr
    assert [row["plan"] for row in json.loads((tmp_path / "rows.json").read_text())] == ["single"]
    assert re.search("^no group: the group did not start.*; plan cfg2 is not timed$", done.stderr, re.M)
    named = run(*common, "--plans", "single,cfg2")
    assert named.returncode == 1 and "bench: the group did not start" in named.stderr
    too_large = run(*common, "--plans", "single,ulysses3")
    assert too_large.returncode == 2 and "plan 'ulysses3' needs 3 devices" in too_large.stderr
    assert too_large.stdout == ""  # it is refused before another plan is timed


def test_info_lines_of_the_whole_package_go_to_standard_error_and_those_of_libraries_do_not(run, monkeypatch, capsys):
    """The command line derives the name of the package's logger from its own, which changes if the folder moves."""
    logging.getLogger("parallel_backend").setLevel(logging.NOTSET)  # an earlier command in this process has set it
    with monkeypatch.context() as patch:
        patch.setattr(logging.root, "handlers", [])  # basicConfig adds none if pytest's are there
        assert run("status").returncode == 0
        launcher.logger.info("starting 2 processes")
        logging.getLogger("some_library").info("loading")
    assert capsys.readouterr().err == "starting 2 processes\n"


class Terminal(io.StringIO):
    """A terminal as far as a progress bar cares."""

    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_a_bar_with_seconds_a_step_and_a_log_gets_lines():
    terminal, file = Terminal(), io.StringIO()
    for output in (terminal, file):
        with Progress(output) as progress:
            for step in range(1, 5):
                time.sleep(0.15)
                progress(step, 4)
    assert file.getvalue() == "step 1/4\nstep 2/4\nstep 3/4\nstep 4/4\n"
    last = terminal.getvalue().rstrip().split("\r")[-1]
    assert re.search(r"^4/4 \|[█#]+\| +\d+\.\d\ds/step, 00:00 left$", last), last


def test_a_table_has_its_columns_below_their_titles(capsys):
    rows = [("cfg2", 3, 0.123456), ("cfg2-ulysses2", None, 12.0)]
    table = Table.of(("plan", "jobs", "s a step"), rows)
    table.show_titles()
    for row in rows:
        table.show(row)
    assert capsys.readouterr().out.splitlines() == [
        "plan           jobs  s a step",
        "cfg2              3    0.1235",
        "cfg2-ulysses2     -        12",
    ]


@pytest.fixture
def served():
    """A group on the CPU that ``serve`` keeps, as the registry describes it. ``auto`` finds one of another plan too."""
    home = Home.open()
    known = {"plan": "ulysses2", "devices": "cpu:2", "shared": True, "processes": 2, "nodes": 1, "node": 0, "first_rank": 0}
    address = GroupAddress.create(home.root, {**known, "lost": None, "lock": str(home.lock.path)})
    yield address
    address.remove()
    home.lock.close()


@pytest.mark.parametrize(
    "plan, devices, workload, found",
    [
        ("auto", "auto", Workload(48), "ulysses2"),
        ("auto", "cpu:2", Workload(48), "ulysses2"),
        ("auto", "cpu", Workload(48), None),
        ("single", "auto", Workload(48), None),
        ("auto", "auto", Workload(47), None),
        ("auto", "auto", Workload(48, guided=False), "ulysses2"),
    ],
    ids=str,
)
def test_a_group_that_serve_keeps_is_found_whatever_its_plan_if_none_is_given(plan, devices, workload, found, served):
    chosen, _, reason = resolve(plan, devices, workload)
    assert (reason == "the group that serve keeps") == (found is not None) and (found is None or str(chosen) == found)


@pytest.mark.parametrize("kept, found", [("cfg2", False), ("pipefusion2", False), ("ring2", True)])
def test_a_group_that_makes_another_video_or_would_be_idle_is_not_taken(kept, found, served):
    served.add(plan=kept)
    reason = resolve("auto", "cpu:2", Workload(48, guided=False))[2]
    assert (reason == "the group that serve keeps") == found


def test_a_second_serve_on_the_same_devices_says_so_and_stop_says_what_it_leaves(served, run):
    done = run("serve", "--plan", "cfg2", "--devices", "cpu:2")
    words = f"serve: serve keeps plan ulysses2 on cpu:2 already (process {os.getpid()}, {served.folder}); end it with stop"
    assert done.returncode == 2 and done.stderr.startswith(words)
    served.add(shared=False)
    said = run("stop").stdout
    assert f"plan ulysses2 on cpu:2 goes on: it belongs to process {os.getpid()}" in said and "--all" in said
    titles, row, logs = run("status").stdout.splitlines()
    assert titles.split()[:4] == ["plan", "devices", "state", "up"]
    assert row.split()[:3] == ["ulysses2", "cpu:2", "starting"] and row.split()[-1] == str(os.getpid())
    assert logs == f"logs of ulysses2 on cpu:2: {served.folder}/logs"


@pytest.mark.parametrize("answers", [True, False])
@pytest.mark.parametrize("ends", [True, False])
def test_stop_ends_the_groups_here_and_its_status_says_whether_they_or_the_cluster_failed(ends, answers, run, monkeypatch):
    ended = []

    def on_cluster() -> dict:
        assert ended  # those here come first
        return {} if answers else silent()

    address = GroupAddress(Path("/nowhere/group-1"))
    known = {"plan": "cfg2", "devices": "cpu:2", "node": 0, "shared": True}
    monkeypatch.setattr(stop, "running", lambda: {address: known})
    monkeypatch.setattr(stop, "end", lambda what, *others: ended.append(what) or ends)
    monkeypatch.setattr(stop, "groups_on_cluster", on_cluster)
    done = run("stop", "--ray")
    assert ended == ["plan cfg2 on cpu:2"] and done.returncode == {(True, True): 0, (False, True): 1, (True, False): 3}.get(
        (ends, answers), 4
    )
    assert done.stderr == ("" if answers else "stop: no Ray cluster answers\n")


def test_status_shows_the_groups_here_where_the_cluster_does_not_answer(served, run, monkeypatch):
    monkeypatch.setattr(nodes, "nodes", silent)
    done = run("status", "--ray")
    assert done.returncode == 3 and done.stderr == "status: no Ray cluster answers\n" and "ulysses2" in done.stdout


def silent() -> dict:
    raise RequestError("no Ray cluster answers")


def test_serve_compares_gpus_only_with_processes_that_number_them_alike(served, monkeypatch):
    served.add(devices="0,1")
    serve.check_unserved(Devices("cuda", (2, 3)))
    serve.check_unserved(Devices("cpu", (0, 1)))
    with pytest.raises(RequestError, match="serve keeps plan ulysses2 on 0,1 already"):
        serve.check_unserved(Devices("cuda", (1, 2)))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")  # what this process started with is seen from outside
    serve.check_unserved(Devices("cuda", (1, 2)))


def test_help_says_the_default_of_every_option_that_has_one_and_which_are_required():
    for name, parser in build_parser()._subparsers._group_actions[0].choices.items():
        said = " ".join(parser.format_help().split())
        for action in parser._actions:
            if action.default or isinstance(action.default, float):
                assert f"(default {action.default}" in said or action.default == SUPPRESS, (name, action.dest)
        assert said.count("(required)") == sum(action.required for action in parser._actions if action.option_strings), name
        alternatives = [group._group_actions for group in parser._mutually_exclusive_groups if group.required]
        assert all(f"(required, or {other.option_strings[0]})" in said for _, other in alternatives), name


def test_the_options_are_frozen_so_that_scripts_go_on_working():
    parser = build_parser()
    commands = parser._subparsers._group_actions[0].choices
    found = {name: {option for action in sub._actions for option in action.option_strings} for name, sub in commands.items()}
    assert set(found) >= {"generate", "plan", "cards", "serve", "status", "stop", "bench"}
    assert found["generate"] >= {
        "--model", "--prompt", "--negative-prompt", "--width", "--height", "--frames", "--steps", "--cfg", "--seed", "--scheduler",
        "--dynamic-cfg", "--fps", "--plan", "--devices", "--dtype", "--offload", "--tiling", "--output", "--save-latents", "--json",
        "--image", "--video", "--denoise", "--lora",
        "--end-image", "--image-scale", "--mask", "--control-video", "--control-strength",
        "--control-start", "--control-end",
    }  # fmt: skip
