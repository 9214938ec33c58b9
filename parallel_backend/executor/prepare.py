"""From the user's job to a job with its plan: opened and checked once, then planned."""

from dataclasses import dataclass

from ..cogvideox.attention import choice
from ..cogvideox.attention.function import Kind
from ..cogvideox.checkpoint.checkpoint import Checkpoint
from ..cogvideox.pipeline import validation
from ..devices import Devices
from ..jobs import Job, SampleJob, UpscaleJob
from ..plan import Plan
from ..workload import Workload
from .resolve import resolve


@dataclass(frozen=True)
class CheckedJob:
    """A job that its checkpoint can do."""

    job: Job
    checkpoint: Checkpoint

    def workload(self, jobs: int = 1) -> Workload:
        """Returns the workload of this job, or of several jobs of its size."""
        return Workload.of_job(self.job, self.checkpoint, jobs=jobs)

    def check_plan(self, plan: Plan) -> None:
        """Raises RequestError when a plan cannot do the job."""
        validation.check_plan(self.checkpoint, plan, self.job)

    def check_devices(self, devices: Devices) -> None:
        """Raises RequestError when devices cannot attend as a sampling job asks for."""
        if not isinstance(self.job, SampleJob | UpscaleJob) or devices.on_ray:
            return  # a group on Ray checks its own devices
        model, head_dim = self.job.model, self.checkpoint.head_dim
        kinds = [Kind(device, self.checkpoint.dtype(model.dtype, device), head_dim) for device in devices.torch_devices]
        choice.check_devices(model.attention, kinds)


@dataclass(frozen=True)
class PreparedJob(CheckedJob):
    """A checked job with the plan and the devices that do it."""

    plan: Plan
    devices: Devices
    reason: str
    """Why this plan, in one sentence."""


def check_job(job: Job) -> CheckedJob:
    """Opens a job's checkpoint and checks the job against it. Reads no weights.

    Raises:
        RequestError: when the checkpoint cannot be opened, or cannot do the job.
    """
    checkpoint = Checkpoint.of(job.model)
    validation.check(checkpoint, job)
    return CheckedJob(job, checkpoint)


def prepare(checked: CheckedJob, plan: str, devices: str, *, jobs: int = 1) -> PreparedJob:
    """Resolves the plan and the devices for a job. Starts nothing.

    Args:
        checked: the job.
        plan, devices: the user's strings; see :func:`.resolve.resolve`.
        jobs: jobs of this size that run one after the other.
    Raises:
        RequestError: when plan, devices and job do not fit each other.
    """
    chosen, found, reason = resolve(plan, devices, checked.workload(jobs))
    checked.check_plan(chosen)
    checked.check_devices(found)
    return PreparedJob(checked.job, checked.checkpoint, chosen, found, reason)
