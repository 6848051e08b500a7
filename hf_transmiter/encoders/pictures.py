"""[`read_picture`]: whatever holds a picture, as 8 bits of red, green and blue, upright. The only way to read one.

Black is 0; what is white is told by the type and the values, or else the picture is refused: see [`_eight_bits`].
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from pathlib import PurePath

import numpy as np
import torch
from datasets import Image as StoredImage
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError


SKIP = "; load the pictures with skip_unreadable=True (--skip-unreadable) to leave such ones out"
MAX_RATIO = 200  # of the sides: scaled to a short side of 224, such a picture has 10 million pixels
_CHANNELS = (1, 2, 3, 4)
_ONLY = (str, bytes, bytearray, os.PathLike, Mapping, Image.Image, np.ndarray, torch.Tensor)


class UnreadablePicture(ValueError):
    """A picture that cannot be read; `fault` is the end of its path, if it has one, and why."""

    def __init__(self, message: str, fault: str):
        super().__init__(message)
        self.fault = fault


def as_pictures(pictures):
    """A list of one, where one picture is given in place of several; an array of four axes is several."""
    single = isinstance(pictures, _ONLY) and getattr(pictures, "ndim", 0) < 4 or not hasattr(pictures, "__iter__")
    return [pictures] if single else pictures


def to_pixels(image_processor, images: Iterable) -> torch.Tensor:
    """[`DualEncoder.preprocess`] with the image processor alone."""
    pictures = (read_picture(image, f"image {index}") for index, image in enumerate(images))
    pixels = [image_processor(images=few, return_tensors="pt")["pixel_values"] for few in _in_groups(pictures)]
    if not pixels:
        raise ValueError("no images were given.")
    return torch.cat(pixels)


def _in_groups(pictures: Iterable[Image.Image], most: int = 2**21) -> Iterator[list[Image.Image]]:
    """Groups of so many picture elements, or one picture more: photographs take a hundred times the memory that is
    left of them here."""
    group, size = [], 0
    for picture in pictures:
        group.append(picture)
        size += picture.width * picture.height
        if size > most:
            yield group
            group, size = [], 0
    if group:
        yield group


def read_picture(picture, name: str = "the picture") -> Image.Image:
    """A picture in mode RGB, turned upright by its EXIF orientation; of an animation the first frame.

    Args:
        picture (`str`, `os.PathLike`, `bytes`, `Mapping`, `PIL.Image.Image`, `np.ndarray`, `torch.Tensor` or `list`):
            A file, its content, ``{"bytes": ..., "path": ...}`` as `datasets` stores it, any mode of Pillow, or values
            (H, W), (H, W, C) or (C, H, W), C of 1 to 4. Where an array could be either, a tensor is (C, H, W).
            Transparency is left out, as transformers does.
        name (`str`, *optional*): what to call it in an error, unless it has a file name.

    Raises:
        UnreadablePicture: the message names it and says why.
    """
    path, content = picture, picture
    if isinstance(picture, Mapping):
        path, content = picture.get("path"), picture.get("bytes")
    elif isinstance(picture, Image.Image):
        path = getattr(picture, "filename", None)
    path = os.fspath(path) if isinstance(path, (str, os.PathLike)) else None
    try:
        if content is None and path is not None:
            # In an archive, or far away, as `datasets` names such places.
            content = StoredImage().decode_example({"bytes": None, "path": path}) if "://" in path else path
        if isinstance(content, Image.Image):
            return _rgb(content)
        if isinstance(content, (str, os.PathLike, bytes, bytearray)):
            encoded = isinstance(content, (bytes, bytearray))
            with io.BytesIO(content) if encoded else open(content, "rb") as file, Image.open(file) as opened:
                return _rgb(opened)
        if isinstance(content, (np.ndarray, torch.Tensor, list)):
            return _from_values(content)
        if isinstance(picture, Mapping) and not picture.keys() & {"path", "bytes"}:
            raise ValueError(f"it is a row of {', '.join(map(str, picture)) or 'nothing'}: pass its picture alone")
        raise ValueError("there is no picture" if content is None else f"it is a {type(content).__name__}, no picture")
    except MemoryError:
        raise
    except Exception as error:  # decoders raise whatever they like
        said = getattr(error, "strerror", None) or " ".join(str(error).split()).rstrip(".") or type(error).__name__
        said = "cannot identify image file" if isinstance(error, UnidentifiedImageError) else said
        place = f" ({'/'.join(PurePath(path).parts[-2:])})" if path else ""  # enough to find it
        whose = repr(path) if path and not isinstance(picture, Mapping) else f"{name}{place}"
        raise UnreadablePicture(f"cannot read {whose}: {said}", f"{place}: {said}") from error


def _rgb(picture: Image.Image) -> Image.Image:
    width, height = picture.size
    if max(width, height) > MAX_RATIO * min(width, height):
        raise ValueError(f"it is {width} x {height} pixels, and one side may be {MAX_RATIO} times the other")
    kind, name = picture.format, getattr(picture, "filename", "")
    if kind == "TIFF" and name:  # which Pillow maps from disk by its name, and then does not turn
        picture.filename = ""
        picture.load()
        picture.filename = name
    picture.load()
    try:
        turned = picture.getexif().get(Image.ExifTags.Base.Orientation, 1) != 1
    except Exception:  # of broken tags: what was decoded elsewhere is as upright as it will be
        if kind is not None:
            raise
        turned = False
    picture = ImageOps.exif_transpose(picture) if turned else picture  # which copies
    mode = picture.mode
    if mode.startswith("I") or mode == "F":
        picture = Image.fromarray(_eight_bits(np.asarray(picture)))
    elif mode == "LAB":
        picture = ImageCms.applyTransform(picture, _from_lab())
    elif mode == "La":
        picture = picture.convert("LA")
    elif mode == "P" and "transparency" in picture.info:  # the same colours, without a warning
        picture = picture.convert("RGBA")
    picture = picture.convert("RGB")
    picture.info = {}  # what is read once more is not turned once more
    return picture


@cache
def _from_lab() -> ImageCms.ImageCmsTransform:
    return ImageCms.buildTransform(ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB"), "LAB", "RGB")


def _from_values(values) -> Image.Image:
    first = isinstance(values, torch.Tensor)
    if first:
        values = values.detach().cpu()
        values = (values.float() if values.dtype == torch.bfloat16 else values).numpy()
    values = np.asarray(values)
    if values.ndim not in (2, 3) or 0 in values.shape:
        raise ValueError(f"an array of shape {values.shape} is no picture: (H, W), (H, W, C) or (C, H, W)")
    if values.ndim == 3:
        leading, trailing = values.shape[0] in _CHANNELS, values.shape[2] in _CHANNELS
        if not leading and not trailing:
            raise ValueError(f"an array of shape {values.shape} is no picture: neither end has 1 to 4 channels")
        if leading and (first or not trailing):
            values = np.moveaxis(values, 0, -1)
        values = values[..., 0] if values.shape[-1] == 1 else values
    return _rgb(Image.fromarray(np.ascontiguousarray(_eight_bits(values))))


def _eight_bits(values: np.ndarray) -> np.ndarray:
    """Values as 0 to 255. White is 1 of booleans; of integers 255 or, where a value is larger, 65535; of floats 1 or,
    if all are whole numbers beyond that, 255 (what Pillow makes of 8 bits).

    Raises:
        ValueError: a type or range of which nobody knows what is white, such as floats that are all 0 or 1.
    """
    kind, white = values.dtype.kind, 1 if values.dtype.kind == "b" else 0
    if kind in "iuf":
        low, high = values.min(), values.max()
        if kind != "f":
            white = 255 if high <= 255 else 65535
        elif not (np.isfinite(high) and (values == np.floor(values)).all()):
            white = 1
        elif high > 1:
            white = 255
        if not 0 <= low <= high <= white:  # not a number, too
            white = 0
    if not white:
        reach = f", {values.min()} to {values.max()}" if kind in "iuf" else ""
        known = "uint8, uint16, or fractions from 0 to 1 for what is white to be known"
        raise ValueError(f"values must be {known}, not {values.dtype}{reach}")
    return values if values.dtype == np.uint8 else (values / (white / 255) + 0.5).astype(np.uint8)
