"""The settings of every stage as dataclasses; the command line and YAML files are made from their fields.

Nothing heavy is imported here, so that `hf-transmiter --help` answers at once. What a field is stands beside it and in
`--help`; the docstrings add what else there is to know.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from numbers import Integral, Real


logger = logging.getLogger(__name__)

SOLVERS = ("image_map", "discriminant", "ridge", "gradient")
AUGMENTATIONS = ("none", "shift", "crop")
SCHEDULES = ("cosine", "epochs")
LAMBDAS = (1e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
SHOTS = 16
BETA = 500.0  # of the published run (arXiv 2508.08604)
PULLS = ("kl", "cosine", "l2", "l1", "promptsrc")
PRECISIONS = ("float32", "bfloat16")
# The linear layers in the blocks of an image tower that is a vision transformer, in every family that has one. The
# towers of open_clip: of timm (EVA-CLIP), its own, of which attention reads weights past its layers, and the ResNet's.
VISION_LINEARS = (
    r"vision_model\.((encoder\.)?layers\.\d+\.\w+\.(q_proj|k_proj|v_proj|out_proj|o_proj|fc1|fc2)"
    r"|trunk\.blocks\.\d+\.\w+\.(q_proj|k_proj|v_proj|proj|fc1|fc1_g|fc1_x|fc2)"
    r"|transformer\.resblocks\.\d+\.mlp\.(c_fc|c_proj)"
    r"|layer\d\.\d+\.conv\d)"
)


def setting(default, help: str, **limits):
    """A field with the help that `--help` shows; of a number with its `limits`, see [`check_number`]."""
    return field(default=default, metadata={"help": help, "limits": limits})


SEED = {"least": 0, "most": 2**63 - 1}
PULL = {"least": 0, "infinite": True}
MOST = 2**31 - 1  # of whole numbers that count something


def check_number(
    name: str, value, kind: type = int, *, least: float | None = None, above: float | None = None,
    most: float | None = None, infinite: bool = False,
):  # fmt: skip
    """`value` as a plain `int` or `float`.

    Raises:
        ValueError: it is none (`True`, a text and a fraction where an int is wanted are not), NaN, infinite where that
            is not allowed, or outside its limits; the message begins with the `name` of the setting.
    """
    wanted = "a whole number" if kind is int else "a number"
    found = None
    if isinstance(value, Integral if kind is int else Real) and not isinstance(value, bool):
        try:
            found = kind(value)
        except OverflowError:
            wanted += " of usual size"
    if found is None or found != found or (found in (math.inf, -math.inf) and not infinite):
        wanted += "" if found is None or infinite else " that is finite"
        raise ValueError(f"{name} must be {wanted}, got {shortened(value)}.")
    if least is not None and most is not None and not least <= found <= most and kind is float:
        raise ValueError(f"{name} must lie between {least} and {most}, got {shortened(value)}.")
    if above is not None and found <= above:
        raise ValueError(f"{name} must be above {above}, got {shortened(value)}.")
    if least is not None and found < least:
        raise ValueError(f"{name} must {f'be at least {least}' if least else 'not be negative'}, got {found}.")
    most = MOST if most is None and kind is int else most
    if most is not None and found > most:
        raise ValueError(f"{name} must be at most {most:,}, got {shortened(value)}.")
    return found


def shortened(value) -> str:
    """`value` as a message quotes it, however long it is."""
    try:
        text = repr(value)
    except ValueError:  # an int of thousands of digits
        text = "a huge number"
    return text if len(text) <= 80 else f"{text[:60]}..."


_KINDS = {"int": int, "float": float, "bool": bool, "str": str}
_WORDS = {bool: "true or false", str: "a text"}


def check_fields(config, limits: Mapping[str, Mapping] | None = None) -> None:
    """Every field of a dataclass whose annotation is a plain kind (`int`, `float | None`, `tuple[float, ...]`, ...)
    is of that kind, and a number within the limits of its [`setting`], or those given here by name.

    Raises:
        ValueError: one is not; the message names it.
    """
    for item in fields(config):
        value, hint = getattr(config, item.name), str(item.type).removesuffix(" | None")
        allowed = (limits or {}).get(item.name, item.metadata.get("limits", {}))
        if value is None and hint != item.type:
            continue
        if hint == "tuple[float, ...]":
            if not isinstance(value, (tuple, list)) or not value:
                raise ValueError(f"{item.name} must be a list of numbers, got {shortened(value)}.")
            value = tuple(check_number(f"each of {item.name}", one, float, **allowed) for one in value)
        elif hint in ("int", "float"):
            value = check_number(item.name, value, _KINDS[hint], **allowed)
        elif hint in _KINDS and not isinstance(value, _KINDS[hint]):
            raise ValueError(f"{item.name} must be {_WORDS[_KINDS[hint]]}, got {shortened(value)}.")
        object.__setattr__(config, item.name, value)


def check_kind(name: str, value, kind: type):
    """Returns `value`, an argument of this `name`.

    Raises:
        TypeError: it is not of this kind; of what can be made into one (`kind.made_from`), the message says how.
    """
    if not isinstance(value, kind):
        known = {dict: f"pass {kind.__name__}(**it)"} if is_dataclass(kind) else {}
        for reader in ("from_pretrained", "read"):
            known |= {(str, os.PathLike): f"load it with {kind.__name__}.{reader}"} if hasattr(kind, reader) else {}
        known |= getattr(kind, "made_from", {})
        hint = next((f": {how}" for other, how in known.items() if isinstance(value, other)), "")
        found = "None" if value is None else f"of the type {type(value).__name__}"
        article = "an" if kind.__name__[0] in "AE" else "a"
        raise TypeError(f"{name} must be {article} {kind.__name__}, not {found}{hint}.")
    return value


@dataclass
class FitConfig:
    """Settings of [`fit`].

    Args:
        weight_decay (`float`): decoupled for AdamW.
        schedule (`str`):
            `"cosine"` falls to 0 after the warm-up, step by step. `"epochs"` is that of the published prompt learners
            (CoOp, arXiv 2109.01134, and its successors), set once per epoch: 1e-5 in the first epoch, then half a
            cosine from the peak, which does not reach 0.

    Raises:
        ValueError: a value of another kind, or a number outside its limits, see [`check_fields`].
    """

    epochs: int = setting(10, "Passes over the examples.", least=1)
    batch_size: int = setting(128, "Examples per step, over all processes.", least=1)
    lr: float = setting(1e-3, "Peak learning rate.", above=0)
    weight_decay: float = setting(1e-3, "Weight decay.", least=0)
    warmup: float = setting(0.05, "Share of the steps with linear warm-up, then cosine to 0.", least=0, most=1)
    schedule: str = setting("cosine", "'cosine' or 'epochs' (of published prompt learners).")
    optimizer: str = setting("adamw", "'adamw' or 'sgd' (momentum 0.9).")
    seed: int = setting(0, "Seed of the order of examples and of random draws.", **SEED)

    def __post_init__(self):
        check_fields(self)


def config_of(kind: type, config):
    """The settings that were passed, or those by default.

    Raises:
        TypeError: they are of another kind.
    """
    return kind() if config is None else check_kind("config", config, kind)


_SGD = {"optimizer": "sgd", "schedule": "epochs", "lr": 2e-3, "weight_decay": 5e-4, "warmup": 0.0}
_ADAMW = {"optimizer": "adamw", "schedule": "cosine", "lr": 2e-4, "weight_decay": 1e-3, "warmup": 0.05}
METHOD_SETTINGS = {
    "lora": {**_ADAMW, "epochs": 20, "batch_size": 64, "pull": "kl", "keep_near": 0.1, "augment": "shift"},
    "coop": {**_SGD, "batch_size": 32},
    "kgcoop": {**_SGD, "epochs": 100, "batch_size": 128, "pull": "cosine", "keep_near": 8.0},
    "prograd": {**_SGD, "batch_size": 32, "pull": "kl", "keep_near": 1.0, "project": True},
    "cocoop": {**_SGD, "epochs": 10, "batch_size": 1},
    "contcoop": {**_SGD, "epochs": 100, "batch_size": 32, "pull": "kl", "keep_near": 0.1},
    "ivlp": {**_SGD, "lr": 2.5e-3, "epochs": 20, "batch_size": 4, "augment": "crop"},
    "maple": {**_SGD, "lr": 3.5e-3, "epochs": 5, "batch_size": 4, "augment": "crop"},
    "promptsrc": {
        **_SGD, "lr": 2.5e-3, "epochs": 20, "batch_size": 4, "augment": "crop", "pull": "promptsrc", "keep_near": 1.0,
    },
}  # fmt: skip
"""What a field of [`TuningConfig`] is for each method where it is left open, as published where it was; other methods
of PEFT take LoRA's."""
METHODS = tuple(METHOD_SETTINGS)
TAUGHT_EPOCHS = 10  # of all methods where a teacher labels the images: there are many more of these


