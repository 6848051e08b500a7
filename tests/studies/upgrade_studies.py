"""Why some prompts survive an upgrade and others do not: their layer, their number, what they attend to.

Each study tunes on the old model only, keeps the adapters in a folder (what is there is not tuned again), and scores
them on both models with [`score_seeds`]. Source: the analysis of ContCoOp (arXiv 2412.20895).
"""

from __future__ import annotations

import copy
import os
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from datasets import Dataset
from tuned_seeds import Metrics, score_seeds, tune_seeds

from hf_transmiter.data.anchors import PROMPTED, Anchors
from hf_transmiter.data.images import guess_columns
from hf_transmiter.encoders.dual_encoder import DualEncoder
from hf_transmiter.evaluation.evaluate import evaluate
from hf_transmiter.method.attach import attach, read_config
from hf_transmiter.method.classifier import AnchorClassifier
from hf_transmiter.settings import split_tuning
from hf_transmiter.tuners import CoOpConfig
from hf_transmiter.tuners.injection import inject
from hf_transmiter.tuners.prompts import class_inputs, layers, phrase_token_ids, prompt_layer, set_classes


Points = dict[str, list[tuple[int, float, float]]]
"""(x, mean, std) in percent, by name: what the figures draw."""


def layer_study(
    old: DualEncoder,
    new: DualEncoder,
    train: Dataset,
    dataset: Dataset,
    tuning: Mapping,
    output_dir: str | os.PathLike,
    *,
    seeds: Sequence[int] = (0,),
    depths: Sequence[int] | None = None,
    **options,
) -> tuple[Points, dict[str, float]]:
    """Learns CoOp's context at one layer l of the text tower at a time, and scores it on both models.

    Args:
        old, new (`DualEncoder`): the model it is learnt on, and its upgrade.
        train, dataset (`datasets.Dataset`): labelled images to learn from, and to score on.
        tuning (`Mapping`): what [`split_tuning`] reads, with `method="coop"`.
        output_dir (`str` or `os.PathLike`): of the adapters.
        seeds (`Sequence[int]`, *optional*): mean and standard deviation are over these.
        depths (`Sequence[int]`, *optional*): layers l, counted from 0 (the input); all when omitted.
        **options: passed to [`tune`].

    Returns:
        Points (l, mean, std) for "old model" and "upgraded model", and both models' zero-shot accuracies: what
        [`layer_study_figure`](upgrade_figures.layer_study_figure) draws.

    Raises:
        ValueError: as [`tune_seeds`]; an upgraded model that does not take the prompts.
    """
    points, floors = {"old model": [], "upgraded model": []}, {}
    for layer in range(len(layers(old.model.text_model))) if depths is None else depths:
        how, folder = split_tuning({**tuning, "layer": layer}), Path(output_dir) / f"layer-{layer}"
        folders = tune_seeds(old, train, seeds, folder, **how, **options)
        floor, row = _accepted(folders, old, new, dataset, tuning, options)
        floors = {"zero-shot, old model": floor["old"][0], "zero-shot, upgraded model": floor["upgraded"][0]}
        for model, values in zip(points, (row["old"], row["upgraded"]), strict=True):
            points[model].append((layer, *mean_std(values)))
    return points, floors


def context_length_study(
    old: DualEncoder,
    new: DualEncoder,
    train: Dataset,
    dataset: Dataset,
    tunings: Mapping[str, Mapping],
    output_dir: str | os.PathLike,
    *,
    lengths: Sequence[int] = (2, 4, 8, 16),
    seeds: Sequence[int] = (0,),
    **options,
) -> Points:
    """Harmonic mean of old and upgraded accuracy for contexts of M vectors, by method.

    A context as long as the phrase starts from it, a longer one from noise and the phrase, a shorter one from noise.

    Args:
        old, new (`DualEncoder`): the model it is learnt on, and its upgrade.
        train, dataset (`datasets.Dataset`): labelled images to learn from, and to score on.
        tunings (`Mapping[str, Mapping]`): what [`split_tuning`] reads, by the name to show.
        output_dir (`str` or `os.PathLike`): of the adapters.
        lengths (`Sequence[int]`, *optional*, defaults to `(2, 4, 8, 16)`): M.
        seeds (`Sequence[int]`, *optional*): mean and standard deviation are over these.
        **options: passed to [`tune`].

    Returns:
        Points (M, mean, std) by method.

    Raises:
        ValueError: as [`tune_seeds`]; an upgraded model that does not take the prompts.
    """
    points: Points = {name: [] for name in tunings}
    for name, tuning in tunings.items():
        phrase = tuning.get("init_phrase", "a photo of a")
        words = 0 if phrase is None else len(phrase_token_ids(old.processor.tokenizer, phrase))
        for length in lengths:
            start = phrase if length >= words else None
            how = split_tuning({**tuning, "n_ctx": length, "init_phrase": start})
            folders = tune_seeds(old, train, seeds, Path(output_dir) / f"{name}-{length}", **how, **options)
            row = _accepted(folders, old, new, dataset, tuning, options)[1]
            points[name].append((length, *mean_std(row["h"])))
    return points


