"""The command `push`, which shares."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

import hf_transmiter as ht

from .options import HubOptions, Result, RunOptions


def push(
    folder: Annotated[str, typer.Argument(help="Folder of an adapter, a tuned model or a bridge.")],
    repo_id: Annotated[str, typer.Argument(help="Where to: user/name.")],
    hub: HubOptions,
    run: RunOptions,
    base_model: Annotated[str | None, "Hub id of the base model, if it was loaded from a local folder."] = None,
    subfolder: Annotated[
        str | None, "Folder of the repository to put it into, such as what its adapter is on another model."
    ] = None,
    license: Annotated[str | None, "Licence of what is shared, such as apache-2.0."] = None,
    tags: Annotated[list[str] | None, "A tag for the card; repeated."] = None,
) -> Result:
    """Shares an adapter, a tuned model or a bridge on the Hub, with its card, in one commit.

    [bold]Example:[/bold] hf-transmiter push out/upgraded me/clip-l14-dtd --license apache-2.0
    """
    options = {"base_model": base_model, "subfolder": subfolder, "license": license, "tags": tags or ()}
    made = ht.push(folder, repo_id, **options, **asdict(hub))
    where = made.pr_url or made.commit_url
    return Result({"repo_id": repo_id, "commit": made.oid, "url": where}, f"Pushed {folder}: {where}")
