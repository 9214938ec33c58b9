"""What the demo model knows: coloured shapes that move on coloured backgrounds, and how people say so."""

import hashlib
import math
import random
from dataclasses import dataclass
from functools import cached_property

WIDTH, HEIGHT, FRAMES = 96, 64, 17

BACKGROUNDS = {"black": (16, 16, 20), "white": (240, 240, 240), "grey": (128, 128, 132), "pink": (245, 175, 195)}
COLOURS = {
    "red": (225, 40, 40),
    "green": (40, 165, 60),
    "blue": (45, 80, 230),
    "yellow": (245, 215, 40),
    "purple": (145, 55, 190),
    "orange": (245, 130, 25),
}
SHAPES = {"circle": ("circle", "disc", "ball"), "square": ("square", "box"), "triangle": ("triangle",), "star": ("star",)}
"""A shape's name and the other words for it."""

DIRECTIONS = ("left", "right", "up", "down")
MOTIONS: dict[str, tuple[tuple[str, str], ...]] = {
    **{
        way: (
            (f"moves {way}", f"moving {way}"),
            (f"moves {to}", f"moving {to}"),
            (f"goes {way}", f"going {way}"),
            (f"slides {to}", f"sliding {to}"),
            (f"travels {way}", f"travelling {way}"),
        )
        for way, to in (("left", "to the left"), ("right", "to the right"), ("up", "upwards"), ("down", "downwards"))
    },
    **{
        f"{way}, stop": (
            (f"moves {way} and stops", f"moving {way} and stopping"),
            (f"goes {way} and then stops", f"going {way} and then stopping"),
            (f"slides {way}, then stops", f"sliding {way}, then stopping"),
        )
        for way in DIRECTIONS
    },
    "bounce": (
        ("bounces", "bouncing"),
        ("bounces up and down", "bouncing up and down"),
        ("jumps up and down", "jumping up and down"),
    ),
    "grow": (("grows", "growing"), ("gets bigger", "getting bigger"), ("becomes larger", "becoming larger")),
    "shrink": (("shrinks", "shrinking"), ("gets smaller", "getting smaller"), ("becomes smaller", "becoming smaller")),
    "still": (("stays still", "staying still"), ("stands still", "standing still"), ("does not move", "not moving")),
}
"""A motion's name and how it is said: with a verb, and as a participle."""

CROSSINGS = ("{0} and {1} cross", "{0} and {1} cross each other", "{0} crosses {1}", "{0} and {1} pass each other")
PLACES = ("on a {} background", "over a {} background", "against a {} background", "in front of a {} background", "on {}")
OPENINGS = ("a video of ", "a clip of ", "an animation of ")
HELD_OUT_ONE_IN = 10


@dataclass(frozen=True)
class Thing:
    """One moving shape. Positions and radii are in pixels, at the first and the last frame."""

    shape: str
    colour: str
    motion: str
    start: tuple[float, float]
    end: tuple[float, float]
    radius: tuple[float, float]

    @property
    def name(self) -> str:
        """What makes it another thing, wherever it is: ``red circle left``."""
        return f"{self.colour} {self.shape} {self.motion}"


@dataclass(frozen=True)
class Scene:
    """One or two things before a background; the first is in front."""

    background: str
    things: tuple[Thing, ...]
    crossing: bool = False
    """Two things that pass each other, and are said to."""

    @cached_property
    def name(self) -> str:
        """The combination, wherever things are."""
        return f"{self.background}: {' + '.join(sorted(thing.name for thing in self.things))}"

    @property
    def held_out(self) -> bool:
        """Whether training must never draw this combination: one in ten, by its name's hash."""
        return int(hashlib.sha256(self.name.encode()).hexdigest(), 16) % HELD_OUT_ONE_IN == 0


def travel(rng: random.Random, low: float, high: float, least: float, most: float, forward: bool) -> tuple[float, float]:
    """Start and end on one axis inside ``low..high``, ``least`` to ``most`` apart."""
    distance = rng.uniform(least, min(most, high - low))
    start = rng.uniform(low, high - distance)
    return (start, start + distance) if forward else (start + distance, start)


def make_thing(rng: random.Random, shape: str, colour: str, motion: str, box: tuple[float, float, float, float]) -> Thing:
    """A thing that stays inside ``box`` (left, top, right, bottom) while it moves."""
    left, top, right, bottom = box
    room = min(right - left, bottom - top) / 2 - 2
    alone = box == (0, 0, WIDTH, HEIGHT)
    radius = rng.uniform(11, 16) if alone else rng.uniform(9, 12.5)
    radii = (radius, radius)
    if motion in ("grow", "shrink"):
        least = rng.uniform(8, 10) if alone else rng.uniform(6.5, 7.5)
        most = min(room, least * rng.uniform(1.8, 2.1))
        radii = (least, most) if motion == "grow" else (most, least)
    edge = max(radii) * 1.15 + 1
    low_x, high_x = left + min(edge, (right - left) / 2), right - min(edge, (right - left) / 2)
    low_y, high_y = top + min(edge, (bottom - top) / 2), bottom - min(edge, (bottom - top) / 2)
    x, y = rng.uniform(low_x, high_x), rng.uniform(low_y, high_y)
    start, end = (x, y), (x, y)
    way = motion.split(",")[0]
    if way in ("left", "right"):
        first, last = travel(rng, low_x, high_x, 30, 56, way == "right")
        start, end = (first, y), (last, y)
    elif way in ("up", "down", "bounce"):
        first, last = travel(rng, low_y, high_y, 22, 34, way != "up")
        start, end = (x, first), (x, last)
    return Thing(shape, colour, motion, start, end, radii)