@torch.no_grad()
def class_contexts(encoder: DualEncoder, names: Sequence[str]) -> torch.Tensor:
    """(C, M, width): what the active prompt learner puts beside each name, on this base model."""
    layer, model = prompt_layer(encoder.model), encoder.model
    count = len(layer.slot_ids(layer.active_config))
    inputs = class_inputs(names, encoder.processor.tokenizer, model.config.model_type, layer.positions, count)
    seen, made = [], layer.context
    layer.context = lambda *arguments: seen.append(made(*arguments)) or seen[-1]
    try:
        model.get_text_features(**{key: value.to(model.device) for key, value in inputs.items()})
    finally:
        del layer.context
    return seen[0].expand(len(names), *seen[0].shape[-2:]).clone()


def freeze_contexts(
    adapter: str | os.PathLike, old: DualEncoder, new: DualEncoder, names: Sequence[str]
) -> DualEncoder:
    """The upgraded model with the contexts that ContCoOp makes on the *old* model, one per class, and never again.

    What is left of ContCoOp when it may not read the current model's class embeddings: if those are what lets it
    survive, this must score worse on the upgraded model than the same adapter attached to it.

    Args:
        adapter (`str` or `os.PathLike`): a saved ContCoOp adapter.
        old, new (`DualEncoder`): the model it was learnt on, and its upgrade.
        names (`Sequence[str]`): C class names.

    Returns:
        [`DualEncoder`]: a copy of the upgraded model with class-specific contexts (C, M, width).
    """
    contexts = class_contexts(attach(adapter, old), names)
    words = read_config(os.fspath(adapter)).init_token_ids
    config = CoOpConfig(n_ctx=contexts.shape[1], init_token_ids=words, class_specific=True, class_names=list(names))
    model = copy.deepcopy(new.model)
    inject(model, config)
    set_classes(model, names, new.processor.tokenizer)
    layer = prompt_layer(model)
    layer.part("ctx", layer.active_name).data.copy_(contexts)
    return DualEncoder(model.requires_grad_(False), new.processor, new.name_or_path, new.revision)


def class_embedding_study(
    adapters: Sequence[str | os.PathLike], old: DualEncoder, new: DualEncoder, dataset: Dataset, **embedding
) -> dict[str, tuple[float, ...]]:
    """Whether ContCoOp survives because it reads the current model's class embeddings.

    Args:
        adapters (`Sequence`): saved ContCoOp adapters, one per seed.
        old, new (`DualEncoder`): the model they were learnt on, and its upgrade.
        dataset (`datasets.Dataset`): labelled test images.
        **embedding: passed to [`evaluate`].

    Returns:
        `dict`: accuracies on the upgraded model in percent, one per adapter, with the class embeddings
        `"of the upgraded model"` and `"of the old model"`.
    """
    names = _class_names(dataset, embedding)
    anchors = Anchors(tuple(names), (), PROMPTED)
    found: dict[str, list[float]] = {"of the upgraded model": [], "of the old model": []}
    for adapter in adapters:
        both = attach(adapter, new), freeze_contexts(adapter, old, new, names)
        for kind, encoder in zip(found, both, strict=True):
            found[kind].append(evaluate(AnchorClassifier(encoder, anchors), dataset, **embedding)[0].value)
    return {kind: tuple(values) for kind, values in found.items()}


def out_of_distribution(
    adapters: Sequence[str | os.PathLike],
    old: DualEncoder,
    new: DualEncoder,
    datasets: Mapping[str, Dataset],
    **options,
) -> dict[str, tuple]:
    """Scores adapters on both models over data they were not tuned on; see [`score_seeds`].

    Args:
        datasets (`Mapping[str, datasets.Dataset]`): labelled images of the same classes, by domain.

    Returns:
        `dict`: what [`score_seeds`] returns, by domain.
    """
    return {name: score_seeds(adapters, old, new, dataset, **options) for name, dataset in datasets.items()}


def mean_std(values: Sequence[float]) -> tuple[float, float]:
    """Mean and (sample) standard deviation; 0 for one value."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def _class_names(dataset: Dataset, options: Mapping) -> list[str]:
    """Names of the label column, which is guessed as everywhere."""
    columns = guess_columns(dataset, options.get("image_column"), options.get("label_column"))
    return list(dataset.features[columns[1]].names)


def _accepted(
    folders: Sequence[Path], old: DualEncoder, new: DualEncoder, dataset: Dataset, tuning: Mapping, options: Mapping
) -> tuple[Metrics, Metrics]:
    """Zero-shot and the prompts, which the upgraded model must take."""
    floor, row, refused = score_seeds(folders, old, new, dataset, progress=options.get("progress", True))
    if refused:
        raise ValueError(f"the upgraded model does not take the prompts of {tuning['method']}: {refused}.")
    return floor, row
