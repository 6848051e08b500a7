"""Configurations of the prompt learners."""

from __future__ import annotations

from dataclasses import dataclass, field

from peft import PeftConfig

from ..registration import PeftType


@dataclass
class PromptConfig(PeftConfig):
    """What every prompt learner has: a context of M vectors in front of the text.

    Args:
        n_ctx (`int`, *optional*, defaults to 16): M, vectors in the context; the phrase's length when there is one.
        init_phrase (`str`, *optional*):
            Words whose token embeddings the context starts from, such as `"a photo of a"`. Without, it starts from
            N(0, 0.02²).
        init_token_ids (`list[int]`, *optional*):
            Token ids of `init_phrase`, without special tokens. Filled in with the tokenizer saved beside the model;
            give them for a model that was built in memory. Saved, so that loading needs no tokenizer.
        seed (`int`, *optional*, defaults to 0): of the random start.

    Raises:
        ValueError: M < 1.
    """

    n_ctx: int = field(default=16, metadata={"help": "M, vectors in the context; a phrase brings its own number."})
    init_phrase: str | None = field(
        default=None, metadata={"help": "Words the context starts from; without, it starts from N(0, 0.02^2)."}
    )
    init_token_ids: list[int] | None = field(
        default=None, metadata={"help": "Token ids of the phrase; filled in from the model's tokenizer."}
    )
    seed: int = field(default=0, metadata={"help": "Seed of the random start."})
    # PEFT reads both on every config; the model's family decides which module is the token table.
    target_modules: str | None = field(default=None, metadata={"help": "Not used: the token table is known."})
    exclude_modules: str | None = field(default=None, metadata={"help": "Not used."})

    def __post_init__(self):
        super().__post_init__()
        if self.init_token_ids is not None:
            self.n_ctx = len(self.init_token_ids)
        if self.n_ctx < 1:
            raise ValueError(f"the context needs at least 1 vector, got n_ctx={self.n_ctx} and no words.")


@dataclass
class CoOpConfig(PromptConfig):
    """CoOp: one context shared by all classes, before the name.

    The text tower reads ``[SOS] v_1 … v_M [name] [.] [EOS]`` where ``v`` (M, width) is all that is learnt. Prompts of
    a model tuned this way are ``"{}."``: with ``"a photo of a"`` to start from, the first forward pass gives what the
    untuned model gives for ``"a photo of a {}."``.

    Source: Zhou et al., "Learning to Prompt for Vision-Language Models" (arXiv 2109.01134), the unified context with
    the name at the end.

    ```python
    >>> model = get_peft_model(clip, CoOpConfig(init_phrase="a photo of a"))
    >>> DualEncoder(model).embed_names(["cat", "dog"], templates=("{}.",))
    ```
    """

    def __post_init__(self):
        super().__post_init__()
        self.peft_type = PeftType.COOP