@dataclass
class TuningConfig(FitConfig):
    """How [`tune`] trains; what is trained is its `adapter`. What is left open becomes the method's published setting
    ([`of`](TuningConfig.of)); only `augment` stays off where that lets images be embedded once.

    | adapter | what is learnt | optimiser, schedule, rate | batch, epochs | pull |
    |---|---|---|---|---|
    | `lora`, others of PEFT | low-rank updates of the image tower | AdamW, cosine, 2e-4 | 64, 20 | 0.1 · kl |
    | `coop` | a context beside the name | SGD, epochs, 2e-3 | 32, 200 (100 with up to 4 shots, 50 with 1) | none |
    | `kgcoop` | the same | SGD, epochs, 2e-3 | 128, 100 | 8 · cosine |
    | `prograd` | the same, where the gradient agrees with the pull's | as `coop` | as `coop` | kl |
    | `cocoop` | a context that each image shifts | SGD, epochs, 2e-3 | 1, 10 | none |
    | `contcoop` | a context that attends to the name's embeddings | SGD, epochs, 2e-3 | 32, 100 | 0.1 · kl |
    | `ivlp` | prompts in several layers of both towers | SGD, epochs, 2.5e-3 | 4, 20 | none |
    | `maple` | text prompts and maps from them to image prompts | SGD, epochs, 3.5e-3 | 4, 5 | none |
    | `promptsrc` | as `ivlp`, averaged over epochs | SGD, epochs, 2.5e-3 | 4, 20 | promptsrc |

    ContCoOp's abstract (arXiv 2412.20895) names none of these: rate and schedule are CoOp's, the pull was chosen on
    the sandbox ("Defaults of tuning" in `tests/studies/RESULTS.md`). All but `lora` and the last three leave the image
    tower as it is, so pictures are embedded once. Where pictures changed, tune the image tower; where the model does
    not know the *words*, a prompt. With a teacher in place of labels each has 10 epochs, and `lora` and `contcoop` no
    pull ("Label-free re-tuning" there).

    Args:
        epochs, batch_size, lr, weight_decay, warmup, schedule, optimizer (*optional*):
            See [`FitConfig`]. The default rates are for CLIPs of usual size (LoRA's after Zanella and Ben Ayed, arXiv
            2405.18541). The sandbox's tiny models want more: 1e-2 with AdamW in its demo.
        pull (`str`, *optional*):
            What training is pulled back to zero-shot by: `"kl"` (predictions on the training images), `"cosine"`,
            `"l2"`, `"l1"` (class vectors) or `"promptsrc"` (predictions, class vectors and image embeddings).
        keep_near (`float`, *optional*):
            Weight of that pull. What was tuned far away from zero-shot carries over badly: more of it pays where
            zero-shot is only partly wrong, and costs accuracy where it is mostly wrong (measured there, too).
        project (`bool`, *optional*):
            ProGrad's rule: follow the cross-entropy only where it does not oppose the pull, with strength `keep_near`.
        gaussian_mean, gaussian_std (`float`, *optional*):
            Average the parameters over the epochs with these weights; `promptsrc`: 15 and 1 of 20 epochs.
        augment (`str`, *optional*):
            Of the training images: `"none"`, `"shift"` (mirrored, moved a little) or `"crop"` (published: mirrored,
            random resized crops). Methods that leave the image tower alone default to `"none"`, which embeds each
            image once.
        views (`int`, *optional*, defaults to 0):
            Those methods with `augment`: embed that many augmented views of each image once and draw among them.
        precision (`str`, *optional*, defaults to `"float32"`):
            `"bfloat16"` runs the towers under autocast; what is learnt, embeddings, logits and losses stay float32.
        text_batch_size (`int`, *optional*, defaults to 256):
            Class prompts per forward pass. With more classes than that, activations are computed again for the
            gradient, so that memory does not grow with their number.

    Raises:
        ValueError: an unknown pull, augmentation or precision, a value of another kind, or a number out of range.
    """

    epochs: int | None = setting(None, "Passes over the training images.", least=1)
    batch_size: int | None = setting(None, "Images per step, over all processes.", least=1)
    lr: float | None = setting(None, "Peak learning rate.", above=0)
    weight_decay: float | None = setting(None, "Weight decay.", least=0)
    warmup: float | None = setting(None, "Cosine schedule: share of the steps to warm up.", least=0, most=1)
    schedule: str | None = setting(None, "'cosine' or 'epochs' (published prompt learners).")
    optimizer: str | None = setting(None, "'adamw' or 'sgd' (momentum 0.9).")
    shots: int | None = setting(
        None, f"Labelled images per class, {SHOTS} if unset; all of a class that has fewer.", least=1
    )
    pull: str | None = setting(None, f"Back to zero-shot: {', '.join(PULLS)}.")
    keep_near: float | None = setting(None, "Weight of the pull towards zero-shot.", least=0)
    project: bool | None = setting(None, "Follow no gradient against the pull (ProGrad).")
    gaussian_mean: float | None = setting(None, "Average over epochs: centre.", least=0)
    gaussian_std: float | None = setting(None, "Average over epochs: spread.", above=0)
    augment: str | None = setting(None, f"Of training images: {', '.join(AUGMENTATIONS)}.")
    views: int = setting(0, "Augmented views per image, embedded once; 0: new each step.", least=0)
    precision: str = setting("float32", "'float32', or 'bfloat16' autocast of the towers.")
    text_batch_size: int = setting(256, "Class prompts per forward pass.", least=1)

    def __post_init__(self):
        super().__post_init__()
        for name, choices in (("pull", PULLS), ("augment", AUGMENTATIONS), ("precision", PRECISIONS)):
            if getattr(self, name) is not None:
                check_choice(name, getattr(self, name), choices)

    def of(self, method: str, *, taught: bool = False) -> TuningConfig:
        """These settings with nothing left open: the others are the method's, see [`METHOD_SETTINGS`].

        Args:
            method (`str`): such as `"coop"`; one that is not listed there is trained as LoRA is.
            taught (`bool`, *optional*): a teacher labels all the images: no `shots`, 10 epochs, and no pull of
                predictions to zero-shot ones, which the soft labels hold already.

        Raises:
            ValueError: a setting that this training does not read.
        """
        if taught and self.shots is not None:
            raise ValueError("shots are of labelled images, and a teacher labels all there are: leave shots out.")
        shots = self.shots or SHOTS
        by_shots = 50 if shots == 1 else 100 if shots <= 4 else 200
        common = {"epochs": by_shots, "pull": "kl", "keep_near": 0.0, "augment": "none", "project": False}
        published = {**common, **METHOD_SETTINGS.get(method, METHOD_SETTINGS["lora"])}
        published |= {"epochs": TAUGHT_EPOCHS} if taught else {"shots": shots}
        if taught and published["pull"] == "kl" and not published["project"]:
            published["keep_near"] = 0.0  # the soft labels hold the zero-shot predictions already
        found = replace(self, **{name: value for name, value in published.items() if getattr(self, name) is None})
        if method == "promptsrc":
            found.gaussian_mean = 0.75 * found.epochs if found.gaussian_mean is None else found.gaussian_mean
            found.gaussian_std = 0.05 * found.epochs if found.gaussian_std is None else found.gaussian_std
        if (found.gaussian_mean is None) != (found.gaussian_std is None):
            raise ValueError("gaussian_mean and gaussian_std must both be given, or neither.")
        if found.schedule == "epochs" and self.warmup:
            raise ValueError("schedule 'epochs' does not read warmup: leave that out, or choose 'cosine'.")
        found.warmup = 0.0 if found.schedule == "epochs" else found.warmup
        if self.pull is not None and not found.keep_near and self.keep_near is None:
            logger.warning("the pull %s has no weight, so it does nothing: give keep_near, such as 1.0.", self.pull)
        if found.project and not found.keep_near and self.keep_near is None:
            raise ValueError("project follows the pull, which has no weight: give keep_near, such as 1.0.")
        if found.augment == "none" and found.views:
            raise ValueError("without augmentation there are no views: leave that out, or choose an augment.")
        return found


