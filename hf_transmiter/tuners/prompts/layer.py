"""The wrapped token table: context slots enter a text as negative ids and leave the table as learnt vectors."""

from __future__ import annotations

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from .config import PromptConfig


class PromptLayer(nn.Module, BaseTunerLayer):
    """Takes the place of a text tower's token embedding; holds any number of adapters, the first active one answers.

    Two bound methods work together. `insert`, a hook before the tower, puts the ids ``-1 … -M`` after the start token
    and lengthens the mask, so that positions, masks and the pooling at the end token follow by themselves. `forward`
    gives id ``-i`` the i-th row of [`context`]. A learner says what its context is; where it goes is `slot_ids`.

    Args:
        base_layer (`nn.Embedding`): the token table.
        positions (`int`): most tokens the tower reads.
        start (`int`): tokens before the context: 1 for a start token, 0 where the family has none.
    """

    other_param_names = ("configs",)

    def __init__(self, base_layer: nn.Embedding, positions: int, start: int):
        super().__init__()
        self.base_layer = base_layer
        self.positions, self.start = positions, start
        self.configs: dict[str, PromptConfig] = {}
        self.merged_adapters = []
        self.hooks: list = []

    @property
    def active_name(self) -> str | None:
        """The adapter that answers: the first active one held here, none while adapters are disabled."""
        if self.disable_adapters:
            return None
        return next((name for name in self.active_adapters if name in self.configs), None)

    def initial_context(self, config: PromptConfig) -> Tensor:
        """(M, width): the token embeddings of the phrase, or a draw from N(0, 0.02²) that the seed decides.

        Raises:
            ValueError: the phrase's ids are not in this token table, or the context leaves no room for a text.
        """
        table = self.get_base_layer().weight
        if config.n_ctx > self.positions - 3:  # start token, one word, end token
            raise ValueError(
                f"a context of {config.n_ctx} vectors leaves no room for a text: the text tower reads "
                f"{self.positions} tokens in all. Use a smaller n_ctx."
            )
        if config.init_token_ids is None:
            generator = torch.Generator().manual_seed(config.seed)
            return 0.02 * torch.randn(config.n_ctx, table.shape[1], generator=generator, device="cpu")
        if not 0 <= min(config.init_token_ids) <= max(config.init_token_ids) < len(table):
            raise ValueError(
                f"init_token_ids {config.init_token_ids} are not all in this model's vocabulary of {len(table)}: "
                "they come from another tokenizer. Leave them out and give init_phrase."
            )
        return table.detach()[config.init_token_ids].clone()

    def context(self, name: str) -> Tensor:
        """(M, width): the vectors in the slots."""
        raise NotImplementedError

    def forward(self, input_ids: Tensor) -> Tensor:
        """Token ids (B, L), slots negative, to embeddings (B, L, width)."""
        if self.active_name is None:
            return self.base_layer(input_ids)
        embeds = self.base_layer(input_ids.clamp(min=0))
        vectors = self.context(self.active_name)[(-1 - input_ids).clamp(min=0)]
        return torch.where((input_ids < 0).unsqueeze(-1), vectors.to(embeds.dtype), embeds)

    def insert(self, tower: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """Before the tower's forward: context slots enter ids and mask; the tower counts positions anew.

        Raises:
            ValueError: a text is too long for the tower with the context in it, or padded on the left.
        """
        kwargs = {**dict(zip(("input_ids", "attention_mask"), args, strict=False)), **kwargs}
        ids, mask = kwargs.get("input_ids"), kwargs.get("attention_mask")
        if self.active_name is None or ids is None:
            return None
        count = self.configs[self.active_name].n_ctx
        ids, mask = self._make_room(ids, mask, self.positions - count)
        slots = (-1 - torch.arange(count, device=ids.device)).expand(len(ids), -1)
        kwargs["input_ids"] = self._with_slots(ids, slots)
        if mask is not None:
            kwargs["attention_mask"] = self._with_slots(mask, torch.ones_like(slots, dtype=mask.dtype))
        # Both are counted for the text as it was; the towers' own defaults fit the longer one.
        kwargs.pop("position_ids", None)
        kwargs.pop("token_type_ids", None)
        return (), kwargs

    def _with_slots(self, row: Tensor, slots: Tensor) -> Tensor:
        return torch.cat([row[:, : self.start], slots, row[:, self.start :]], dim=1)

    def _make_room(self, ids: Tensor, mask: Tensor | None, room: int) -> tuple[Tensor, Tensor | None]:
        """Drops padding, never words, so that ids and mask (B, L) have L <= room."""
        if mask is not None and not mask[:, 0].all():
            raise ValueError("texts must be padded on the right: the context goes after their first token.")
        if ids.shape[1] <= room:
            return ids, mask
        if mask is not None:
            lengths = mask.long().sum(1)
        else:
            # Up to the last token that differs from the final one, and one more: the end token may be the padding.
            differs = ids != ids[:, -1:]
            lengths = ids.shape[1] - differs.flip(1).int().argmax(1) + 1
            lengths = lengths.where(differs.any(1), torch.ones_like(lengths))
        row = int(lengths.argmax())
        if lengths[row] > room:
            raise ValueError(
                f"text {row} of the batch has {int(lengths[row])} tokens, but only {room} of the text tower's "
                f"{self.positions} positions are left beside the learnt context: shorten the name, or use a smaller "
                "n_ctx. Prompts of a tuned model are '{}.', without words of their own."
            )
        return ids[:, :room], None if mask is None else mask[:, :room]


class CoOpLayer(PromptLayer):
    """The context is a parameter: `coop_ctx` (M, width) per adapter."""

    adapter_layer_names = ("coop_ctx",)

    def __init__(self, base_layer: nn.Embedding, positions: int, start: int):
        super().__init__(base_layer, positions, start)
        self.coop_ctx = nn.ParameterDict()

    def update_layer(self, name: str, config: PromptConfig) -> None:
        """Adds an adapter at its start; a phrase changes nothing compared with writing it out."""
        self.configs[name] = config
        self.coop_ctx[name] = nn.Parameter(self.initial_context(config))
        self._move_adapter_to_device_of_base_layer(name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def context(self, name: str) -> Tensor:
        return self.coop_ctx[name]
