"""The wrapped token table: context slots enter a text as negative ids and leave the table as learnt vectors."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..registration import AdapterLayer
from .config import PromptConfig
from .texts import (
    arrange,
    class_inputs,
    end_token_id,
    holds,
    load_tokenizer,
    name_lengths,
    start_tokens,
    text_ends,
    without_padding,
)


NO_TOKENIZER = "there is no tokenizer beside this model: call set_classes(model, class_names, tokenizer=...)."


# What belongs to one call. Never on a module: several threads may share a model, and copies of it for several devices
# share its hooks.
_PLAIN: ContextVar[bool] = ContextVar("plain", default=False)  # inside a call that must see the base model
_VECTORS: ContextVar[Tensor | None] = ContextVar("vectors", default=None)  # for the slots of the text under way
_IMAGES: ContextVar[Tensor | None] = ContextVar("images", default=None)  # see `seeing`


@contextmanager
def _inside(variable: ContextVar, value) -> Iterator[None]:
    token = variable.set(value)
    try:
        yield
    finally:
        variable.reset(token)


def as_base():
    """Inside, a model answers as if there were no prompt learner on it."""
    return _inside(_PLAIN, True)


def seeing(images: Tensor):
    """Inside, each text of a batch belongs to one of these unit image embeddings (B, d)."""
    return _inside(_IMAGES, images)


def images_seen() -> Tensor | None:
    """The images of [`seeing`], if inside."""
    return _IMAGES.get()


class Texts(NamedTuple):
    """Texts without slots: ids and mask (B, L), positions of their ends (B,), which tokens are the name (B, L)."""

    ids: Tensor
    mask: Tensor | None
    ends: Tensor
    named: Tensor


class PromptLayer(AdapterLayer):
    """Takes the place of a text tower's token embedding; holds any number of adapters, the first active one answers.

    Bound methods of it are hooks elsewhere. `insert`, before the text tower, puts the ids ``-1 … -M`` beside the name
    and lengthens the mask, so that positions, masks and the pooling at the end token follow by themselves; `forward`
    gives id ``-i`` the i-th row of the context. `before_text_layer`, `after_patches` and `before_vision_layer` put
    prompts into deeper layers and the image tower. `fill_texts`, before the whole model, gives a call without texts
    the prompts of the config's classes.

    A learner is a subclass: `prefix`, `parts` (its parameters or modules, each an attribute `prefix + part`),
    `initial` for their start, and whichever of `context`, `text_prompt` and `vision_prompt` it fills; `reads_images`
    says whether its context depends on the image. The `base_layer` is the token table; the text tower reads at most so
    many `positions`.
    """

    parts = ("ctx",)
    reads_images = False
    other_param_names = ("configs", "class_texts", "class_rows")

    def __init__(self, base_layer: nn.Embedding, model_config, positions: int):
        super().__init__()
        self.base_layer = base_layer
        self.positions = positions
        self.start, self.end_id = start_tokens(model_config), end_token_id(model_config)
        self.reads_every_position = model_config.model_type == "siglip"
        self.class_texts: dict[str, dict[str, Tensor]] = {}
        self.class_rows: dict[str, Tensor] = {}  # (C, L), see `without_padding`

    # ---- adapters ---------------------------------------------------------------------------------------------------

    @property
    def active_name(self) -> str | None:
        """The adapter that answers: the first active one held here, none while adapters are disabled."""
        return None if self.disable_adapters or _PLAIN.get() else super().active_name

    @property
    def active_config(self) -> PromptConfig | None:
        name = self.active_name
        return None if name is None else self.configs[name]

    @property
    def moves_images(self) -> bool:
        """Whether the active adapter has prompts in the image tower, too."""
        return self.active_name is not None and self.vision_prompt(self.active_name, 0) is not None

    def update_layer(self, name: str, config: PromptConfig, root: nn.Module) -> None:
        """Adds an adapter at its start; a phrase changes nothing compared with writing it out."""
        self.configs[name] = config
        self.class_texts.pop(name, None)
        with torch.random.fork_rng():
            torch.manual_seed(config.seed)  # modules draw their start from the global generator
            self.fill(name, self.initial(config, root))
        tokenizer = load_tokenizer(root) if getattr(config, "class_specific", False) else None
        if tokenizer is not None:
            self.set_classes(name, config.class_names, tokenizer, root.config.model_type)
        self._move_adapter_to_device_of_base_layer(name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def initial(self, config: PromptConfig, root: nn.Module) -> dict[str, Tensor | nn.Module]:
        """Start of every part; parts a configuration does not have are left out."""
        return {"ctx": self.initial_context(config)}

    def initial_context(self, config: PromptConfig) -> Tensor:
        """(M, width): noise from N(0, 0.02²) that the seed decides, then the token embeddings of the phrase.

        Raises:
            ValueError: the phrase's ids are not in this token table, or the context leaves no room for a text.
        """
        table, ids = self.get_base_layer().weight, config.init_token_ids or []
        count = len(self.slot_ids(config))
        if count > self.positions - 3:  # start token, one word, end token
            said = f"the text tower reads {self.positions} tokens in all"
            raise ValueError(f"a context of {count} vectors leaves no room for a text: {said}. Use a smaller n_ctx.")
        if ids and not 0 <= min(ids) <= max(ids) < len(table):
            raise ValueError(
                f"init_token_ids {ids} are not all in this model's vocabulary of {len(table)}: "
                "they come from another tokenizer. Leave them out and give init_phrase."
            )
        words = table.detach()[config.learned_ids].float()
        return torch.cat([self.noise(config, config.n_ctx - len(words), table.shape[1]).to(words.device), words])

    @staticmethod
    def noise(config: PromptConfig, *shape: int) -> Tensor:
        """A draw from N(0, 0.02²) that the seed decides, also while PEFT builds modules without memory."""
        generator = torch.Generator().manual_seed(config.seed)
        return 0.02 * torch.randn(*shape, generator=generator, dtype=torch.float32, device="cpu")

    def set_classes(self, name: str, names: Sequence[str], tokenizer, family: str) -> None:
        """See [`set_classes`](hf_transmiter.tuners.prompts.set_classes)."""
        config = self.configs[name]
        if tokenizer is None:
            raise ValueError(NO_TOKENIZER)
        inputs = class_inputs(names, tokenizer, family, self.positions, len(self.slot_ids(config)))
        if getattr(config, "class_specific", False):
            unknown = [n for n in names if n not in config.class_names]
            if unknown:
                raise ValueError(
                    f"class-specific contexts know only the {len(config.class_names)} classes they were learnt for, "
                    f"not {unknown[0]!r}: use a context shared by all classes for new names."
                )
            all_names = class_inputs(config.class_names, tokenizer, family, self.positions, config.n_ctx)
            ids = all_names["input_ids"]
            rows = without_padding(ids, text_ends(ids, all_names.get("attention_mask"), self.end_id))
            keys = list(map(tuple, rows.tolist()))
            last = {key: row for row, key in enumerate(keys)}
            for row, key in enumerate(keys):
                if last[key] != row:
                    raise ValueError(
                        f"the class names {config.class_names[row]!r} and {config.class_names[last[key]]!r} are the "
                        "same text to the tokenizer: class-specific contexts need names that read differently."
                    )
            self.class_rows[name] = rows
        else:
            config.class_names = list(names)
        self.class_texts[name] = inputs

    # ---- what a learner fills ---------------------------------------------------------------------------------------

    def context(self, name: str, texts: Texts, tower: nn.Module) -> Tensor | None:
        """(M, width), or (B, M, width) for these texts: the vectors in the slots."""
        return self.part("ctx", name)

    def text_prompt(self, name: str, layer: int) -> Tensor | None:
        """(M, width): what takes the context's places before the text tower's layer, counted from 0; or `None`."""
        return None

    def vision_prompt(self, name: str, layer: int) -> Tensor | None:
        """(n, width): what stands behind the patches from the image tower's layer on; `None` leaves what is there."""
        return None

    def slot_ids(self, config: PromptConfig) -> list[int]:
        """What goes in beside the name: -1 … -M for the context, ordinary ids for words of the phrase."""
        return [*range(-1, -1 - config.n_ctx, -1), *config.kept_ids]

    # ---- hooks ------------------------------------------------------------------------------------------------------

    def forward(self, input_ids: Tensor) -> Tensor:
        """Token ids (B, L), slots negative, to embeddings (B, L, width)."""
        context = _VECTORS.get()
        if context is None:
            return self.base_layer(input_ids)
        embeds = self.base_layer(input_ids.clamp(min=0))
        slots = (-1 - input_ids).clamp(min=0)
        if context.ndim == 2:
            vectors = context[slots]
        else:
            vectors = context.gather(1, slots.unsqueeze(-1).expand(-1, -1, context.shape[-1]))
        return torch.where((input_ids < 0).unsqueeze(-1), vectors.to(embeds), embeds)

    def insert(self, tower: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """Before the text tower's forward: slots enter ids and mask; the tower counts positions anew.

        Padding is cut off: the texts end with the longest one (in the SigLIP family, which reads every position, they
        stay as long as they were where there is room).

        Raises:
            ValueError: a text is too long for the tower with the context in it, or padded on the left.
        """
        kwargs = {**dict(zip(("input_ids", "attention_mask"), args, strict=False)), **kwargs}
        ids, mask = kwargs.get("input_ids"), kwargs.get("attention_mask")
        if self.active_name is None or ids is None:
            return None
        self = _own(tower)  # of a copy for another device the hooks are those of the original
        config = self.active_config
        slots = torch.tensor(self.slot_ids(config), device=ids.device).expand(ids.shape[0], -1)
        count = slots.shape[1]
        ids, mask, ends = self._cut(ids, mask, self.positions - count)
        names = name_lengths(ids, ends, self.start, config.period_id) if config.reads_names else torch.ones_like(ends)
        place = torch.arange(ids.shape[1], device=ids.device)
        texts = Texts(ids, mask, ends, (place >= self.start) & (place < self.start + names[:, None]))
        _VECTORS.set(self.context(self.active_name, texts, tower))
        before = {"end": count, "middle": count // 2, "front": 0}[getattr(config, "position", "end")]
        order = arrange(ids.shape[1], self.start, count, before, names)
        kwargs["input_ids"] = torch.cat([ids, slots], 1).gather(1, order)
        if mask is not None:
            kwargs["attention_mask"] = torch.cat([mask, torch.ones_like(slots, dtype=mask.dtype)], 1).gather(1, order)
        # Both are counted for the text as it was; the towers' own defaults fit the longer one.
        kwargs.pop("position_ids", None)
        kwargs.pop("token_type_ids", None)
        return (), kwargs

    def finish(self, tower: nn.Module, args: tuple, output) -> None:
        """After the text tower's forward, also one that failed."""
        _VECTORS.set(None)

    def _cut(self, ids: Tensor, mask: Tensor | None, room: int) -> tuple[Tensor, Tensor | None, Tensor]:
        """Drops padding, never words; returns ids and mask (B, L) with L <= room, and the texts' last positions."""
        if mask is not None and not holds(mask[:, 0].all(), "texts must be padded on the right"):
            raise ValueError("texts must be padded on the right: the context goes after their first token.")
        known = self.active_config.end_id  # the tokenizer's own, which a model's configuration may have wrong
        ends = text_ends(ids, mask, self.end_id if known is None else known)
        if torch.compiler.is_exporting():  # lengths are not known
            holds(ends.max() < room, f"a text has more than {room} tokens")
            return ids[:, :room], None if mask is None else mask[:, :room], ends
        longest = int(ends.max()) + 1
        if longest > room:
            raise ValueError(
                f"text {int(ends.argmax())} of the batch has {longest} tokens, but only {room} of the text tower's "
                f"{self.positions} positions are left beside the learnt context: shorten the name, or use a smaller "
                "n_ctx. Prompts of a tuned model are '{}.', without words of their own."
            )
        length = min(room, ids.shape[1]) if self.reads_every_position else longest
        return ids[:, :length], None if mask is None else mask[:, :length], ends

    def before_text_layer(self, index: int, layer: nn.Module, args: tuple, kwargs: dict) -> tuple | None:
        prompt = None if self.active_name is None else self.text_prompt(self.active_name, index)
        if prompt is None:
            return None
        return _with_hidden(args, kwargs, lambda hidden: _put(hidden, prompt, self.start, self.start + len(prompt)))

    def after_patches(self, embeddings: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
        prompt = None if self.active_name is None else self.vision_prompt(self.active_name, 0)
        return None if prompt is None else _put(output, prompt, output.shape[1], output.shape[1])

    def before_vision_layer(self, index: int, layer: nn.Module, args: tuple, kwargs: dict) -> tuple | None:
        prompt = None if self.active_name is None or not index else self.vision_prompt(self.active_name, index)
        if prompt is None:
            return None
        return _with_hidden(args, kwargs, lambda hidden: _put(hidden, prompt, -len(prompt), hidden.shape[1]))

    def fill_texts(self, root: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """Before the whole model's forward: the classes' prompts, where no texts were given."""
        config = self.active_config
        if config is None or not config.class_names or args or kwargs.get("input_ids") is not None:
            return None
        if self.active_name not in self.class_texts:
            self.set_classes(self.active_name, config.class_names, load_tokenizer(root), root.config.model_type)
        device = root.device if kwargs.get("pixel_values") is None else kwargs["pixel_values"].device
        texts = {key: value.to(device) for key, value in self.class_texts[self.active_name].items()}
        return args, {**kwargs, **texts}

    def attach(self, root: nn.Module) -> None:
        """Registers the hooks on the whole model; `detach` takes them off."""
        text, vision = root.text_model, root.vision_model
        self.hooks = [
            root.register_forward_pre_hook(self.fill_texts, with_kwargs=True),
            text.register_forward_pre_hook(self.insert, with_kwargs=True),
            text.register_forward_hook(self.finish, always_call=True),
        ]
        prompted = [(text, self.before_text_layer)]
        if takes_image_prompts(root):
            self.hooks.append(vision.embeddings.register_forward_hook(self.after_patches))
            prompted.append((vision, self.before_vision_layer))
        for tower, hook in prompted:
            for index, layer in enumerate(layers(tower)):
                # Bound methods and partials of them survive deepcopy and pickle; closures would not.
                bound = functools.partial(hook, index)
                self.hooks.append(layer.register_forward_pre_hook(bound, with_kwargs=True))


def _own(tower: nn.Module) -> PromptLayer:
    """The layer in a text tower.

    Raises:
        ValueError: another adapter is around it, which would read its negative ids.
    """
    for module in tower.modules():
        if isinstance(getattr(module, "base_layer", None), PromptLayer):
            raise ValueError(
                f"a {type(module).__name__} layer of another adapter was put around the prompt learner's token table: "
                "put that adapter on first, or leave the token table out of its target_modules."
            )
        if isinstance(module, PromptLayer):
            return module
    raise ValueError("the prompt learner's token table was replaced: load the model and its adapter anew.")


def takes_image_prompts(root: nn.Module) -> bool:
    """Whether prompts can go behind the patches: not in open_clip's towers, which are of many kinds."""
    return root.config.model_type != "open_clip"


def layers(tower: nn.Module) -> nn.ModuleList:
    """The transformer layers of a tower, which families keep under different names.

    Raises:
        ValueError: it has none (a ResNet).
    """
    found = next((module for module in tower.modules() if isinstance(module, nn.ModuleList)), None)
    if found is None:
        raise ValueError(f"a {type(tower).__name__} has no transformer layers that prompts could go into.")
    return found


def _with_hidden(args: tuple, kwargs: dict, change) -> tuple[tuple, dict]:
    if args:
        return (change(args[0]), *args[1:]), kwargs
    return args, {**kwargs, "hidden_states": change(kwargs["hidden_states"])}


def _put(hidden: Tensor, prompt: Tensor, start: int, stop: int) -> Tensor:
    """Hidden states (B, L, width) with the prompt (n, width) in place of those from `start` to `stop`."""
    rows = prompt.to(hidden).expand(hidden.shape[0], -1, -1)
    return torch.cat([hidden[:, :start], rows, hidden[:, stop:]], 1)