def split_tuning(settings: Mapping) -> dict:
    """Arguments of [`tune`] from one flat mapping, as YAML files and saved adapters hold it.

    Returns:
        `dict`: `config`, a [`TuningConfig`] of the settings that are its fields, and `adapter`, the other ones: its
        `method` (`"lora"` where none is named) and options of its PEFT configuration.

    Raises:
        ValueError: what [`TuningConfig`] refuses.
    """
    training = {key: value for key, value in settings.items() if key in TuningConfig.__dataclass_fields__}
    adapter = {key: value for key, value in settings.items() if key not in training}
    return {"adapter": {"method": "lora", **adapter}, "config": TuningConfig(**training)}


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raises a `ValueError` that lists the choices where `value` is none of them."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}.")


def check_read(config, choice: str, unread: Collection[str]) -> None:
    """
    Raises:
        ValueError: one of the fields `unread` is not as it is by default, though `choice` does not read it.
    """
    given = [f.name for f in fields(config) if f.name in unread and getattr(config, f.name) != f.default]
    if given:
        raise ValueError(f"{choice} does not read {', '.join(given)}: leave that out, or choose another.")


@dataclass
class ExtractionConfig(FitConfig):
    """Settings of [`extract`]. The fields of the gradient solver default to the published run.

    Args:
        solver (`str`, *optional*):
            `"image_map"` (an image side), `"discriminant"` or `"ridge"` (class vectors), all in closed form, or
            `"gradient"` (published). When omitted: the teacher's own class vectors where it has them (prompts), the
            image map where its image tower was tuned; of stored logits the ridge where they are linear in the
            embeddings (a head was tuned; told by the leave-one-out error), else the image map.
        shrinkage (`float`):
            Of the discriminant; strong, because directions that are only reliable on the weak model do not carry over.
        lambdas (`tuple[float, ...]`): chosen from by leave-one-out error.
        basis (`str`): `"fixed"` is 3-4 times faster.

    The remaining fields are those of [`FitConfig`], with the published values.

    Raises:
        ValueError: an unknown solver or basis, a number out of range, or a setting that the solver does not read.
    """

    solver: str | None = setting(None, f"{', '.join(SOLVERS)} (published); by what was tuned if unset.")
    shrinkage: float = setting(30.0, "Of the discriminant's covariance, in mean variances.", least=0)
    lambdas: tuple[float, ...] = setting(LAMBDAS, "Penalties the ridge chooses from.", least=0)
    teacher_temperature: float = setting(0.5, "Divides the teacher's logits.", above=0)
    noise_std: float = setting(0.5, "Input noise in units of each row's logit std.", least=0)
    noise_probability: float = setting(0.5, "Share of the batches with noise.", least=0, most=1)
    basis: str = setting("learned", "'learned' (published) or 'fixed' (faster).")
    width: int | None = setting(None, "D, rows of the basis; the number of anchors if unset.", least=1, most=2**16)

    def __post_init__(self):
        if self.solver is not None:
            check_choice("solver", self.solver, SOLVERS)
        check_choice("basis", self.basis, ("learned", "fixed"))
        super().__post_init__()
        closed = {"image_map": None, "discriminant": "shrinkage", "ridge": "lambdas", None: "lambdas"}
        if self.solver in closed:
            unread = {item.name for item in fields(self)} - {"solver", "seed", closed[self.solver]}
        else:
            unread = {"shrinkage", "lambdas"}
        check_read(self, f"solver {self.solver!r}" if self.solver else "an extraction with no solver chosen", unread)


