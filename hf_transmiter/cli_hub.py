"""Commands about sharing; `cli` adds them to the others. Heavy imports are inside, as there."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from .cli_arguments import MODEL, TEST
from .cli_options import DataOptions, HubOptions, ModelOptions, Result, RunOptions, command


def add_commands(app: typer.Typer) -> None:
    """Registers the commands of this module."""
    command(app)(push_command)
    command(app)(card_command)
    command(app)(upgrade_command)


def push_command(
    folder: Annotated[str, typer.Argument(help="Folder of an adapter, a tuned model or a bridge.")],
    repo_id: Annotated[str, typer.Argument(help="Where to: user/name.")],
    hub: HubOptions,
    run: RunOptions,
    base_model: Annotated[
        str | None, typer.Option(help="Hub id of the base model, if it was loaded from a local folder.")
    ] = None,
    as_transfer: Annotated[
        bool,
        typer.Option("--as-transfer", help="Add it to the weak model's adapter REPO_ID, as what that becomes here."),
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="With --as-transfer: replace the transfer to the same model.")
    ] = False,
) -> Result:
    """Shares an adapter, a tuned model or a bridge on the Hub, with its card, in one commit.

    [bold]Example:[/bold] hf-transmiter push out/upgraded me/clip-l14-dtd
    """
    options = asdict(hub)
    if not as_transfer:
        from .sharing import push

        if overwrite:
            raise ValueError("--overwrite belongs to --as-transfer: a push always makes a new commit.")
        made = push(folder, repo_id, base_model=base_model, **options)
    else:
        from .bridge import Bridge
        from .sharing import BRIDGE
        from .transfers import push_transfer, read_adapter

        if options.pop("private") is not None or base_model is not None:
            raise ValueError(
                "--private and --base-model are for a push of its own: a transfer joins REPO_ID as it is."
            )
        is_bridge = (Path(folder) / BRIDGE).is_file() or folder.endswith(".safetensors")
        finished = Bridge.from_pretrained(folder) if is_bridge else read_adapter(folder)
        made = push_transfer(repo_id, finished, overwrite=overwrite, **options)
    where = made.pr_url or made.commit_url
    return Result({"repo_id": repo_id, "commit": made.oid, "url": where}, f"Pushed {folder}: {where}")


def card_command(
    folder: Annotated[str, typer.Argument(help="Folder of an adapter, a tuned model or a bridge.")],
    run: RunOptions,
    license: Annotated[str | None, typer.Option(help="Licence of what is shared, such as apache-2.0.")] = None,
    datasets: Annotated[list[str] | None, typer.Option(help="Hub id of a dataset it learnt from; repeated.")] = None,
    tags: Annotated[list[str] | None, typer.Option(help="A tag; repeated.")] = None,
    new_version: Annotated[str | None, typer.Option(help="Hub id of what takes its place.")] = None,
) -> Result:
    """Writes the card of a folder anew from its files. Text that people wrote stays.

    [bold]Example:[/bold] hf-transmiter card out/upgraded --license apache-2.0
    """
    from .cards import write_card

    facts = {"license": license, "datasets": datasets, "tags": tags, "new_version": new_version}
    path = write_card(folder, **{key: value for key, value in facts.items() if value})
    return Result({"card": str(path)}, f"Card: {path}")


def upgrade_command(
    repos: Annotated[list[str], typer.Option(help="A TransMiter adapter: Hub id or folder; repeated.")],
    to: Annotated[str, typer.Option(help=f"The strong model: {MODEL}")],
    output_dir: Annotated[Path, typer.Option(help="Folder for the upgraded adapters, upgrade.md and upgrade.json.")],
    hub: HubOptions,
    data: DataOptions,
    models: ModelOptions,
    run: RunOptions,
    bridge: Annotated[
        str | None, typer.Option(help="Bridge to the strong model: file, folder or Hub id; from text alone if unset.")
    ] = None,
    push: Annotated[
        bool,
        typer.Option("--push", help="Share each as YOU/NAME-STRONG_MODEL, and name it in the card of its source."),
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and do nothing.")] = False,
) -> Result:
    """Any number of adapters to a strong model over one bridge, without an image.

    Each is scored on the dataset its noted scores were measured on, where that can be loaded. What is finished is kept:
    an interrupted run goes on.

    [bold]Example:[/bold] hf-transmiter upgrade --repos me/dtd-b16 --repos me/pets-b16 --to openai/clip-vit-large-patch14 --output-dir out/l14 --dry-run
    """  # noqa: E501
    from .bridge import Bridge
    from .catalog import load_encoder
    from .files import replace_file
    from .upgrading import upgrade, upgrade_table

    if hub.commit_message is not None:
        raise ValueError("--commit-message is not for upgrade, which makes several commits with titles of their own.")

    rows = upgrade(
        repos,
        load_encoder(to, **models.load(run)),
        output_dir,
        bridge=None if bridge is None else Bridge.from_pretrained(bridge),
        dry_run=dry_run,
        push_to_hub=push,
        private=hub.private,
        create_pr=hub.create_pr,
        token=hub.token,
        images=lambda dataset, split: data.load(dataset, TEST, split),
        **data.embedding(run),
    )
    table = upgrade_table(rows)
    found = {"to": to, "bridge": bridge, "dry_run": dry_run, "rows": [asdict(row) for row in rows]}
    if dry_run:
        return Result(found, f"{table}\nNothing was done yet: leave --dry-run out.")
    text = f"# Upgrade to {to}\n\n{table}"
    replace_file(output_dir / "upgrade.md", lambda path: path.write_text(text, encoding="utf-8"))
    return Result(found, f"{table}\nReport: {output_dir / 'upgrade.md'}")
