"""From dataclasses to command-line options, and what every command shares: config files, errors, remarks, outputs.

A command is a function whose parameters are dataclasses; each field becomes an option of its name with the help in
its metadata. The same names are the keys of a YAML file (``--config``) and of ``--set key=value``, which is how a
command takes its experts' options: the fields in `EXPERT`, and typer's hidden ones. Nothing heavy is imported at the
top.
"""

from __future__ import annotations

import inspect
import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import MISSING, dataclass, fields, is_dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, ClassVar, get_args, get_origin, get_type_hints

import typer

import hf_transmiter as ht

from ..hub.checks import parse_yaml, read_yaml
from ..settings import FitConfig, check_choice, check_fields, setting
from .reporting import fail, reporting


UNLABELLED = ("unlabelled", "unlabeled", "train")
LABELLED = ("train",)
TEST = ("test", "validation")

MODEL = "Hub id (id@revision), folder, open_clip:NAME/TAG, or sandbox:weak, sandbox:strong, sandbox:weak-upgraded."
IMAGES = "Hub id (id@revision), name in the catalogue, folder, .parquet or .arrow files, or sandbox:DOMAIN."

Weak = Annotated[str, f"The weak model: {MODEL}"]
Strong = Annotated[str, f"The strong model: {MODEL}"]
Teacher = Annotated[str, "The tuned weak model: folder of `tune`, PEFT adapter, model, or logits (.safetensors)."]
Images = Annotated[str, f"Pictures: {IMAGES}"]
OptionalImages = Annotated[str | None, f"Pictures: {IMAGES}"]
Seen = Annotated[list[str] | None, "Names the tuning saw: repeated, 'a,b,c', or a file with one name per line."]

EXPERT = {
    *("subset", "image_column", "label_column", "skip_unreadable", "cache_dir"),
    *("embed_batch_size", "embed_precision", "num_workers"),
    *("batch_size", "weight_decay", "warmup", "schedule", "optimizer", "pull", "keep_near", "project"),
    *("gaussian_mean", "gaussian_std", "views", "precision", "text_batch_size"),
    *("lambdas", "noise_std", "noise_probability", "width"),
    *("beta", "beta_per_image"),
}
"""Fields that `--help` only names, behind ``--set``."""
_NOT_SAVED = ("config", "set", "json", "quiet", "debug", "overwrite", "output_dir", "output")


@dataclass
class RunOptions:
    """What every command takes."""

    json: bool = setting(False, "Print the result as JSON on stdout, everything else on stderr.")
    quiet: bool = setting(False, "No progress bars and no remarks.")
    debug: bool = setting(False, "Show the whole traceback of an error.")

    @property
    def progress(self) -> bool:
        return not self.quiet

    @property
    def main_process(self) -> bool:
        return int(os.environ.get("RANK", 0)) == 0

    @cached_property
    def held(self) -> ExitStack:
        """What the run keeps to its end: the places that it is going to write."""
        return ExitStack()

    inputs: ClassVar[list[str]] = []  # whatever options name, for places that must be none of it

    @cached_property
    def accelerator(self):
        """An `Accelerator` under `accelerate launch` or `torchrun` with several processes, else `None`.

        Raises:
            ValueError: the launched processes do not find each other, so that each would do the whole work.
        """
        world = int(os.environ.get("WORLD_SIZE", 1))
        if world < 2 and {"MASTER_ADDR", "ACCELERATE_MIXED_PRECISION"} <= os.environ.keys():
            raise ValueError(
                "accelerate launch --cpu starts one process per machine, each of which would do the whole work: pass "
                "--multi_gpu in its place, without GPUs too, or use torchrun."
            )
        if world < 2:
            return None
        import torch  # takes seconds
        from accelerate import Accelerator  # likewise

        # Without a GPU accelerate must be told, or every process believes to be the only one.
        made = Accelerator(cpu=not torch.accelerator.is_available())
        if made.num_processes != world:
            raise ValueError(f"{world} processes were launched, but accelerate joined {made.num_processes} of them.")
        return made


