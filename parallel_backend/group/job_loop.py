"""The loop that every rank runs: it receives jobs and runs its share of each; rank 0 also answers."""

import logging
import os
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, replace

import torch

from ..cogvideox.checkpoint.checkpoint import Checkpoint
from ..cogvideox.checkpoint.likeness import likeness
from ..cogvideox.pipeline import validation
from ..config import CONFIG
from ..engine.engine import Engine
from ..errors import Cancelled, RequestError
from ..jobs import Job, Progress, Result
from ..notes import information_of
from ..parallel.group_rank import GroupRankContext, slow_link
from ..planner.machine import Link
from ..system.processes import described
from .codec import Message, decode, encode
from .heartbeat import HeartbeatWriter
from .job_fields import join_fields, split_fields
from .registry import GroupAddress
from .server import ClientRequest, Server
from .start_request import HOST

logger = logging.getLogger(__name__)


class Keeping:
    """Sends a job's state to its caller while the next step is computed. Call :meth:`wait` before sending anything else.

    Args:
        request: the caller's.
        device: of the state.
    """

    def __init__(self, request: ClientRequest, device: torch.device):
        self._request = request
        self._thread = ThreadPoolExecutor(1, "kept")
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._sending: Future | None = None
        self._last = time.monotonic()

    def keep(self, progress: Progress) -> None:
        """Starts sending the state after a finished step, if ``keep_seconds`` have passed since the last time."""
        now = time.monotonic()
        if now - self._last >= CONFIG.keep_seconds:
            self._last = now
            self._sending = self._thread.submit(self._send, progress)

    def _send(self, progress: Progress) -> None:
        with torch.cuda.stream(self._stream):  # on the main stream the copy would wait for the next step
            self._request.answer(Message("kept", *split_fields(progress)))

    def wait(self) -> None:
        """Waits until the state is sent."""
        if self._sending:
            self._sending.result()
            self._sending = None

    def close(self) -> None:
        """Waits for the thread to end."""
        self._thread.shutdown()


