"""Files as phones, cameras and scanners make them are read as a viewer or a player shows them."""

import io
import struct
from fractions import Fraction
from itertools import product
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

from parallel_backend.errors import RequestError
from parallel_backend.media import reading
from workflows.headless import GetVideoComponents

RANDOM = np.random.default_rng(0)
CORNERS = np.zeros((32, 48, 3), np.uint8)
CORNERS[:16, :24], CORNERS[:16, 24:], CORNERS[16:, :24] = (200, 20, 20), (20, 200, 20), (20, 20, 200)
MATRICES = {1: (0.2126, 0.0722), 5: (0.299, 0.114), 6: (0.299, 0.114), 9: (0.2627, 0.0593)}
"""Shares of red and blue in the luma of BT.709, BT.601 (twice) and BT.2020, by FFmpeg's numbers."""


def read(path: Path, kind: str) -> np.ndarray:
    """The pictures ``[count, height, width, 3]``, 0 to 255."""
    return torch.cat(list(reading.pictures(path, kind))).mul(255).numpy()


def write_video(path: Path, pictures: list[np.ndarray], *, rate=8, ticks=None, base=None, pixel_format="yuv444p", **settings):
    """Writes H.264, near enough to lossless; ``ticks`` are the times at which pictures are shown, in units of ``base``."""
    with av.open(path, "w") as file:
        frames = [
            one if isinstance(one, av.VideoFrame) else av.VideoFrame.from_ndarray(one, format="rgb24") for one in pictures
        ]
        stream = file.add_stream("libx264", rate=rate, options={"crf": "1", "bf": "2"})
        stream.height, stream.width, stream.pix_fmt = frames[0].height, frames[0].width, pixel_format
        if base:
            stream.time_base = stream.codec_context.time_base = base
        for name, value in settings.items():
            setattr(stream.codec_context, name, value)
        for place, frame in enumerate(frames):
            if ticks:
                frame.pts, frame.time_base = ticks[place], base
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
    return path


def grey(levels) -> list[np.ndarray]:
    """A picture of each grey level."""
    return [np.full((32, 48, 3), level, np.uint8) for level in levels]


@pytest.mark.parametrize("matrix", [m for a, b in product((1, -1), repeat=2) for m in ((a, 0, 0, b), (0, a, b, 0))])
def test_a_video_is_turned_and_mirrored_as_its_display_matrix_says(matrix, tmp_path):
    path = write_video(tmp_path / "phone.mp4", [CORNERS] * 3)
    a, b, c, d = matrix
    data = bytearray(path.read_bytes())
    place = data.index(b"tkhd") + 4 + 40
    data[place : place + 36] = struct.pack(">9i", a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30)
    path.write_bytes(data)
    expected = np.zeros((32, 48, 3) if a else (48, 32, 3))
    for y, x in np.ndindex(32, 48):  # a negative place counts from the other edge
        expected[b * x + d * y - (b + d < 0), a * x + c * y - (a + c < 0)] = CORNERS[y, x]
    found = read(path, "video")
    assert found.shape == (3, *expected.shape) and np.abs(found - expected).mean() < 3
    assert torch.equal(GetVideoComponents().take(str(path))[0], torch.from_numpy(found) / 255)


