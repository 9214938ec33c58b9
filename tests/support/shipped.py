"""The shipped workflows, by their short names."""

import json

from workflows import headless

NAMES = tuple(headless.FILES)
PATHS = {name: headless.find(name) for name in NAMES}


def shipped(name: str) -> dict:
    """Returns a shipped workflow as the front end saves it."""
    return json.loads(PATHS[name].read_text(encoding="utf-8"))
