"""The command ``bench``: the speed table of ``benchmarks/``."""

from argparse import Namespace


def bench(args: Namespace) -> int:
    """Side by side with diffusers and xDiT's own pipeline."""
    from benchmarks.table import run

    return run(args)
