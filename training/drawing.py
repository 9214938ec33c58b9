"""Scenes to pixels, many at a time, on any device."""

import math

import torch

from .scenes import BACKGROUNDS, COLOURS, FRAMES, HEIGHT, MOTIONS, SHAPES, WIDTH, Scene, progress

STAR_OUTER, STAR_INNER = 1.15, 0.42 * 1.15
WAYS = {motion: [progress(motion, frame) for frame in range(FRAMES)] for motion in MOTIONS}
"""How far from start to end a thing is at each frame, by its motion."""


def distances(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Signed distances to each of SHAPES with radius 1, positive outside. ``[...]`` to ``[shapes, ...]``."""
    circle = (x**2 + y**2).sqrt() - 1
    square = torch.maximum(x.abs(), y.abs()) - 0.88
    triangle = torch.maximum(y - 0.8, (1.8 * x.abs() - y) / math.hypot(1.8, 1) - 1 / math.hypot(1.8, 1))
    tip = 2 * math.pi / 5
    angle = torch.remainder(torch.atan2(x, -y) + tip / 2, tip) - tip / 2  # 0 towards the nearest tip
    length = (x**2 + y**2).sqrt()
    along, across = length * angle.cos(), length * angle.sin().abs()
    notch = (STAR_INNER * math.cos(tip / 2), STAR_INNER * math.sin(tip / 2))
    edge = (notch[0] - STAR_OUTER, notch[1])
    star = (edge[1] * (along - STAR_OUTER) - edge[0] * across) / math.hypot(*edge)
    return torch.stack([circle, square, triangle, star])


def draw(scenes: list[Scene], device: torch.device | str = "cpu") -> torch.Tensor:
    """Draws scenes with smooth edges: ``[scenes, frames, height, width, 3]``, float32 in 0..1."""
    shapes = list(SHAPES)
    background = torch.tensor([BACKGROUNDS[scene.background] for scene in scenes], device=device) / 255
    video = background[:, None, None, None, :].expand(-1, FRAMES, HEIGHT, WIDTH, -1)
    rows = torch.arange(HEIGHT, device=device)[:, None] + 0.5
    columns = torch.arange(WIDTH, device=device)[None, :] + 0.5
    for layer in reversed(range(max(len(scene.things) for scene in scenes))):
        where = [index for index, scene in enumerate(scenes) if layer < len(scene.things)]
        things = [scenes[index].things[layer] for index in where]
        first = torch.tensor([(*thing.start, thing.radius[0]) for thing in things], device=device)[:, None]
        last = torch.tensor([(*thing.end, thing.radius[1]) for thing in things], device=device)[:, None]
        along = torch.tensor([WAYS[thing.motion] for thing in things], device=device)[:, :, None]
        track = (1 - along) * first + along * last
        x, y, radius = (track[..., index, None, None] for index in range(3))
        all_shapes = distances((columns - x) / radius, (rows - y) / radius)
        kind = torch.tensor([shapes.index(thing.shape) for thing in things], device=device)
        distance = all_shapes[kind, torch.arange(len(things), device=device)] * radius
        cover = (0.5 - distance).clamp(0, 1)[..., None]
        colour = torch.tensor([COLOURS[thing.colour] for thing in things], device=device)[:, None, None, None, :] / 255
        index = torch.tensor(where, device=device)
        video = video.index_copy(0, index, cover * colour + (1 - cover) * video[index])
    return video
