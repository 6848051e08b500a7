"""Where models and tuned models come from: a Hub id, a folder, a file, or ``sandbox:NAME``."""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Sequence

import torch
from peft import PeftModel
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from safetensors.torch import load_file

from ..algebra import check_weights
from ..data.anchors import DEFAULT_TEMPLATES, Anchors, read_templates
from ..encoders.dual_encoder import DualEncoder, load_base, load_encoder
from ..encoders.identity import ModelId
from ..hub.adapter_files import TeacherFacts
from ..hub.checks import check_adapter_tensors, refuse_pickles
from ..hub.repo import fetch, read_json, split_revision
from ..settings import check_kind
from ..tuners import PeftType
from .classifier import AnchorClassifier
from .stored_logits import CalibrationPack
from .teacher import Teacher, as_classifier, task_names


logger = logging.getLogger(__name__)


def load_teacher(source: str, weak: DualEncoder) -> Teacher:
    """A tuned version of `weak` from where it was saved: a folder of `hf-transmiter tune` or any PEFT adapter of
    `weak`; a TransMiter adapter; a whole tuned model; a ``.safetensors`` file with its logits ([`CalibrationPack`]).

    Raises:
        FileNotFoundError, OSError: nothing there, or an adapter without safetensors.
        ValueError: an adapter of another model, damaged files, or pickles beside them.
    """
    source = os.fspath(source)
    check_kind("weak", weak, DualEncoder)
    if source.endswith(".safetensors"):
        return CalibrationPack.load(source)
    adapter = read_json(source, "adapter_config.json")
    if adapter is None:
        return load_encoder(source, device=weak.device, dtype=weak.dtype)
    name, revision = split_revision(source)
    if adapter.get("peft_type") == PeftType.TRANSMITER:
        same = (adapter.get("base_model_name_or_path"), adapter.get("revision")) == (weak.name_or_path, weak.revision)
        return load_classifier(source, weak if same else None, device=weak.device, dtype=weak.dtype)
    if adapter["peft_type"] not in PEFT_TYPE_TO_CONFIG_MAPPING:
        raise ValueError(
            f"adapter_config.json of {source!r} has the peft_type {adapter['peft_type']!r}, which PEFT does not know: "
            "a newer PEFT may, or the file was edited."
        )
    facts = TeacherFacts.read(source)
    if facts is not None and not ModelId(facts.weak, facts.revision, facts.fingerprint).is_of(weak):
        raise ValueError(
            f"{source!r} was tuned from {facts.weak!r} (revision {facts.revision}), not from {weak.name_or_path!r} "
            f"(revision {weak.revision}): pass that model as the weak one."
        )
    weights = fetch(source, "adapter_model.safetensors")
    if weights is None:
        raise FileNotFoundError(f"{source!r} has no adapter_model.safetensors, and no other weights are read.")
    refuse_pickles(name)
    check_adapter_tensors(weights, adapter)
    check_weights(load_file(weights), f"{{}} of {source}")
    try:
        model = PeftModel.from_pretrained(copy.deepcopy(weak.model), name, revision=revision)
    except OSError:  # of the Hub
        raise
    except RuntimeError as error:  # what torch says of tensors of other shapes
        raise ValueError(f"the adapter {source!r} does not fit {weak.name_or_path!r}: {error}") from error
    except Exception as error:  # whatever PEFT runs into with a stranger's settings
        raise ValueError(f"adapter_config.json of {source!r} describes no adapter for this model: {error}") from error
    tuned = DualEncoder(model.eval(), weak.processor, weak.name_or_path, weak.revision)
    if facts is None:
        names = task_names(None, tuned)
        return tuned if names is None else as_classifier(tuned, names)
    classifier = AnchorClassifier(tuned, Anchors(facts.class_names, (), facts.templates))
    classifier.facts = facts
    return classifier


