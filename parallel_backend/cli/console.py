"""Lines that the command line writes."""

import json
import sys


def show(line: str) -> None:
    """Writes a line of the command's result."""
    print(line, flush=True)


def show_step(step: int, steps: int) -> None:
    """Writes progress to standard error."""
    print(f"step {step}/{steps}", file=sys.stderr, flush=True)


def show_json(value: dict) -> None:
    """Writes one JSON object."""
    show(json.dumps(value))


def quiet_libraries() -> None:
    """Turns the libraries' own progress bars off; ours is the steps."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
