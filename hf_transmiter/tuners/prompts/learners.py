"""The learners: what each one learns and what it puts into the slots, [`PromptLayer`] does the rest."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, relu, scaled_dot_product_attention

from ...encoders.families import shared_width
from .config import ContCoOpConfig, DeepPromptConfig, IVLPConfig, MaPLeConfig, PromptConfig
from .layer import NO_TOKENIZER, PromptLayer, Texts, as_base, images_seen, layers
from .logits import image_conditioned_logits
from .texts import find_rows, holds, start_token_id, start_tokens, without_padding


class CoOpLayer(PromptLayer):
    """The context is a parameter: `ctx` (M, width), or (C, M, width) for class-specific contexts."""

    prefix = "coop_"

    def initial(self, config: PromptConfig, root: nn.Module) -> dict[str, Tensor | nn.Module]:
        context, depth = self.initial_context(config), len(layers(root.text_model))
        if config.layer >= depth:
            raise ValueError(f"layer={config.layer}, but the text tower's last layer is {depth - 1}.")
        if config.layer:
            context = self._states(config, root) if _causal(root) else self.noise(config, *context.shape)
        if config.class_specific:
            context = context.repeat(len(config.class_names), 1, 1)
            if not config.learned_ids:
                context = self.noise(config, *context.shape)
        return {"ctx": context}

    def _states(self, config: PromptConfig, root: nn.Module) -> Tensor:
        """(M, width): the phrase's states before `config.layer`; in a causal tower the same for every name."""
        ids, seen = torch.tensor([[start_token_id(root.config), *config.init_token_ids]], device=root.device), []
        # output_hidden_states would leave transformers' own hooks on the model for good.
        hook = layers(root.text_model)[config.layer].register_forward_pre_hook(
            lambda layer, args, kwargs: seen.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
        )
        try:
            with as_base(), torch.no_grad():
                root.text_model(input_ids=ids)
        finally:
            hook.remove()
        return seen[0][0, start_tokens(root.config) :].float().clone()

    def slot_ids(self, config: PromptConfig) -> list[int]:
        return config.kept_ids if config.layer else super().slot_ids(config)

    def text_prompt(self, name: str, layer: int) -> Tensor | None:
        return self.part("ctx", name) if layer and layer == self.configs[name].layer else None

    def context(self, name: str, texts: Texts, tower: nn.Module) -> Tensor | None:
        config = self.configs[name]
        if config.layer:
            return None
        if not config.class_specific:
            return self.part("ctx", name)
        if name not in self.class_rows:
            raise ValueError(NO_TOKENIZER)
        rows, known = find_rows(without_padding(texts.ids, texts.ends), self.class_rows[name])
        if not holds(known.all(), "a text is none of the classes of the contexts"):
            raise ValueError(
                f"text {int(known.int().argmin())} of the batch is none of the {len(config.class_names)} classes of "
                "these class-specific contexts: ask about '{}.' filled with one of class_names."
            )
        return self.part("ctx", name)[rows]


class KgCoOpLayer(CoOpLayer):
    """As [`CoOpLayer`]: what differs is the objective."""

    prefix = "kgcoop_"