class JobLoop:
    """The loop that every rank runs; rank 0 also answers.

    Args:
        context: the rank, its device and its share of each forward.
        address: of the group.
        heart: writes the rank's heartbeats.
        link: the measured link between the ranks.
    """

    def __init__(self, context: GroupRankContext, address: GroupAddress, heart: HeartbeatWriter, link: Link):
        self.context = context
        self.link = link
        slow = slow_link(context.plan, context.device.type, link.bandwidth)
        self.notes = (*context.notes, *([slow] if slow else []))
        self.engine = Engine(context)
        self.started = time.time()
        self.state = "ready"
        self.jobs = 0
        self.memory: list[int] = []
        self.last_error: str | None = None
        self.heart = heart
        self.engine.on_stage = heart.say
        self.server = Server(address, self.status) if context.rank == 0 else None
        self.is_shared = bool(address.describe()["shared"]) if context.rank == 0 else False

    @property
    def host(self) -> str | None:
        """This host's name for messages; None in a group of one host."""
        return os.environ.get(HOST)

    def status(self) -> dict:
        """Returns the answer to a ``status`` request, as plain values."""
        return {
            "state": self.state,
            "plan": str(self.context.plan),
            "world_size": self.context.plan.world_size,
            "uptime": time.time() - self.started,
            "jobs": self.jobs,
            **self.engine.status(),
            "memory": self.memory,
            "link": self.link.bandwidth,
            "latency": self.link.latency,
            "last_error": self.last_error,
        }

    def run_forever(self) -> None:
        """Takes requests until one is ``stop``."""
        while True:
            self.heart.beat("waiting for a job", None)
            request = self.next_request() if self.server else None
            self.state = "busy"
            message = decode(self.context.broadcast_bytes(request.data if request else None))
            if message.kind == "stop":
                if request:
                    request.answer(Message("done"))
                return
            if message.kind == "free":
                self.engine.free()
                self._end_job()
                if request:
                    request.answer(Message("done"))
            else:
                self.do_job(message, request)

    def _end_job(self) -> None:
        """Notes what is in use, and that the group is ready: before the answer, as its caller may ask at once."""
        self.memory = self.context.collect(self.engine.status()["memory"])
        self.state = "ready"

    def next_request(self) -> ClientRequest:
        """Returns rank 0's next request that is not cancelled.

        After the idle time it is a request to end the group, or if other processes use the group, to free the weights.
        """
        while True:
            can_wait = self.is_shared and not self.engine.status()["held"]
            request = self.server.next(None if can_wait else 60 * CONFIG.idle_minutes or None)
            if request is None:
                logger.info(
                    "idle for %g minutes; %s", CONFIG.idle_minutes, "freeing the weights" if self.is_shared else "ending"
                )
                return ClientRequest(encode(Message("free" if self.is_shared else "stop")), None)
            if request.begin():
                return request

    def do_job(self, message: Message, request: ClientRequest | None) -> None:
        """Runs one job with the other ranks. Rank 0 answers with the result or the failure."""
        failure: dict | None = None
        result: Result | None = None
        try:
            result = self.run(message, request)
        except Exception as error:
            failure = {**described(error), "host": self.host}
            if not isinstance(error, Cancelled):
                logger.exception("%s job failed", message.kind)
        if self.context.rank and not self.engine.together:
            self.heart.beat("waiting for rank 0, which works alone", None)  # rank 0 has its own heartbeat
        else:
            self.heart.beat("ending a job", CONFIG.load_seconds if message.kind == "load" else CONFIG.exchange_seconds)
        failures = self.compare(failure, together=self.engine.together)
        self.jobs += 1
        self._end_job()
        if request is None:
            return
        for rank, failure in enumerate(failures):
            if failure:
                kind = "cancelled" if failure["error"] == Cancelled.__name__ else "failed"
                if kind == "failed":
                    self.last_error = f"rank {rank}: {failure['error']}: {failure['message']}"
                request.answer(Message(kind, {"rank": rank, **failure}))
                return
        notes = self.notes if message.kind == "sample" else ()
        report = replace(result.report, peak_memory=tuple(self.memory), notes=(*notes, *result.report.notes))
        self.log_line(message.kind, report, request.waited)
        plain = {"report": asdict(report), "information": information_of(report.notes)}
        request.answer(Message("done", plain, {"tensor": result.tensor}))

    def run(self, message: Message, request: ClientRequest | None) -> Result | None:
        """Runs this rank's share of a job."""
        self.engine.together = message.kind not in ("decode", "encode")  # until the engine decides
        self.heart.beat(f"loading, and on the first step or the whole of a {message.kind} job", CONFIG.load_seconds)
        job = self.opened(message)

        lasted, began = [], time.monotonic()
        keeping = request and Keeping(request, self.context.device)

        def wanted() -> bool:
            return request is None or not request.cancelled.is_set()

        def after_step(progress: Progress, steps: int) -> bool:
            nonlocal began
            now = time.monotonic()
            lasted.append(now - began)
            began = now
            longest = max(lasted[1:] or lasted)  # the first step includes loading and warm-up
            doing = f"on step {progress.step + 1} of {steps}" if progress.step < steps else "ending a job"
            self.heart.beat(doing, max(CONFIG.step_seconds, CONFIG.step_factor * longest))
            if keeping:
                keeping.wait()
                request.answer(Message("step", {"step": progress.step, "steps": steps}))
                if progress.step < steps:
                    keeping.keep(progress)
            return wanted()

        def show(picture: torch.Tensor) -> None:
            keeping.wait()
            request.answer(Message("picture", {}, {"picture": picture}))

        def hand_over(video: int, start: int, frames: torch.Tensor) -> None:
            request.answer(Message("frames", {"video": video, "start": start}, {"frames": frames}))

        listeners = (show, hand_over) if request else ()
        try:
            return self.engine.run(job, after_step, wanted, *listeners)
        finally:
            if keeping:
                keeping.close()

    def opened(self, message: Message) -> Job:
        """Returns the job of a message, validated against this rank's files and, with several hosts, those of every rank.

        Raises:
            RequestError: on all ranks, naming the host whose files are missing or different.
        """
        job, refused, files = join_fields(message.kind, message.plain, message.tensors), None, None
        try:
            checkpoint = Checkpoint.of(job.model)
            validation.check(checkpoint, job)
            files = self.host and likeness(job, checkpoint)
        except RequestError as error:
            refused = error
        said = self.context.collect((self.host, refused and str(refused), files)) if self.host else []
        if refused and all(words for _, words, _ in said):
            raise refused
        for host, words, its in said:
            if words:
                raise RequestError(f"{host}: {words}; models and LoRAs must be at the same path on every host")
            if its != said[0][2]:
                raise RequestError(
                    f"{host}: {job.model.path}, its LoRAs or its ControlNets have other files than on {said[0][0]}; copy them from there"
                )
        return job

    def compare(self, failure: dict | None, *, together: bool) -> list[dict | None]:
        """Collects every rank's failure, None for ranks without one.

        If the ranks work ``together`` and this one fails alone, it exits, which ends the group, as the others hang in a
        collective. If rank 0 works alone, the others already wait here.
        """
        if failure is None or not together:
            return self.context.collect(failure)
        began = time.monotonic()
        try:
            if not self.context.is_in_step:
                raise RuntimeError("messages in flight between the ranks would be received by the next job")
            self.context.meet(CONFIG.failure_seconds)
        except RuntimeError:
            waited = time.monotonic() - began
            self.heart.report_failure({**failure, "waited": waited})
            logger.error("the other ranks did not follow; leaving")
            os._exit(1)
        return self.context.collect(failure)

    def log_line(self, kind: str, report, waited: float) -> None:
        """Logs one line for a job."""
        steps = sorted(report.step_seconds)
        each = f", {len(steps)} steps of {steps[len(steps) // 2]:.3f} s" if steps else ""
        peak = "/".join(f"{size / 2**30:.2f}" for size in report.peak_memory)
        logger.info(
            "%s: plan %s, waited %.2f s, load %.2f s, run %.2f s%s, peak %s GiB",
            kind, report.plan, waited, report.load_seconds, report.run_seconds, each, peak,
        )  # fmt: skip
