"""Recognizes what a clip shows by image measurements: colour masks, fill ratios, centroids. No model is used."""

from dataclasses import dataclass

import torch

from training.scenes import BACKGROUNDS, COLOURS, Scene

LEAST_PIXELS = 20
"""A colour with fewer pixels (median over the frames) is the edge of something else."""
FILL_RATIOS = {"star": 0.38, "triangle": 0.52, "circle": 0.785, "square": 1.0}
"""The share of its bounding box that a shape fills."""


@dataclass(frozen=True)
class Seen:
    """One thing in a clip, as measured."""

    shape: str
    colour: str
    motion: str


@dataclass(frozen=True)
class Verdict:
    """Whether a clip agrees with its scene; for two things, whether both do."""

    background: bool
    colour: bool
    shape: bool
    motion: bool


def nearest(pixels: torch.Tensor, palette: list[tuple[int, int, int]]) -> torch.Tensor:
    """Returns the index of the nearest palette colour for pixels ``[..., 3]`` in 0..1."""
    colours = torch.tensor(palette, dtype=torch.float32) / 255
    return (pixels[..., None, :] - colours).square().sum(-1).argmin(-1)


def background_of(clip: torch.Tensor) -> str:
    """Returns the background that most pixels of ``[frames, height, width, 3]`` are nearest to."""
    names = list(BACKGROUNDS)
    return names[nearest(clip, list(BACKGROUNDS.values())).flatten().bincount(minlength=len(names)).argmax()]


def colours_of(clip: torch.Tensor, *, most: int) -> list[str]:
    """Returns up to ``most`` colours of things in the clip, the largest first."""
    names = list(COLOURS)
    palette = [*COLOURS.values(), *BACKGROUNDS.values()]
    found = nearest(clip, palette).flatten(1)
    areas = torch.stack([(found == index).sum(1) for index in range(len(names))]).float().median(1).values
    order = areas.argsort(descending=True)[:most].tolist()
    return [names[index] for index in order if areas[index] >= max(LEAST_PIXELS, areas.max() / 5)]


def shape_of(mask: torch.Tensor) -> str:
    """Returns the shape whose fill ratio is nearest to a mask's ``[frames, height, width]``, the median over the frames."""
    ratios = []
    for frame in mask:
        rows, columns = frame.any(1).nonzero(), frame.any(0).nonzero()
        if len(rows):
            box = (rows.max() - rows.min() + 1) * (columns.max() - columns.min() + 1)
            ratios.append(frame.sum() / box)
    ratio = torch.stack(ratios).median().item() if ratios else 0.0
    return min(FILL_RATIOS, key=lambda shape: abs(FILL_RATIOS[shape] - ratio))


def near_its_middle(mask: torch.Tensor) -> torch.Tensor:
    """Returns a mask ``[frames, height, width]`` without far pixels, which are edges of something else of a similar colour."""
    kept = torch.zeros_like(mask)
    for index, frame in enumerate(mask):
        points = frame.nonzero().float()
        if len(points):
            reach = 1.6 * len(points) ** 0.5
            close = (points - points.median(0).values).norm(dim=1) <= reach
            rows, columns = points[close].long().unbind(1)
            kept[index, rows, columns] = True
    return kept


def turned_back(track: list[float]) -> float:
    """Returns the smaller of the longest distances that a track goes forward and back: about 0 unless it turns."""
    forward = max(later - earlier for index, earlier in enumerate(track) for later in track[index:])
    back = max(earlier - later for index, earlier in enumerate(track) for later in track[index:])
    return min(forward, back)


def motion_of(mask: torch.Tensor) -> str:
    """Returns the name of a motion (:data:`training.scenes.MOTIONS`) from the track and the area of a mask."""
    area = mask.flatten(1).sum(1).float()
    if (area < 1).all():
        return "gone"
    rows = torch.arange(mask.shape[1])[:, None] + 0.5
    columns = torch.arange(mask.shape[2])[None, :] + 0.5
    kept = area >= 1
    x = ((mask * columns).flatten(1).sum(1)[kept] / area[kept]).tolist()
    y = ((mask * rows).flatten(1).sum(1)[kept] / area[kept]).tolist()
    across, along = x[-1] - x[0], y[-1] - y[0]
    height = max(y) - min(y)
    if height >= 10 and turned_back(y) >= height / 2:
        return "bounce"
    if max(abs(across), abs(along)) >= 10:
        track = x if abs(across) > abs(along) else y
        way = ("right" if across > 0 else "left") if track is x else ("down" if along > 0 else "up")
        late = abs(track[-1] - track[len(track) * 5 // 8]) / abs(track[-1] - track[0])
        return f"{way}, stop" if late < 0.18 else way
    growth = area[kept][-1] / area[kept][0]
    return "grow" if growth > 1.7 else "shrink" if growth < 1 / 1.7 else "still"


def look(clip: torch.Tensor, *, things: int) -> tuple[str, list[Seen]]:
    """Returns the background and up to ``things`` things of a clip ``[frames, height, width, 3]`` in 0..1."""
    background = background_of(clip)
    colours = colours_of(clip, most=things)
    classes = nearest(clip, [BACKGROUNDS[background], *(COLOURS[colour] for colour in colours)])
    masks = [near_its_middle(classes == index + 1) for index in range(len(colours))]
    return background, [Seen(shape_of(mask), colour, motion_of(mask)) for mask, colour in zip(masks, colours)]


def judge(clip: torch.Tensor, scene: Scene) -> Verdict:
    """Compares a clip with its scene. Things are matched by colour."""
    background, seen = look(clip, things=len(scene.things))
    by_colour = {one.colour: one for one in seen}
    matched = [(by_colour.get(thing.colour), thing) for thing in scene.things]
    # A single thing of the wrong colour still has a shape and a motion to compare.
    if len(scene.things) == 1 and seen:
        matched = [(seen[0], scene.things[0])]
    return Verdict(
        background=background == scene.background,
        colour={one.colour for one in seen} == {thing.colour for thing in scene.things},
        shape=all(one is not None and one.shape == thing.shape for one, thing in matched),
        motion=all(one is not None and one.motion == thing.motion for one, thing in matched),
    )
