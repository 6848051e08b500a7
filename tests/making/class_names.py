"""Builds the class-name files of the datasets: names in the order of the published base and novel halves.

The lists come from wheels that are only read as files, never imported; see NOTICE beside the files. What no wheel
holds stands below.

    pip download --no-deps --dest wheels timm==1.0.31 open_clip_torch==3.3.0 tensorflow-datasets==4.9.10
    python tests/making/class_names.py wheels

A line is the name, and after tabs how datasets spell the same class. Spellings that differ only in case, spaces and
signs need no mention. Existing files are only replaced with --overwrite.
"""

from __future__ import annotations

import argparse
import ast
import os
import re
import zipfile
from pathlib import Path


HEADER = "# Built by tests/making/class_names.py; origin and licences in NOTICE."
FOLDER = Path(__file__).parents[2] / "hf_transmiter" / "assets" / "datasets"
# variants.txt of FGVC-Aircraft 2013b, unchanged.
AIRCRAFT = """
707-320, 727-200, 737-200, 737-300, 737-400, 737-500, 737-600, 737-700, 737-800, 737-900, 747-100, 747-200, 747-300,
747-400, 757-200, 757-300, 767-200, 767-300, 767-400, 777-200, 777-300, A300B4, A310, A318, A319, A320, A321, A330-200,
A330-300, A340-200, A340-300, A340-500, A340-600, A380, ATR-42, ATR-72, An-12, BAE 146-200, BAE 146-300, BAE-125,
Beechcraft 1900, Boeing 717, C-130, C-47, CRJ-200, CRJ-700, CRJ-900, Cessna 172, Cessna 208, Cessna 525, Cessna 560,
Challenger 600, DC-10, DC-3, DC-6, DC-8, DC-9-30, DH-82, DHC-1, DHC-6, DHC-8-100, DHC-8-300, DR-400, Dornier 328,
E-170, E-190, E-195, EMB-120, ERJ 135, ERJ 145, Embraer Legacy 600, Eurofighter Typhoon, F-16A/B, F/A-18, Falcon 2000,
Falcon 900, Fokker 100, Fokker 50, Fokker 70, Global Express, Gulfstream IV, Gulfstream V, Hawk T1, Il-76, L-1011,
MD-11, MD-80, MD-87, MD-90, Metroliner, Model B200, PA-28, SR-20, Saab 2000, Saab 340, Spitfire, Tornado, Tu-134,
Tu-154, Yak-42
"""
# The wording of CoOp (arXiv 2109.01134), by the folders of EuroSAT.
EUROSAT = {
    "AnnualCrop": "Annual Crop Land",
    "Forest": "Forest",
    "HerbaceousVegetation": "Herbaceous Vegetation Land",
    "Highway": "Highway or Road",
    "Industrial": "Industrial Buildings",
    "Pasture": "Pasture Land",
    "PermanentCrop": "Permanent Crop Land",
    "Residential": "Residential Buildings",
    "River": "River",
    "SeaLake": "Sea or Lake",
}
# Where the mapping from category to name that is passed around with Oxford Flowers differs from tensorflow_datasets,
# by official number; the spelling of OpenAI's list beside it.
FLOWERS = {16: ("globe-flower", "globe flower"), 60: ("pink-yellow dahlia", "pink and yellow dahlia")}
FLOWERS |= {78: ("lotus lotus", "lotus"), 93: ("ball moss", "air plant")}
CALTECH = {"airplanes": "airplane", "faces": "face", "leopards": "leopard", "motorbikes": "motorbike"}
CALTECH_LEFT_OUT = ("background_google", "faces_easy")
# OpenAI's list has these twice; names must differ, so the class whose WordNet name is another takes that.
REPEATED = {"n04008634": "projectile", "n04355933": "sunglass"}
# WordNet calls both "crane"; copies of ImageNet on the Hub number the second.
CRANES = {"n02012849": "crane", "n03126707": "crane2"}


class Wheels:
    """Text files and constants inside the wheels of a folder."""

    def __init__(self, folder: Path):
        self.folder = folder

    def text(self, wheel: str, file: str) -> str:
        (path,) = self.folder.glob(f"{wheel}-*.whl")
        with zipfile.ZipFile(path) as archive:
            return archive.read(file).decode("utf-8")

    def lines(self, wheel: str, file: str) -> list[str]:
        return [line.strip() for line in self.text(wheel, file).splitlines() if line.strip()]

    def constant(self, wheel: str, file: str, name: str):
        for node in ast.parse(self.text(wheel, file)).body:
            if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", None) == name:
                return ast.literal_eval(node.value)
        raise ValueError(f"{file} of {wheel} has no {name}.")

    def tensorflow(self, file: str) -> list[str]:
        return self.lines("tensorflow_datasets", f"tensorflow_datasets/{file}")

    def timm(self, file: str) -> list[str]:
        return self.lines("timm", f"timm/data/_info/{file}.txt")


