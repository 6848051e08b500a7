"""Options that several commands share, and which split of a dataset they look for first."""

from __future__ import annotations

from typing import Annotated

import typer


UNLABELLED = ("unlabelled", "unlabeled", "train")
LABELLED = ("train",)
TEST = ("test", "validation")

MODEL = "Hub id (id@revision), folder, open_clip:NAME/TAG, or sandbox:weak, sandbox:strong, sandbox:weak-upgraded."
IMAGES = "Hub id (id@revision), name in the catalogue, folder, .parquet or .arrow files, or sandbox:DOMAIN."

Weak = Annotated[str, typer.Option(help=f"The weak model: {MODEL}")]
Strong = Annotated[str, typer.Option(help=f"The strong model: {MODEL}")]
Teacher = Annotated[
    str, typer.Option(help="The tuned weak model: folder of `tune`, PEFT adapter, model, or logits (.safetensors).")
]
Images = Annotated[str, typer.Option("--dataset", help=f"Pictures: {IMAGES}")]
OptionalImages = Annotated[str | None, typer.Option("--dataset", help=f"Pictures: {IMAGES}")]
Seen = Annotated[
    list[str] | None, typer.Option(help="Names the tuning saw: repeated, 'a,b,c', or a file with one name per line.")
]
