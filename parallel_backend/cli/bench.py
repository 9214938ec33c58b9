"""The command ``bench``: the table of this machine's speed."""

from argparse import ArgumentParser, Namespace

from ..validation import TILINGS
from .options import add_model_options


def add_options(parser: ArgumentParser) -> None:
    """Adds the options of ``bench``."""
    add_model_options(parser)
    parser.add_argument(
        "--plans",
        default="single,auto",
        help="comma-separated plans, each on the first of the devices, as many as it needs; auto: what the planner chooses for all "
        "of them; none: this pack is not timed",
    )
    parser.add_argument(
        "--precisions",
        default="lossless",
        help="comma-separated: lossless, eager, fp8, fp8-all, int8; add caches as in fp8-all+cache0.1 or lossless+guidance4",
    )
    parser.add_argument("--float32", action="store_true", help="add each row's distance from float32 after two steps")
    parser.add_argument("--devices", default="auto", help="as in generate")
    parser.add_argument("--repeat", type=int, default=2, help="jobs of each plan; the last one is reported")
    parser.add_argument("--warmup-steps", type=int, help="steps of the jobs before the last (default: --steps)")
    parser.add_argument("--reference", metavar="FILE", help="latent that rows are compared with; written if it does not exist")
    parser.add_argument("--diffusers", default="eager", help="diffusers' pipeline, comma-separated: eager, compiled, none")
    parser.add_argument(
        "--xdit",
        default="none",
        help="comma-separated plans of xDiT's own pipeline, such as cfg2,ulysses2",
    )
    parser.add_argument("--decode", action="store_true", help="time a decode too")
    parser.add_argument(
        "--tiling", choices=TILINGS, default="auto", help="decode in tiles; auto: if a whole video does not fit"
    )
    parser.add_argument("--output", help="write the rows as JSON to this file")
    parser.set_defaults(run=bench)


def bench(args: Namespace) -> int:
    """Times plans, next to diffusers' and xDiT's own pipelines."""
    from .bench_table import run

    return run(args)
