"""ComfyUI's prompt syntax: ``(words:1.3)`` sets a weight, ``(words)`` means 1.1, ``\\(`` and ``\\)`` are literal brackets."""

import math
import re

EMPHASIS = 1.1
"""Factor of brackets without a number; nested brackets multiply."""
ESCAPES = {"\\(": "\x0e", "\\)": "\x0f"}
"""Escaped brackets, and the control characters that replace them during parsing."""
EMBEDDING = re.compile(r"(?:^|(?<=\s))embedding:[^\s,<\[]+")
FOREIGN = re.compile(r"\bBREAK\b|<(?:lora|lyco|hypernet):[^<>]*>|\[[^\[\]]*\]")
"""Syntax of other programs. ComfyUI's own encoder reads it as plain words, too."""


def parse(prompt: str) -> list[tuple[str, float]]:
    """Splits a prompt into parts with weights, as ComfyUI does.

    A number replaces the weight of the surrounding brackets. Unbalanced brackets are plain text.
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
    """Splits text before and after each outermost pair of brackets. The parts concatenate to the text."""
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
    """Returns the text inside a pair of brackets without its number, and its weight.

    Args:
        inside: the text between the brackets.
        weight: of the text around them.
    """
    words, colon, number = inside.rpartition(":")
    try:
        if colon and words and math.isfinite(float(number)):
            return words, float(number)
    except ValueError:
        pass
    return inside, weight * EMPHASIS


def without_embeddings(text: str) -> tuple[str, list[str]]:
    """Removes textual inversions, ``embedding:name``, from a text. Returns the text and the removed names."""
    return EMBEDDING.sub("", text), EMBEDDING.findall(text)


def foreign(prompt: str) -> list[str]:
    """Returns the parts of a prompt that other programs would interpret as syntax."""
    return list(dict.fromkeys(FOREIGN.findall(prompt)))