@dataclass
class ModelOptions:
    """Where models run."""

    device: str | None = setting(None, "Where models run; a GPU if there is one.")
    dtype: str = setting("float32", "'float32', 'bfloat16', 'float16' or 'auto' (as stored).")

    def load(self, run: RunOptions) -> dict:
        """Arguments of `load_encoder`."""
        import torch  # takes seconds

        check_choice("dtype", self.dtype, ("float32", "bfloat16", "float16", "auto"))
        device = self.device if self.device is not None else ("cuda" if torch.cuda.is_available() else "cpu")
        if run.accelerator is not None:
            device = run.accelerator.device
        try:
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as error:
            raise ValueError(f"device {str(device)!r} cannot be used: {error}") from error
        return {"device": device, "dtype": self.dtype if self.dtype == "auto" else getattr(torch, self.dtype)}


@dataclass
class DataOptions:
    """Which pictures."""

    split: str | None = setting(None, "Split of the dataset; chosen by what the command needs if unset.")
    subset: str | None = setting(None, "Configuration of a Hub dataset that has several.")
    image_column: str | None = setting(None, "Column with the pictures; guessed if unset.")
    label_column: str | None = setting(None, "Column with the labels; guessed if unset.")
    max_images: int | None = setting(None, "Use that many pictures, drawn at random.", least=1)
    skip_unreadable: bool = setting(False, "Leave out pictures that cannot be read; else they are an error.")
    embedding_columns: list[str] | None = setting(
        None,
        "Embeddings that are there already: MODEL=COLUMN, may be repeated; a column called as the model if unset.",
    )
    embed_batch_size: int = setting(64, "Pictures per forward pass.", least=1)
    embed_precision: str = setting("float32", "'float32', or 'bfloat16' autocast of the image tower.")
    num_workers: int | None = setting(None, "Processes that prepare pictures; by the cores if unset.", least=0)
    cache_dir: str | None = setting(None, "Where embeddings are kept; a folder in the Hugging Face cache if unset.")

    def __post_init__(self):
        check_fields(self)

    def load(self, source: str | None, prefer: tuple[str, ...], split: str | None = None):
        """One split of a dataset, the first of `prefer` if none is named; `None` without a source. Of a row of the
        catalogue it is the one for the role that `prefer` begins with."""
        if source is None:
            return None
        options = {"max_images": self.max_images, "skip_unreadable": self.skip_unreadable}
        spec = ht.find_row(source)
        if spec is not None:
            return ht.load_split(spec if split is None else replace(spec, **{prefer[0]: split}), prefer[0], **options)
        return ht.load_images(source, split, prefer=prefer, subset=self.subset, **self.columns, **options)

    @property
    def columns(self) -> dict:
        return {"image_column": self.image_column, "label_column": self.label_column}

    def work(self, run: RunOptions) -> dict:
        """Arguments of everything that embeds pictures."""
        shown = {"progress": run.progress, "accelerator": run.accelerator}
        return {**self.columns, **shown, "cache_dir": self.cache_dir}

    def embedding(self, run: RunOptions) -> dict:
        """Arguments of `embed_dataset`."""
        found = None if not self.embedding_columns else dict(map(_model_and_column, self.embedding_columns))
        how = {"batch_size": self.embed_batch_size, "precision": self.embed_precision}
        return {**self.work(run), **how, "num_workers": self.num_workers, "embedding_columns": found}


@dataclass
class NameOptions:
    """What pictures are asked about."""

    class_names: list[str] | None = setting(
        None, "Class names, in any order where labels have names: repeated, 'a,b,c', or a file with one per line."
    )
    template: list[str] | None = setting(
        None, "Prompts with {}, or names of shipped ones; the teacher's or dataset's if unset."
    )


@dataclass
class HubOptions:
    """How to share."""

    private: bool | None = setting(None, "Whether a new repository is private; your account's default if unset.")
    commit_message: str | None = setting(None, "Title of the commit.")
    create_pr: bool = setting(False, "Propose the change instead of making it.")
    token: str | None = setting(None, "Hub token; the one of `hf auth login` if unset.")


def expert(help: str):
    """An option of one command that `--help` only names, behind ``--set``."""
    return typer.Option(help=help, hidden=True)


