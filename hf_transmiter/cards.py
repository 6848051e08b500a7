"""Model cards: [`write_card`] writes the ``README.md`` of an adapter, bridge or tuned model from the files beside it.

A card says what its repository holds, what was measured and what was not. It is made again with every save, from the
other files and from the metadata that people added to it (licence, data sets, language, tags, newer version), and
nothing in it is guessed. A README that people wrote keeps its text; only its metadata is completed.
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass, fields
from pathlib import Path
from typing import ClassVar

from .card_facts import (
    METHOD_NAMES,
    NamedDataset,
    NamedModel,
    Step,
    Weights,
    history,
    number,
    optional,
    required,
    rounding,
    text_map,
    whole,
)
from .card_metadata import KEPT, MARKER, Card, by_people, completed, given_metadata
from .card_text import fill
from .files import replace_file
from .scores import read_scores
from .settings import TuningConfig
from .trust import check_json, load_json, parse_json, read_header


__all__ = ["AdapterCard", "BridgeCard", "TunedCard", "read_card", "write_card"]

logger = logging.getLogger(__name__)

README = "README.md"
CLASS_VECTORS = ("COOP", "KGCOOP", "PROGRAD", "CONTCOOP")
PROMPTS = (*CLASS_VECTORS, "COCOOP", "IVLP", "MAPLE", "PROMPTSRC")


@dataclass
class AdapterCard(Card):
    """Card of a TransMiter adapter.

    Args:
        class_names (`list[str]`): C names. num_auxiliary (`int`): how many others only widen the logits.
        templates (`list[str]`), form (`str`), width (`int`, *optional*): as in `TransMiterConfig`.
        anchors_fingerprint (`str`, *optional*): of names and templates.
        steps (`list[Step]`): how it came about, the first step first.
        rounding (`str`, *optional*): number format, where it was chosen at saving, and what rounding to it changed.
        calibration (`Weights`, *optional*): of the tuned model's logits, where they are kept beside the adapter.
        calibration_images (`int`, *optional*): how many images these are of.
        transfers (`list[tuple[NamedModel, str, int]]`): finished transfers: model, kind and bytes.
    """

    class_names: list[str]
    num_auxiliary: int
    templates: list[str]
    form: str
    width: int | None
    anchors_fingerprint: str | None
    steps: list[Step]
    rounding: str | None
    calibration: Weights | None
    calibration_images: int | None
    calibration_data: NamedDataset | None
    transfers: list[tuple[NamedModel, str, int]]

    tags: ClassVar[tuple[str, ...]] = ("peft", "clip", "transmiter", "weak-to-strong")
    template: ClassVar[str] = "adapter.md.jinja"

    @classmethod
    def of_folder(cls, folder: str | os.PathLike, *, name: str | None = None, **facts) -> AdapterCard:
        """The facts in an adapter's folder.

        Args:
            folder (`str` or `os.PathLike`): the folder.
            name (`str`, *optional*): Hub id, if it has one; the folder's name when omitted.
            **facts: metadata, see [`write_card`].

        Raises:
            FileNotFoundError, ValueError: no ``adapter_config.json``, or a damaged one.
        """
        folder = Path(folder)
        config = required(folder, "adapter_config.json", "adapter_config")
        provenance = config.get("provenance") or {}
        pack = folder / "calibration.safetensors"
        header = optional(pack, read_header)
        index = optional(folder / "transfers" / "index.json", lambda path: load_json(path, "transfers"))
        finished = [] if index is None else index["transfers"]
        base = [config.get(key) for key in ("base_model_name_or_path", "revision", "base_fingerprint")]
        return cls(
            **_common(folder, name, facts),
            base=NamedModel(*base),
            weights=optional(folder / "adapter_model.safetensors", Weights.of),
            versions=_versions(provenance, config),
            class_names=config["class_names"],
            num_auxiliary=len(config.get("auxiliary_names") or ()),
            templates=config.get("templates") or [],
            form=config["form"],
            width=config.get("width"),
            anchors_fingerprint=config.get("anchors_fingerprint"),
            steps=history(provenance),
            rounding=rounding(provenance.get("saved_as")),
            calibration=optional(pack, Weights.of),
            calibration_images=None if header is None or "logits" not in header[1] else header[1]["logits"][1][0],
            calibration_data=None if header is None else NamedDataset.of(header[0].get("dataset")),
            transfers=[(NamedModel.of(row["model"]), row["kind"], row["num_bytes"]) for row in finished],
        )

    @property
    def extraction(self) -> Step | None:
        return next((step for step in self.steps if step.kind == "extract"), None)

    @property
    def transfer(self) -> Step | None:
        return next((step for step in self.steps if step.kind == "transfer"), None)

    def training_data(self) -> list[NamedDataset]:
        return [data for data in (*(step.dataset for step in self.steps), self.calibration_data) if data]


@dataclass
class BridgeCard(Card):
    """Card of a bridge; `base` is its strong model.

    Args:
        weak (`NamedModel`): where it begins.
        space, source (`str`), num_pairs (`int`), alignment (`float`, *optional*), beta, scale (`float`): as in
            `Bridge`.
        shape (`tuple[int, int]`, *optional*): of the matrix.
        dataset (`NamedDataset`, *optional*): the images, or the names it was built from.
        held_out (`float`, *optional*): alignment on pairs it was not built from.
        through (`list[NamedModel]`): models between the two, of a composed bridge.
        num_anchors (`int`, *optional*), anchors_fingerprint: the names both models were asked about.
    """

    weak: NamedModel
    space: str
    source: str
    num_pairs: int
    alignment: float | None
    beta: float
    scale: float
    shape: tuple[int, ...] | None
    dataset: NamedDataset | None
    held_out: float | None
    through: list[NamedModel]
    anchor_names: list[str]
    templates: list[str]

    tags: ClassVar[tuple[str, ...]] = ("clip", "transmiter", "weak-to-strong", "bridge")
    template: ClassVar[str] = "bridge.md.jinja"
    pipeline_tag: ClassVar[str | None] = None
    is_scored: ClassVar[bool] = False  # scores are of adapters that crossed it: for the text, not for leaderboards

    @classmethod
    def of_folder(cls, folder: str | os.PathLike, *, name: str | None = None, **facts) -> BridgeCard:
        """The facts in a bridge's folder, see [`AdapterCard.of_folder`].

        Raises:
            FileNotFoundError, ValueError: no ``bridge.safetensors``, or a damaged one.
        """
        folder = Path(folder)
        path = folder / "bridge.safetensors"
        header, tensors = read_header(path, "bridge", "write one with Bridge.save_pretrained")
        where = f"the metadata of {path}"
        content = check_json(parse_json(header.get("bridge", "{}"), where), "bridge", where)
        anchors = content.get("anchors") or {}
        through = content.get("through")
        return cls(
            **_common(folder, name, facts),
            base=NamedModel.of(content["strong"]),
            weights=Weights.of(path),
            versions=text_map(content.get("versions")),
            weak=NamedModel.of(content["weak"]),
            **{key: content[key] for key in ("space", "source", "num_pairs", "alignment", "beta", "scale")},
            shape=tensors["matrix"][1] if "matrix" in tensors else None,
            dataset=NamedDataset.of(content.get("dataset")),
            held_out=number(content.get("held_out")),
            through=[NamedModel(name) for name in through] if isinstance(through, list) else [],
            anchor_names=[*anchors.get("task", ()), *anchors.get("auxiliary", ())],
            templates=list(anchors.get("templates", ())),
        )

    def gaps(self) -> list[str]:
        found = [] if self.held_out is not None else ["its fit on pairs that it was not built from"]
        found += [] if self.scores else ["what an adapter that crosses it is worth"]
        return [*found, "what it is worth for other tasks and other kinds of tuning"]


@dataclass
class TunedCard(Card):
    """Card of a tuned model: a LoRA or a learnt prompt, as `tune` makes them, or any other PEFT adapter.

    Args:
        peft_type (`str`): PEFT's name of the method.
        method (`str`, *optional*): ours.
        settings (`dict[str, str]`): of the tuning. seed, shots, num_images (`int`, *optional*): how it was tuned.
        dataset (`NamedDataset`, *optional*), dataset_fingerprint, split (`str`, *optional*): the labelled images.
        class_names (`list[str]`), templates (`list[str]`): what it was tuned on; empty where not noted.
    """

    peft_type: str
    method: str | None
    settings: dict[str, str]
    shots: int | None
    seed: int | None
    num_images: int | None
    dataset: NamedDataset | None
    dataset_fingerprint: str | None
    split: str | None
    class_names: list[str]
    templates: list[str]
    by_tune: bool

    template: ClassVar[str] = "tuned.md.jinja"

    @property
    def is_prompt(self) -> bool:
        return self.peft_type in PROMPTS

    @property
    def shown_settings(self) -> dict[str, str]:
        """Those that have no line of their own, and that the method reads."""
        unread = () if self.peft_type == "LORA" else ("rank", "alpha", "target_modules")
        return {key: value for key, value in self.settings.items() if key not in ("method", "shots", "seed", *unread)}

    @property
    def options(self) -> list[tuple[str, str]]:
        """The settings as options of `hf-transmiter tune`."""
        chosen = {key: value for key, value in self.settings.items() if key in ("method", "shots", "seed")}
        known = {field.name for field in fields(TuningConfig)}
        chosen |= self.shown_settings
        return [(key.replace("_", "-"), value) for key, value in chosen.items() if key in known]

    @property
    def has_class_vectors(self) -> bool:
        """Whether `extract` needs no image of the task: a prompt that leaves images alone and does not read them."""
        return self.peft_type in CLASS_VECTORS

    @property
    def tags(self) -> tuple[str, ...]:
        return ("peft", "clip", *(("prompt-learning",) if self.is_prompt else ()), self.peft_type.lower())

    @classmethod
    def of_folder(cls, folder: str | os.PathLike, *, name: str | None = None, **facts) -> TunedCard:
        """The facts in a tuned model's folder, see [`AdapterCard.of_folder`]."""
        folder = Path(folder)
        config = required(folder, "adapter_config.json", "adapter_config")
        teacher = optional(folder / "teacher.json", lambda path: load_json(path, "teacher")) or {}
        noted = config.get("provenance") if isinstance(config.get("provenance"), dict) else {}
        settings = teacher.get("settings") or noted.get("settings")
        settings = settings if isinstance(settings, dict) else {}
        base = NamedModel(config.get("base_model_name_or_path"), config.get("revision"))
        if teacher:
            base = NamedModel(teacher["weak"], teacher["revision"], teacher["fingerprint"])
        names = teacher.get("class_names") or config.get("class_names")
        fingerprint, split = (noted.get(key) for key in ("dataset_fingerprint", "split"))
        return cls(
            **_common(folder, name, facts),
            base=base,
            weights=optional(folder / "adapter_model.safetensors", Weights.of),
            versions=_versions(noted, config),
            peft_type=config["peft_type"],
            method=METHOD_NAMES.get(str(settings.get("method"))),
            settings=text_map(settings),
            shots=whole(settings.get("shots")),
            seed=whole(settings.get("seed")),
            num_images=whole(noted.get("num_images")),
            dataset=NamedDataset.of(noted.get("dataset")),
            dataset_fingerprint=fingerprint if isinstance(fingerprint, str) else None,
            split=split if isinstance(split, str) else None,
            class_names=[text for text in names if isinstance(text, str)] if isinstance(names, list) else [],
            templates=teacher.get("templates") or [],
            by_tune=bool(teacher),
        )

    def training_data(self) -> list[NamedDataset]:
        return [self.dataset] if self.dataset else []