class CoCoOpLayer(PromptLayer):
    """`ctx` (M, width), and `down`, `up`: the net from a unit image embedding to a shift of all M vectors."""

    prefix = "cocoop_"
    modules_of = ("down", "up")
    reads_images = True

    def initial(self, config: PromptConfig, root: nn.Module) -> dict[str, Tensor | nn.Module]:
        context, d = self.initial_context(config), shared_width(root)
        sizes = d, max(d // 16, 1), context.shape[1]
        down, up = (nn.Linear(*pair, dtype=torch.float32) for pair in zip(sizes, sizes[1:], strict=False))
        return {"ctx": context, "down": down, "up": up}

    def context(self, name: str, texts: Texts, tower: nn.Module) -> Tensor:
        context, images = self.part("ctx", name), images_seen()
        if images is None:
            return context
        down = self.part("down", name)
        shift = self.part("up", name)(relu(down(images.to(down.weight.dtype))))
        return context + shift[:, None]

    def attach(self, root: nn.Module) -> None:
        super().attach(root)
        self.hooks.append(root.register_forward_hook(self.rewrite_logits, with_kwargs=True))

    def rewrite_logits(self, root: nn.Module, args: tuple, kwargs: dict, output):
        """After the whole model's forward: logits against class vectors that every image makes for itself.

        Raises:
            ValueError: the call asked for a tuple, or for the loss, which is that of texts no image has changed.
        """
        if self.active_name is None:
            return output
        if isinstance(output, tuple) or getattr(output, "loss", None) is not None:
            raise ValueError(
                "with CoCoOp every image has texts of its own: call the model without return_dict=False and "
                "return_loss=True, and compute the loss from logits_per_image."
            )
        if getattr(output, "logits_per_image", None) is None:
            return output
        inputs = {key: kwargs[key] for key in ("input_ids", "attention_mask") if kwargs.get(key) is not None}
        if "input_ids" not in inputs:
            inputs["input_ids"] = args[0]
        logits = image_conditioned_logits(root, self, output.image_embeds, inputs)
        output.logits_per_image, output.logits_per_text = logits, logits.T
        return output


class ContCoOpLayer(PromptLayer):
    """`ctx` (M, width), and the attention from it to the class's embeddings in the base model (see the config)."""

    prefix = "contcoop_"
    modules_of = ("norm_q", "norm_k", "query", "key", "value", "out")

    def initial(self, config: ContCoOpConfig, root: nn.Module) -> dict[str, Tensor | nn.Module]:
        context = self.initial_context(config)
        width = context.shape[1]
        if width % self._heads(config, width):
            raise ValueError(f"{config.heads} heads do not divide the text tower's width of {width}.")
        parts = {part: nn.Linear(width, width, dtype=torch.float32) for part in ("out", "query", "value")}
        for parameter in parts["out"].parameters():
            nn.init.zeros_(parameter)
        # No bias: softmax does not see what all keys have in common.
        parts["key"] = nn.Linear(width, width, bias=False, dtype=torch.float32)
        return {"ctx": context, "norm_q": nn.LayerNorm(width), "norm_k": nn.LayerNorm(width), **parts}

    @staticmethod
    def _heads(config: ContCoOpConfig, width: int) -> int:
        return config.heads or max(width // 64, 1)

    def context(self, name: str, texts: Texts, tower: nn.Module) -> Tensor:
        config = self.configs[name]
        context = self.part("ctx", name).expand(texts.ids.shape[0], -1, -1)
        embeds, mask = self._class_embeds(config, context.dtype, texts, tower)
        query, keys = self.part("norm_q", name)(context), self.part("norm_k", name)(embeds)
        heads = self._heads(config, query.shape[-1])

        def split(part: str, rows: Tensor) -> Tensor:
            return self.part(part, name)(rows).unflatten(-1, (heads, -1)).transpose(1, 2)

        q, k, v = split("query", query), split("key", keys), split("value", keys)
        attended = scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None])
        return context + self.part("out", name)(attended.transpose(1, 2).flatten(2))

    def _class_embeds(
        self, config: ContCoOpConfig, dtype: torch.dtype, texts: Texts, tower: nn.Module
    ) -> tuple[Tensor, Tensor]:
        """E (B, L, width) and which of its rows count (B, L), from the base model as it is now."""
        ids, named = texts.ids, texts.named
        if config.class_embed == "text_feature":
            return self._features(config, texts, tower).to(dtype)[:, None], torch.ones_like(named[:, :1])
        embeds = self.base_layer(ids).to(dtype)
        if config.class_embed == "tokens":
            return embeds, named
        weight = named / named.sum(1, keepdim=True)
        return (weight[..., None].to(dtype) * embeds).sum(1, keepdim=True), torch.ones_like(named[:, :1])

    def _features(self, config: ContCoOpConfig, texts: Texts, tower: nn.Module) -> Tensor:
        """(B, width): the base model's pooled states of the phrase and the names."""
        ids, mask = texts.ids, texts.mask
        words = torch.tensor([config.init_token_ids or []], dtype=ids.dtype, device=ids.device)
        words = words.expand(ids.shape[0], -1)
        ids = torch.cat([ids[:, : self.start], words, ids[:, self.start :]], 1)
        if mask is not None:
            mask = torch.cat(
                [mask[:, : self.start], torch.ones_like(words, dtype=mask.dtype), mask[:, self.start :]], 1
            )
        if self.reads_every_position:  # the end token fills them: as many as the text with its context will have
            extra = config.n_ctx - words.shape[1]
            ids, mask = (x if x is None else torch.cat([x, x[:, -1:].expand(-1, extra)], 1) for x in (ids, mask))
        with as_base(), torch.no_grad():
            output = tower(input_ids=ids, attention_mask=mask)
        pooled = output.pooler_output
        features = output.last_hidden_state[:, 0] if pooled is None else pooled
        width = self.get_base_layer().embedding_dim
        if features.shape[1] != width:
            raise ValueError(
                f"class_embed='text_feature' needs pooled text states as wide as tokens ({width}), this tower's have "
                f"{features.shape[1]}: use 'tokens' or 'mean_token'."
            )
        return features


