"""What a file of a repository must look like before it is used: strangers write them, too.

JSON is bounded in size and depth and must fit the rule of its kind (`rules`). Of safetensors files the header is read
first: names, shapes and dtypes are compared with what the configuration says before any tensor is allocated. Whatever
does not fit ends in a `ValueError` that says which file, where in it, and what to do.
"""

from __future__ import annotations

import difflib
import json
import math
import os
import re
import unicodedata
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

import yaml
from safetensors import SafetensorError, safe_open

from .rules import KINDS, METHODS, SHORT, Misfit


MAX_JSON_BYTES = 8 * 2**20  # parsed, the worst JSON takes twenty times its size
MAX_HEADER_BYTES = 8 * 2**20
MAX_DEPTH = 32
MAX_YAML_VALUES = 100_000
FLOATING = ("F64", "F32", "F16", "BF16")
KEY_PREFIX = "base_model.model.transmiter.transmiter_"  # of a tensor's name in a saved adapter
PICKLES = (".bin", ".ckpt", ".dill", ".joblib", ".pickle", ".pkl", ".pt", ".pth")


class BareString(TypeError, ValueError):
    """One string where a list of them is wanted: its letters would be the entries."""


def as_list(values, what: str) -> list:
    """
    Raises:
        BareString: `values` is one string.
    """
    if isinstance(values, (str, bytes)):
        raise BareString(f"{what} must be a list of strings, got the bare string {values!r}; write [{values!r}].")
    return list(values)


def parse_json(text: str | bytes, where: str):
    """The value of a JSON text (bytes are UTF-8), whoever wrote it. `where` is what to call it in an error.

    Raises:
        ValueError: too large, too deep, not JSON (NaN and infinite numbers are not), a key twice in one object, or a
            text that is not Unicode.
    """

    def read() -> object:
        content = text.decode() if isinstance(text, bytes) else text
        value = json.loads(content, object_pairs_hook=_unique, parse_float=_finite, parse_constant=_finite)
        json.dumps(value, ensure_ascii=False).encode()  # a lone surrogate, which could not be written again, raises
        return value

    return _parsed(text, read, where, "JSON")


def _parsed(text: str | bytes, read: Callable[[], object], where: str, language: str):
    """What `read` makes of a stranger's text, if that is neither too large nor too deep."""
    if len(text) > MAX_JSON_BYTES:
        raise ValueError(f"{where} holds more than {MAX_JSON_BYTES:,} bytes, too much for what it should be.")
    try:
        value = read()
        if _depth(value) > MAX_DEPTH:
            raise RecursionError
    except RecursionError:
        raise ValueError(f"{where} is not valid {language}: it is nested more than {MAX_DEPTH} deep.") from None
    except (yaml.YAMLError, ValueError, TypeError) as error:
        raise ValueError(f"{where} is not valid {language}: {' '.join(str(error).split())}.") from error
    return value


def _unique(pairs: list[tuple[str, object]]) -> dict:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise ValueError(f"the key {SHORT.repr(twice)} is there twice")
    return found


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:20]} is not a number of JSON")
    return value


def _depth(value) -> int:
    """How many lists and objects stand inside each other."""
    if not isinstance(value, dict | list):
        return 0
    return 1 + max(map(_depth, value.values() if isinstance(value, dict) else value), default=0)


def printable(text: str) -> str:
    """`text` without what a terminal would obey (control characters, other directions of writing, invisible letters),
    which is shown as Python would write it; line ends and tabs stay."""

    def shown(match: re.Match) -> str:
        letter = match[0]
        kept = letter in "\n\t\u200c\u200d" or unicodedata.category(letter) not in ("Cc", "Cf", "Cs", "Zl", "Zp")
        return letter if kept else letter.encode("unicode_escape").decode()

    return re.sub(r"[^ -~]", shown, text)


def read_text(path: str | os.PathLike) -> str:
    """
    Raises:
        OSError: it cannot be read.
        ValueError: no UTF-8, with or without the mark that Windows puts in front.
    """
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        where = f"{error.reason} at byte {error.start}"
        raise ValueError(f"{path} is no text in UTF-8 ({where}): save it as UTF-8.") from error


def parse_yaml(text: str | bytes, where: str):
    """The value of a YAML text, whoever wrote it. `where` is what to call it in an error.

    Raises:
        ValueError: too large (also by its aliases, before they are expanded), too deep, not YAML, or a key twice
            in one mapping.
    """

    def read() -> object:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        if node is not None and _expanded(node, {}) > MAX_YAML_VALUES:
            raise ValueError(f"its aliases stand for more than {MAX_YAML_VALUES:,} values")
        return None if node is None else loader.construct_document(node)

    return _parsed(text, read, where, "YAML")


