"""The node xDiT Backend."""

from comfy_api.latest import io

from ..parallel_backend.errors import RequestError
from ..parallel_backend.executor.resolve import check_strings
from ..parallel_backend.jobs import SampleJob
from ..parallel_backend.plan import AUTO
from .base import CogVideoXNode, advanced, schema
from .comfy import errors, runtime, submission
from .comfy.types import CATEGORY, BackendHandle, BackendSocket


class XDiTBackend(CogVideoXNode):
    """Sets which devices work together and how each step is split over them."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="XDiTBackend",
            display_name="xDiT Backend",
            aliases="multi gpu, multigpu, parallel, distributed, xdit, xfuser, ulysses, "
            "usp, ring attention, sequence parallel, tensor parallel, cfg parallel, fsdp, pipefusion",
            category=CATEGORY,
            description="Splits each step over several GPUs. A group of processes, one per GPU, starts once and stays warm. "
            "If none can start, the work is done in ComfyUI's own process and the node says so.",
            inputs=[
                io.String.Input(
                    "devices",
                    default="auto",
                    tooltip="auto: every GPU. Or GPU numbers such as 0,1; cpu:2 for two processes on the CPU; or ray for the "
                    "GPUs of a Ray cluster, ray:8 for eight of them. More GPUs make steps faster. The memory per GPU stays about the same, except with tensorN or fsdpN in the plan.",
                ),
                io.String.Input(
                    "plan",
                    default=AUTO,
                    tooltip="How each step is split. auto: the plan that is predicted to be fastest, on fewer devices if "
                    "more would be slower. single: one device. Or degrees that multiply to the number of devices, such as "
                    "cfg2-ulysses2: cfg2 splits the two halves of guidance, ulyssesN the heads (N must divide them), ringN "
                    "the tokens. For less memory per GPU: tensorN, or fsdpN, which does not multiply (cfg2-fsdp2 is two "
                    "GPUs). For a batch: replicasN, N groups that share its videos (replicas2-cfg2 is four GPUs). For slow "
                    "links: pipefusionN, which changes the video slightly. All other plans make the same video.",
                ),
                advanced(
                    io.Int.Input(
                        "pipefusion_warmup",
                        default=SampleJob.pipefusion_warmup,
                        min=1,
                        max=1000,
                        optional=True,
                        tooltip="Only with pipefusionN in the plan: the number of first steps that are exact, and as slow as "
                        "on one GPU. Later steps are faster, but use some data of the previous step. More exact steps bring "
                        "the video closer to that of other plans.",
                    )
                ),
            ],
            outputs=[BackendSocket.Output(display_name="backend")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(cls, plan: str | None) -> bool | str:
        """Refuses a wrong plan, devices that do not exist, and both if they do not fit each other, before the workflow runs.

        ComfyUI reports what this returns once for each argument, so ``plan`` is the only one. Inputs from other nodes are None.
        """
        node_id = cls.hidden.unique_id
        devices = submission.value_of(node_id, "devices")
        try:
            check_strings(AUTO if plan is None else plan, AUTO if devices is None else str(devices))
        except RequestError as error:
            return errors.refuse(str(error), node_id)
        return True

    @classmethod
    def execute(cls, devices: str, plan: str, pipefusion_warmup: int = SampleJob.pipefusion_warmup) -> io.NodeOutput:
        """Passes the settings on. The imports of a group begin; the sampler or the decoder starts it."""
        check_strings(plan, devices)  # again, as they may come from other nodes
        runtime.warm_up(devices, plan)
        return io.NodeOutput(BackendHandle(devices, plan, pipefusion_warmup))
