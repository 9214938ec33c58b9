"""Videos on disk: whole, or not there and said so."""

import json
import os
import subprocess
import sys
import tempfile
import threading
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path

import av
import pytest
import torch

from parallel_backend.errors import RequestError, WriteFailure
from parallel_backend.media import encoding, video
from parallel_backend.system.files import check_writable

from .conftest import wait_until

REPO = Path(__file__).resolve().parents[1]
FRAMES = torch.rand(9, 64, 96, 3, generator=torch.Generator().manual_seed(0))
ROOM = """
import json, os, resource, sys
from pathlib import Path
import torch
from parallel_backend.media import video
from parallel_backend.system import files
folder, frames = Path(sys.argv[1]), torch.rand(9, 64, 96, 3, generator=torch.Generator().manual_seed(0))
whole, before, said = folder / "whole.mp4", resource.getrlimit(resource.RLIMIT_FSIZE), {}
video.save(whole, frames, fps=8)
size = whole.stat().st_size
def attempt(name, call):
    try:
        call()
    except Exception as error:
        said[name] = [type(error).__name__, str(error)]
for room in (0, 100, 10_000, size // 2, size - 1):
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
    attempt(f"video {room}", lambda: video.save(folder / "clip.mp4", frames, fps=8))
    attempt(f"latent {room}", lambda: video.save_latent(folder / "clip.latent", torch.zeros(1, 16, 13, 60, 90)))
    if room <= 10_000:
        attempt(f"check {room}", lambda: files.check_writable(folder / "clip.mp4"))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    video.save(whole, frames, fps=8)
print(json.dumps([said, sorted(os.listdir(folder))]))
"""
"""Writes with a limit of a file's size, as on a disk that is full then, and once more without after each failure."""


def decode(path: Path) -> torch.Tensor:
    """The frames, 0 to 255."""
    with av.open(path) as file:
        return torch.stack([torch.from_numpy(frame.to_ndarray(format="rgb24")) for frame in file.decode(video=0)])


@contextmanager
def raises_line(kind: type[Exception], words: str):
    """An error of just this kind, in one line."""
    with pytest.raises(kind, match=words) as raised:
        yield
    assert type(raised.value) is kind and "\n" not in str(raised.value)


def test_a_process_survives_a_full_disk_says_so_and_leaves_nothing_behind(tmp_path):
    run = [sys.executable, "-c", ROOM, str(tmp_path)]
    done = subprocess.run(run, capture_output=True, text=True, cwd=REPO, env={**os.environ, "PYTHONPATH": str(REPO)})
    assert done.returncode == 0, done.stderr
    said, left = json.loads(done.stdout.splitlines()[-1])
    assert left == ["whole.mp4"]
    assert len(said) == 5 + 5 + 3  # every attempt failed
    for kind, line in said.values():
        assert kind == "WriteFailure" and "File too large; free space or choose another folder" in line
        assert line.startswith("cannot write ") and "/clip." in line and "\n" not in line


def test_a_video_that_was_there_before_stays_whole_when_the_disk_is_full(tmp_path, monkeypatch):
    path = tmp_path / "clip.latent"
    video.save_latent(path, torch.zeros(1, 16, 3, 8, 12))
    before = path.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with raises_line(WriteFailure, "clip.latent: No space left on device"):
        video.save_latent(path, torch.ones(1, 16, 3, 8, 12))
    assert path.read_bytes() == before and os.listdir(tmp_path) == [path.name]


