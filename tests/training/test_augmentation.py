"""Random variants of pictures: what may be random in them, and what may not."""

import numpy as np
import pytest
import torch
from PIL import Image

from hf_transmiter.settings import AUGMENTATIONS
from hf_transmiter.training.augmentation import _crop_boxes, _resized_crop, augment


RANDOM = ("shift", "crop")
SIDE = 48


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def noise(count=6, side=SIDE, dtype=torch.float32):
    return torch.randn(count, 3, side, side, generator=seeded(1)).to(dtype)


def coordinates(count, side=SIDE):
    """Pictures that say where each pixel came from: x, y and x again."""
    at = torch.arange(side, dtype=torch.float64)
    x, y = at.expand(side, side), at[:, None].expand(side, side)
    return torch.stack((x, y, x)).expand(count, -1, -1, -1)


def test_none_is_the_pictures():
    pixels, generator = noise(), seeded()
    state = generator.get_state()
    assert augment(pixels, generator, "none") is pixels
    assert torch.equal(generator.get_state(), state)


@pytest.mark.parametrize("kind", RANDOM)
def test_the_generator_decides_everything(kind):
    pixels = noise()
    before = pixels.clone()
    first = augment(pixels, seeded(), kind)
    torch.randn(7)  # the global generator plays no part
    assert torch.equal(augment(pixels, seeded(), kind), first)
    assert not torch.equal(augment(pixels, seeded(5), kind), first)
    assert torch.equal(pixels, before)
    generator = seeded()
    assert not torch.equal(augment(pixels, generator, kind), augment(pixels, generator, kind))


@pytest.mark.parametrize("kind", AUGMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_shape_type_and_range_stay(kind, dtype):
    pixels = noise(dtype=dtype)
    found = augment(pixels, seeded(), kind)
    assert found.shape == pixels.shape and found.dtype == dtype and found.device == pixels.device
    assert (found.amin((2, 3)) >= pixels.amin((2, 3))).all() and (found.amax((2, 3)) <= pixels.amax((2, 3))).all()


@pytest.mark.parametrize("kind", AUGMENTATIONS)
def test_a_constant_picture_stays(kind):
    pixels = torch.tensor([-1.7, 0.0, 2.1])[None, :, None, None].expand(4, 3, 17, 17)
    torch.testing.assert_close(augment(pixels, seeded(), kind), pixels, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("kind", RANDOM)
def test_half_of_the_pictures_are_mirrored(kind):
    found = augment(coordinates(1000, 16), seeded(), kind)
    mirrored = (found[:, 0, 8, -4] < found[:, 0, 8, 3]).double().mean()
    assert abs(float(mirrored) - 0.5) < 0.05  # three standard deviations
    assert (found[:, 1, -4, 8] > found[:, 1, 3, 8]).all()  # never upside down


def test_shifts_reach_a_sixteenth():
    found = augment(coordinates(500), seeded(), "shift")
    mirrored = found[:, 0, 0, 24] > found[:, 0, 0, 25]
    x = torch.where(mirrored, 47 - found[:, 0, 0, 24], found[:, 0, 0, 24])
    assert sorted(set((x - 24).tolist())) == [-3, -2, -1, 0, 1, 2, 3]
    assert sorted(set((found[:, 1, 24, 0] - 24).tolist())) == [-3, -2, -1, 0, 1, 2, 3]
    assert found.min() == 0 and found.max() == 47  # edges repeated, nothing invented


def test_crops_have_the_published_sizes():
    """Read off the pictures: coordinates run linearly over a crop, away from its edges."""
    found = augment(coordinates(2000), seeded(), "crop")
    width = 48 * (found[:, 0, 24, 30] - found[:, 0, 24, 18]).abs() / 12
    height = 48 * (found[:, 1, 30, 24] - found[:, 1, 18, 24]) / 12
    share, ratio = width * height / 48**2, width / height
    # Whole pixels: a side of at least 11 is rounded by up to half a pixel.
    assert 0.07 < share.min() < 0.1 and 0.9 < share.max() <= 1 + 1e-6
    assert 0.69 < ratio.min() < 0.78 and 1.29 < ratio.max() < 1.45
    # Uniform in area (the largest ones that do not fit are drawn again), and alike in width and height.
    assert 0.47 < share.mean() < 0.54 and abs(float(ratio.log().mean())) < 0.02


def test_crops_lie_anywhere_inside():
    boxes = _crop_boxes(5000, 8, seeded())
    top, left, height, width = boxes.T
    assert boxes.min() >= 0 and (top + height <= 8).all() and (left + width <= 8).all() and height.min() >= 1
    for corner, size in ((top, height), (left, width)):
        assert sorted(set(corner[size == 5].tolist())) == [0, 1, 2, 3]
        counts = corner[size == 5].bincount().double()
        assert (counts / counts.mean() - 1).abs().max() < 0.15


def test_the_first_try_that_fits_is_taken():
    """As in a loop over the ten tries of each picture."""
    share, ratio = torch.rand(2, 300, 10, dtype=torch.float64, generator=seeded(3))
    found = _crop_boxes(300, 32, seeded(3))[:, 2:].tolist()
    for shares, ratios, box in zip(share.tolist(), ratio.tolist(), found, strict=True):
        for a, b in zip(shares, ratios, strict=True):
            area, aspect = 32**2 * (0.08 + 0.92 * a), (3 / 4) * (16 / 9) ** b
            size = [round((area / aspect) ** 0.5), round((area * aspect) ** 0.5)]
            if max(size) <= 32:
                break
        else:
            size = [32, 32]
        assert box == size


def test_a_picture_too_small_to_cut():
    pixels = noise(50, side=1)
    assert torch.equal(augment(pixels, seeded(), "crop"), pixels)


def test_a_crop_of_everything_is_the_picture():
    picture = noise(1)[0]
    torch.testing.assert_close(_resized_crop(picture, 0, 0, SIDE, SIDE), picture, atol=1e-6, rtol=1e-6)


def test_a_crop_shows_its_part():
    left_half = torch.zeros(3, 32, 32)
    left_half[:, :, :16] = 1.0
    for left, value in ((0, 1.0), (16, 0.0)):
        part = _resized_crop(left_half, 4, left, 20, 16)
        torch.testing.assert_close(part, torch.full_like(part, value), atol=1e-5, rtol=0)
    # The edge in the middle, and no overshoot beside it.
    edge = _resized_crop(left_half, 0, 8, 16, 16)
    assert edge[:, :, :12].min() > 0.999 and edge[:, :, 20:].max() < 0.001 and 0 <= edge.min() and edge.max() <= 1


def test_a_crop_is_scaled_as_pillow_does():
    picture = torch.randint(70, 180, (3, 64, 64), generator=seeded())  # nothing reaches black or white
    image = Image.fromarray(picture.permute(1, 2, 0).to(torch.uint8).numpy())
    for top, left, height, width in ((5, 7, 40, 30), (0, 2, 61, 62)):
        crop = image.crop((left, top, left + width, top + height)).resize((64, 64), Image.Resampling.BICUBIC)
        expected = torch.tensor(np.array(crop)).permute(2, 0, 1).clamp(70, 179)
        found = _resized_crop(picture.float(), top, left, height, width)
        # Pillow rounds to whole numbers after either axis; cubic weights add up to less than 1.4 in magnitude.
        assert (found - expected).abs().max() <= 0.5 * 1.4 + 0.5


def test_an_unknown_kind():
    with pytest.raises(ValueError, match="must be one of none, shift, crop, got 'flip'"):
        augment(noise(1), seeded(), "flip")
