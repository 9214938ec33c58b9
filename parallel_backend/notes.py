"""The severity of a note, which is a line of a job's report. A note is a warning unless it says that it is information."""

from collections.abc import Collection, Iterable


class Information(str):
    """A note on what the user asked for, or on a choice that costs nothing. Fallbacks, skips and degraded modes are plain strings."""

    __slots__ = ()


def is_warning(note: str) -> bool:
    """Returns whether a note is a warning."""
    return not isinstance(note, Information)


def information_of(notes: Iterable[str]) -> list[str]:
    """Returns those of the notes that are information, for a message. It is no field of the report, which older versions could not read."""
    return [str(note) for note in notes if not is_warning(note)]


def marked(notes: Iterable[str], information: Collection[str]) -> tuple[str, ...]:
    """Returns the notes of a message with their severity. An older version names no information: all of its notes are warnings."""
    return tuple(Information(note) if note in information else note for note in notes)