def read_card(folder: str | os.PathLike, *, name: str | None = None, **facts) -> AdapterCard | BridgeCard | TunedCard:
    """The card of a folder, of the kind its files say. See [`write_card`].

    Raises:
        FileNotFoundError: no adapter, no bridge and no tuned model in there.
        ValueError: a damaged file, or an unknown fact.
    """
    folder = Path(folder)
    if (folder / "adapter_config.json").is_file():
        config = load_json(folder / "adapter_config.json", "adapter_config")
        kind = AdapterCard if config["peft_type"] == "TRANSMITER" else TunedCard
    elif (folder / "bridge.safetensors").is_file():
        kind = BridgeCard
    else:
        raise FileNotFoundError(
            f"{folder} holds neither adapter_config.json nor bridge.safetensors: no card to write."
        )
    return kind.of_folder(folder, name=name, **facts)


def write_card(folder: str | os.PathLike, *, name: str | None = None, **facts) -> Path:
    """Writes the ``README.md`` of an adapter, bridge or tuned model, atomically.

    It never costs the artefact: where a card cannot be made, that is logged, and a README that is there stays, else a
    short one says so.

    Args:
        folder (`str` or `os.PathLike`): the folder.
        name (`str`, *optional*): Hub id, if it has one: for the title, the snippets and the model index.
        **facts: metadata that people give: `license`, `license_name`, `license_link`, `datasets`, `language`, `tags`,
            `new_version` (Hub id of the model that takes this one's place). What an existing card says of these is
            kept unless given here; lists are joined.

    Returns:
        `Path`: of the card.

    Raises:
        FileNotFoundError: nothing in the folder that has a card.
        TypeError: an unknown fact.
    """
    unknown = sorted(set(facts) - set(KEPT))
    if unknown:
        raise TypeError(f"write_card knows no fact {unknown[0]!r}; it knows {', '.join(KEPT)}.")
    folder, path = Path(folder), Path(folder) / README
    try:
        card = read_card(folder, name=name, **facts)
        written = by_people(path)
        text = card.render() if written is None else completed(written, card.metadata())
    except FileNotFoundError:
        raise
    except Exception as error:  # whatever it is: what was trained matters more than what is said about it
        logger.warning("the card of %s could not be written: %s: %s", folder, type(error).__name__, error)
        if path.exists():
            return path
        text = fill("minimal.md.jinja", name=name or folder.resolve().name, reason=str(error)) + MARKER + "\n"
    replace_file(path, lambda temporary: temporary.write_bytes(text.encode("utf-8")))
    return path


def _common(folder: Path, name: str | None, facts: dict) -> dict:
    """What every card takes from the folder and from the card that is in there."""
    named, given = given_metadata(folder / README, facts)
    scores = optional(folder / "scores.json", read_scores) or []
    return {"name": name or named or folder.resolve().name, "given": given, "scores": scores}


def _versions(provenance: dict, config: dict) -> dict[str, str]:
    known = text_map(provenance.get("versions"))
    return known or text_map({"peft": config.get("peft_version")})
