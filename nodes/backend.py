"""xDiT Backend."""

from comfy_api.latest import io

from ..parallel_backend.errors import RequestError
from ..parallel_backend.jobs import SampleJob
from ..parallel_backend.plan import AUTO, Plan
from .base import CogVideoXNode
from .comfy import runtime
from .comfy.types import CATEGORY, BackendHandle, BackendSocket


def advanced(widget: io.WidgetInput) -> io.WidgetInput:
    """The widget among those that a node shows on demand. The argument of that name is younger than the oldest ComfyUI that will do."""
    widget.extra_dict["advanced"] = True
    return widget


class XDiTBackend(CogVideoXNode):
    """Which devices work together, and how each step is split over them."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="XDiTBackend",
            display_name="xDiT Backend",
            category=CATEGORY,
            description="A group of processes, one per GPU, that is started once and stays warm. "
            "Where none can start, the work is done in this process and the node says so.",
            inputs=[
                io.String.Input(
                    "devices",
                    default="auto",
                    tooltip="auto: every GPU. Or GPU numbers such as 0,1; or cpu:2 for two processes on the CPU.",
                ),
                io.String.Input(
                    "plan",
                    default=AUTO,
                    tooltip="auto (the fastest, on fewer devices where more would be slower), single, or degrees that multiply to the number "
                    "of devices: cfg2 (both halves of "
                    "guidance), ulyssesN (must divide the model's heads), ringN; such as cfg2-ulysses2. For a model that does "
                    "not fit on each GPU: tensorN, or fsdpN, which multiplies nothing: cfg2-fsdp2 is two GPUs. "
                    "For a batch: replicasN, N groups that share its videos; such as replicas2-cfg2. For slow links: pipefusionN, "
                    "which makes another video, near the same; such as cfg2-pipefusion2.",
                ),
                advanced(
                    io.Int.Input(
                        "pipefusion_warmup",
                        default=SampleJob.pipefusion_warmup,
                        min=1,
                        max=1000,
                        optional=True,
                        tooltip="With pipefusionN in the plan: so many steps are exact at first, as slow as on one GPU. The others use "
                        "what other GPUs have made in the step before.",
                    )
                ),
            ],
            outputs=[BackendSocket.Output(display_name="backend")],
        )

    @classmethod
    def validate_inputs(cls, devices: str, plan: str):
        """Refuses what can be refused before anything runs."""
        try:
            if devices is not None:
                runtime.devices_exist(devices)
            if plan not in (None, AUTO):
                Plan.parse(plan)
        except RequestError as error:
            return str(error)
        return True

    @classmethod
    def execute(cls, devices: str, plan: str, pipefusion_warmup: int = SampleJob.pipefusion_warmup) -> io.NodeOutput:
        """Hands the words on; sampler and decoder start the group."""
        return io.NodeOutput(BackendHandle(devices, plan, pipefusion_warmup))
