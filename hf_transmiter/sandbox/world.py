"""The sandbox world: a seeded renderer of small pictures, in batches, with nothing but torch and Pillow.

A shape is a signed-distance template, placed by `grid_sample` (position, size, rotation, aspect), filled with a
two-tone texture, put before a background, occluded, lit and made noisy as its *style* asks. The geometry varies
gently on purpose: models this small learn shapes several times slower when it varies more.
"""

import math
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Generator, Tensor

from .words import SHAPES


IMAGE_SIZE = 32
STYLES = ("studio", "street", "print", "night", "neon")

_RGB = torch.tensor(
    [
        (0.85, 0.12, 0.12), (0.95, 0.55, 0.10), (0.95, 0.90, 0.20), (0.15, 0.65, 0.20), (0.10, 0.65, 0.65),
        (0.15, 0.25, 0.85), (0.50, 0.15, 0.65), (0.95, 0.50, 0.75), (0.45, 0.27, 0.12), (0.96, 0.96, 0.96),
    ]
)  # fmt: skip
_WHITE = 9
_RADIUS = (0.68, 0.86)  # as a share of half the picture
_INKS = torch.tensor([[0.72, 0.22, 0.04], [0.08, 0.66, 0.22], [0.20, 0.06, 0.64]])
_NEON_ANGLE = math.radians(50)


class _Placed(NamedTuple):
    """Where the objects are. `dx`, `dy`: offsets from the centre; `u`, `v`: the shape's own axes; all (N, S, S)."""

    dx: Tensor
    dy: Tensor
    u: Tensor
    v: Tensor
    radius: Tensor
    angle: Tensor


def render(classes: Tensor | Sequence[Sequence[int]], style: str, generator: Generator) -> Tensor:
    """Draw one picture per index triple (texture, colour, shape) of `classes` (N, 3): uint8 RGB (N, 3, 32, 32).

    The generator is the only source of chance: its same state gives the same pictures.

    Raises:
        ValueError: `style` is none of [`STYLES`].
    """
    if style not in STYLES:
        raise ValueError(f"Unknown style {style!r}; there are {', '.join(STYLES)}.")
    texture, colour, shape = torch.as_tensor(classes).unbind(1)
    n = len(texture)
    placed = _place(n, generator)
    distance = _distance(shape, placed)
    base = (_RGB[colour] + _uniform(generator, -0.07, 0.07, n, 3)).clamp(0, 1)
    surface = _surface(texture, colour, base, placed, generator)
    background = _background(style, n, generator)
    mask = (0.5 - distance).clamp(0, 1)[:, None]
    picture = surface * mask + background * (1 - mask)
    if style in ("street", "night", "neon"):
        picture = _occlude(picture, generator)
    picture, noise = _light(style, picture, placed, distance, base, generator)
    picture = picture + noise * torch.randn(picture.shape, generator=generator)
    return (picture.clamp(0, 1) * 255).round().to(torch.uint8)


def _uniform(generator: Generator, low: float, high: float, *shape: int) -> Tensor:
    return torch.rand(*shape, generator=generator) * (high - low) + low


def _cloud(generator: Generator, n: int, cells: int) -> Tensor:
    """Smooth coloured noise of shape (n, 3, S, S)."""
    coarse = torch.rand(n, 3, cells, cells, generator=generator)
    return F.interpolate(coarse, size=(IMAGE_SIZE, IMAGE_SIZE), mode="bilinear", align_corners=False)


@cache
def _axes() -> tuple[Tensor, Tensor]:
    axis = (torch.arange(IMAGE_SIZE) + 0.5) / IMAGE_SIZE * 2 - 1
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    return x, y


def _ramp(generator: Generator, n: int) -> Tensor:
    """A linear ramp across the picture in a random direction, (n, 1, S, S), within -2 to 2."""
    x, y = _axes()
    return _uniform(generator, -1, 1, n, 1, 1, 1) * x + _uniform(generator, -1, 1, n, 1, 1, 1) * y


def _place(n: int, generator: Generator) -> _Placed:
    x, y = _axes()
    radius = _uniform(generator, *_RADIUS, n, 1, 1)
    dx = x - _uniform(generator, -0.17, 0.17, n, 1, 1)
    dy = y - _uniform(generator, -0.17, 0.17, n, 1, 1)
    angle = _uniform(generator, -0.25, 0.25, n, 1, 1)
    aspect = _uniform(generator, 0.85, 1.18, n, 1, 1)
    u = (angle.cos() * dx + angle.sin() * dy) / radius * aspect
    v = (-angle.sin() * dx + angle.cos() * dy) / radius / aspect
    return _Placed(dx, dy, u, v, radius, angle)


def _distance(shape: Tensor, placed: _Placed) -> Tensor:
    """Signed distance to the outline in pixels, negative inside, (N, S, S)."""
    grid = torch.stack([placed.u, placed.v], -1) / _EXTENT
    sampled = F.grid_sample(_templates()[shape], grid, align_corners=False, padding_mode="border")[:, 0]
    return sampled * placed.radius * IMAGE_SIZE / 2


