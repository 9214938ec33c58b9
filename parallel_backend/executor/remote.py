"""What executors have in common that send their jobs to a group as requests."""

from abc import abstractmethod
from collections.abc import Iterator
from contextlib import closing

from ..cogvideox.vae.frames import FramesListener
from ..cogvideox.vae.preview import PictureListener
from ..errors import GroupLost
from ..group.codec import Message
from ..group.job_fields import split_fields
from ..jobs import Job, Result
from . import recovery
from .base import Executor, StepListener, StopSignal, never, silent
from .group_connection import Keepsake, last_answer, result_of


class RemoteExecutor(Executor):
    """Runs jobs in a group, and goes on with a job if the group is lost."""

    @abstractmethod
    def answers(self, message: Message, should_stop: StopSignal, seconds: float | None = None) -> Iterator[Message]:
        """Sends a request and yields its answers.

        Args:
            message: the request.
            should_stop: called while no answer comes.
            seconds: timeout for the last answer, if any.
        Raises:
            GroupLost: when the group is lost. It is not started again.
        """

    def _explain(self, lost: GroupLost, should_stop: StopSignal) -> GroupLost:
        """Returns the error that says why the group was lost, or raises it if the job is not to be run again here."""
        return lost

    def _with_own(self, notes: list[str]) -> list[str]:
        """Returns the notes on a job's losses with the executor's own."""
        return notes

    def _run(
        self,
        job: Job,
        on_step: StepListener,
        should_stop: StopSignal,
        on_picture: PictureListener | None = None,
        on_frames: FramesListener | None = None,
    ) -> Result:
        def ask(job: Job, kept: Keepsake) -> Message:
            return self._ask(Message(job.kind, *split_fields(job)), on_step, should_stop, kept)

        def explain(lost: GroupLost) -> GroupLost:
            return self._explain(lost, should_stop)

        answer, notes = recovery.run_and_resume(job, ask, explain, Keepsake(on_picture, on_frames))
        return result_of(answer, self._with_own(notes))

    def _ask(
        self,
        message: Message,
        on_step: StepListener = silent,
        should_stop: StopSignal = never,
        kept: Keepsake | None = None,
        seconds: float | None = None,
    ) -> Message:
        """Sends a request and returns its last answer; ``seconds`` is its timeout, if any."""
        with closing(self.answers(message, should_stop, seconds)) as found:
            return last_answer(found, on_step, kept or Keepsake())
