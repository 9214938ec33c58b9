"""The command ``plan``: predicts the cost of every plan."""

import math
from argparse import SUPPRESS, ArgumentParser, Namespace
from dataclasses import asdict, replace

import torch

from ..cogvideox.checkpoint import published
from ..cogvideox.checkpoint.catalogue import ALONE, MODELS
from ..devices import Devices
from ..errors import RequestError
from ..fit import Fit, fit
from ..model import Model
from ..planner import hardware
from ..planner.cost_model import Prediction
from ..planner.gpu_table import KNOWN, LINKS
from ..planner.machine import Machine
from ..planner.planner import approximations, choose, predictions
from ..validation import check_size
from ..workload import work_of
from .console import show, show_json
from .options import add_cfg_option, add_former_options, add_rounding_options, add_size_options, cfg_of, size_of


def add_options(parser: ArgumentParser) -> None:
    """Adds the options of ``plan``."""
    parser.add_argument(
        "--model", required=True, help=f"as in generate; or {', '.join(MODELS | ALONE)}, which need not be downloaded"
    )
    parser.add_argument("--gpus", type=int, help="GPUs of each machine (default: those of this machine)")
    parser.add_argument("--nodes", type=int, default=1, metavar="N", help="machines with such GPUs, as in a Ray cluster")
    add_former_options(parser, "--nnodes")
    parser.add_argument(
        "--memory-gib",
        type=float,
        help="memory of one GPU; if the model does not fit, plans that shard its weights are listed (default: what is free here, or "
        "what --gpu has)",
    )
    parser.add_argument("--memory-gb", type=float, dest="memory_gib", help=SUPPRESS)  # the option's name before
    parser.add_argument(
        "--gpu", metavar="NAME", help=f"such as 3090; known are {', '.join(KNOWN)} (default: those of this machine)"
    )
    parser.add_argument("--link", choices=tuple(LINKS), help="link between the GPUs (default: the GPU's own)")
    add_cfg_option(parser)
    add_size_options(parser)
    add_rounding_options(parser)
    parser.add_argument("--count", type=int, default=1, metavar="N", help="videos to make; replicas may share them")
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object")
    parser.set_defaults(run=plan)


def plan(args: Namespace) -> int:
    """Prints the predicted cost of every plan, the plan that ``auto`` would choose, and the reason."""
    checkpoint = published.find(args.model)
    if args.gpus is not None and args.gpus < 1:
        raise RequestError(f"--gpus is {args.gpus}; use 1 or more")
    if args.memory_gib is not None and not 0 < args.memory_gib < math.inf:
        raise RequestError(f"--memory-gib is {args.memory_gib:g}; give what one GPU has, such as 24")
    if args.count < 1:
        raise RequestError(f"--count is {args.count}; use 1 or more")
    size, cfg = size_of(args, checkpoint), cfg_of(args, checkpoint)
    check_size(**size, batch=1)
    if args.nodes < 1:
        raise RequestError(f"--nodes is {args.nodes}; use 1 or more")
    present = Devices.parse("auto")
    each = args.gpus or present.count
    count = each * args.nodes
    machine = hardware.asked(args.gpu, count=each, link=args.link, memory_gib=args.memory_gib)
    model = Model(str(checkpoint.path), fp8=args.fp8, quantize=args.quantize)
    work = work_of(checkpoint, torch.device("cuda"), size=tuple(size.values()), guided=cfg > 1, model=model)
    found = predictions(work, machine, count, jobs=args.count)
    found += [replace(each, rounds=args.count) for each in approximations(work, machine, count)]
    found.sort(key=lambda each: each.total)
    chosen, reason = choose(work, machine, count, jobs=args.count)
    fitted = None if machine.free is None else fit(checkpoint, work, machine, count, size=tuple(size.values()))
    if args.json:
        known = {"model": checkpoint.name, **size, "cfg": cfg, "gpus": count, "plan": str(chosen), "reason": reason}
        show_json({**figures(found, machine), **known, "fit": fitted and {**asdict(fitted), "plan": str(fitted.plan)}})
        return 0
    show(checkpoint.describe)
    if isinstance(checkpoint, published.UnreadCheckpoint):
        show("not downloaded: this is predicted from its published configuration")
    show(f"predicted for {size['width']}x{size['height']}x{size['frames']}, cfg {cfg:g}")
    if args.gpu is None:
        for line in [*hardware.survey(present), *hardware.warnings(present)]:
            show(line)
    show(
        f"{'':2} {'plan':24} {'s a step':>9} {'peak GiB':>9} {'needs GiB':>9}  fits"
        + (f"  s a step of all {args.count}" if args.count > 1 else "")
    )
    for each in found:
        mark, last = "->" if each.plan == chosen else "", f"  {each.total:9.3g}" if args.count > 1 else ""
        fits = "yes" if each.fits else "no"
        exact = "" if each.plan.is_exact else "  not exact: auto leaves it to you"
        show(
            f"{mark:2} {str(each.plan):24} {each.seconds:9.3g} {each.peak / 2**30:9.3g} {each.needed / 2**30:9.3g}  {fits:4}{last}{exact}".rstrip()
        )
    show(machine.describe)
    where = f" on {args.nodes} machines" if args.nodes > 1 else ""
    show(f"{count} GPU{'s' * (count > 1)}{where} ({machine.name}): {reason}")
    if fitted:
        show(how(fitted))
    return 0


def how(fitted: Fit) -> str:
    """Says in one line how the model fits into the GPUs."""
    if not fitted.fits:
        return "a forward pass does not fit into the memory of a GPU: use a smaller size, or more GPUs"
    decode = "in tiles" if fitted.is_tiled else "whole"
    return (
        f"with plan {fitted.plan}: offload '{fitted.offload}', {fitted.peak / 2**30:.1f} GiB on each GPU, decode {decode}, "
        f"about {fitted.host / 2**30:.0f} GiB of host memory"
    )


def figures(found: list[Prediction], machine: Machine) -> dict:
    """Returns predictions, and the rates they are from, as plain values."""
    plans = [
        {
            "plan": str(each.plan),
            "devices": each.plan.world_size,
            "step_seconds": each.seconds,
            "total_step_seconds": each.total,
            "peak_memory": each.peak,
            "needed_memory": each.needed,
            "fits": each.fits,
            "exact": each.plan.is_exact,
        }
        for each in found
    ]
    rates = {
        "matrix": machine.matrix,
        "attention": machine.attention,
        "bandwidth": machine.bandwidth,
        "from": machine.rates_from,
    }
    link = {"bandwidth": machine.link.bandwidth, "latency": machine.link.latency, "from": machine.link_from}
    return {"gpu": machine.name, "free_memory": machine.free, "rates": rates, "link": link, "plans": plans}