def imagenet(wheels: Wheels) -> dict[str, list[tuple[str, ...]]]:
    """OpenAI's names in the order of the sorted synsets; aliases are the synset and WordNet's synonyms."""
    synsets = wheels.timm("imagenet_synsets")
    names = wheels.constant("open_clip_torch", "open_clip/zero_shot_metadata.py", "IMAGENET_CLASSNAMES")
    synonyms = dict(line.split("\t") for line in wheels.timm("imagenet_synset_to_lemma"))
    if synsets != sorted(synsets) or len(synsets) != len(names):
        raise ValueError("the lists of ImageNet do not belong together.")
    of = {synset: REPEATED.get(synset, name) for synset, name in zip(synsets, names, strict=True)}
    rows = [(of[synset], synset, CRANES.get(synset, synonyms[synset])) for synset in synsets]
    parts = {"imagenet": rows}
    for part in ("imagenet_a", "imagenet_r"):
        parts[part] = [(of[synset], synset) for synset in sorted(wheels.timm(f"{part}_synsets"))]
    return parts


def scene(folder: str) -> str:
    """``/c/church/indoor`` to ``indoor church``."""
    return " ".join(reversed(folder.split("/")[2:])).replace("_", " ")


def files(wheels: Wheels) -> dict[str, list[tuple[str, ...]]]:
    """{dataset: [(name, other spelling, ...)]}."""
    images, tables = "image_classification", "datasets"
    caltech = [name for name in wheels.tensorflow(f"{images}/caltech101_labels.txt") if name not in CALTECH_LEFT_OUT]
    # The folders that begin with a capital come first: bytes are sorted, not letters.
    caltech.sort(key=lambda name: (name not in ("faces", "leopards", "motorbikes"), name))
    pets = wheels.constant(
        "tensorflow_datasets",
        f"tensorflow_datasets/{tables}/oxford_iiit_pet/oxford_iiit_pet_dataset_builder.py",
        "_LABEL_CLASSES",
    )
    cars = wheels.constant("tensorflow_datasets", f"tensorflow_datasets/{images}/cars196.py", "_NAMES")
    flowers = wheels.constant(
        "tensorflow_datasets",
        f"tensorflow_datasets/{tables}/oxford_flowers102/oxford_flowers102_dataset_builder.py",
        "_NAMES",
    )
    flowers = {number: FLOWERS.get(number, (name,)) for number, name in enumerate(flowers, start=1)}
    scenes = wheels.tensorflow(f"{images}/sun397_labels.txt")
    actions = wheels.tensorflow("video/ucf101_labels.txt")
    return {
        **imagenet(wheels),
        "caltech101": [(CALTECH.get(name, name).replace("_", " "), name) for name in caltech],
        "oxford_pets": [(name.lower().replace("_", " "),) for name in pets],
        "stanford_cars": [(f"{name[-4:]} {name[:-5]}", name) for name in cars],
        "oxford_flowers": [(spellings[0], str(number), *spellings[1:]) for number, spellings in flowers.items()],
        "food101": [(name.replace("_", " "),) for name in sorted(wheels.tensorflow(f"{images}/food-101_classes.txt"))],
        "fgvc_aircraft": [(name,) for name in AIRCRAFT.replace("\n", " ").strip().split(", ")],
        "sun397": [(scene(name), name) for name in scenes],
        "dtd": [(name,) for name in wheels.tensorflow(f"{images}/dtd_key_attributes.txt")],
        "eurosat": [(name, folder) for folder, name in EUROSAT.items()],
        "ucf101": [(" ".join(re.findall("[A-Z][^A-Z]*", name)), name) for name in actions],
    }


def needed(rows: list[tuple[str, ...]]) -> list[str]:
    """The lines of a file, without spellings that match the name anyway."""
    bare = re.compile(r"[\W_]+")
    lines = []
    for name, *spellings in rows:
        same = bare.sub("", name.casefold())
        kept = dict.fromkeys(other for other in spellings if bare.sub("", other.casefold()) != same)
        lines.append("\t".join([name, *kept]))
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheels", type=Path, help="folder with the three wheels")
    parser.add_argument("--overwrite", action="store_true", help="replace files that differ")
    options = parser.parse_args()
    for dataset, rows in files(Wheels(options.wheels)).items():
        path = FOLDER / f"{dataset}.txt"
        text = "\n".join([HEADER, *needed(rows)]) + "\n"
        if path.exists() and path.read_text(encoding="utf-8") == text:
            print(f"{path.name}: unchanged, {len(rows)} names")
            continue
        if path.exists() and not options.overwrite:
            raise SystemExit(f"{path} exists and differs; pass --overwrite.")
        temporary = path.with_suffix(".tmp")
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
        print(f"{path.name}: {len(rows)} names")


if __name__ == "__main__":
    main()
