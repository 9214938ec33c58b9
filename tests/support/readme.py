"""The commands in README.md, and what stands in for an address, a model or a GPU. It needs nothing but Python."""

import re
import shlex
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
STAND_INS = {
    "PATH-OF-5b-I2V": "demo-i2v",
    "PATH-OF-DOVE": "demo",
    "PATH": "demo",
    "single,cfg2": "cfg2",  # of two devices
    "XDiTBackend.devices=0,1": "XDiTBackend.devices=cpu:2",
}
"""What a user replaces, or has and a test has not."""
DEVICES = ["--devices", "cpu:2"]
"""Added to a command that has a plan and no devices."""
ONLY_ON_GPUS = "--xdit"
"""Left out with the word after it."""
INLINE = re.compile(r"`(python -m parallel_backend [^`]+|python -m benchmarks\.[^`]+|pip install [^`]+)`")
"""A command in the middle of the text."""
ADDRESS = re.compile(r"https://github\.com/[\w.-]+/([\w.-]+)")


def text() -> str:
    """Returns the README."""
    return (REPO / "README.md").read_text(encoding="utf-8")


def blocks() -> list[list[str]]:
    """Returns the commands of each code block, without comments."""
    found = re.findall(r"^```bash\n(.*?)^```", text(), re.DOTALL | re.MULTILINE)
    return [[line for line in block.splitlines() if words_of(line)] for block in found]


def inline() -> list[str]:
    """Returns the commands in the middle of the text, each once."""
    return list(dict.fromkeys(INLINE.findall(re.sub(r"^```.*?^```", "", text(), flags=re.DOTALL | re.MULTILINE))))


def words_of(command: str) -> list[str]:
    """Returns the words of a command."""
    return shlex.split(command, comments=True)


def possible_here(command: str) -> list[str]:
    """Returns the words of a command with the stand-ins, which need no GPU and no model that is not here."""
    words = [STAND_INS.get(word, word) for word in words_of(command)]
    if ONLY_ON_GPUS in words:
        place = words.index(ONLY_ON_GPUS)
        del words[place : place + 2]
    if {"--plan", "--plans"} & set(words) and "--devices" not in words:
        words += DEVICES
    return words