def test_a_video_whose_folder_went_while_it_was_made_is_kept_elsewhere(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with raises_line(WriteFailure, r"cannot write /gone/clip\.mp4: .* this video is kept as"):
        video.save_or_rescue(Path("/gone/clip.mp4"), FRAMES, fps=8)
    rescued = next(tmp_path.glob("xdit-video-*/clip.mp4"))
    assert len(decode(rescued)) == len(FRAMES)
    monkeypatch.setattr(tempfile, "tempdir", "/gone")
    with raises_line(WriteFailure, r"cannot write /gone/clip\.mp4: No such file"):
        video.save_or_rescue(Path("/gone/clip.mp4"), FRAMES, fps=8)
    video.save_or_rescue(tmp_path / "clip.mp4", FRAMES, fps=8)
    assert len(decode(tmp_path / "clip.mp4")) == len(FRAMES)


def test_a_place_that_cannot_be_written_to_is_found_by_writing(tmp_path, monkeypatch):
    (tmp_path / "old.mp4").write_text("old")
    (tmp_path / "folder.mp4").mkdir()
    for name in ("new.mp4", "old.mp4", f"{'x' * 251}.mp4"):
        check_writable(tmp_path / name)
    assert sorted(os.listdir(tmp_path)) == ["folder.mp4", "old.mp4"] and (tmp_path / "old.mp4").read_text() == "old"
    for name, words in (
        ("none/new.mp4", "there is no folder"),
        ("old.mp4/new.mp4", "there is no folder"),
        ("folder.mp4", "it is a folder"),
        (f"{'x' * 252}.mp4", "File name too long"),
    ):
        with raises_line(RequestError, words):
            check_writable(tmp_path / name)
    with raises_line(RequestError, "cannot write /proc/clip.mp4"):
        check_writable(Path("/proc/clip.mp4"))  # permissions allow it where the user is root
    video.save(tmp_path / f"{'x' * 251}.mp4", FRAMES, fps=8)


def test_colours_rate_and_metadata_are_in_the_file(tmp_path):
    colours = torch.tensor([[200, 60, 30], [20, 90, 220], [40, 180, 60], [128, 128, 128]]) / 255
    video.save(
        tmp_path / "clip.mp4",
        colours[:, None, None].expand(4, 720, 96, 3),
        fps=29.97,
        metadata={"prompt": "a", "workflow": "{}"},
    )
    with av.open(tmp_path / "clip.mp4") as file:
        stream = file.streams.video[0]
        assert stream.average_rate == Fraction(2997, 100)
        assert file.metadata["prompt"] == "a" and file.metadata["workflow"] == "{}"
        context = stream.codec_context
        assert (context.colorspace, context.color_primaries, context.color_trc, context.color_range) == (1, 1, 1, 1)
        for frame, colour in zip(file.decode(stream), colours, strict=True):
            luma = torch.from_numpy(frame.to_ndarray())[:720].float().mean()  # of yuv420p: its first rows
            expected = 16 + 219 * (colour * torch.tensor([0.2126, 0.7152, 0.0722])).sum()
            assert abs(luma - expected) < 1.5
    head = (tmp_path / "clip.mp4").read_bytes()
    assert 0 < head.index(b"moov") < head.index(b"mdat")  # the front end looks for a workflow at the start alone


def moving(count: int = 49) -> torch.Tensor:
    """A clip of 96x64 with smooth shapes and a little noise that moves two pixels a frame."""
    generator = torch.Generator().manual_seed(0)
    wide = torch.rand(1, 3, 8, 24, generator=generator)
    wide = torch.nn.functional.interpolate(wide, size=(64, 96 + 2 * count), mode="bicubic")[0].permute(1, 2, 0)
    clip = torch.stack([wide[:, 2 * place : 2 * place + 96] for place in range(count)])
    return (clip + 0.02 * torch.randn(clip.shape, generator=generator)).clamp(0, 1)


def arriving(clip: torch.Tensor, fps: float = 8) -> encoding.Encoding:
    """The encoding of a clip whose frames arrive as a VAE decodes them; it began again once."""
    encodings = encoding.Encodings(video.checked_fps(fps))
    starts = [0, 0, *range(9, len(clip), 8)]
    for start in starts:
        encodings.on_frames(0, start, clip[start : start + 8 if start else 9])
    encodings.finish()
    return encodings.videos[0]


def test_a_video_encoded_while_its_frames_arrive_is_the_file_of_one_saved_whole(tmp_path, monkeypatch):
    clip, metadata = moving(), {"prompt": '{"1": {}}', "workflow": "{}"}
    video.save(tmp_path / "whole.mp4", clip, fps=8, metadata=metadata)
    early = arriving(clip)
    monkeypatch.setattr(video, "encode", None)  # nothing is encoded when it is saved
    for name in ("early.mp4", "again.mp4"):
        video.save(tmp_path / name, clip, fps=8, metadata=metadata, early=early)
        assert (tmp_path / name).read_bytes() == (tmp_path / "whole.mp4").read_bytes()


def test_of_a_batch_only_the_encoder_of_the_last_video_stays_open():
    before, clip = set(threading.enumerate()), moving(17)
    encodings = encoding.Encodings(video.checked_fps(8))
    for number in range(4):
        for start in (0, 9):
            encodings.on_frames(number, start, clip[start : start + 8 if start else 9])
    assert wait_until(lambda: sum(thread.name.startswith("encoding") for thread in {*threading.enumerate()} - before) == 1)
    files = [encodings.videos[number].mp4() for number in range(4)]
    assert files == [arriving(clip).mp4()] * 4


@pytest.mark.parametrize("change", ["rate", "pixel", "order", "rows", "frame", "NaN"])
def test_a_video_that_is_not_the_one_encoded_before_is_encoded_when_it_is_saved(change, tmp_path):
    clip, fps = moving(17), 8
    early = arriving(clip)
    early.mp4()
    if change == "rate":
        fps = 9
    elif change == "pixel":
        clip[5, 6, 7, 1] *= 0.5  # by a node that changes its input in place
        assert early.mp4_of(clip, early.rate) is None
        clip[5] *= 0.5
    elif change in ("order", "rows"):
        clip.copy_(clip.flip(0 if change == "order" else 1))
    elif change == "frame":
        clip = clip[1:]
    else:
        clip[5, 6, 7, 1] = float("nan")
        early = arriving(clip)
        with raises_line(RequestError, "NaN"):
            video.save(tmp_path / "a.mp4", clip, fps=fps, early=early)
        return
    for name, given in (("a.mp4", early), ("b.mp4", None)):
        video.save(tmp_path / name, clip, fps=fps, early=given)
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()


def test_a_file_is_as_good_as_that_of_the_encoder_left_alone(tmp_path):
    clip = moving()
    pixels = (clip * 255).round().to(torch.uint8)
    video.save(tmp_path / "ours.mp4", clip, fps=8)
    with av.open(tmp_path / "reference.mp4", "w") as file:
        stream = file.add_stream("libx264", rate=8)
        stream.height, stream.width, stream.pix_fmt = 64, 96, "yuv420p"
        for frame in pixels:
            picture = av.VideoFrame.from_ndarray(frame.numpy(), format="rgb24")
            file.mux(stream.encode(picture.reformat(format="yuv420p", dst_colorspace="ITU709")))
        file.mux(stream.encode(None))
    luma = [av.VideoFrame.from_ndarray(frame.numpy(), format="rgb24").reformat(format="yuv420p", dst_colorspace="ITU709")
            for frame in pixels]  # fmt: skip
    wanted = torch.stack([torch.from_numpy(frame.to_ndarray()) for frame in luma]).float()
    ours, reference = (psnr(tmp_path / name, wanted) for name in ("ours.mp4", "reference.mp4"))
    assert ours >= reference - 0.5
    assert (tmp_path / "ours.mp4").stat().st_size <= 1.1 * (tmp_path / "reference.mp4").stat().st_size


def psnr(path: Path, wanted: torch.Tensor) -> float:
    """The PSNR in dB of a file's frames in yuv420p."""
    with av.open(path) as file:
        found = torch.stack([torch.from_numpy(frame.to_ndarray()) for frame in file.decode(video=0)]).float()
    return float(10 * torch.log10(255**2 / (found - wanted).square().mean()))


@pytest.mark.parametrize(
    "frames, size",
    [
        (torch.cat([FRAMES, torch.zeros(9, 64, 96, 1)], -1), (9, 64, 96, 3)),
        (FRAMES[..., :1], (9, 64, 96, 3)),
        (FRAMES[None], (9, 64, 96, 3)),
        (FRAMES[0], (1, 64, 96, 3)),
        (FRAMES[:, :33, :47], (9, 32, 46, 3)),
        (FRAMES[:, :2, :2], (9, 2, 2, 3)),
        (FRAMES * 4 - 2, (9, 64, 96, 3)),
    ],
)
def test_pictures_with_an_obvious_meaning_become_a_video(frames, size, tmp_path):
    said = []
    video.save(tmp_path / "clip.mp4", frames, fps=8, say=said.append)
    assert decode(tmp_path / "clip.mp4").shape == size
    assert said == (["frames of 47x33 are cropped to 46x32: H.264 needs even sizes"] if size[1] == 32 else [])


@pytest.mark.parametrize(
    "frames, fps, words",
    [
        *((FRAMES, fps, "fps is .*; use a number from 1 to 240") for fps in (0, -5.0, float("nan"), float("inf"), "x", None)),
        (FRAMES[:0], 8, "holds no image"),
        (FRAMES[..., :2], 8, "2 channels"),
        (FRAMES[:, :1, :1], 8, "images are 1x1; a video is at least 2x2"),
        (FRAMES * float("nan"), 8, "NaN"),
        (FRAMES[:1, :2].repeat(1, 1, 200, 1), 8, "the H.264 encoder takes no frames of 19200x2"),
    ],
)
def test_what_is_no_video_is_refused_in_one_line(frames, fps, words, tmp_path):
    with raises_line(RequestError, words):
        video.save(tmp_path / "clip.mp4", frames, fps=fps)
    assert not os.listdir(tmp_path)


def test_save_video_writes_a_file_a_video_and_finds_a_bad_place_before_the_workflow_runs(in_comfyui):
    shown, log = in_comfyui("""
Save, errors = part("nodes.saving").SaveVideo, part("parallel_backend.errors")
from comfy_api.latest import io
hidden = {io.Hidden.prompt: {"1": {}}, io.Hidden.extra_pnginfo: None, io.Hidden.unique_id: "1"}
node = Save.PREPARE_CLASS_CLONE({"hidden_inputs": hidden})
frames = torch.rand(6, 32, 47, 3)
def save(images, fps=8.0, prefix="each", **more):
    try:
        return [one["filename"] for one in node.execute(images, fps, prefix, **more).ui["images"]]
    except errors.RequestError as error:
        return str(error)
made = [save(frames), save(frames, videos=2), save(frames.view(2, 3, 32, 47, 3)), save(frames, fps=5, videos=3.0)]
refused = [save(frames, videos=4), save(frames[:0]), save(frames, fps=0.0), save(frames, prefix="x" * 300)]
valid = [Save.validate_inputs(filename_prefix=prefix) for prefix in ("b/c", None, "x" * 300, "../../x", chr(0))]
show(made=made, refused=refused, valid=valid, folder=folder)
""")
    assert shown["made"] == [
        ["each_00001_.mp4"],
        ["each_00002_.mp4", "each_00003_.mp4"],
        ["each_00004_.mp4", "each_00005_.mp4"],
        ["each_00006_.mp4", "each_00007_.mp4", "each_00008_.mp4"],
    ]
    assert [len(decode(path)) for path in sorted(Path(shown["folder"]).glob("each_*.mp4"))] == [6, 3, 3, 3, 3, 2, 2, 2]
    assert log.count("frames of 47x32 are cropped to 46x32") == 8
    words = (
        "6 images cannot be split into 4 videos of equal length",
        "holds no image",
        "fps is 0.0; use",
        "File name too long",
    )
    assert all(word in line for word, line in zip(words, shown["refused"], strict=True))
    assert shown["valid"][:2] == [True, True]
    words = ("File name too long", "cannot be used: ", "null byte")
    assert all(word in line for word, line in zip(words, shown["valid"][2:], strict=True))
