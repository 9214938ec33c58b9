"""The command ``bench``: the speed table of ``benchmarks/``."""

from argparse import Namespace


def bench(args: Namespace) -> int:
    """Times plans, next to diffusers' and xDiT's own pipelines."""
    from benchmarks.table import run

    return run(args)
