"""The renderer: the same seed gives the same pictures, and pictures show what their class says."""

import pytest
import torch

from hf_transmiter.sandbox import words, world


def draw(classes, style="studio", seed=0):
    return world.render(classes, style, torch.Generator().manual_seed(seed))


def studio(texture, colour, shape, n=64):
    index = (words.TEXTURES.index(texture), words.COLOURS.index(colour), words.SHAPES.index(shape))
    return draw([index] * n).float() / 255


@pytest.mark.parametrize("style", world.STYLES)
def test_rendering_is_seeded(style):
    classes = words.CLASSES[::20]
    pictures = draw(classes, style)
    assert pictures.shape == (36, 3, 32, 32) and pictures.dtype == torch.uint8
    assert torch.equal(pictures, draw(classes, style))
    assert not torch.equal(pictures, draw(classes, style, seed=1))


def test_styles_look_different():
    night, neon, street = (draw(words.CLASSES[::20], style).float().mean() for style in ("night", "neon", "street"))
    assert night < 0.5 * street and night < 0.5 * neon
    red, blue = draw(words.CLASSES[::20], "print").float().mean((0, 2, 3))[[0, 2]]
    assert red > 1.2 * blue  # the paper is yellowish


@pytest.mark.parametrize("colour", words.COLOURS)
def test_the_centre_has_the_colour(colour):
    centre = studio("plain", colour, "disc")[:, :, 14:18, 14:18].mean((0, 2, 3))
    distances = (world._RGB - centre).norm(dim=1)
    assert words.COLOURS[distances.argmin()] == colour


def test_textures_vary_inside_the_object_unless_plain():
    inside = {t: studio(t, "red", "disc")[:, :, 11:21, 11:21].std((2, 3)).mean().item() for t in words.TEXTURES}
    assert all(inside[t] > 1.5 * inside["plain"] for t in words.TEXTURES[1:])


def test_stripes_run_across():
    striped = studio("striped", "red", "square")[:, :, 10:22, 10:22]
    assert striped.mean(3).std(2).mean() > 1.5 * striped.mean(2).std(2).mean()


def test_a_ring_is_hollow_and_shapes_differ_in_silhouette():
    templates = world._templates()[:, 0] < 0
    assert not templates[words.SHAPES.index("ring"), 32, 32]
    assert templates[words.SHAPES.index("disc"), 32, 32]
    overlap = (templates[:, None] & templates[None]).sum((2, 3)) / (templates[:, None] | templates[None]).sum((2, 3))
    assert overlap.fill_diagonal_(0).max() < 0.95
    assert templates.flatten(1).float().mean(1).min() > 0.1


def test_pictures_do_not_depend_on_what_else_is_known_to_the_process():
    torch.manual_seed(1)
    first = draw(words.CLASSES[:3], "street")
    torch.rand(7)
    assert torch.equal(first, draw(words.CLASSES[:3], "street"))


def test_unknown_style_lists_the_known_ones():
    with pytest.raises(ValueError, match="'sketch'.*studio, street, print, night, neon"):
        draw(words.CLASSES[:1], "sketch")
