"""Commands that carry adapters over; `cli` adds them to the others. Heavy imports are inside, as there."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..settings import TransferConfig
from .arguments import MODEL, UNLABELLED, OptionalImages, Seen, Strong
from .options import DataOptions, ModelOptions, OutputOptions, Result, RunOptions, check_new, command


if TYPE_CHECKING:
    from ..method.bridge import Bridge

_BRIDGE = "bridge (file, folder or Hub id)"


def add_commands(app: typer.Typer) -> None:
    """Registers the commands of this module."""
    command(app)(bridge)
    command(app)(transfer)


def bridge(
    output: Annotated[Path, typer.Option(help="A .safetensors file, or a folder ready for the Hub, with a card.")],
    data: DataOptions,
    models: ModelOptions,
    run: RunOptions,
    weak: Annotated[str | None, typer.Option(help=f"The weak model: {MODEL}")] = None,
    strong: Annotated[str | None, typer.Option(help=f"The strong model: {MODEL}")] = None,
    dataset: OptionalImages = None,
    space: Annotated[str, typer.Option(help="'embedding' or 'logit' (published; needs pictures).")] = "embedding",
    anchors: Annotated[
        str | None,
        typer.Option(help="Names to ask about: an adapter, or a file of `Anchors.save`; common nouns if unset."),
    ] = None,
    beta: Annotated[float, typer.Option(help="Logit space: pull towards the identity.")] = TransferConfig.beta,
    compose: Annotated[
        list[str] | None,
        typer.Option(
            help=f"Instead of building one: a {_BRIDGE} from A to B, repeated with one from B to C, and so on."
        ),
    ] = None,
    invert: Annotated[str | None, typer.Option(help=f"Instead of building one: turn this {_BRIDGE} round.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing bridge.")] = False,
) -> Result:
    """The map between two models, once per pair: from any pictures, from text alone, or from other bridges.

    A composed bridge is measured on the pictures of --dataset, if there are any.

    [bold]Example:[/bold] hf-transmiter bridge --weak openai/clip-vit-base-patch16 --strong openai/clip-vit-large-patch14 --output out/b16-l14
    """  # noqa: E501
    if run.main_process:
        check_new(output, overwrite)
    from ..encoders.dual_encoder import load_encoder
    from ..hub.repo import public_name
    from ..method.bridge import Bridge
    from ..method.saved import load_anchors

    images = data.load(dataset, UNLABELLED, data.split)
    if compose or invert:
        made = _derived(compose or [], invert)
        if compose and images is not None:
            pair = [load_encoder(model.name, model.revision, **models.load(run)) for model in (made.weak, made.strong)]
            made.measure(*pair, images, **data.embedding(run))
    elif weak is None or strong is None:
        raise ValueError("a bridge needs --weak and --strong, or other bridges: --compose twice, or --invert.")
    else:
        pair = [load_encoder(model, **models.load(run)) for model in (weak, strong)]
        names = None if anchors is None else load_anchors(anchors)
        made = Bridge.build(*pair, images, space=space, anchors=names, beta=beta, **data.embedding(run))
        made.dataset = None if images is None else f"{public_name(dataset)} ({images.split})"
    if run.main_process:
        (made.save if output.suffix == ".safetensors" else made.save_pretrained)(output, overwrite=overwrite)
    known = ("space", "source", "dataset", "num_pairs", "alignment", "held_out", "beta", "derived")
    return Result({"output": str(output), **{key: getattr(made, key) for key in known}}, f"{_said(made)}: {output}")


def _said(made: Bridge) -> str:
    """Where a bridge comes from and what it is worth."""
    kept = "not measured" if made.held_out is None else f"{made.held_out:.3f}"
    if made.derived:
        return f"Bridge {made.derived}, alignment {kept}"
    return f"Bridge from {made.num_pairs} {made.source} pairs, alignment {made.alignment:.3f} (held out: {kept})"


def _derived(compose: list[str], invert: str | None) -> Bridge:
    from ..method.bridge import Bridge

    if bool(compose) == bool(invert) or len(compose) == 1:
        raise ValueError("pass --compose at least twice, from the first model to the last, or --invert once.")
    first, *others = (Bridge.from_pretrained(source) for source in compose or [invert])
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
    weak: Annotated[str | None, typer.Option(help="The weak model, if it is not where the adapter says.")] = None,
    bridge: Annotated[str | None, typer.Option(help=f"A {_BRIDGE} of this pair; built here if unset.")] = None,
    dataset: OptionalImages = None,
    teacher: Annotated[
        str | None, typer.Option(help="The tuned weak model, for pictures that `extract` did not see.")
    ] = None,
    seen_classes: Seen = None,
) -> Result:
    """An adapter of the weak model becomes one of the strong model, from unlabelled pictures, a bridge, or text alone.

    Of several adapters each becomes a folder of --output-dir; those that are finished are kept, so that an interrupted
    run goes on.

    [bold]Example:[/bold] hf-transmiter transfer out/adapter --strong openai/clip-vit-large-patch14 --dataset mteb/dtd --output-dir out/strong
    """  # noqa: E501
    several = len(adapters) > 1
    if several and (bridge is None or dataset or teacher or seen_classes):
        raise ValueError(
            "several adapters cross one bridge, without pictures: pass --bridge, and neither --dataset, --teacher nor "
            "--seen-classes."
        )
    if several:
        left = _unfinished(adapters, output, values, run)
    else:
        output.check(run)
        left = {adapters[0]: output}
    from ..data.class_names import read_names
    from ..encoders.dual_encoder import load_encoder
    from ..method.bridge import Bridge
    from ..method.saved import load_classifier, load_teacher
    from ..method.transfer import transfer

    options = models.load(run)
    weak_model = load_encoder(weak, **options) if weak else None
    strong_model = load_encoder(strong, **options) if left else None
    crossed = None if bridge is None else Bridge.from_pretrained(bridge)
    images, made = data.load(dataset, UNLABELLED, data.split), []
    for adapter, place in left.items():
        source = load_classifier(adapter, weak_model, **options)
        weak_model = source.encoder
        upgraded = transfer(
            source,
            strong_model,
            images,
            bridge=crossed,
            teacher=None if teacher is None else load_teacher(teacher, source.encoder),
            seen_classes=read_names(seen_classes),
            config=config,
            dataset_name=dataset,
            **data.embedding(run),
        )
        place.write(upgraded.save_pretrained, {**values, "adapters": [adapter]}, run)
        facts = upgraded.adapter_config
        made.append({"output_dir": str(place.output_dir), "form": facts.form, "provenance": facts.provenance})
    if several:
        kept = len(adapters) - len(made)
        said = f"Transferred to {strong}: {len(made)} adapters, {kept} were finished already: {output.output_dir}"
        return Result({"transferred": made, "kept": kept}, said)
    facts = made[0]["provenance"]
    how = f"refit on {facts['refit_on']} images" if "refit_on" in facts else f"bridge from {facts['bridge']['source']}"
    return Result(made[0], f"Transferred to {strong} ({how}): {output.output_dir}")


def _unfinished(adapters: list[str], output: OutputOptions, values: dict, run: RunOptions) -> dict[str, OutputOptions]:
    """Where each adapter goes, without those that an earlier run of the same command has finished.

    Raises:
        FileExistsError: one of the folders holds something else.
        ValueError: two adapters would go to one folder.
    """
    from ..hub.repo import split_revision

    left, taken = {}, set()
    for adapter in adapters:
        name = Path(adapter).resolve().name if Path(adapter).is_dir() else split_revision(adapter)[0].split("/")[-1]
        if name in taken:
            raise ValueError(f"two adapters are called {name!r}: carry them over in separate runs.")
        taken.add(name)
        place = OutputOptions(output.output_dir / name, output.overwrite)
        if place.saved() != {**values, "adapters": [adapter]} or output.overwrite:
            place.check(run)
            left[adapter] = place
    return left