def _surface(texture: Tensor, colour: Tensor, base: Tensor, placed: _Placed, generator: Generator) -> Tensor:
    """Two tones of the base colour, mixed by the texture, (N, 3, S, S)."""
    n = len(texture)
    period = _uniform(generator, 6.5, 8.0, n, 1, 1)
    angle = placed.angle + _uniform(generator, -0.1, 0.1, n, 1, 1)
    px, py = placed.dx * IMAGE_SIZE / 2, placed.dy * IMAGE_SIZE / 2
    across = torch.sin(2 * math.pi * (angle.cos() * px + angle.sin() * py) / period)
    down = torch.sin(2 * math.pi * (-angle.sin() * px + angle.cos() * py) / period)
    speckles = (torch.rand(n, IMAGE_SIZE, IMAGE_SIZE, generator=generator) > 0.3).float()

    def steep(wave: Tensor) -> Tensor:
        return (wave * 2.2 + 0.5).clamp(0, 1)

    fills = torch.stack(
        [
            torch.ones_like(across),
            steep(down),
            1 - steep((across + down) * 0.8 - 0.55),
            steep(across * down * 1.6),
            (0.5 - 0.65 * placed.v).clamp(0, 1),
            speckles,
        ]
    )
    fill = fills[texture, torch.arange(n)][:, None]
    darker = (torch.rand(n, generator=generator) < 0.5) | (colour == _WHITE)
    second = torch.where(darker[:, None], base * 0.35, base * 0.35 + 0.65)
    return base[:, :, None, None] * fill + second[:, :, None, None] * (1 - fill)


def _background(style: str, n: int, generator: Generator) -> Tensor:
    """What is behind the object, (N, 3, S, S)."""
    if style == "studio":
        wall = _uniform(generator, 0.15, 0.85, n, 1, 1, 1) + _uniform(generator, -0.08, 0.08, n, 3, 1, 1)
        return wall + 0.25 * _ramp(generator, n)
    background = 0.05 + 0.9 * _cloud(generator, n, 4)
    if style == "print":
        return 0.75 + 0.25 * background
    return 0.6 * background + 0.4 * _cloud(generator, n, 12)


def _occlude(picture: Tensor, generator: Generator) -> Tensor:
    """A thin coloured post before 60 % of the pictures."""
    n = len(picture)
    x, y = _axes()
    offset, width = _uniform(generator, -0.9, 0.9, n, 1, 1), _uniform(generator, 0.03, 0.12, n, 1, 1)
    angle = _uniform(generator, -0.7, 0.7, n, 1, 1)
    present = torch.rand(n, 1, 1, generator=generator) < 0.6
    post = ((x * angle.cos() + y * angle.sin() - offset).abs() < width) & present
    return torch.where(post[:, None], torch.rand(n, 3, 1, 1, generator=generator), picture)


def _light(
    style: str, picture: Tensor, placed: _Placed, distance: Tensor, base: Tensor, generator: Generator
) -> tuple[Tensor, Tensor | float]:
    """What light and medium of the style make of the picture, and its noise level."""
    n = len(picture)
    if style == "studio":
        return picture * (1 + 0.25 * _ramp(generator, n)), 0.02
    if style == "street":
        exposure = _uniform(generator, 0.6, 1.15, n, 1, 1, 1) * (1 + _uniform(generator, -0.15, 0.15, n, 3, 1, 1))
        lit = picture * (1 + 0.4 * _ramp(generator, n)) * exposure
        return lit, _uniform(generator, 0, 0.08, n, 1, 1, 1)
    if style == "print":
        return _printed(picture, generator), 0.05
    if style == "night":
        spot_x, spot_y = (_uniform(generator, -0.5, 0.5, n, 1, 1) for _ in range(2))
        spot = torch.exp(-((placed.dx - spot_x) ** 2 + (placed.dy - spot_y) ** 2) / 0.8)[:, None]
        blue = torch.tensor([0.65, 0.85, 1.35])[:, None, None]
        return picture * (0.14 + 0.36 * spot) * blue + torch.tensor([0.0, 0.01, 0.06])[:, None, None], 0.05
    glow = torch.exp(-distance.clamp(min=0) / 3)[:, None] * base[:, :, None, None] * 0.4
    return 0.8 * torch.einsum("dc,nchw->ndhw", _hue_rotation(_NEON_ANGLE), picture) + glow, 0.04


def _printed(picture: Tensor, generator: Generator) -> Tensor:
    """Inks that mix, low contrast and a halftone screen, on tinted paper."""
    n = len(picture)
    x, y = _axes()
    paper = torch.tensor([0.86, 0.80, 0.66])[:, None, None] + _uniform(generator, -0.05, 0.05, n, 3, 1, 1)
    ink = torch.einsum("dc,nchw->ndhw", _INKS, picture)
    phase = _uniform(generator, 0, 2 * math.pi, n, 1, 1)
    pitch = IMAGE_SIZE / 2 * math.pi * math.sqrt(2) / 2.9
    screen = (torch.sin((x + y) * pitch + phase) * torch.sin((x - y) * pitch + phase))[:, None]
    return paper * (0.25 + 0.70 * ink) + 0.12 * screen * (1 - ink)