def load_teacher_and_weak(
    source: str,
    weak: str | None = None,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | str | None = None,
) -> tuple[Teacher, DualEncoder | None]:
    """A tuned model (see [`load_teacher`]) and what it was before: the model `weak`, or else the one noted beside it;
    stored logits need none.

    Raises:
        ValueError: it is not noted which model was tuned, or what [`load_teacher`] raises.
    """
    revision = None
    if weak is None and source.endswith(".safetensors"):
        return CalibrationPack.load(source), None
    if weak is None:
        facts = _tuning(source)
        adapter = read_json(source, "adapter_config.json")
        if facts is not None:
            weak, revision = facts.weak, facts.revision
        elif adapter is not None:
            weak, revision = adapter.get("base_model_name_or_path"), adapter.get("revision")
        if not weak:
            raise ValueError(f"{source!r} does not say which model it was tuned from: name it with `weak`.")
    encoder = load_encoder(weak, revision, device, dtype)
    return load_teacher(source, encoder), encoder


def load_classifier(
    source: str,
    encoder: DualEncoder | None = None,
    *,
    class_names: Sequence[str] | None = None,
    templates: Sequence[str] = DEFAULT_TEMPLATES,
    device: torch.device | str | None = None,
    dtype: torch.dtype | str | None = None,
) -> AnchorClassifier:
    """A classifier from a TransMiter adapter, a tuned model (see [`load_teacher`]), or a plain model (zero-shot).

    Args:
        source (`str`): folder, Hub id or ``sandbox:MODEL``.
        encoder (`DualEncoder`, *optional*): the model under an adapter; loaded by the name in its config if omitted.
        class_names, templates (*optional*): of a model that has none saved with it; learnt prompts need no templates.

    Raises:
        ValueError: no class names where they are needed, or what [`load_teacher`] raises.
    """
    source = os.fspath(source)
    adapter = read_json(source, "adapter_config.json")
    if adapter is None:
        classifier = load_encoder(source, device=device, dtype=dtype)
    else:
        if encoder is None:
            options = {"device": device, "dtype": dtype}
            encoder = load_base(source, adapter.get("base_model_name_or_path"), adapter.get("revision"), **options)
        if adapter.get("peft_type") == PeftType.TRANSMITER:
            name, revision = split_revision(source)
            return AnchorClassifier.from_pretrained(name, encoder, revision=revision)
        classifier = load_teacher(source, encoder)
    if isinstance(classifier, AnchorClassifier) and (classifier.facts is not None or not class_names):
        return classifier
    if isinstance(classifier, AnchorClassifier):  # a prompt, which can be asked for any names
        classifier = classifier.encoder
    if not class_names:
        raise ValueError(f"{source!r} has no class names saved with it: pass class names, or a dataset that has some.")
    return as_classifier(classifier, class_names, templates)


def load_anchors(source: str) -> Anchors:
    """The anchors of a TransMiter adapter (folder or Hub id), or of a file that `Anchors.save` wrote.

    Raises:
        FileNotFoundError: nothing there.
        ValueError: another kind of file or adapter.
    """
    if source.endswith(".json"):
        return Anchors.load(source)
    adapter = read_json(source, "adapter_config.json") or {}
    if adapter.get("peft_type") != PeftType.TRANSMITER:
        raise ValueError(f"{source!r} is not a TransMiter adapter; pass one, or a .json file of Anchors.save.")
    return Anchors(adapter["class_names"], adapter.get("auxiliary_names") or (), adapter["templates"])


def teacher_facts(source: str) -> dict | None:
    """What an adapter's provenance says of the tuned model it learnt from; `None` where that says nothing."""
    facts = _tuning(source)
    return None if facts is None else {key: facts.settings.get(key) for key in ("method", "shots", "seed")}


def teacher_templates(
    source: str, given: Sequence[str] | None = None, usual: Sequence[str] = DEFAULT_TEMPLATES
) -> tuple[str, ...]:
    """Prompts of the weak model's class vectors: those given, those the teacher's tuning started from, or `usual`."""
    if given:
        return read_templates(given)
    facts = _tuning(source)
    return tuple(usual if facts is None else facts.zero_shot_templates)


def _tuning(source: str) -> TeacherFacts | None:
    """What `tune` noted beside a tuned model; stored logits have nothing beside them."""
    return None if source.endswith(".safetensors") else TeacherFacts.read(source)
