"""The command line: ``python -m parallel_backend COMMAND``, or ``cogvideox-xdit COMMAND``."""

import argparse
import difflib
import logging
import os
import sys
from pathlib import Path

import torch

from ..errors import Cancelled, Failure, RequestError
from ..system.limits import usable_cores
from . import bench, cards, download, generate_options, plan, serve, status, stop, upscale

COMMANDS = {
    "generate": (generate_options.add_options, "make video files from prompts, images or videos"),
    "upscale": (upscale.add_options, "enlarge a video with a super-resolution model, in tiles"),
    "download": (download.add_options, "get a model from a hub"),
    "plan": (plan.add_options, "show what auto would choose, and why"),
    "cards": (cards.add_options, "show which GPU can run which published model, and how"),
    "serve": (serve.add_options, "keep a group running for other processes, on one or several machines"),
    "status": (status.add_options, "list the groups that are running"),
    "stop": (stop.add_options, "end the group that serve keeps"),
    "bench": (bench.add_options, "time plans, next to diffusers' and xDiT's own pipelines"),
}
"""Adds the options of each command, and says what it does."""
SCRIPT = "cogvideox-xdit"
"""The console script that ``pip install`` makes."""


class Help(argparse.HelpFormatter):
    """Adds its default to the help of each option that has one, and names each that is required."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.required and action.option_strings:
            return f"{action.help} (required)"
        is_said = action.help is None or "(default" in action.help
        is_none = action.default is None or action.default is False or action.default in ("", [], argparse.SUPPRESS)
        if is_said or is_none:
            return action.help
        return f"{action.help} (default %(default)s)"


class Parser(argparse.ArgumentParser):
    """Reports a wrong option in one line, with exit status 2."""

    def __init__(self, **settings):
        super().__init__(**{"formatter_class": Help, **settings})

    def error(self, message: str):
        self.exit(2, f"{self.prog}: {message}\n")


class CommandParser(Parser):
    """Names an option that does not exist before one that is missing."""

    def parse_known_args(self, args=None, namespace=None):
        for word in args or ():
            name = word.partition("=")[0]
            if name == "--":
                break
            is_option = name.startswith("--") and " " not in name
            if is_option and not any(known.startswith(name) for known in self._option_string_actions):
                self._refuse(name)
        return super().parse_known_args(args, namespace)

    def _refuse(self, name: str) -> None:
        near = difflib.get_close_matches(name, self._option_string_actions, 1)
        self.error(f"there is no option {name}" + (f"; did you mean {near[0]}?" if near else "; --help lists all"))


def build_parser() -> Parser:
    """Returns the parser of the whole command line."""
    is_script = Path(sys.argv[0]).stem == SCRIPT
    parser = Parser(prog=SCRIPT if is_script else "python -m parallel_backend", description="CogVideoX on every GPU you have.")
    commands = parser.add_subparsers(dest="command", required=True, parser_class=CommandParser, metavar="COMMAND")
    for name, (add_options, what) in COMMANDS.items():
        add_options(commands.add_parser(name, help=what, description=f"{what[0].upper()}{what[1:]}."))
    return parser


def main(argv: list[str] | None = None) -> int:
    """Runs one command. Returns the exit status: 0, 1 for a failure, 2 for a wrong request."""
    args = build_parser().parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger(__package__.removesuffix(".cli")).setLevel(logging.INFO)
    if "OMP_NUM_THREADS" not in os.environ:  # torch does not see a container's quota
        torch.set_num_threads(min(torch.get_num_threads(), usable_cores()))
    try:
        return args.run(args)
    except RequestError as error:
        print(f"{args.command}: {error}", file=sys.stderr)
        return 2
    except Failure as error:
        print(f"{args.command}: {error}", file=sys.stderr)
        return 1
    except (Cancelled, KeyboardInterrupt):
        print(f"{args.command}: stopped", file=sys.stderr)
        return 1
