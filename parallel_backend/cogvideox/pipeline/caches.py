"""The caches of a job, which make some of its steps shorter: one of each kind that is on per window."""

from ...jobs import SampleJob
from ...notes import Information, is_warning
from ..transformer.step_cache import StepCache
from .guidance_cache import GuidanceCache


class JobCaches:
    """The caches of one job.

    Args:
        job: its model says which caches are on.
        context: of this rank; a :class:`parallel_backend.parallel.rank.RankContext`.
    """

    def __init__(self, job: SampleJob, context):
        self.threshold = job.model.step_cache
        self.most = job.model.guidance_cache if job.guided else 0
        self._context = context
        self._steps: dict[tuple[int, int, bool], StepCache] = {}
        self._guidance: dict[tuple[int, int], GuidanceCache] = {}

    def of(self, frames: slice, *, spared: bool = False) -> StepCache | None:
        """Returns the step cache of the window with these frames, after its guidance cache began the step.

        Passes with one prompt have a step cache of their own. A pass that renews the difference of guidance's halves runs all
        blocks: with both halves extrapolated, the demo ended 36 % from lossless instead of 5 % (threshold 0.3, 50 steps).
        """
        if self.threshold == 0:
            return None
        cache = self._steps.setdefault((frames.start, frames.stop, spared), StepCache(self.threshold, self._context.total))
        guidance = self.guidance(frames)
        if guidance and guidance.renews:
            cache.expire()
        return cache

    def guidance(self, frames: slice) -> GuidanceCache | None:
        """Returns the guidance cache of the window with these frames."""
        return self._guidance.setdefault((frames.start, frames.stop), GuidanceCache(self.most)) if self.most else None

    def expire(self) -> None:
        """Forces a full step of every window next, as the prompt changes."""
        for cache in (*self._steps.values(), *self._guidance.values()):
            cache.expire()

    @property
    def restarted(self) -> str | None:
        """A note for a resumed job: what was reset, if anything."""
        reset = [name for name, on in (("the step cache", self.threshold), ("the guidance cache", self.most)) if on]
        return f"{' and '.join(reset)} {'was' if len(reset) == 1 else 'were'} reset on the way" if reset else None

    @property
    def notes(self) -> list[str]:
        """Notes for the user: how many forward passes were shortened, and how many steps."""
        found = []
        if self.threshold:
            reused, forwards = (sum(getattr(cache, name) for cache in self._steps.values()) for name in ("reused", "forwards"))
            line = f"step cache {self.threshold:g}: {reused} of {forwards} forwards ran their first block only"
            found.append(Information(line))
        if self.most:
            spared, steps = (sum(getattr(cache, name) for cache in self._guidance.values()) for name in ("spared", "steps"))
            about = spared and self._context.about_spared
            line = f"guidance cache {self.most}: {spared} of {steps} forwards ran on the positive prompt only"
            line += f"; {about}" if about else ""
            found.append(line if about and is_warning(about) else Information(line))
        return found