def _hue_rotation(angle: float) -> Tensor:
    """The rotation of RGB space about its grey axis (Rodrigues' formula)."""
    same, off = math.cos(angle), math.sqrt(1 / 3) * math.sin(angle)
    third = (1 - same) / 3
    a, b, c = same + third, third - off, third + off
    return torch.tensor([[a, b, c], [c, a, b], [b, c, a]])


# ---- shapes --------------------------------------------------------------------------------------------------------

_EXTENT = 1.5  # templates cover -1.5 to 1.5 in units of the shape's radius
_FINE, _COARSE = 192, 64


@cache
def _templates() -> Tensor:
    """Signed-distance templates of the shapes, in units of the radius, (12, 1, 64, 64)."""
    return torch.stack([_signed_distance(np.asarray(_silhouette(shape)) > 127) for shape in SHAPES])[:, None]


def _signed_distance(inside: np.ndarray) -> Tensor:
    edge = (inside[1:] != inside[:-1])[:, :-1] | (inside[:, 1:] != inside[:, :-1])[:-1]
    rows, columns = np.nonzero(edge)
    edge_x, edge_y = ((i + 1) / _FINE * 2 * _EXTENT - _EXTENT for i in (columns, rows))
    axis = (np.arange(_COARSE) + 0.5) / _COARSE * 2 * _EXTENT - _EXTENT
    x, y = np.meshgrid(axis, axis)
    squared = (x.reshape(-1, 1) - edge_x) ** 2 + (y.reshape(-1, 1) - edge_y) ** 2
    distance = np.sqrt(squared.min(1)).reshape(_COARSE, _COARSE)
    step = _FINE // _COARSE
    return torch.tensor(np.where(inside[step // 2 :: step, step // 2 :: step], -distance, distance)).float()


def _silhouette(shape: str) -> Image.Image:
    image = Image.new("L", (_FINE, _FINE), 0)
    draw = ImageDraw.Draw(image)
    for outline, fill in _outlines(shape):
        draw.polygon([tuple((p / _EXTENT + 1) * _FINE / 2 for p in point) for point in outline], fill=fill)
    return image


def _circle(x: float, y: float, radius: float) -> list[tuple[float, float]]:
    turns = np.linspace(0, 2 * math.pi, 60)
    return [(x + radius * math.cos(a), y + radius * math.sin(a)) for a in turns]


def _corners(*radii: float, count: int, start: float = -math.pi / 2) -> list[tuple[float, float]]:
    """A closed outline of `count` corners whose radii alternate through `radii`."""
    polar = [(radii[i % len(radii)], start + 2 * math.pi * i / count) for i in range(count)]
    return [(r * math.cos(a), r * math.sin(a)) for r, a in polar]


def _heart() -> list[tuple[float, float]]:
    turns = np.linspace(0, 2 * math.pi, 80)
    x = np.sin(turns) ** 3
    y = -(13 * np.cos(turns) - 5 * np.cos(2 * turns) - 2 * np.cos(3 * turns) - np.cos(4 * turns)) / 16
    return list(zip(x.tolist(), y.tolist(), strict=True))


def _box(half_width: float, half_height: float) -> list[tuple[float, float]]:
    w, h = half_width, half_height
    return [(-w, -h), (w, -h), (w, h), (-w, h)]


def _outlines(shape: str) -> list[tuple[list[tuple[float, float]], int]]:
    """Polygons painted one after the other: 255 adds, 0 cuts out."""
    return {
        "disc": [(_circle(0, 0, 0.95), 255)],
        "square": [(_box(0.82, 0.82), 255)],
        "triangle": [([(0, -1), (1, 0.8), (-1, 0.8)], 255)],
        "star": [(_corners(1.15, 0.48, count=10), 255)],
        "ring": [(_circle(0, 0, 1), 255), (_circle(0, 0, 0.5), 0)],
        "cross": [(_box(0.33, 1), 255), (_box(1, 0.33), 255)],
        "heart": [(_heart(), 255)],
        "crescent": [(_circle(0, 0, 1), 255), (_circle(0.45, -0.1, 0.78), 0)],
        "arrow": [
            ([(0, -1.1), (0.9, 0), (0.35, 0), (0.35, 1), (-0.35, 1), (-0.35, 0), (-0.9, 0)], 255),
        ],
        "bowtie": [([(-1.05, -0.75), (0, -0.12), (1.05, -0.75), (1.05, 0.75), (0, 0.12), (-1.05, 0.75)], 255)],
        "hexagon": [(_corners(1, count=6, start=0), 255)],
        "fork": [
            (_box(0.9, 1), 255),
            ([(-0.5, -1.1), (0.5, -1.1), (0.5, -0.05), (-0.5, -0.05)], 0),
            ([(-0.9, 0.4), (-0.25, 0.4), (-0.25, 1.1), (-0.9, 1.1)], 0),
            ([(0.25, 0.4), (0.9, 0.4), (0.9, 1.1), (0.25, 1.1)], 0),
        ],
    }[shape]
