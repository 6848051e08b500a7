"""Tiny copies of the datasets of the catalogue, with the columns, types, splits and class names of the Hub's: what
the rows have to cope with. One picture a class (four frames a video); its colour says the class it is of.

The names are written down from the rules of the datasets, independently of the files that the rows read.
"""

import io
import re
import tarfile
from functools import cache
from pathlib import Path

from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value
from PIL import Image as Pictures

from hf_transmiter.data.catalogue import DatasetSpec, catalogue


@cache
def picture(i: int) -> bytes:
    """A picture of class `i` of the row."""
    content = io.BytesIO()
    Pictures.new("RGB", (4, 4), (i % 256, i // 256, 7)).save(content, "PNG")
    return content.getvalue()


def class_of(image: Pictures.Image) -> int:
    red, green, blue = image.convert("RGB").getpixel((0, 0))
    assert blue == 7
    return red + 256 * green


def _synsets(spec: DatasetSpec) -> list[str]:
    """Of the classes of the row, in its order."""
    by_name = {name: alias for alias, name in spec.aliases.items() if re.fullmatch(r"n\d{8}", alias)}
    return [by_name[name] for name in spec.class_names]


def spelt(spec: DatasetSpec) -> dict[str, int]:
    """{class as the data spell it: its position in the row, -1 for one that is left out}, in the data's order."""
    names = list(spec.class_names)
    if spec.name == "caltech101":
        plural = {"face": "faces", "leopard": "leopards", "motorbike": "motorbikes", "airplane": "airplanes"}
        found = {plural.get(name, name.replace(" ", "_")): i for i, name in enumerate(names)}
        found |= {"background_google": -1, "faces_easy": -1}
    elif spec.name == "oxford_pets":
        cats = ("abyssinian", "bengal", "birman", "bombay", "british", "egyptian", "maine", "persian", "ragdoll")
        cats += ("russian", "siamese", "sphynx")  # spelt with capitals, so sorted before the dogs
        title = {name: name.title() if name.startswith(cats) else name for name in names}
        found = {title[name].replace(" ", "_"): i for i, name in enumerate(names)}
    elif spec.name == "stanford_cars":
        found = {f"{name[5:]} {name[:4]}": i for i, name in enumerate(names)}
    elif spec.name == "oxford_flowers":
        found = {str(i + 1): i for i in range(len(names))}
    elif spec.name in ("food101", "dtd"):
        found = {name.replace(" ", "_"): i for i, name in enumerate(names)}
    elif spec.name == "sun397":
        folders = {name: alias for alias, name in spec.aliases.items()}
        found = {folders[name]: i for i, name in enumerate(names)}
    elif spec.name == "eurosat":
        words = "AnnualCrop Forest HerbaceousVegetation Highway Industrial Pasture PermanentCrop Residential River"
        found = {name: i for i, name in enumerate([*words.split(), "SeaLake"])}
    elif spec.name == "ucf101":
        found = {name.replace(" ", ""): i for i, name in enumerate(names)}
    elif spec.name in ("imagenet_a", "imagenet_r"):
        found = {synset: i for i, synset in enumerate(_synsets(spec))}
    else:
        found = {name: i for i, name in enumerate(names)}
    return dict(sorted(found.items()))


def _rows(spec: DatasetSpec) -> Dataset:
    """One row per class, the last class first."""
    found = spelt(spec)
    images = [{"bytes": picture(max(i, 0)), "path": None} for i in found.values()]
    label = ClassLabel(names=list(found))
    features, columns = {"image": Image(), "label": label}, {"image": images, "label": list(range(len(found)))}
    if spec.name == "imagenet":
        features = {"jpg": Image(), "cls": Value("int64")}
        images = [{"bytes": picture(i), "path": None} for i in range(1000)]
        columns = {"jpg": images, "cls": list(range(1000))}
    elif spec.name == "fgvc_aircraft":
        kinds = ("family", "manufacturer")
        features = {"image": Image(), "variant": label, **dict.fromkeys(kinds, ClassLabel(names=["Boeing", "Fokker"]))}
        columns = {"image": images, "variant": columns["label"], **dict.fromkeys(kinds, [1] * len(found))}
    elif spec.name == "imagenet_r":
        features = {"image": Image(), "wnid": Value("string"), "class_name": Value("string")}
        columns = {"image": images, "wnid": list(found), "class_name": [f"class_{i}" for i in found.values()]}
    elif spec.name == "ucf101":
        return _frames(found)
    return Dataset.from_dict({name: values[::-1] for name, values in columns.items()}, features=Features(features))


def _frames(found: dict[str, int]) -> Dataset:
    """Four frames, out of order, of one video a class; only the one in the middle (number 2) shows the class."""
    order = (3, 0, 2, 1)
    features = {"image": Image(), "video_id": Value("string"), "clip_id": Value("string"), "frame": Value("int64")}
    features["label"] = ClassLabel(names=list(found))
    columns = {name: [] for name in features}
    for label, i in enumerate(found.values()):
        columns["image"] += [{"bytes": picture(i if frame == 2 else 999), "path": None} for frame in order]
        columns["frame"] += order
        columns["label"] += [label] * 4
    rows = len(columns["frame"])
    # The numbers begin anew in every class.
    columns |= {"video_id": ["01"] * rows, "clip_id": ["01"] * rows}
    return Dataset.from_dict(columns, features=Features(features))


def classes_in(name: str) -> range:
    """Positions of the classes that the copy has pictures of: all, but of web datasets, which are slow, some."""
    return (
        range(0, 1000, 9) if name in ("imagenetv2", "imagenet_sketch") else range(len(catalogue()[name].class_names))
    )


def _shards(folder: Path, ending: str) -> None:
    """A web dataset: an archive with a picture and a number for some of ImageNet's classes."""
    (folder / "test").mkdir(parents=True)
    with tarfile.open(folder / "test" / "0.tar", "w") as archive:
        for i in classes_in("imagenetv2"):
            for name, content in ((f"s{i:07d}.{ending}", picture(i)), (f"s{i:07d}.cls", str(i).encode())):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))


def write_copy(spec: DatasetSpec, folder: Path) -> None:
    """The copy of a row's dataset, to be read by `load_dataset` or `load_from_disk`."""
    if spec.name in ("imagenetv2", "imagenet_sketch"):
        _shards(folder, "webp" if spec.name == "imagenetv2" else "jpg")
        return
    rows = _rows(spec)
    if spec.name in ("dtd", "food101"):
        for split in sorted({*spec.splits.values()}):
            rows.to_parquet(folder / "data" / f"{split}-00000-of-00001.parquet")
    else:
        DatasetDict(dict.fromkeys(spec.splits.values(), rows)).save_to_disk(folder)
