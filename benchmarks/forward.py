"""One forward of the transformer on one GPU: the host's time, the device's, and what its kernels take.

``python -m benchmarks.forward CHECKPOINT [--fp8 all | --quantize int8] [--attention cudnn] [--cfg 1]``, at the checkpoint's
own size. With ``--cfg 1`` it is what each rank of ``cfg2`` computes in a step. ``--int8 comfy-kitchen`` and ``--int8 torch`` choose
how layers in int8 multiply, which is otherwise timed.
"""

import argparse
import time
from collections import Counter
from dataclasses import replace
from statistics import median

import torch
from torch.profiler import ProfilerActivity, profile

from parallel_backend.cogvideox.attention.timings import Timings
from parallel_backend.cogvideox.checkpoint.checkpoint import Checkpoint
from parallel_backend.cogvideox.transformer import int8_choice
from parallel_backend.engine.engine import Engine
from parallel_backend.model import ATTENTIONS, FP8S, QUANTIZES
from parallel_backend.parallel.rank import RankContext

from .group import job_of
from .kernels import spans_of

FORWARDS = 7
SHOWN = 12
"""Kernels, those that take longest."""


def main() -> None:
    """Prints the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint")
    parser.add_argument("--fp8", choices=FP8S, default="off")
    parser.add_argument("--attention", choices=ATTENTIONS, default="auto")
    parser.add_argument("--quantize", choices=QUANTIZES, default="off")
    parser.add_argument("--int8", choices=(int8_choice.TORCH, int8_choice.KITCHEN))
    parser.add_argument("--cfg", type=float, default=6.0)
    asked = parser.parse_args()
    if asked.int8:
        int8_choice.measured = lambda *about: Timings({asked.int8: 0.0})
    checkpoint = Checkpoint.open(asked.checkpoint)
    job = job_of(checkpoint)
    job = replace(
        job,
        model=replace(job.model, fp8=asked.fp8, quantize=asked.quantize, attention=asked.attention),
        cfg=asked.cfg,
        steps=1,
        scheduler="ddim",
    )
    if asked.cfg == 1:
        job = replace(job, negative=None)
    engine = Engine(RankContext(torch.device("cuda", 0)))
    began = time.perf_counter()
    report = engine.run(job).report
    first = time.perf_counter() - began
    transformer, given = engine.cache.held["transformer"][1], []
    hook = transformer.register_forward_pre_hook(lambda *call: given.append(call[1:]), with_kwargs=True, prepend=True)
    engine.run(job)
    hook.remove()
    args, kwargs = given[0]
    hosts, forwards = [], []
    with torch.inference_mode():
        for _ in range(FORWARDS):
            torch.cuda.synchronize()
            began = time.perf_counter()
            transformer(*args, **kwargs)
            hosts.append(time.perf_counter() - began)
            torch.cuda.synchronize()
            forwards.append(time.perf_counter() - began)
        with profile(activities=[ProfilerActivity.CUDA]) as profiled:
            transformer(*args, **kwargs)
            torch.cuda.synchronize()
    seconds, calls, kinds = Counter(), Counter(), Counter()
    for span in spans_of(profiled):
        seconds[span.name] += span.seconds
        calls[span.name] += 1
        kinds[span.kind] += span.seconds
    print(
        f"{checkpoint.describe}, layers {job.model.quantization}, attention {engine.cache.attention.name}, cfg {asked.cfg:g}: {median(forwards) * 1e3:.0f} ms a forward, at least "
        f"{min(forwards) * 1e3:.0f}; kernels {sum(seconds.values()) * 1e3:.0f}; the host asks for it in {median(hosts) * 1e3:.0f}, "
        f"{median(hosts) / checkpoint.layers * 1e6:.0f} us a block; first job {first:.1f} s, {report.load_seconds:.1f} of them loading{''.join('; ' + note for note in report.notes)}"
    )
    print(", ".join(f"{kind} {taken * 1e3:.1f} ms" for kind, taken in kinds.most_common()))
    for name, taken in seconds.most_common(SHOWN):
        print(f"{taken * 1e3:9.2f} ms {calls[name]:5} x {name[:90]}")


if __name__ == "__main__":
    main()
