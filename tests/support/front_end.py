"""What the pack's JavaScript shows to the user, found in its source without running it."""

import re

STRING = r'"(?:[^"\\\n]|\\.)*"' + r"|'(?:[^'\\\n]|\\.)*'"
NO_CODE = re.compile(rf"{STRING}|`(?:[^`\\]|\\.)*`|//[^\n]*|/\*.*?\*/", re.DOTALL)


def settings(source: str) -> dict[str, set[str]]:
    """Returns the settings that a module registers, and for each the words that a locale has to have.

    The words are named as in ComfyUI's ``settings.json``: ``name``, ``tooltip``, ``options.a``. A setting is an object with the
    keys ``id`` and ``defaultValue``.

    Raises:
        ValueError: if the id of a setting is not written out.
    """
    found = {}
    if not re.search(r"\bsettings: \[", NO_CODE.sub("", source)):  # a dialog has a defaultValue too
        return found
    for name, own in _objects(source):
        if not _has_key(own, "defaultValue"):
            continue
        words = {"name"} | ({"tooltip"} if _has_key(own, "tooltip") else set())
        if options := re.search(r"\boptions:\s*\[(.*?)\]", own, re.DOTALL):
            texts = re.findall(rf"\btext:\s*({STRING})", options[1]) or re.findall(STRING, options[1])
            words |= {f"options.{_key(text[1:-1])}" for text in texts}
        found[_key(name)] = words
    if len(found) != len(re.findall(r"\bdefaultValue\b", NO_CODE.sub("", source))):
        raise ValueError("write the id of every setting out as a string, so that it is found")
    return found


def commands(source: str) -> set[str]:
    """Returns the ids of the commands that a module registers: objects with the keys ``id`` and ``function``."""
    return {_key(name) for name, own in _objects(source) if _has_key(own, "function")}


def said(source: str) -> set[str]:
    """Returns the English texts that a module shows with ``say``, if they are written there."""
    return {text[1:-1] for text in re.findall(rf"\bsay\(\s*({STRING})", source)}


def table(source: str, name: str) -> dict[str, str]:
    """Returns the texts of a constant object of a module, by key."""
    (body,) = re.findall(rf"^const {name} = {{\n(.*?)^}};", source, re.MULTILINE | re.DOTALL)
    return {key.strip("\"'"): text[1:-1] for key, text in re.findall(rf"^\s*({STRING}|\w+): ({STRING}),$", body, re.MULTILINE)}


def _objects(source: str) -> list[tuple[str, str]]:
    """Returns the id and the source of each object that has an id."""
    code = NO_CODE.sub(lambda found: " " * len(found[0]), source)
    found = []
    for match in re.finditer(rf"\bid:\s*({STRING})", source):
        if code[match.start()] == " ":  # in a comment or string
            continue
        first, last = _edge(code, match.start(), -1), _edge(code, match.start(), 1)
        found.append((match[1][1:-1], source[first : last + 1]))
    return found


def _edge(code: str, at: int, step: int) -> int:
    """Returns the place of the brace that opens (step -1) or closes (step 1) the object around a place."""
    inner, outer = ("}", "{") if step < 0 else ("{", "}")
    depth = 1
    while depth:
        at += step
        depth += {inner: 1, outer: -1}.get(code[at], 0)
    return at


def _has_key(own: str, key: str) -> bool:
    return re.search(rf"[{{,]\s*(async\s+)?{key}\s*[:(,]", own) is not None


def _key(text: str) -> str:
    """Returns a name as ComfyUI's front end looks it up."""
    return text.replace(".", "_")
