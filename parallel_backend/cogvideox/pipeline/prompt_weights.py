"""ComfyUI's prompt syntax: ``(words:1.3)`` weighs words, ``(words)`` means 1.1, ``\\(`` and ``\\)`` are brackets."""

import math
import re

EMPHASIS = 1.1
"""The weight of brackets without a number; nested brackets multiply it."""
ESCAPES = {"\\(": "\x0e", "\\)": "\x0f"}
"""Each escaped bracket, and the control character that stands for it while brackets are counted."""
EMBEDDING = re.compile(r"(?:^|(?<=\s))embedding:[^\s,<\[]+")
FOREIGN = re.compile(r"\bBREAK\b|<(?:lora|lyco|hypernet):[^<>]*>|\[[^\[\]]*\]")
"""Syntax of other programs, which the core reads as words too."""


def parse(prompt: str) -> list[tuple[str, float]]:
    """The parts of a prompt and their weights, as ComfyUI's core reads them.

    A number replaces the weight of the brackets around it. Brackets that do not match are text.
    """
    for escaped, stand_in in ESCAPES.items():
        prompt = prompt.replace(escaped, stand_in)
    waiting, parts = [(part, 1.0) for part in reversed(split(prompt))], []
    while waiting:
        part, weight = waiting.pop()
        if not (part.startswith("(") and part.endswith(")") and len(part) > 1):
            parts.append((part, weight))
            continue
        inside, weight = weigh(part[1:-1], weight)
        waiting += [(inner, weight) for inner in reversed(split(inside))]
    for escaped, stand_in in ESCAPES.items():
        parts = [(part.replace(stand_in, escaped[1:]), weight) for part, weight in parts]
    return parts


def split(text: str) -> list[str]:
    """Text cut before and after each outermost pair of brackets; the pieces joined are the text."""
    pieces, start, depth = [], 0, 0
    for place, character in enumerate(text):
        if character == "(":
            if depth == 0:
                pieces.append(text[start:place])
                start = place
            depth += 1
        elif character == ")":
            depth -= 1
            if depth == 0:
                pieces.append(text[start : place + 1])
                start = place + 1
    return [piece for piece in (*pieces, text[start:]) if piece]


def weigh(inside: str, weight: float) -> tuple[str, float]:
    """The words between two brackets and their weight, given the weight of the text around them."""
    words, colon, number = inside.rpartition(":")
    try:
        if colon and words and math.isfinite(float(number)):
            return words, float(number)
    except ValueError:
        pass
    return inside, weight * EMPHASIS


def without_embeddings(text: str) -> tuple[str, list[str]]:
    """Text without textual inversions, ``embedding:name``, and those that were in it."""
    return EMBEDDING.sub("", text), EMBEDDING.findall(text)


def foreign(prompt: str) -> list[str]:
    """What other programs would take for an instruction."""
    return list(dict.fromkeys(FOREIGN.findall(prompt)))