def _expanded(node: yaml.Node, known: dict[yaml.Node, int | None]) -> int:
    """How many values it would hold with every alias written out."""
    if node not in known:
        known[node] = None
        inner = node.value if isinstance(node, yaml.CollectionNode) else []
        if isinstance(node, yaml.MappingNode):
            keys = [key.value for key, _ in inner if isinstance(key, yaml.ScalarNode)]
            twice = next((key for key in keys if keys.count(key) > 1), None) if len(keys) > len(set(keys)) else None
            if twice is not None:
                raise ValueError(f"the key {SHORT.repr(twice)} is there twice")
            inner = [each for pair in inner for each in pair]
        known[node] = 1 + sum(_expanded(each, known) for each in inner)
    if known[node] is None:
        raise ValueError("an alias stands inside what it stands for")
    return known[node]


def read_yaml(path: str | os.PathLike):
    """The value of a YAML file, see [`parse_yaml`].

    Raises:
        OSError: it cannot be read.
        ValueError: what [`parse_yaml`] refuses.
    """
    with open(path, "rb") as file:
        return parse_yaml(file.read(MAX_JSON_BYTES + 1), str(path))


def load_json(path: str | os.PathLike, kind: str | None = None):
    """The value of a JSON file, see [`parse_json`]; with `kind` also what [`check_json`] checks.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: what [`parse_json`] and [`check_json`] refuse.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} does not exist.")
    with open(path, "rb") as file:
        value = parse_json(file.read(MAX_JSON_BYTES + 1), str(path))
    return value if kind is None else check_json(value, kind, str(path))


def check_json(content, kind: str, where: str):
    """Returns what [`parse_json`] returned, unchanged.

    Raises:
        ValueError: it is not what its `kind`, a key of `rules.KINDS`, must be; the message says where in it, what is
            wrong, and what to do.
    """
    rule, remedy = KINDS[kind]
    try:
        rule.check(content)
        if kind == "adapter_config" and content["peft_type"] in METHODS:
            METHODS[content["peft_type"]].check(content)
    except Misfit as misfit:
        place = f"{where}: {misfit.place[:80]}" if misfit.place else where
        raise ValueError(f"{place} {misfit.problem}. {remedy}") from None
    return content


def read_header(
    path: str | os.PathLike, what: str = "safetensors file", remedy: str = "fetch it again"
) -> tuple[dict[str, str], dict[str, tuple[str, tuple[int, ...]]]]:
    """Metadata, and dtype (`"F32"`, ...) and shape of every tensor of a safetensors file; no tensor is read. `what` it
    should be and the `remedy` are words for an error.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: not a safetensors file, a damaged one, or a header of more than `MAX_HEADER_BYTES`.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} does not exist.")
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
    try:
        if size > MAX_HEADER_BYTES:
            raise SafetensorError(f"its header would have {size:,} bytes, at most {MAX_HEADER_BYTES:,} are read")
        with safe_open(os.fspath(path), framework="np") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}
            shapes = {name: (part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()}
            return file.metadata() or {}, shapes
    except SafetensorError as error:
        # safetensors quotes what it cannot read, however long that is.
        raise ValueError(f"{path} is damaged or not a {what} ({str(error)[:200]}); {remedy}.") from error


def check_tensors(
    path: str | os.PathLike,
    expected: Mapping[str, tuple[int | str, ...]],
    *,
    optional: Collection[str] = (),
    what: str = "file",
    remedy: str = "fetch it again",
) -> None:
    """Compares the header of a safetensors file with what must be in it, before anything is loaded.

    Shapes are `expected` by name; tensors that are `optional` may be missing. A letter in place of a size may be any
    positive number, the same one wherever it stands: ``{"matrix": ("m", "k"), "mean": ("m",)}``.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a tensor is missing or unknown, is not floating point, or has another shape.
    """
    found = read_header(path, what, remedy)[1]

    def refuse(problem: str) -> None:
        raise ValueError(f"{path} is damaged or not a {what}: {problem}; {remedy}.")

    missing, unknown = sorted(set(expected) - set(found) - set(optional)), sorted(set(found) - set(expected))
    if missing or unknown:
        named = f"lacks {SHORT.repr(missing)}" if missing else f"holds the unknown {SHORT.repr(unknown)}"
        refuse(f"it {named}")
    sizes: dict[str, int] = {}
    for name, shape in expected.items():
        if name not in found:
            continue
        dtype, actual = found[name]
        if dtype not in FLOATING:
            refuse(f"{name} has the dtype {dtype}, it must be one of {', '.join(FLOATING)}")
        fits = len(actual) == len(shape) and all(actual)
        for size, wanted in zip(actual, shape, strict=False):
            fits = fits and size == (sizes.setdefault(wanted, size) if isinstance(wanted, str) else wanted)
        if not fits:
            wanted = ", ".join(str(sizes.get(size, size)) for size in shape)
            refuse(f"{name} must have the shape ({wanted}), it has {tuple(actual)}")


def adapter_shapes(config: Mapping) -> dict[str, tuple[int | str, ...]]:
    """Tensors that a TransMiter adapter with this (checked) ``adapter_config.json`` has, and their shapes.

    ``anchors`` (K, d); form "linear": ``image_map`` (d, m), ``image_shift`` (d,), ``class_vectors`` (C, d or d + m),
    ``bias`` (C,), as far as it has these sides; form "mlp": ``basis`` (D, K), ``norm`` (D,), ``up`` (hD, D), ``down``
    (D, hD). The letter `"d"` stands for an `embed_dim` that is not known.
    """
    classes = len(config["class_names"])
    anchors, d = classes + len(config.get("auxiliary_names") or ()), config.get("embed_dim") or "d"
    shapes = {"anchors": (anchors, d)}
    if config.get("form", "mlp") == "linear":
        image, text = config.get("image_side"), config.get("text_side")
        text = d if text is None and not image else text
        shapes |= {"image_map": (d, image), "image_shift": (d,)} if image else {}
        shapes |= {"class_vectors": (classes, text), "bias": (classes,)} if text else {}
    else:
        width = config.get("width") or anchors
        hidden = config.get("mlp_ratio", 4) * width
        shapes |= {"basis": (width, anchors), "norm.weight": (width,), "norm.bias": (width,)}
        shapes |= {"up.weight": (hidden, width), "up.bias": (hidden,)}
        shapes |= {"down.weight": (width, hidden), "down.bias": (width,)}
    return {KEY_PREFIX + part: shape for part, shape in shapes.items()}


def check_adapter_tensors(path: str | os.PathLike, config: Mapping) -> None:
    """Compares the weights of an adapter with its (checked) configuration; only the header is read.

    All shapes of a TransMiter adapter are known. Of LoRA and the prompt learners the sizes are compared that their
    configuration chooses freely; what else they allocate follows from the model.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: they do not belong together, or the file is damaged.
    """
    what, remedy = "adapter of its adapter_config.json", "load the weights that were saved with this configuration"
    if config["peft_type"] == "TRANSMITER":
        check_tensors(path, adapter_shapes(config), what=what, remedy=remedy)
        return
    for key, size, saved in _chosen_sizes(config, read_header(path, what, remedy)[1]):
        if type(size) is int and size > saved:
            raise ValueError(f"{path} is not the {what}: {key} is {size:,} there, here it is {saved:,}; {remedy}.")


def _chosen_sizes(config: Mapping, header: Mapping[str, tuple[str, tuple[int, ...]]]) -> list[tuple[str, object, int]]:
    """Names of settings, their values, and the largest such size among the tensors of the file."""

    def shapes(part: str, dims: int) -> list[tuple[int, ...]]:
        return [shape for name, (_, shape) in header.items() if re.search(part, name) and len(shape) >= dims]

    sizes = []
    if config["peft_type"] == "LORA":
        # No rank exceeds the width: a tall and narrow tensor must not vouch for a large allocation.
        rank = max((shape[0] for shape in shapes(r"lora_(embedding_)?A(\.|$)", 2) if shape[0] <= shape[1]), default=0)
        sizes = [("r", size, rank) for size in [config.get("r"), *(config.get("rank_pattern") or {}).values()]]
    for key, part in (("n_ctx", "_ctx$"), ("n_vision", "_vision$")):
        if key == "n_ctx" or config.get("vision_depth"):
            sizes.append((key, config.get(key), max((shape[-2] for shape in shapes(part, 2)), default=0)))
    if config.get("class_specific"):
        contexts = max((shape[0] for shape in shapes("_ctx$", 3)), default=0)
        sizes.append(("class_names", len(config.get("class_names") or ()), contexts))
    return sizes


def simplified(name: str) -> str:
    """What spellings of one name have in common: letters with their marks and digits, in lower case; of a name that
    is all signs, such as "+", the signs."""
    name = unicodedata.normalize("NFC", name).casefold()
    if not any(map(str.isalnum, name)):
        return "".join(name.split())
    return "".join(c for c in name if c.isalnum() or unicodedata.category(c)[0] == "M")


def nearest(name: str, known: Collection[str], count: int = 3) -> list[str]:
    """Those of `known` that look most like `name`, best first; perhaps none."""
    spellings = {simplified(other): other for other in known}
    return [spellings[found] for found in difflib.get_close_matches(simplified(name), spellings, count, 0.5)]


def did_you_mean(name: str, known: Collection[str]) -> str:
    """``"did you mean 'refit'?"``, or all there are."""
    near = nearest(name, known)
    return f"did you mean {' or '.join(map(repr, near))}?" if near else f"there are {', '.join(known)}."


def refuse_pickles(folder: str | os.PathLike) -> None:
    """Makes sure that nothing in a local folder (anything else passes) could be unpickled, which would run whatever
    code it holds. PEFT takes ``adapter_model.bin`` where there is no ``adapter_model.safetensors``.

    Raises:
        ValueError: it holds pickles; the message names them.
    """
    found = sorted(path.name for path in Path(folder).glob("*") if path.suffix.lower() in PICKLES)
    if found:
        raise ValueError(
            f"{folder} holds {SHORT.repr(found)[1:-1]}: such files run the code in them when they are read. Delete "
            "them and keep the .safetensors files, or save the adapter again with safe_serialization."
        )
