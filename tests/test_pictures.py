"""Pictures from other nodes: what has an obvious meaning is taken, the rest refused in one line."""

import pytest
import torch

from parallel_backend.errors import RequestError
from parallel_backend.media.pictures import checked_pictures

RGB = torch.rand(6, 4, 5, 3, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "given, expected",
    {
        "rgb": (RGB, RGB),
        "alpha": (torch.cat([RGB, torch.zeros(6, 4, 5, 1)], -1), RGB),
        "grey": (RGB[..., :1], RGB[..., :1].repeat(1, 1, 1, 3)),
        "videos": (RGB.view(2, 3, 4, 5, 3), RGB),
        "one picture": (RGB[0], RGB[:1]),
        "bf16": (RGB.bfloat16(), RGB.bfloat16().float()),
        "float64": (RGB.double(), RGB),
        "8 bits": ((RGB * 255).round().byte(), (RGB * 255).round() / 255),
        "out of 0..1": (RGB * 4 - 2, RGB * 4 - 2),
    }.values(),
)
def test_what_has_an_obvious_meaning_is_taken(given, expected):
    found = checked_pictures(given, "images")
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)


@pytest.mark.parametrize(
    "given, said",
    [
        (RGB[..., :2], "images has 2 channels"),
        (RGB.movedim(-1, 1), "images has 5 channels"),
        (RGB[..., 0], r"images has shape \[6, 4, 5\]"),
        (RGB[0, 0], r"images has shape \[5, 3\]"),
        (RGB[None, None], r"images has shape \[1, 1, 6, 4, 5, 3\]"),
        (RGB[:0], "holds no image"),
        (RGB[:, :0], "holds no image"),
        (RGB.view(2, 3, 4, 5, 3)[:0], "holds no image"),
        (RGB.log() * 0 / 0, "NaN or infinite"),
        (RGB / 0, "NaN or infinite"),
        ((RGB / 0).to(torch.float8_e5m2), "NaN or infinite"),
        (RGB.long(), "torch.int64"),
        ([RGB], "a list"),
        (None, "NoneType"),
    ],
)
def test_the_rest_is_refused_in_one_line(given, said):
    with pytest.raises(RequestError, match=said) as raised:
        checked_pictures(given, "images")
    assert "\n" not in str(raised.value)
