"""What the command line writes: lines, tables, JSON, and progress."""

import json
import sys
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from typing import Any, TextIO

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

BAR = "{n_fmt}/{total_fmt} |{bar}| {rate_inv_fmt}, {remaining} left"


def show(line: str) -> None:
    """Writes a line of the command's result."""
    print(line, flush=True)


def show_json(value: dict) -> None:
    """Writes one JSON object."""
    show(json.dumps(value))


class Table:
    """Writes rows under the titles of their columns. Numbers are at the right.

    Args:
        widths: of each column, by its title; the title's own if that is more.
    """

    def __init__(self, widths: Mapping[str, int]):
        self.widths = {title: max(len(title), width) for title, width in widths.items()}

    @classmethod
    def of(cls, titles: Iterable[str], rows: Iterable[Iterable[Any]]) -> "Table":
        """Returns a table that is wide enough for these rows."""
        columns = zip(*rows)
        return cls({title: max(len(text_of(cell)) for cell in column) for title, column in zip(titles, columns)})

    def show_titles(self) -> None:
        """Writes the titles."""
        self.show(self.widths)

    def show(self, cells: Iterable[Any]) -> None:
        """Writes one row."""
        each = zip(cells, self.widths.values())
        words = (f"{text_of(cell):{'<' if isinstance(cell, str) else '>'}{width}}" for cell, width in each)
        show("  ".join(words).rstrip())


def text_of(cell: Any) -> str:
    """Returns what stands in a cell: four digits of a number, and a dash for what is unknown."""
    return "-" if cell is None else f"{cell:.4g}" if isinstance(cell, float) else str(cell)


class Progress:
    """Shows steps on standard error: in a terminal a bar with seconds a step and the time left, elsewhere a line for each.

    It is a step listener and a context; leaving it ends the bar.
    """

    def __init__(self, file: TextIO | None = None):
        self._file = file or sys.stderr
        self._bar: tqdm | None = None
        self._opened = ExitStack()

    def __enter__(self) -> "Progress":
        if self._file.isatty():
            self._opened.enter_context(logging_redirect_tqdm())  # else a log line would break the bar
        return self

    def __exit__(self, *_) -> None:
        if self._bar is not None:
            self._bar.close()
        self._opened.close()

    def __call__(self, step: int, steps: int) -> None:
        if not self._file.isatty():
            print(f"step {step}/{steps}", file=self._file, flush=True)
            return
        if self._bar is None:  # the first step is not timed, as it includes loading
            self._bar = tqdm(total=steps, initial=step, file=self._file, unit="step", bar_format=BAR, dynamic_ncols=True)
        self._bar.update(step - self._bar.n)


def quiet_libraries() -> None:
    """Turns the libraries' own progress bars off; ours is the steps."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