@dataclass
class Result:
    """What a command has to say.

    Args:
        data (`dict`): for `--json`.
        text (`str`): for people.
        failed (`str`, *optional*): why the command ends with exit code 1, after its result.
    """

    data: dict
    text: str
    failed: str = ""


def command(app: typer.Typer, panel: str, *, config_file: bool = True) -> Callable:
    """Makes a command of a function, listed under `panel`: its parameters are dataclasses (one option per field),
    options with their help beside the type (``Annotated[str, "..."]``), or typer's own. It takes a `RunOptions` named
    `run`, may take the plain option values as `values`, and returns a [`Result`]. With `config_file` its options may
    stand in a YAML file (``--config``) or behind ``--set``."""

    def register(function: Callable[..., Result]) -> Callable[..., Result]:
        hints = get_type_hints(function, include_extras=True)
        groups = {name: kind for name, kind in hints.items() if is_dataclass(kind) and name != "return"}
        taken = inspect.signature(function).parameters
        parameters = []
        for name, parameter in taken.items():
            if name in groups:
                parameters += _parameters(groups[name])
            elif name != "values":
                kind, said = get_args(hints[name])
                if isinstance(said, str):
                    parameters.append(_option(name, kind, parameter.default, said))
                else:
                    parameters.append(_keyword(name, hints[name], parameter.default))
        if config_file:
            parameters += _from_elsewhere(parameters)

        spelt = _spelling(parameters)

        def run_command(**values) -> None:
            run = RunOptions(**{item.name: values[item.name] for item in fields(RunOptions)})
            given = (item if isinstance(item, list) else [item] for item in values.values())
            run.inputs = [item for some in given for item in some if isinstance(item, str)]
            quiet = run.quiet or not run.main_process
            with reporting(quiet, run.debug, spelt) as said, run.held:
                arguments = {name: value for name, value in values.items() if name in taken}
                for name, kind in groups.items():
                    arguments[name] = _instance(kind, values)
                arguments["run"] = run
                if "values" in taken:
                    arguments["values"] = _plain({k: v for k, v in values.items() if k not in _NOT_SAVED})
                result = function(**arguments)
                if run.main_process:
                    print(_json(result.data) if run.json else said(result.text), flush=True)
                if result.failed:
                    if run.accelerator is not None:  # the first process that ends with an error ends the others
                        run.accelerator.wait_for_everyone()
                    fail(said(result.failed), quiet=not run.main_process)

        run_command.__name__, run_command.__doc__ = function.__name__, function.__doc__
        run_command.__signature__ = inspect.Signature(parameters)
        run_command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        app.command(name=function.__name__, no_args_is_help=True, rich_help_panel=panel)(run_command)
        return function

    return register


def _spelling(parameters: list[inspect.Parameter]) -> dict[str, str]:
    """How the command line names an option, by its name in Python."""
    found = {}
    for item in parameters:
        about = item.annotation.__metadata__[0]
        if isinstance(about, typer.models.OptionInfo):
            dashed = f"--{item.name.replace('_', '-')}"
            found[item.name] = f"--set {item.name}=VALUE" if about.hidden else dashed
    return found


def _json(data: dict) -> str:
    """JSON has no NaN: null."""
    return json.dumps(json.loads(json.dumps(data, default=str), parse_constant=lambda _: None), indent=2)


def _parameters(kind: type) -> Iterator[inspect.Parameter]:
    """One keyword parameter per field, as typer reads them."""
    hints = get_type_hints(kind)
    for item in fields(kind):
        annotation, default = hints[item.name], item.default
        if get_origin(annotation) is tuple:  # of any length; typer knows that as a list
            annotation, default = list[get_args(annotation)[0]], list(default)
        panel = re.split("[.,;]", inspect.getdoc(kind))[0].replace("[`", "").replace("`]", "")
        if item.name in FitConfig.__dataclass_fields__ and issubclass(kind, FitConfig):
            panel = "Training"
        elif issubclass(kind, RunOptions):
            panel = "Options"
        default = inspect.Parameter.empty if default is MISSING else default
        about = {"rich_help_panel": panel, "hidden": item.name in EXPERT}
        yield _option(item.name, annotation, default, item.metadata["help"], **about)