@pytest.mark.parametrize("bits", [8, 10])
@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("matrix, height", [(1, 64), (5, 64), (6, 64), (9, 64), (2, 64), (2, 720)])
def test_colours_follow_the_matrix_and_the_range_that_a_file_names(matrix, height, full, bits, tmp_path):
    colour = np.array([200, 60, 30]) / 255
    red, blue = MATRICES[matrix if matrix != 2 else 5 if height < 720 else 1]  # players guess where a file says nothing
    luma = colour @ (red, 1 - red - blue, blue)
    chroma = [(colour[2] - luma) / (2 - 2 * blue), (colour[0] - luma) / (2 - 2 * red)]
    low, span, chroma_span = (0, 255, 255) if full else (16, 219, 224)
    planes = [low + span * luma, *(128 + chroma_span * one for one in chroma)]
    frame = av.VideoFrame(64, height, "yuv444p" if bits == 8 else "yuv444p10le")
    for plane, value in zip(frame.planes, planes):
        whole = np.full(plane.buffer_size // (1 if bits == 8 else 2), round(value * 2 ** (bits - 8)))
        plane.update(whole.astype(np.uint8 if bits == 8 else "<u2").tobytes())
    path = write_video(
        tmp_path / "clip.mp4", [frame], pixel_format=frame.format.name, colorspace=matrix, color_range=2 if full else 1
    )
    found = read(path, "video")[0]
    assert found.shape == (height, 64, 3) and np.abs(found - colour * 255).max() < 3


@pytest.mark.parametrize("transfer, words", [(16, "is HDR (PQ)"), (18, "is HDR (HLG)"), (1, "")])
def test_hdr_is_said(transfer, words, tmp_path, caplog):
    read(write_video(tmp_path / "a.mp4", [CORNERS], color_trc=transfer), "video")
    assert words in caplog.text and bool(words) == bool(caplog.text)


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.avi"])
@pytest.mark.parametrize("rate", [Fraction(24), Fraction(30000, 1001), Fraction(8)])
def test_a_constant_rate_stays_as_it_is(rate, name, tmp_path, caplog):
    levels = range(10, 250, 5)
    path = write_video(tmp_path / name, grey(levels), rate=rate, pixel_format="yuv420p")  # Matroska rounds to milliseconds
    assert np.abs(read(path, "video").mean((1, 2, 3)) - levels).max() < 2.5
    assert reading.frames_per_second(path) == pytest.approx(float(rate), rel=1e-3)
    assert not caplog.text


@pytest.mark.parametrize(
    "ticks, fps",
    [
        ([0, 100, 200, 300, 400, 800, 1200, 1600, 1700], 10),  # half of it slower, as a phone in the dark
        ([500, 600, 700, 800, 2800, 2900, 3000], 10),  # a recorded screen that rested; it does not begin at 0
        ([0, 97, 203, 310, 395, 502, 1600, 1700], 10),  # uneven, as phones are
        ([0, 100, 101, 102, 200, 300, 400, 500, 600, 700, 800, 900], 10),  # more than are shown
        ([0, 1, 2, 3, 900, 901, 902], reading.MOST_FPS),
    ],
)
def test_a_variable_rate_is_read_as_it_plays(ticks, fps, tmp_path, caplog):
    levels = range(10, 10 + 20 * len(ticks), 20)
    path = write_video(tmp_path / "a.mp4", grey(levels), ticks=ticks, base=Fraction(1, 1000), pixel_format="yuv420p")
    found, rate = read(path, "video").mean((1, 2, 3)), reading.frames_per_second(path)
    assert rate == pytest.approx(fps, rel=0.08)
    assert "variable frame rate" in caplog.text
    assert len(found) / rate == pytest.approx((ticks[-1] - ticks[0]) / 1000, abs=0.5 + 1 / rate)
    for place, level in enumerate(found):
        shown = [ticks[0] + 1000 * (place + near) / rate for near in (-0.51, 0.51)]  # at least a time near it shows this frame
        playing = [max(sum(tick <= time for tick in ticks) - 1, 0) for time in shown]
        assert levels[playing[0]] - 3 <= level <= levels[playing[1]] + 3
    assert GetVideoComponents().take(str(path))[2] == rate


def test_odd_sizes_and_pixels_that_are_not_square(tmp_path):
    odd = Image.fromarray(CORNERS).resize((47, 33))
    path = write_video(tmp_path / "odd.mp4", [np.asarray(odd)])
    assert read(path, "video").shape == (1, 33, 47, 3)
    path = write_video(tmp_path / "wide.mp4", [CORNERS], sample_aspect_ratio=Fraction(4, 3))
    found = read(path, "video")
    assert found.shape == (1, 32, 64, 3)
    assert np.abs(found[0][:, ::4] - CORNERS[:, ::3]).mean() < 3


def test_what_holds_no_video_is_refused_in_one_line(tmp_path):
    sound = tmp_path / "sound.m4a"
    with av.open(sound, "w", format="mp4") as file:
        stream = file.add_stream("aac", rate=48000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate, frame.pts = 48000, 0
        file.mux([*stream.encode(frame), *stream.encode(None)])
    (tmp_path / "text.mp4").write_text("not a video")
    (tmp_path / "text.png").write_text("not a picture")
    (tmp_path / "empty.png").write_bytes(b"")
    whole = io.BytesIO()
    Image.fromarray(RANDOM.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(whole, "PNG")
    (tmp_path / "half.png").write_bytes(whole.getvalue()[:5000])
    for name, kind, words in (
        ("sound.m4a", "video", "holds sound and no video; give a video file"),
        ("text.mp4", "video", "cannot be read as video: it is damaged, or of another kind; give another file, such as an MP4"),
        ("text.png", "image", "cannot be read as image: it is damaged, or of another kind; give a JPEG, PNG or WebP"),
        ("empty.png", "image", "cannot be read as image"),
        ("half.png", "image", "cannot be read as image"),
        ("none.png", "image", "there is no image file"),
        (f"{'x' * 300}.png", "image", "there is no image file"),
    ):
        with pytest.raises(RequestError, match=words) as raised:
            read(tmp_path / name, kind)
        assert "\n" not in str(raised.value)
    with pytest.raises(RequestError, match="holds sound and no video"):
        reading.frames_per_second(sound)


def test_the_cover_of_a_song_is_no_video(tmp_path):
    cover = io.BytesIO()
    Image.fromarray(CORNERS).save(cover, "JPEG")
    picture = b"\x00image/jpeg\x00\x03\x00" + cover.getvalue()
    frame = b"APIC" + struct.pack(">IH", len(picture), 0) + picture
    size = len(frame)
    header = b"ID3\x03\x00\x00" + bytes((size >> shift) & 127 for shift in (21, 14, 7, 0))
    sound = b"\xff\xfb\x90\xc4" + bytes(413)  # an MP3 frame of silence
    (tmp_path / "song.mp3").write_bytes(header + frame + sound * 20)
    with pytest.raises(RequestError, match="holds sound and no video"):
        read(tmp_path / "song.mp3", "video")


RAMP = np.linspace(0, 65535, 32 * 48).reshape(32, 48)
RGBA = np.dstack([CORNERS, np.full((32, 48), 255, np.uint8)])
RGBA[:8, :, 3] = 0


def swapped() -> bytes:
    """A colour profile whose red and green are sRGB's green and red."""
    data = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    return data.replace(b"rXYZ", b"----", 1).replace(b"gXYZ", b"rXYZ", 1).replace(b"----", b"gXYZ", 1)


def with_exif(turn: int) -> Image.Exif:
    """EXIF that says how to turn a picture."""
    exif = Image.Exif()
    exif[0x0112] = turn
    return exif


@pytest.mark.parametrize(
    "image, name, settings, expected",
    [
        (Image.fromarray(RAMP.astype(np.uint16)), "a.png", {}, np.dstack([RAMP / 257] * 3)),
        (Image.fromarray(RAMP.astype(np.uint16)), "a.tiff", {}, np.dstack([RAMP / 257] * 3)),
        (Image.fromarray(RAMP.astype(np.int32)), "a.tiff", {}, np.dstack([RAMP / 257] * 3)),
        (Image.fromarray((RAMP / 65535).astype(np.float32)), "a.tiff", {}, np.dstack([RAMP / 257] * 3)),
        (Image.fromarray(RAMP.astype(np.uint16)), "a.png", {"exif": with_exif(3)}, np.dstack([RAMP[::-1, ::-1] / 257] * 3)),
        (Image.fromarray(CORNERS), "a.png", {"exif": with_exif(6)}, np.rot90(CORNERS, -1)),
        (Image.fromarray(CORNERS), "a.png", {"exif": with_exif(5)}, CORNERS.transpose(1, 0, 2)),
        (Image.fromarray(CORNERS).quantize(16), "a.png", {}, CORNERS),
        (Image.fromarray(CORNERS).quantize(16), "a.gif", {"transparency": 0}, CORNERS),
        (Image.fromarray(CORNERS).quantize(16), "a.png", {"transparency": bytes([0, 128])}, CORNERS),
        (Image.fromarray(RGBA), "a.png", {}, CORNERS),
        (Image.fromarray(CORNERS[..., 0]), "a.png", {}, CORNERS[..., :1].repeat(3, 2)),
        (Image.fromarray(CORNERS[..., 0] > 99), "a.png", {}, (CORNERS[..., :1] > 99).repeat(3, 2) * 255),
        (Image.fromarray(np.dstack([CORNERS[..., 0], RGBA[..., 3]]), "LA"), "a.png", {}, CORNERS[..., :1].repeat(3, 2)),
        (Image.fromarray(CORNERS).convert("CMYK"), "a.tiff", {}, CORNERS),
        (Image.fromarray(CORNERS).convert("CMYK"), "a.jpg", {"quality": 100}, CORNERS),
        (Image.fromarray(CORNERS), "a.png", {"icc_profile": swapped()}, CORNERS[..., [1, 0, 2]]),
        (Image.fromarray(CORNERS), "a.png", {"icc_profile": b"broken"}, CORNERS),
        (Image.fromarray(CORNERS).resize((47, 33), Image.Resampling.NEAREST), "a.png", {}, None),
    ],
)  # fmt: skip
def test_an_image_is_read_as_a_viewer_shows_it(image, name, settings, expected, tmp_path):
    image.save(tmp_path / name, **settings)
    (found,) = read(tmp_path / name, "image")
    expected = np.asarray(image, np.float32) if expected is None else expected
    assert found.shape == expected.shape
    assert np.abs(found - expected).mean() < 1.5 and np.abs(found - expected).max() < (1 if name != "a.jpg" else 30)


def test_several_pictures_in_a_file_and_what_is_transparent(tmp_path, caplog):
    def save(name, **settings):  # of new images: PIL keeps in them how it wrote them last
        first, *others = (Image.fromarray(picture) for picture in grey((10, 90, 170)))
        if name == "a.tiff":
            others[0] = others[0].resize((24, 16))
        if name == "a.mpo":
            others.pop()  # as many as phones write; Pillow 11 writes no more
        first.save(tmp_path / name, save_all=True, append_images=others, **settings)

    save("a.gif", duration=100)
    assert np.abs(read(tmp_path / "a.gif", "image").mean((1, 2, 3)) - (10, 90, 170)).max() < 1
    assert np.abs(read(tmp_path / "a.gif", "video").mean((1, 2, 3)) - (10, 90, 170)).max() < 3
    assert reading.frames_per_second(tmp_path / "a.gif") == 10
    save("a.mpo")
    assert len(read(tmp_path / "a.mpo", "image")) == 1
    save("a.tiff")
    assert len(read(tmp_path / "a.tiff", "image")) == 2
    assert not caplog.text
    Image.fromarray(RGBA).save(tmp_path / "a.png")
    read(tmp_path / "a.png", "image")
    assert "partly transparent" in caplog.text
    images, masks = reading.images_and_masks(tmp_path / "a.png")
    assert images.shape == (1, 32, 48, 3) and torch.equal(masks[0], torch.from_numpy(RGBA[..., 3] == 0).float())
    assert not reading.images_and_masks(tmp_path / "a.gif")[1].any()
    Image.fromarray(np.full((4, 4), 80, np.float32)).save(tmp_path / "metres.tiff")
    with pytest.raises(RequestError, match="its values run from 80 to 80"):
        read(tmp_path / "metres.tiff", "image")
