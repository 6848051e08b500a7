"""Configurations of the prompt learners: published settings are the defaults."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from peft import PeftConfig

from ...data.class_names import check_names
from ...settings import SEED, check_choice, check_fields
from ..registration import PeftType


POSITIONS = ("end", "middle", "front")
CLASS_EMBEDS = ("tokens", "mean_token", "text_feature")
_LIMITS = {
    "n_ctx": {"most": 10_000},
    **dict.fromkeys(("n_vision", "heads", "text_depth", "depth"), {"least": 1, "most": 10_000}),
    **dict.fromkeys(("vision_depth", "layer"), {"least": 0, "most": 10_000}),
    **dict.fromkeys(("period_id", "end_id"), {"least": 0}),
    "seed": SEED,
}


@dataclass
class PromptConfig(PeftConfig):
    """What every prompt learner has: a context of M vectors in the text.

    Args:
        n_ctx (`int`, *optional*):
            M, vectors in the context. The phrase's number of tokens when omitted, or 16 without a phrase. A context
            longer than its phrase starts with noise and ends with the phrase.
        init_phrase (`str`, *optional*):
            Words whose token embeddings the context starts from, such as `"a photo of a"`. Without, it starts from
            N(0, 0.02²).
        init_token_ids (`list[int]`, *optional*):
            Token ids of `init_phrase`, without special tokens. Filled in with the tokenizer saved beside the model;
            give them for a model that was built in memory. Saved, so that loading needs no tokenizer.
        seed (`int`, *optional*, defaults to 0): of the random start.
        class_names (`list[str]`, *optional*):
            The classes asked about in a call without texts, `model(pixel_values=...)`; see `set_classes`.
        period_id, end_id (`int`, *optional*):
            Token ids of the period after a name and of the end of a text, filled in by learners that tell a name from
            what follows it.
        base (`dict`, *optional*): sizes and vocabulary of the model it was made on; filled in, checked when loaded.
        provenance (`dict`, *optional*): what it was trained on, filled in by `tune`.

    Raises:
        ValueError: a number outside its limits, a phrase of more than M tokens, or a repeated or empty class name.
    """

    kind: ClassVar[PeftType | None] = None
    # Facts of the base model that must be the same where the adapter is loaded.
    must_match: ClassVar[tuple[str, ...]] = ("text_width", "vocabulary_size", "vocabulary")
    reads_names: ClassVar[bool] = False
    # Whether words of the phrase beyond M vectors stay in the text as words.
    keeps_words: ClassVar[bool] = False

    n_ctx: int | None = None
    init_phrase: str | None = None
    init_token_ids: list[int] | None = None
    seed: int = 0
    class_names: list[str] | None = None
    period_id: int | None = None
    end_id: int | None = None
    base: dict[str, Any] | None = None
    provenance: dict[str, Any] | None = None
    # PEFT reads both on every config; the model's family decides which module is the token table.
    target_modules: str | None = None
    exclude_modules: str | None = None

    def __post_init__(self):
        super().__post_init__()
        self.peft_type = self.kind
        check_fields(self, _LIMITS)
        if self.n_ctx is None and self.init_phrase is None and self.init_token_ids is None:
            self.n_ctx = 16
        if self.init_token_ids is not None:
            self.start_from(self.init_token_ids)
        if self.n_ctx is not None and self.n_ctx < 1:
            raise ValueError(f"the context needs at least 1 vector, got n_ctx={self.n_ctx}.")
        if self.class_names is not None:
            check_names(self.class_names, "the prompt's classes")

    def start_from(self, token_ids: list[int]) -> None:
        """Takes the phrase's token ids, which decide M where it was left open.

        Raises:
            ValueError: more tokens than the context has vectors.
        """
        self.init_token_ids = list(token_ids)
        self.n_ctx = len(token_ids) if self.n_ctx is None else self.n_ctx
        if len(token_ids) > self.n_ctx and not self.keeps_words:
            phrase = f"the phrase {self.init_phrase!r}" if self.init_phrase else "init_token_ids"
            said = f"{phrase} has {len(token_ids)} tokens, but the context only n_ctx={self.n_ctx} vectors"
            raise ValueError(f"{said}: use a shorter phrase, or leave n_ctx out.")

    @property
    def learned_ids(self) -> list[int]:
        """Token ids the last vectors of the context start from."""
        return (self.init_token_ids or [])[: self.n_ctx]

    @property
    def kept_ids(self) -> list[int]:
        """Token ids of the phrase that stay in the text as words, after the context."""
        return (self.init_token_ids or [])[self.n_ctx :]


@dataclass
class CoOpConfig(PromptConfig):
    """CoOp: a context beside the name, one for all classes or one for each.

    The text tower reads ``[SOS] v_1 … v_M [name] [.] [EOS]`` where ``v`` (M, width) is all that is learnt. Prompts of
    a model tuned this way are ``"{}."``: with ``"a photo of a"`` to start from, the first forward pass gives what the
    untuned model gives for ``"a photo of a {}."``.

    Args:
        position (`str`, *optional*, defaults to `"end"`):
            Where the name stands: `"end"` (above), `"middle"` (after M // 2 vectors) or `"front"` (before the context;
            the period stays last).
        class_specific (`bool`, *optional*, defaults to `False`):
            A context of its own, (C, M, width) in all, for each of `class_names`; only those can be asked about.
        layer (`int`, *optional*, defaults to 0):
            0: the context is read by the first layer, as published. l: the tower reads the plain phrase, and the
            context overwrites its M positions before layer l (counted from 0), for studies of which layer's prompts
            survive an upgrade.

    Source: Zhou et al., "Learning to Prompt for Vision-Language Models" (arXiv 2109.01134).

    ```python
    >>> model = get_peft_model(clip, CoOpConfig(init_phrase="a photo of a"))
    >>> DualEncoder(model).embed_names(["cat", "dog"], templates=("{}.",))
    ```
    """

    kind: ClassVar[PeftType | None] = PeftType.COOP
    position: str = "end"
    class_specific: bool = False
    layer: int = 0

    def __post_init__(self):
        super().__post_init__()
        check_choice("position", self.position, POSITIONS)
        if self.class_specific and not self.class_names:
            raise ValueError("class-specific contexts belong to classes: pass class_names.")
        if self.layer and (self.class_specific or self.position != "end"):
            raise ValueError("a context at a deeper layer is shared by all classes and stands before the name.")
        if self.layer and self.init_phrase is None and self.init_token_ids is None:
            raise ValueError("a context at a deeper layer overwrites words: pass init_phrase.")

    def start_from(self, token_ids: list[int]) -> None:
        super().start_from(token_ids)
        if self.layer and len(token_ids) != self.n_ctx:
            said = f"a context at a deeper layer overwrites the {len(token_ids)} tokens of its phrase"
            raise ValueError(f"{said}, got n_ctx={self.n_ctx}: leave n_ctx out.")

    @property
    def reads_names(self) -> bool:
        return self.position != "end"

    @property
    def kept_ids(self) -> list[int]:
        return list(self.init_token_ids or []) if self.layer else []


@dataclass
class KgCoOpConfig(CoOpConfig):
    """KgCoOp: CoOp from `"a photo of a"`, kept near hand-written prompts while it is trained (see `tune`).

    Source: Yao et al., "Visual-Language Prompt Tuning with Knowledge-guided Context Optimization" (arXiv 2303.13283).
    """

    kind: ClassVar[PeftType | None] = PeftType.KGCOOP
    init_phrase: str | None = "a photo of a"


@dataclass
class CoCoOpConfig(PromptConfig):
    """CoCoOp: a context that every image shifts, ``v_m(x) = v_m + h(x)`` with x (d,) the unit image embedding.

    ``h`` is Linear(d, d // 16), ReLU, Linear(d // 16, width). Every image has class vectors of its own: B · C texts
    per batch, also at inference.

    Source: Zhou et al., "Conditional Prompt Learning for Vision-Language Models" (arXiv 2203.05557).
    """

    kind: ClassVar[PeftType | None] = PeftType.COCOOP
    must_match: ClassVar[tuple[str, ...]] = (*PromptConfig.must_match, "embed_dim")

    init_phrase: str | None = "a photo of a"


@dataclass
class ContCoOpConfig(PromptConfig):
    """ContCoOp: a context that attends to the class's embeddings in the *current* base model.

    ``P_c = v + MHA(LN(v), LN(E_c), LN(E_c))`` with ``v`` (M, width) the context and ``E_c`` (L_c, width) the rows of
    the base model's token table for the tokens of name c. ``P_c`` takes the place of CoOp's context. On another base
    model the same weights read its embeddings, so the prompts follow the upgrade. The output projection starts at
    zero: before training, this is the written phrase.

    Args:
        class_embed (`str`, *optional*, defaults to `"tokens"`):
            What E_c is: `"tokens"`, their mean (`"mean_token"`), or the text tower's pooled state for the written
            phrase and the name (`"text_feature"`).
        heads (`int`, *optional*): attention heads; width // 64 (at least 1) when omitted.

    Source: ContCoOp (arXiv 2412.20895), after its abstract, which leaves open the form of the attention and of the
    class embeddings. This form is the simplest within a standard error (1.6 points) of the best, by the accuracy of
    the *old* model on the sandbox's validation splits (mean of print and jargon, one seed): 54.8; ``v`` among the
    keys 56.0; no layer norms 55.5; `mean_token` 55.0, with ``v`` among the keys 54.0; ``v`` as an offset of the
    phrase's rows in the token table 54.8; four heads 54.5; `text_feature` 53.4; without ``v +`` 52.5; an output
    projection that starts at noise 51.6; eight vectors 53.6.
    """

    kind: ClassVar[PeftType | None] = PeftType.CONTCOOP
    reads_names: ClassVar[bool] = True

    init_phrase: str | None = "a photo of a"
    class_embed: str = "tokens"
    heads: int | None = None

    def __post_init__(self):
        super().__post_init__()
        check_choice("class_embed", self.class_embed, CLASS_EMBEDS)


@dataclass
class DeepPromptConfig(PromptConfig):
    """What learners with prompts in several layers share.

    The text tower's layers 0 … D-1 get fresh vectors at the positions of the context (layer 0's are the context), the
    image tower's get theirs behind the patches; `depths` says how many of either. Words of the phrase beyond M vectors
    stay in the text.
    """

    keeps_words: ClassVar[bool] = True

    init_phrase: str | None = "a photo of a"


@dataclass
class IVLPConfig(DeepPromptConfig):
    """IVLP: prompts of their own in several layers of either tower.

    Args:
        n_ctx (`int`, *optional*, defaults to 4): vectors per prompted layer of the text tower.
        n_vision (`int`, *optional*, defaults to 4): vectors per prompted layer of the image tower.
        text_depth (`int`, *optional*, defaults to 9): prompted layers of the text tower, at least 1.
        vision_depth (`int`, *optional*, defaults to 9): prompted layers of the image tower; 0 leaves it alone.

    Source: Rasheed et al. (arXiv 2212.03640) as set in Khattak et al., "Self-regulating Prompts" (arXiv 2307.06948).
    """

    kind: ClassVar[PeftType | None] = PeftType.IVLP
    n_ctx: int | None = 4
    n_vision: int = 4
    text_depth: int = 9
    vision_depth: int = 9

    @property
    def depths(self) -> tuple[int, int]:
        return self.text_depth, self.vision_depth

    @property
    def must_match(self) -> tuple[str, ...]:
        return (*PromptConfig.must_match, *(("vision_width",) if self.vision_depth else ()))


@dataclass
class PromptSRCConfig(IVLPConfig):
    """PromptSRC: IVLP's prompts, trained against three pulls and averaged over epochs (see `tune`).

    Source: Khattak et al., "Self-regulating Prompts: Foundational Model Adaptation without Forgetting" (arXiv
    2307.06948).
    """

    kind: ClassVar[PeftType | None] = PeftType.PROMPTSRC


@dataclass
class MaPLeConfig(DeepPromptConfig):
    """MaPLe: text prompts in D layers, and linear maps F_i from them to the image tower's prompts.

    Layer i of the image tower gets ``F_i(P_i)`` behind its patches, P_i (M, width) the text prompt of layer i.

    Args:
        n_ctx (`int`, *optional*, defaults to 2): vectors per layer, in both towers.
        depth (`int`, *optional*, defaults to 9): prompted layers of both towers.

    Source: Khattak et al., "MaPLe: Multi-modal Prompt Learning" (arXiv 2210.03117).
    """

    kind: ClassVar[PeftType | None] = PeftType.MAPLE
    must_match: ClassVar[tuple[str, ...]] = (*PromptConfig.must_match, "vision_width")

    n_ctx: int | None = 2
    depth: int = 9

    @property
    def depths(self) -> tuple[int, int]:
        return self.depth, self.depth