PARTS = ("both", "image", "text")


@dataclass
class TransferConfig:
    """Settings of [`transfer`].

    Args:
        refit (`bool`, *optional*):
            With images: fit the adapter to the experts' labels on them (linear adapters only). Done when omitted with
            100 images or more, and one per class; fewer do harm.
        parts (`str`, *optional*):
            Of the refit: `"image"` (pictures look different), `"text"` (words mean something else) or `"both"`. When
            omitted both, but the image side alone where a class is not among the `seen_classes` or hardly among the
            images: a text side would not know it. What is asked for is made, of few of the classes too.
        even (`bool`, *optional*):
            Whether the images hold all classes about equally often. Judged by the labels when omitted.
        zero_shot_weight (`float`, *optional*):
            Of carried class vectors: 0 keeps all that tuning taught, larger values protect classes that the tuning
            never saw. Chosen by `seen_classes` when omitted: 0 without unseen classes, else 1/2.
        beta (`float`): β of a logit-space bridge built here (published, absolute); infinite for no basis change.

    Raises:
        ValueError: unknown parts, a weight out of range, or a setting that this transfer does not read.
    """

    refit: bool | None = setting(None, "Fit to the images' soft labels; done with 100 images or more if unset.")
    parts: str | None = setting(None, f"Of the refit: {', '.join(PARTS)}; chosen if unset.")
    even: bool | None = setting(None, "Whether the images hold the classes equally often; judged if unset.")
    zero_shot_weight: float | None = setting(
        None, "Share of the strong model's own class vectors; by seen classes if unset.", least=0, most=1
    )
    beta: float = setting(BETA, "Pull of a logit-space bridge towards the identity.", **PULL)
    beta_per_image: float | None = setting(None, "Beta = this times the number of images.", **PULL)

    def __post_init__(self):
        check_fields(self)
        if self.parts is not None:
            check_choice("parts", self.parts, PARTS)
        if self.refit is False:
            check_read(self, "a transfer without a refit", ("parts", "even"))
        if self.beta_per_image is not None:
            check_read(self, "a bridge with beta_per_image", ("beta",))


@dataclass
class LabelTuningConfig(FitConfig):
    """Settings of [`label_tune`]; the other fields are those of [`FitConfig`]. The basis W moves unconstrained."""

    epochs: int = setting(50, "Passes over the labelled images.", least=1)
    batch_size: int = setting(32, "Images per step.", least=1)
    train_basis: bool = setting(False, "Also move the basis of a published adapter.")
