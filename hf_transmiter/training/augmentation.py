"""[`augment`]: random variants of training pictures, without torchvision."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import interpolate, pad

from ..settings import AUGMENTATIONS, check_choice
from .draws import per_example


# torchvision's defaults for random resized crops, which the published prompt learners train with.
CROP_SHARE = (0.08, 1.0)  # of the picture's area
CROP_RATIO = (3 / 4, 4 / 3)  # width : height
CROP_TRIES = 10


def augment(pixels: Tensor, generator: torch.Generator, kind: str) -> Tensor:
    """A random variant of every picture.

    - `"none"`: the pictures as they are.
    - `"shift"`: half of them mirrored, each one shifted by up to S / 16 pixels; edges are repeated. Keeps the whole
      object in sight.
    - `"crop"`: half of them mirrored, each one cut to a part of 8 to 100 % of its area and an aspect ratio between
      3/4 and 4/3 (uniform in the logarithm), which is scaled back to S x S (bicubic, antialiased) and kept within the
      range of the picture's values. The augmentation of CoOp (arXiv 2109.01134) and its successors, with the
      difference that they cut from the picture as it is on disk and this one from the square that the model sees.

    Args:
        pixels (`Tensor`): (B, 3, S, S), normalised; type and device stay.
        generator (`torch.Generator`): on the CPU; all that is random comes from it.

    Raises:
        ValueError: an unknown kind.
    """
    check_choice("the augmentation", kind, AUGMENTATIONS)
    if kind == "none":
        return pixels
    coins = per_example(generator, len(pixels), lambda count: torch.rand(count, generator=generator))
    mirrored = (coins < 0.5).to(pixels.device)
    pixels = torch.where(mirrored[:, None, None, None], pixels.flip(-1), pixels)
    return _shifted(pixels, generator) if kind == "shift" else _cropped(pixels, generator)


def _shifted(pixels: Tensor, generator: torch.Generator) -> Tensor:
    side = pixels.shape[-1]
    reach = max(side // 16, 1)
    padded = pad(pixels, (reach,) * 4, mode="replicate")
    corners = per_example(
        generator, len(pixels), lambda count: torch.randint(2 * reach + 1, (count, 2), generator=generator)
    )
    cuts = zip(padded, corners.tolist(), strict=True)
    return torch.stack([picture[:, y : y + side, x : x + side] for picture, (y, x) in cuts])


def _cropped(pixels: Tensor, generator: torch.Generator) -> Tensor:
    boxes = per_example(generator, len(pixels), lambda count: _crop_boxes(count, pixels.shape[-1], generator))
    return torch.stack([_resized_crop(picture, *box) for picture, box in zip(pixels, boxes.tolist(), strict=True)])


def _crop_boxes(count: int, side: int, generator: torch.Generator) -> Tensor:
    """(count, 4): top, left, height and width. The first of ten tries that fits; the whole square if none does."""
    share, ratio = torch.rand(2, count, CROP_TRIES, dtype=torch.float64, generator=generator)
    share = CROP_SHARE[0] + (CROP_SHARE[1] - CROP_SHARE[0]) * share
    low, high = map(math.log, CROP_RATIO)
    ratio = torch.exp(low + (high - low) * ratio)
    sizes = side * torch.stack(((share / ratio).sqrt(), (share * ratio).sqrt()), 2)
    sizes = sizes.round().long()  # (count, tries, 2)
    fits = ((sizes > 0) & (sizes <= side)).all(2)
    chosen = sizes[torch.arange(count), fits.int().argmax(1)]  # the first where several fit
    chosen = torch.where(fits.any(1, keepdim=True), chosen, side)
    corners = torch.rand(count, 2, dtype=torch.float64, generator=generator) * (side - chosen + 1)
    return torch.cat((corners.long(), chosen), 1)


def _resized_crop(picture: Tensor, top: int, left: int, height: int, width: int) -> Tensor:
    """(3, S, S) from (3, S, S)."""
    crop = picture[None, :, top : top + height, left : left + width]
    # In fp32 (or wider), because half precision has no antialiased kernel everywhere.
    wide = crop.to(torch.promote_types(crop.dtype, torch.float32))
    scaled = interpolate(wide, picture.shape[-2:], mode="bicubic", align_corners=False, antialias=True)[0]
    # Cubic weights overshoot at edges; image libraries cut that off at black and white.
    low, high = picture.amin((1, 2), keepdim=True), picture.amax((1, 2), keepdim=True)
    return scaled.to(picture.dtype).clamp(low, high)
