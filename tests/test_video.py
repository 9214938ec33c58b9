"""Videos on disk: whole, or not there and said so."""

import resource
import tempfile
from contextlib import contextmanager
from pathlib import Path

import imageio.v3 as iio
import pytest
import torch

from parallel_backend import video
from parallel_backend.errors import RequestError

FRAMES = torch.rand(9, 64, 96, 3, generator=torch.Generator().manual_seed(0))


@contextmanager
def room_for(size: int):
    """A file can have so many bytes, as on a disk that is full then."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def frames_of(path: Path) -> int:
    return len(iio.imread(path, plugin="pyav"))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # imageio closes its file a second time
def test_a_full_disk_is_said_in_one_line_and_leaves_nothing_behind(tmp_path):
    with room_for(10_000), pytest.raises(RequestError, match=r"cannot write .*clip\.mp4: File too large; make room"):
        video.save(tmp_path / "clip.mp4", FRAMES, fps=8)
    with room_for(1_000), pytest.raises(RequestError, match=r"cannot write .*clip\.latent: File too large"):
        video.save_latent(tmp_path / "clip.latent", torch.zeros(1, 16, 3, 8, 12))
    assert not list(tmp_path.iterdir())


def test_a_video_that_was_there_before_stays_whole_when_the_disk_is_full(tmp_path):
    video.save_latent(tmp_path / "clip.latent", torch.zeros(1, 16, 3, 8, 12))
    before = (tmp_path / "clip.latent").read_bytes()
    with room_for(1_000), pytest.raises(RequestError):
        video.save_latent(tmp_path / "clip.latent", torch.ones(1, 16, 3, 8, 12))
    assert (tmp_path / "clip.latent").read_bytes() == before


def test_a_video_whose_folder_went_while_it_was_made_is_kept_elsewhere(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.raises(RequestError, match=r"cannot write /gone/clip\.mp4: .* this video is kept as") as raised:
        video.save_or_rescue(Path("/gone/clip.mp4"), FRAMES, fps=8)
    assert frames_of(Path(str(raised.value).rpartition("kept as ")[2])) == len(FRAMES)
    video.save_or_rescue(tmp_path / "clip.mp4", FRAMES, fps=8)
    assert frames_of(tmp_path / "clip.mp4") == len(FRAMES)
