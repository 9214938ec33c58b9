"""Thins out the frames of a clip to the rate that a model was trained at."""

from dataclasses import dataclass


@dataclass(frozen=True)
class FrameRate:
    """The rate of a clip, and which of its frames are used."""

    source: float
    """Frames per second of the clip."""
    step: int = 1
    """Every how many frames one is used."""

    @classmethod
    def nearest(cls, source: float, wanted: float) -> "FrameRate":
        """Returns the rate nearest to ``wanted`` that uses every n-th frame. Motion then stays even."""
        return cls(source, max(1, round(source / wanted)))

    @property
    def fps(self) -> float:
        """Frames per second of the frames that are used."""
        return self.source / self.step

    def describe(self, wanted: float) -> str:
        """Returns what is done, for the user."""
        which = f"1 of {self.step} frames" if self.step > 1 else "every frame"
        return f"{which} of the clip ({self.source:.4g} fps) is used, {self.fps:.4g} fps; the model was trained at {wanted:g}"