class DeepPromptLayer(PromptLayer):
    """Learners with prompts in several layers. `ctx` and `text` (D_t - 1, M, width) are those of the text tower's."""

    def check_depths(self, config: DeepPromptConfig, root: nn.Module) -> None:
        """Raises a `ValueError` where a tower has fewer layers than are to be prompted."""
        towers = (("text", root.text_model), ("image", root.vision_model))
        for (what, tower), depth in zip(towers, config.depths, strict=True):
            if depth and depth > len(layers(tower)):
                raise ValueError(
                    f"prompts in {depth} layers of the {what} tower, which has {len(layers(tower))}: use a smaller "
                    "depth, or a model as deep as the one the prompts were learnt on."
                )

    def text_prompt(self, name: str, layer: int) -> Tensor | None:
        return self.part("text", name)[layer - 1] if 0 < layer < self.configs[name].depths[0] else None


class IVLPLayer(DeepPromptLayer):
    """`ctx` (M, width), `text` (D_t - 1, M, width) and `vision` (D_v, n, vision width), all free."""

    prefix = "ivlp_"
    parts = ("ctx", "text", "vision")

    def initial(self, config: IVLPConfig, root: nn.Module) -> dict[str, Tensor | nn.Module]:
        self.check_depths(config, root)
        context = self.initial_context(config)
        deep = config.text_depth - 1
        width = root.config.vision_config.hidden_size if config.vision_depth else 0
        count = deep * context.numel()
        noise = self.noise(config, count + config.vision_depth * config.n_vision * width)
        start = {"ctx": context}
        if deep:
            start["text"] = noise[:count].reshape(deep, *context.shape)
        if config.vision_depth:
            start["vision"] = noise[count:].reshape(config.vision_depth, config.n_vision, width)
        return start

    def vision_prompt(self, name: str, layer: int) -> Tensor | None:
        return self.part("vision", name)[layer] if layer < self.configs[name].vision_depth else None


class PromptSRCLayer(IVLPLayer):
    """As [`IVLPLayer`]: what differs is the objective."""

    prefix = "promptsrc_"


class MaPLeLayer(DeepPromptLayer):
    """`ctx` (M, width), `text` (D - 1, M, width), and the maps F_i: `weight` (D, vision width, width) and `bias`."""

    prefix = "maple_"
    parts = ("ctx", "text", "weight", "bias")

    def initial(self, config: MaPLeConfig, root: nn.Module) -> dict[str, Tensor | nn.Module]:
        self.check_depths(config, root)
        context = self.initial_context(config)
        deep, width = config.depth - 1, context.shape[1]
        # As published: F_0 has a start of its own, all others begin as copies of one. Uniform as in nn.Linear.
        bound = width**-0.5
        draws = torch.empty(2, root.config.vision_config.hidden_size, width + 1, dtype=torch.float32, device="cpu")
        draws.uniform_(-bound, bound)
        maps = torch.cat([draws[:1], draws[1:].expand(deep, -1, -1)])
        start = {"ctx": context, "weight": maps[..., :-1].contiguous(), "bias": maps[..., -1].contiguous()}
        if deep:
            start["text"] = self.noise(config, deep, *context.shape)
        return start

    def vision_prompt(self, name: str, layer: int) -> Tensor | None:
        if layer >= self.configs[name].depth:
            return None
        prompt = self.part("text", name)[layer - 1] if layer else self.part("ctx", name)
        return linear(prompt, self.part("weight", name)[layer], self.part("bias", name)[layer])


def _causal(root: nn.Module) -> bool:
    return root.config.model_type in ("clip", "metaclip_2", "open_clip")