def _option(name: str, annotation, default, help: str, **about) -> inspect.Parameter:
    # A switch that is off needs no opposite.
    flag = [f"--{name.replace('_', '-')}"] if default is False else []
    return _keyword(name, Annotated[annotation, typer.Option(*flag, help=help, **about)], default)


def _instance(kind: type, values: dict):
    hints = get_type_hints(kind)
    given = {item.name: values[item.name] for item in fields(kind)}
    return kind(**{name: tuple(v) if get_origin(hints[name]) is tuple else v for name, v in given.items()})


def _plain(value):
    """Paths and tuples as YAML can write them; unset options left out."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items() if item is not None and item != []}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return os.fspath(value) if isinstance(value, Path) else value


def _read_config(context: typer.Context, path: Path | None) -> None:
    """Takes the file's values as defaults, so that options on the command line win."""
    if path is None:
        return
    try:
        content = read_yaml(path) or {}
    except OSError as error:
        fail(f"cannot read the config {str(path)!r}: {error.strerror}.")
    except ValueError as error:
        fail(str(error))
    if not isinstance(content, dict):
        fail(f"{path} must hold 'option: value' lines, not a {type(content).__name__}.")
    _take(context, {str(key): value for key, value in content.items()}, str(path))


def _read_settings(context: typer.Context, entries: list[str] | None) -> None:
    """Takes ``key=value`` as a config file's lines; they win over the file."""
    try:
        content = key_values(entries, "--set")
    except ValueError as error:
        fail(str(error))
    _take(context, content, "--set", wins=True)


def _model_and_column(entry: str) -> tuple[str, str]:
    model, _, column = (part.strip() for part in entry.rpartition("="))
    if not model or not column:
        raise ValueError(f"--embedding-columns takes MODEL=COLUMN, got {entry!r}.")
    return model, column


def key_values(entries: list[str] | None, option: str) -> dict:
    """``key=value`` of a repeated option; values as YAML reads them.

    Raises:
        ValueError: an entry without ``=``.
    """
    content = {}
    for entry in entries or ():
        key, found, value = entry.partition("=")
        if not found or not key.strip():
            raise ValueError(f"{option} takes key=value, got {entry!r}.")
        try:
            content[key.strip()] = parse_yaml(value, key)
        except ValueError:
            content[key.strip()] = value
    return content


def _take(context: typer.Context, content: dict, where: str, wins: bool = False) -> None:
    # As on the command line: `epochs: 1.5` is no whole number there, and `true` none either.
    content = {key.replace("-", "_"): _as_typed(value) for key, value in content.items()}
    known = [option.name for option in context.command.params if option.name not in ("config", "set", "help")]
    unknown = [key for key in content if key not in known]
    if unknown:
        fail(f"{where} has unknown options {', '.join(unknown)}; there are: {', '.join(known)}.")
    lists = [option.name for option in context.command.params if getattr(option, "multiple", False)]
    bare = next((key for key in lists if isinstance(content.get(key), str)), None)
    if bare:
        fail(f"{where}: {bare} must be a list, got {content[bare]!r}; write [{content[bare]}].")
    before = context.default_map or {}
    context.default_map = {**before, **content} if wins else {**content, **before}


def _as_typed(value):
    if isinstance(value, list):
        return [_as_typed(one) for one in value]
    return value if value is None or isinstance(value, dict) else str(value)


def _from_elsewhere(parameters: list[inspect.Parameter]) -> Iterator[inspect.Parameter]:
    """``--config``, and ``--set`` where there are experts' options."""
    hidden = [item.name for item in parameters if item.annotation.__metadata__[0].hidden]
    named = f"For experts: key=value of {', '.join(hidden)}; may be repeated."
    file = "YAML file with any of these options, spelt as here without the dashes in front."
    for name, kind, help, callback in (
        ("set", list[str] | None, named, _read_settings),
        ("config", Path | None, file, _read_config),
    ):
        option = typer.Option(f"--{name}", help=help, callback=callback, is_eager=True)
        if hidden or name == "config":
            yield _keyword(name, Annotated[kind, option], None)


def _keyword(name: str, annotation, default) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=annotation, default=default)
