"""Encodes videos as H.264 in threads, while their frames arrive."""

import io
from concurrent.futures import Future, ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path

import torch

from ..errors import RequestError
from .pictures import check_finite

LOOKAHEAD = 10
"""Frames by which the encoder looks ahead. With its default of 40 most of a short video would be encoded after its last frame.
Of 49 frames with 0.15 of noise the PSNR is the same; with 0.02 it is 0.1 dB less, in a file that is a third smaller."""

REPRODUCIBLE = "deterministic=1:cpu-independent=1"
"""Makes the same file of the same frames. The encoder's code for some processors is not reproducible, and hardly faster."""


class Encoding:
    """One video, encoded in a thread while its frames arrive. Colours are BT.709, and the stream declares it, as players guess otherwise.

    Args:
        height, width: of the frames, both even.
        rate: frames per second.
    """

    def __init__(self, height: int, width: int, rate: Fraction):
        self.size = height, width
        self.rate = rate
        self.frames = 0
        """Number of frames that were added."""
        self.checksum = self._encoded = 0
        """Of the frames that are encoded so far, see :func:`checksum`; and their number."""
        self._buffer = io.BytesIO()
        self._file = self._stream = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="encoding")
        self._parts: list[Future] = []
        self._finished: Future | None = None

    def add(self, frames: torch.Tensor) -> None:
        """Has the next frames encoded, ``[frames, height, width, 3]`` in 0..1 on the CPU. They must not change until that is done."""
        self.frames += len(frames)
        self._parts.append(self._thread.submit(self._encode, frames))

    def finish(self) -> None:
        """Has the video finished, without waiting for it. More calls do nothing."""
        if self._finished is None:
            self._finished = self._thread.submit(self._close)
            self._thread.shutdown(wait=False)

    def mp4(self) -> bytes:
        """Waits until the video is finished. Returns it as MP4 without metadata.

        Raises:
            RequestError: if frames have NaN or infinite values, or the encoder rejects them.
        """
        self.finish()
        for part in self._parts:
            part.result()
        self._finished.result()
        return self._buffer.getvalue()

    def mp4_of(self, frames: torch.Tensor, rate: Fraction) -> bytes | None:
        """Waits until the video is finished. Returns it as :meth:`mp4` does, or None if it was not made of these frames at this rate.

        Args:
            frames: ``[frames, height, width, 3]``, float32 on the CPU.
            rate: frames per second.
        """
        if (self.rate, self.frames, self.size) != (rate, len(frames), tuple(frames.shape[1:3])):
            return None
        try:
            mp4 = self.mp4()
        except RequestError:  # whoever encodes the frames gets it again
            return None
        return mp4 if self.checksum == checksum(frames) else None

    def drop(self) -> None:
        """Ends the thread. What is not encoded yet is left out."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _encode(self, frames: torch.Tensor) -> None:
        import av

        check_finite(frames, "images")
        self.checksum = (self.checksum + checksum(frames, self._encoded)) % 2**64
        self._encoded += len(frames)
        try:
            if self._file is None:
                self._open()
            values = torch.empty(frames.shape[1:])
            for frame in frames:
                torch.mul(frame, 255, out=values).round_().clamp_(0, 255)
                picture = av.VideoFrame.from_ndarray(values.to(torch.uint8).numpy(), format="rgb24")
                self._file.mux(self._stream.encode(picture.reformat(format="yuv420p", dst_colorspace="ITU709")))
        except av.FFmpegError as error:
            raise self._refused(error) from error

    def _open(self) -> None:
        import av

        self._file = av.open(self._buffer, "w", format="mp4")
        self._stream = stream = self._file.add_stream("libx264", rate=self.rate)
        stream.height, stream.width = self.size
        stream.pix_fmt = "yuv420p"
        stream.thread_type = "FRAME"  # PyAV's default, slices, keeps few cores busy and costs bits
        stream.options = {"rc-lookahead": str(LOOKAHEAD), "x264-params": REPRODUCIBLE}
        context = stream.codec_context
        context.colorspace = context.color_primaries = context.color_trc = 1  # BT.709
        context.color_range = 1  # 16 to 235

    def _close(self) -> None:
        import av

        if self._file is None or any(part.exception() for part in self._parts):
            return
        try:
            self._file.mux(self._stream.encode(None))
            self._file.close()
        except av.FFmpegError as error:
            raise self._refused(error) from error

    def _refused(self, error: Exception) -> RequestError:
        height, width = self.size
        return RequestError(f"the H.264 encoder takes no frames of {width}x{height}; use another size ({error})")


class Encodings:
    """The videos of a decoding job, encoded while they are decoded.

    Args:
        rate: frames per second.
    """

    def __init__(self, rate: Fraction):
        self.rate = rate
        self.videos: dict[int, Encoding] = {}
        """By their number in the batch."""

    def on_frames(self, video: int, start: int, frames: torch.Tensor) -> None:
        """Has frames encoded that stay as they are; see :data:`parallel_backend.cogvideox.vae.frames.FramesListener`."""
        if start == 0:
            self.drop(video)
            self.finish()  # the ones before: each has an encoder with threads and frames of its own
            self.videos[video] = Encoding(*frames.shape[1:3], self.rate)
        self.videos[video].add(frames)

    def drop(self, video: int) -> None:
        """Leaves out a video that begins again."""
        if video in self.videos:
            self.videos.pop(video).drop()

    def finish(self) -> None:
        """Has all videos finished, without waiting for it."""
        for encoding in self.videos.values():
            encoding.finish()


def encode(frames: torch.Tensor, rate: Fraction) -> Encoding:
    """Returns the encoding of a whole video ``[frames, height, width, 3]`` of even size in 0..1."""
    encoding = Encoding(*frames.shape[1:3], rate)
    encoding.add(frames.cpu())
    encoding.finish()
    return encoding


def checksum(frames: torch.Tensor, first: int = 0) -> int:
    """Returns a sum over the bits of frames, in which each row counts as often as its number in the video says. Those of parts add up.

    Args:
        frames: ``[frames, height, width, 3]``, float32, of even width, as two numbers are added as one.
        first: number of the first frame.
    """
    rows = frames.contiguous().flatten(0, 1).flatten(1).view(torch.int64).sum(1)
    numbers = torch.arange(1, 1 + len(rows)) + first * frames.shape[1]
    return int((rows * numbers).sum()) % 2**64


def write(path: Path, mp4: bytes, metadata: dict[str, str]) -> None:
    """Writes an encoded video to a file, with metadata at its start.

    Raises:
        OSError: if the file cannot be written.
    """
    import av

    with av.open(io.BytesIO(mp4)) as source:
        (encoded,) = source.streams.video
        scale = str(encoded.time_base.denominator)  # PyAV 14's own would round the frame rate
        options = {"movflags": "use_metadata_tags+faststart", "video_track_timescale": scale}
        with av.open(path, "w", options=options) as file:
            file.metadata.update(metadata)
            stream = file.add_stream_from_template(encoded, opaque=True)
            for packet in source.demux(encoded):
                if packet.dts is not None:  # the last one only ends the stream
                    packet.stream = stream
                    file.mux(packet)