def random_scene(rng: random.Random, *, pairs: float = 0.3) -> Scene:
    """Any scene: one thing, or, with the likelihood of ``pairs``, two."""
    background = rng.choice(list(BACKGROUNDS))
    if rng.random() < 1 - pairs:
        thing = make_thing(
            rng, rng.choice(list(SHAPES)), rng.choice(list(COLOURS)), rng.choice(list(MOTIONS)), (0, 0, WIDTH, HEIGHT)
        )
        return Scene(background, (thing,))
    colours = rng.sample(list(COLOURS), 2)
    shapes = [rng.choice(list(SHAPES)) for _ in range(2)]
    crossing = rng.random() < 0.3
    rows = crossing or rng.random() < 0.5
    if rows:  # one above the other, so that ways along a row do not meet
        boxes = [(0, 0, WIDTH, HEIGHT / 2 + 2), (0, HEIGHT / 2 - 2, WIDTH, HEIGHT)]
        motions = ["left", "right", "grow", "shrink", "still"]
    else:
        boxes = [(0, 0, WIDTH / 2, HEIGHT), (WIDTH / 2, 0, WIDTH, HEIGHT)]
        motions = ["up", "down", "bounce", "grow", "shrink", "still"]
    chosen = rng.sample(["left", "right"], 2) if crossing else [rng.choice(motions) for _ in range(2)]
    rng.shuffle(boxes)
    things = tuple(make_thing(rng, *what, box) for *what, box in zip(shapes, colours, chosen, boxes))
    return Scene(background, things, crossing)


def training_scene(rng: random.Random, *, pairs: float = 0.3) -> Scene:
    """Any scene that is not held out."""
    while (scene := random_scene(rng, pairs=pairs)).held_out:
        pass
    return scene


def held_out_scenes(count: int, *, pairs: int, seed: int = 2026) -> list[Scene]:
    """Scenes that training never draws, no combination twice: ``pairs`` of ``count`` hold two things."""
    rng = random.Random(seed)
    found: dict[str, Scene] = {}
    wanted = {1: count - pairs, 2: pairs}
    while len(found) < count:
        scene = random_scene(rng)
        things = len(scene.things)
        if scene.held_out and scene.name not in found and wanted[things]:
            wanted[things] -= 1
            found[scene.name] = scene
    return list(found.values())


def caption(scene: Scene, rng: random.Random | None, *, partial: bool = False) -> str:
    """Says what a scene shows.

    Args:
        rng: chooses the wording; None takes the first of each.
        partial: leaves some of it unsaid, so that the model need not hear everything.
    """

    def pick(options):
        return options[0] if rng is None else rng.choice(options)

    def says(likely: float) -> bool:
        return not partial or rng.random() < likely

    def subject(thing: Thing) -> str:
        noun = pick(SHAPES[thing.shape]) if says(0.7) else "shape"
        described = f"{thing.colour} {noun}" if says(0.7) else noun
        return f"an {described}" if described[0] in "aeiou" else f"a {described}"

    opening = "" if rng is None or rng.random() < 0.8 else rng.choice(OPENINGS)
    if scene.crossing:
        what = pick(CROSSINGS).format(*map(subject, scene.things))
        opening = ""
    else:
        parts = []
        for thing in scene.things:
            verb, participle = pick(MOTIONS[thing.motion])
            joined = f"{subject(thing)} {participle if opening else verb}"
            parts.append(joined if says(0.7) else subject(thing))
        what = " and ".join(parts)
    place = pick(PLACES).format(scene.background)
    if not says(0.5):
        return opening + what
    if rng is not None and rng.random() < 0.15:
        return f"{place}, {opening}{what}"
    return f"{opening}{what} {place}"


def vocabulary() -> list[str]:
    """Every word that captions are made of, in a fixed order."""
    phrases = [*BACKGROUNDS, *COLOURS, *OPENINGS, "a an and shape something"]
    phrases += [noun for nouns in SHAPES.values() for noun in nouns]
    phrases += [form for ways in MOTIONS.values() for way in ways for form in way]
    phrases += [template.replace("{0}", "").replace("{1}", "").replace("{}", "") for template in (*CROSSINGS, *PLACES)]
    words = " ".join(phrases).replace(",", " ").split()
    return list(dict.fromkeys(words))


def progress(motion: str, frame: int) -> float:
    """How far from start (0) to end (1) a thing is at a frame of 17."""
    time = frame / (FRAMES - 1)
    if motion == "bounce":
        return 1 - abs(math.cos(1.5 * math.pi * time))  # down, up, and down again
    return min(2 * time, 1.0) if motion.endswith("stop") else time
