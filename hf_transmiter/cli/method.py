"""The method, one command per step: tune, extract, bridge, transfer, evaluate. They do little but call the API."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

import hf_transmiter as ht

from ..settings import METHODS, ExtractionConfig, TransferConfig, TuningConfig
from .options import (
    LABELLED,
    MODEL,
    TEST,
    UNLABELLED,
    DataOptions,
    Images,
    ModelOptions,
    NameOptions,
    OptionalImages,
    Result,
    RunOptions,
    Seen,
    Strong,
    Teacher,
    Weak,
    key_values,
)  # fmt: skip
from .output import OutputOptions


_BRIDGE = "bridge (file, folder or Hub id)"


def tune(
    model: Annotated[str, f"The model to be tuned; with a teacher, the strong one: {MODEL}"],
    dataset: Images,
    output: OutputOptions,
    data: DataOptions,
    names: NameOptions,
    config: TuningConfig,
    models: ModelOptions,
    run: RunOptions,
    values: dict,
    method: Annotated[
        str | None, f"{', '.join(METHODS)}, or another PEFT method; lora, or what fits the teacher, if unset."
    ] = None,
    adapter: Annotated[
        list[str] | None, "An option of its PEFT configuration, such as n_ctx=8; may be repeated."
    ] = None,
    teacher: Annotated[
        str | None, "A tuned weak model in place of labels: folder of `tune`, PEFT adapter, model, or logits."
    ] = None,
    weak: Annotated[str | None, "What the teacher was before its tuning, if that is not noted beside it."] = None,
) -> Result:
    """Labelled pictures to a tuned model, saved as a PEFT adapter; or unlabelled ones, which a tuned weak model labels.

    [bold]Example:[/bold] hf-transmiter tune --model openai/clip-vit-base-patch16 --dataset mteb/dtd --method contcoop --output-dir out/tuned

    [bold]Without labels:[/bold] hf-transmiter tune --model openai/clip-vit-large-patch14 --teacher out/tuned --dataset mteb/dtd --output-dir out/strong
    """  # noqa: E501
    output.check(run, "tuned model")
    if weak and not teacher:
        raise ValueError("--weak is what a teacher was before its tuning: pass --teacher, or name the model --model.")
    how = None
    if method or adapter or not teacher:
        how = ht.adapter_settings({"method": method or "lora", **key_values(adapter, "--adapter")})
    options, usual = models.load(run), ht.usual_templates(dataset)
    taught, templates = {}, ht.read_templates(names.template) if names.template else None
    if teacher:
        taught = dict(zip(("teacher", "weak"), ht.load_teacher_and_weak(teacher, weak, **options), strict=True))
        templates = ht.teacher_templates(teacher, names.template, usual)
    tuned = ht.tune(
        ht.load_encoder(model, **options),
        data.load(dataset, UNLABELLED if teacher else LABELLED, data.split),
        how,
        **taught,
        class_names=ht.read_names(names.class_names),
        templates=templates or ht.starting_templates(how["method"], usual),
        config=config,
        checkpoint=output.checkpoint,
        keep_checkpoint=True,
        **data.work(run),
    )
    output.write(tuned.save_pretrained, values, run)
    facts, count = tuned.facts, len(tuned.class_names)
    method = facts.settings["method"]
    found = {"output_dir": str(output.output_dir), "method": method, "num_classes": count, "learnt": facts.learnt}
    return Result(found, f"Tuned {model} ({method}) on {count} classes: {output.output_dir}\n{facts.verdict}")


def extract(
    weak: Weak,
    teacher: Teacher,
    output: OutputOptions,
    data: DataOptions,
    names: NameOptions,
    config: ExtractionConfig,
    models: ModelOptions,
    run: RunOptions,
    values: dict,
    dataset: OptionalImages = None,
    seen_classes: Seen = None,
) -> Result:
    """What the tuning changed, as an adapter of the weak model, from unlabelled pictures.

    Pictures are not needed when a prompt was tuned.

    [bold]Example:[/bold] hf-transmiter extract --weak openai/clip-vit-base-patch16 --teacher out/tuned --dataset mteb/dtd --output-dir out/adapter
    """  # noqa: E501
    output.check(run, "adapter")
    encoder = ht.load_encoder(weak, **models.load(run))
    images = data.load(dataset, UNLABELLED, data.split)
    adapter = ht.extract(
        encoder,
        ht.load_teacher(teacher, encoder),
        images,
        class_names=ht.read_names(names.class_names),
        templates=ht.teacher_templates(teacher, names.template, ht.usual_templates(dataset)),
        seen_classes=ht.read_names(seen_classes),
        config=config,
        dataset_name=dataset,
        checkpoint=output.checkpoint,
        keep_checkpoint=True,
        **data.embedding(run),
    )
    facts = adapter.adapter_config.provenance
    facts["teacher"] = ht.teacher_facts(teacher)
    output.write(adapter.save_pretrained, values, run)
    found = {"output_dir": str(output.output_dir), "form": adapter.adapter_config.form, "provenance": facts}
    how = facts["solver"] or "the teacher's own class vectors"
    return Result(found, f"Extracted from {facts['num_images']} images ({how}): {output.output_dir}")


def bridge(
    output: Annotated[Path, "A .safetensors file, or a folder ready for the Hub, with a card."],
    data: DataOptions,
    models: ModelOptions,
    run: RunOptions,
    weak: Annotated[str | None, f"The weak model: {MODEL}"] = None,
    strong: Annotated[str | None, f"The strong model: {MODEL}"] = None,
    dataset: OptionalImages = None,
    space: Annotated[str, "'embedding' or 'logit' (published; needs pictures)."] = "embedding",
    anchors: Annotated[
        str | None, "Names to ask about: an adapter, or a file of `Anchors.save`; common nouns if unset."
    ] = None,
    beta: Annotated[float, "Logit space: pull towards the identity."] = TransferConfig.beta,
    compose: Annotated[
        list[str] | None,
        f"Instead of building one: a {_BRIDGE} from A to B, repeated with one from B to C, and so on.",
    ] = None,
    invert: Annotated[str | None, f"Instead of building one: turn this {_BRIDGE} round."] = None,
    overwrite: Annotated[bool, "Replace an existing bridge."] = False,
) -> Result:
    """The map between two models, once per pair: from any pictures, from text alone, or from other bridges.

    A composed or inverted bridge is measured on the pictures of --dataset, if there are any.

    [bold]Example:[/bold] hf-transmiter bridge --weak openai/clip-vit-base-patch16 --strong openai/clip-vit-large-patch14 --output out/b16-l14
    """  # noqa: E501
    place, single = OutputOptions(output, overwrite), output.suffix == ".safetensors"
    place.check(run, "bridge", file=single)
    images = data.load(dataset, UNLABELLED, data.split)
    if compose or invert:
        if weak or strong or anchors or space != "embedding" or beta != TransferConfig.beta:
            said = "what is made of other bridges has their models, space and names"
            raise ValueError(f"{said}: leave --weak, --strong, --space, --anchors and --beta out.")
        made = _derived(compose or [], invert)
        if images is not None:
            made.measure(*_models_of(made, models.load(run)), images, **data.embedding(run))
    elif weak is None or strong is None:
        raise ValueError("a bridge needs --weak and --strong, or other bridges: --compose twice, or --invert.")
    else:
        pair = [ht.load_encoder(model, **models.load(run)) for model in (weak, strong)]
        names = None if anchors is None else ht.load_anchors(anchors)
        made = ht.Bridge.build(*pair, images, space=space, anchors=names, beta=beta, **data.embedding(run))
        made.dataset = None if images is None else f"{ht.public_name(dataset)} ({images.split})"
    if single and run.main_process:
        made.save(place.place, overwrite=overwrite)
    else:
        place.write(made.save_pretrained, None, run)
    known = ("space", "source", "dataset", "num_pairs", "alignment", "held_out", "held_out_on", "beta", "derived")
    return Result({"output": str(output), **{key: getattr(made, key) for key in known}}, f"{_said(made)}: {output}")


def _said(made: ht.Bridge) -> str:
    """Where a bridge comes from and what it is worth."""
    if made.derived:
        return f"Bridge {made.derived}, alignment {made.trust}"
    return f"Bridge from {made.num_pairs} {made.source} pairs, alignment {made.alignment:.3f} (held out: {made.trust})"


def _models_of(bridge: ht.Bridge, options: dict) -> list[ht.DualEncoder]:
    """Both models of a bridge, from where it says."""
    if None in (bridge.weak.name, bridge.strong.name):
        raise ValueError("the bridge does not say which models it is between: in Python they can be passed.")
    try:
        return [ht.load_encoder(one.name, one.revision, **options) for one in (bridge.weak, bridge.strong)]
    except OSError as error:
        raise OSError(f"{error} It is a model of the bridge; one that was moved can be passed in Python.") from error


def _derived(compose: list[str], invert: str | None) -> ht.Bridge:
    if bool(compose) == bool(invert) or len(compose) == 1:
        raise ValueError("pass --compose at least twice, from the first model to the last, or --invert once.")
    first, *others = (ht.Bridge.from_pretrained(source) for source in compose or [invert])
    if invert:
        return first.invert()
    for bridge in others:
        first = first.compose(bridge)
    return first


def transfer(
    adapters: Annotated[
        list[str],
        typer.Argument(help="Adapter of the weak model: folder or Hub id; several with a --bridge and no pictures."),
    ],
    strong: Strong,
    output: OutputOptions,
    data: DataOptions,
    config: TransferConfig,
    models: ModelOptions,
    run: RunOptions,
    values: dict,
    weak: Annotated[str | None, "The weak model, if it is not where the adapter says."] = None,
    bridge: Annotated[str | None, f"A {_BRIDGE} of this pair; built here if unset."] = None,
    dataset: OptionalImages = None,
    teacher: Annotated[str | None, "The tuned weak model, for pictures that `extract` did not see."] = None,
    seen_classes: Seen = None,
) -> Result:
    """An adapter of the weak model becomes one of the strong model, from unlabelled pictures, a bridge, or text alone.

    Of several adapters each becomes a folder of --output-dir; those that are finished are kept, so that an interrupted
    run goes on.

    [bold]Example:[/bold] hf-transmiter transfer out/adapter --strong openai/clip-vit-large-patch14 --dataset mteb/dtd --output-dir out/strong
    """  # noqa: E501
    several = len(adapters) > 1
    if several and (bridge is None or dataset or teacher or seen_classes):
        said = "pass --bridge, and neither --dataset, --teacher nor --seen-classes"
        raise ValueError(f"several adapters cross one bridge, without pictures: {said}.")
    options = models.load(run)
    if several and run.main_process:
        run.held.enter_context(ht.claim(output.output_dir))
    elif not several:
        output.check(run, "adapter")
    strong_model = ht.load_encoder(strong, **options)
    left, made_from = {adapters[0]: output}, {}
    if several:
        contents = (ht.content_digest(adapter, bridge, strong_model.fingerprint) for adapter in adapters)
        made_from = dict(zip(adapters, contents, strict=True))
        left = _unfinished(made_from, output, values, run)
    weak_model = ht.load_encoder(weak, **options) if weak else None
    crossed = None if bridge is None else ht.Bridge.from_pretrained(bridge)
    images, made = data.load(dataset, UNLABELLED, data.split), []
    for adapter, place in left.items():
        source = ht.load_classifier(adapter, weak_model, **options)
        weak_model = source.encoder
        upgraded = ht.transfer(
            source,
            strong_model,
            images,
            bridge=crossed,
            teacher=None if teacher is None else ht.load_teacher(teacher, source.encoder),
            seen_classes=ht.read_names(seen_classes),
            config=config,
            dataset_name=dataset,
            **data.embedding(run),
        )
        place.write(upgraded.save_pretrained, {**values, "adapters": [adapter]}, run, made_from.get(adapter, ""))
        facts = upgraded.adapter_config
        made.append({"output_dir": str(place.output_dir), "form": facts.form, "provenance": facts.provenance})
    if several:
        kept = len(adapters) - len(made)
        said = f"Transferred to {strong}: {len(made)} adapters, {kept} were finished already: {output.output_dir}"
        return Result({"transferred": made, "kept": kept}, said)
    facts = made[0]["provenance"]
    how = f"refit on {facts['refit_on']} images" if "refit_on" in facts else f"bridge from {facts['bridge']['source']}"
    why = f"\nWhy so: {facts['because']}" if "because" in facts else ""
    return Result(made[0], f"Transferred to {strong} ({how}): {output.output_dir}{why}")


def _unfinished(
    made_from: dict[str, str], output: OutputOptions, values: dict, run: RunOptions
) -> dict[str, OutputOptions]:
    """Where each adapter goes, without those that an earlier run of the same command has finished."""
    left, taken = {}, set()
    for adapter, content in made_from.items():
        name = Path(adapter).resolve().name if Path(adapter).is_dir() else ht.split_revision(adapter)[0].split("/")[-1]
        if name in taken:
            raise ValueError(f"two adapters are called {name!r}: carry them over in separate runs.")
        taken.add(name)
        place = OutputOptions(output.output_dir / name, output.overwrite)
        if output.overwrite or not place.holds({**values, "adapters": [adapter]}, content):
            place.check(run, "adapter")
            left[adapter] = place
    return left


def evaluate(
    model: Annotated[
        str, typer.Argument(help=f"Adapter or tuned model (folder or Hub id), {_BRIDGE}, or a plain model: {MODEL}")
    ],
    dataset: Images,
    data: DataOptions,
    names: NameOptions,
    models: ModelOptions,
    run: RunOptions,
    base_model: Annotated[str | None, "The model under an adapter, if it is not where the adapter says."] = None,
    seen_classes: Seen = None,
    record: Annotated[bool, "Note the scores in the folder of the adapter or bridge, for its card."] = False,
    analyse: Annotated[bool, "What the adapter changed against zero-shot; pictures without labels will do."] = False,
    teacher: Annotated[
        str | None, "Analysis: the tuned weak model or its logits on these pictures, to compare with."
    ] = None,
    output_dir: Annotated[Path | None, "Analysis: folder for report.md, analysis.json, figures."] = None,
    overwrite: Annotated[bool, "Replace an existing report."] = False,
) -> Result:
    """Accuracy on labelled pictures; with seen classes also base, novel, their harmonic mean, and joint.

    With --analyse also which classes an adapter prefers now, what it corrected and broke, and how sure it is.

    Of a bridge, on pictures that it was not built from: whether an index of the old model's embeddings, translated,
    finds what one of the new model's would, better than going on with the old model.

    [bold]Example:[/bold] hf-transmiter evaluate out/strong --dataset mteb/dtd --analyse --output-dir out/analysis
    """
    if not analyse and (teacher or output_dir):
        raise ValueError("--teacher and --output-dir are for an analysis: pass --analyse, too.")
    crossed = _bridge_at(model)
    if crossed is not None:
        given = {"class_names": names.class_names, "template": names.template, "base_model": base_model}
        given |= {"seen_classes": seen_classes, "analyse": analyse}
        unread = [f"--{name.replace('_', '-')}" for name, value in given.items() if value]
        if unread:
            raise ValueError(f"{model!r} is a bridge, which has no classes: leave {', '.join(unread)} out.")
        return _evaluate_bridge(crossed, model, dataset, record, data, models, run)
    output = None if output_dir is None else OutputOptions(output_dir, overwrite)
    if output is not None:
        output.check(run, "analysis")
    if record and not (Path(model) / "adapter_config.json").is_file():
        raise ValueError(f"--record needs the folder of an adapter, {model!r} is none.")
    if record and run.main_process:
        run.held.enter_context(ht.claim(model))
    options = models.load(run)
    images = data.load(dataset, TEST, data.split)
    _, label = ht.guess_columns(images, **data.columns, pictures=False)
    asked = ht.read_names(names.class_names)
    classifier = ht.load_classifier(
        model,
        ht.load_encoder(base_model, **options) if base_model else None,
        class_names=asked or getattr(images.features.get(label), "names", None),
        templates=ht.read_templates(names.template) if names.template else ht.usual_templates(dataset),
        **options,
    )
    if asked and classifier.class_names != asked:
        classifier.set_classes(asked)
    if names.template and classifier.anchors.templates != ht.read_templates(names.template):
        raise ValueError(f"{model!r} was saved with its own templates: leave --template out.")
    if base_model and not (Path(model) / "adapter_config.json").is_file() and Path(model).is_dir():
        raise ValueError(f"--base-model is the model under an adapter, and {model!r} is none: leave it out.")
    seen = ht.read_names(seen_classes)
    split = str(images.split)
    about = {"seen_classes": seen, "split": split, "dataset_name": dataset, **data.embedding(run)}
    unscored = analyse and not record and label is None
    scores = [] if unscored else ht.evaluate(classifier, images, method=model, **about)
    if record and run.main_process:
        ht.record_scores(model, classifier, images, scores, **about)
    found = {"model": model, "dataset": dataset, "num_images": len(images), "scores": [asdict(s) for s in scores]}
    result = Result(found, ht.markdown_table(scores) if scores else "")
    chance = ht.guessing(scores[0].value, len(images), len(classifier.class_names)) if scores else None
    if chance is not None:
        result.text += (
            f"\nWarning: {scores[0].value:.1f} % is no better than guessing, {chance:.1f} %: look at the labels, the "
            "class names and their order.\n"
        )
    if analyse:
        own = None if teacher is None else _own_teacher(teacher, classifier, options)
        changed = ht.analyse(classifier, images, teacher=own, **data.embedding(run))
        result.data["analysis"] = changed.to_dict()
        result.text = f"{result.text}\n{ht.markdown(changed)}".strip()
        if output is not None:
            title = f"What the adapter {ht.public_name(model)} changes on {ht.public_name(dataset)} ({split})"
            output.write(lambda folder: ht.write_analysis(folder, changed, title=title), None, run)
            result.text += f"\n\nReport: {output_dir / 'report.md'}"
    return result


def _bridge_at(source: str) -> ht.Bridge | None:
    """A bridge; `None` where there is something else."""
    single = source.endswith(".safetensors")
    if not single and (ht.read_json(source, "adapter_config.json") or ht.fetch(source, "bridge.safetensors") is None):
        return None
    return ht.Bridge.from_pretrained(source)


def _evaluate_bridge(
    bridge: ht.Bridge,
    source: str,
    dataset: str,
    record: bool,
    data: DataOptions,
    models: ModelOptions,
    run: RunOptions,
) -> Result:
    if record and not Path(source).is_dir():
        raise ValueError(f"--record needs the folder of a bridge, {source!r} is none: scores lie beside it.")
    if record and run.main_process:
        run.held.enter_context(ht.claim(source))
    pair, images = _models_of(bridge, models.load(run)), data.load(dataset, TEST, data.split)
    about = {"split": str(images.split), "dataset_name": dataset, **data.embedding(run)}
    scores = ht.evaluate_bridge(bridge, *pair, images, **about)
    if record and run.main_process:
        ht.note_scores(source, scores)
    verdict = ht.index_verdict(scores)
    if bridge.dataset == f"{ht.public_name(dataset)} ({images.split})":
        verdict += (
            "\nWarning: the bridge was built from these pictures and looks better on them than it is: pass others."
        )
    found = {"model": source, "dataset": dataset, "num_images": len(images), "verdict": verdict}
    found["scores"] = [asdict(score) for score in scores]
    return Result(found, f"{verdict}\n\n{ht.markdown_table(scores)}")


def _own_teacher(
    source: str, classifier: ht.AnchorClassifier, options: dict
) -> ht.AnchorClassifier | ht.CalibrationPack:
    """The tuned model by itself: which weak model is under it is noted beside it."""
    if source.endswith(".safetensors"):
        return ht.CalibrationPack.load(source)
    names, templates = classifier.class_names, classifier.adapter_config.templates
    return ht.load_classifier(source, class_names=names, templates=templates, **options)
