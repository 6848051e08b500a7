"""[`TransMiterLayer`]: the adapter's weights and its forward pass, one child module on a dual encoder's root."""

from __future__ import annotations

import threading

import torch
from torch import Tensor, nn
from transformers.utils import ModelOutput

from ...algebra import check_unit, standardise
from ...encoders.dual_encoder import DualEncoder
from ...encoders.families import dummy_text_inputs, logit_scale_and_bias, token_rows, unit_rows
from ..registration import AdapterLayer
from .config import TransMiterConfig


_LOCK = threading.RLock()  # for what a call changes on a layer that several threads may share


def _release(projection: nn.Module) -> None:
    """Takes every layer's `adapt_projected` off a projection and what it wraps."""
    for module in projection.modules():
        for key, hook in list(module._forward_hooks.items()):
            if getattr(hook, "__func__", None) is TransMiterLayer.adapt_projected:
                del module._forward_hooks[key]


def _orthonormal(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    q, r = torch.linalg.qr(torch.randn(rows, columns, generator=generator))
    # The sign makes the draw uniform over orthonormal bases; rows in memory order, as they are loaded.
    return (q * torch.diagonal(r).sign()).contiguous()


def refine(logits: Tensor, basis: Tensor, norm: nn.Module, up: nn.Module, down: nn.Module) -> Tensor:
    """``ẑ = z + MLP(LN(z Wᵀ)) W``, given back its mean and std: (B, K), of which the first C columns are the
    prediction (arXiv 2508.08604, section 3).

    Equal to the published ``h + MLP(LN(h))`` with ``h = z Wᵀ`` read out by ``W``, since ``Wᵀ W = 1``.

    Args:
        logits (`Tensor`): (B, K) over the anchors, scale included.
        basis (`Tensor`): W (D, K), orthonormal columns.
        norm, up, down (`nn.Module`): LayerNorm(D), Linear(D, 4D), Linear(4D, D).
    """
    z, std, mean = standardise(logits.to(basis.dtype))
    change = down(nn.functional.gelu(up(norm(z @ basis.T))))
    return (z + change @ basis) * std + mean


class TransMiterLayer(AdapterLayer):
    """Holds any number of adapters; the first active one answers.

    Per adapter: `anchors` (K, d) unit text embeddings of the names on *this* model, frozen and saved, so that
    inference needs neither tokenizer nor text tower; form "mlp": `basis` W (D, K), `norm`, `up` (D to 4D), `down`
    (4D to D, zero at start); form "linear": `image_map` A (d, m) and `image_shift` b (d,), zero at start, and
    `class_vectors` W (C, d or d + m), the anchors at start, and `bias` (C,).
    """

    prefix = "transmiter_"
    parts = ("anchors", "basis", "image_map", "image_shift", "class_vectors", "bias")
    modules_of = ("norm", "up", "down")
    other_param_names = ("configs", "fresh")
    # BaseTunerLayer reads these off a wrapped layer; this one wraps none.
    weight = bias = None

    def __init__(self):
        super().__init__()
        self.frozen_peft_weight_names = {}
        self.fresh: dict[str, bool] = {}  # whether an adapter's names are still to be embedded
        self.roots: list[nn.Module] = []  # the model it hangs on; in a list, where it is no child of its own

    def update_layer(self, name: str, config: TransMiterConfig, like: Tensor) -> None:
        """Adds an adapter that starts as the identity, on the device of `like`, in float32."""
        k, c, d = config.anchors.num_anchors, len(config.class_names), config.embed_dim
        generator = torch.Generator().manual_seed(config.seed)
        self.configs[name], self.fresh[name] = config, True
        parts, frozen = {"anchors": torch.zeros(k, d)}, ("transmiter_anchors",)
        if config.form == "linear":
            image, text = config.widths
            parts |= {"image_map": torch.zeros(d, image), "image_shift": torch.zeros(d)} if image else {}
            parts |= {"class_vectors": torch.zeros(c, text), "bias": torch.zeros(c)} if text else {}
        else:
            width = config.width or k
            hidden = config.mlp_ratio * width
            up, down = nn.Linear(width, hidden), nn.Linear(hidden, width)
            if not up.weight.is_meta:
                nn.init.xavier_uniform_(up.weight, generator=generator)
            for tensor in (up.bias, down.weight, down.bias):
                nn.init.zeros_(tensor)
            basis = torch.empty(width, k) if up.weight.is_meta else _orthonormal(width, k, generator)
            parts |= {"basis": basis, "norm": nn.LayerNorm(width), "up": up, "down": down}
            frozen += () if config.train_basis else ("transmiter_basis",)
        self.frozen_peft_weight_names[name] = frozen
        self.fill(name, parts)
        if not self.part("anchors", name).is_meta:  # PEFT's loading without memory
            self.fill(name, {part: self.part(part, name).to(like.device) for part in parts})
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    @classmethod
    def holding(
        cls, config: TransMiterConfig, tensors: dict[str, Tensor] | None = None, device: torch.device | str = "cpu"
    ) -> TransMiterLayer:
        """A layer with one adapter, `"default"`, that belongs to no PEFT model. Its `embed_dim` must be known; with
        `tensors`, those that [`tensors`] of another one gave, it takes them over, else it starts as the identity.
        """
        layer = cls()
        layer._active_adapter = ["default"]
        layer.update_layer("default", config, torch.empty(0, device=device))
        if tensors is not None:
            layer.set_tensors("default", tensors)
        return layer

    def set_anchors(self, name: str, embeds: Tensor) -> None:
        """Fills in the anchors' text embeddings (K, d) of a fresh adapter; class vectors start there (identity)."""
        anchors = self.transmiter_anchors[name]
        if embeds.shape != anchors.shape:
            raise ValueError(f"anchor embeddings must be {tuple(anchors.shape)}, got {tuple(embeds.shape)}.")
        anchors.data.copy_(embeds)
        if name in self.transmiter_class_vectors:
            vectors = self.transmiter_class_vectors[name]
            vectors.data[:, : embeds.shape[1]] = embeds[: len(vectors)]
        self.fresh[name] = False

    def set_tensors(self, name: str, tensors: dict[str, Tensor]) -> None:
        """Overwrites all weights of one adapter by what [`tensors`] of another one gave, which is checked."""
        self.check_tensors(name, tensors)
        for key, tensor in self.tensors(name).items():
            tensor.copy_(tensors[key])
        self.fresh[name] = not tensors["anchors"].any()

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        for name in self.configs:
            anchors = state_dict.get(f"{prefix}transmiter_anchors.{name}")
            if anchors is not None and not anchors.is_meta:
                self.fresh[name] = not anchors.any()

    def learnable(self, name: str) -> dict[str, nn.Parameter]:
        """The [`weights`] that a few labelled images improve: not the anchors, a basis that has to stay orthonormal,
        or class vectors beside an image side, which only learn the few labels by heart."""
        config = self.configs[name]
        frozen = {"anchors"} | (set() if config.train_basis else {"basis"})
        frozen |= {"class_vectors"} if config.image_side else set()
        return {part: weight for part, weight in self.weights(name).items() if part not in frozen}

    @property
    def reads_tower(self) -> bool:
        """Whether the answering adapter reads what the vision tower saw, rows (B, d + 2D), and not (B, d) alone."""
        config = None if self.disable_adapters else self.configs.get(self.active_name)
        return config is not None and config.reads > config.embed_dim

    @property
    def has_image_side(self) -> bool:
        """Whether the answering adapter changes image embeddings, so that it can be asked for any names."""
        return not self.disable_adapters and self.active_name in self.transmiter_image_map

    @property
    def is_head(self) -> bool:
        """Whether the model's own image embeddings are all it needs, and stay as they are."""
        return not (self.has_image_side or self.reads_tower)

    def embedding_parts(self) -> list[nn.Parameter]:
        """Weights that change the model's own image embeddings, for its fingerprint."""
        names = ("image_map", "image_shift") if self.has_image_side else ()
        return [self.part(part, self.active_name) for part in names]

    def _change(self, rows: Tensor) -> Tensor:
        """``A f + b`` (B, d) for rows ``f`` (B, d or d + 2D); the adapter must have an image side.

        Raises:
            ValueError: the rows lack what the adapter reads.
        """
        self._check(rows)
        # A copy of the model for another device has this layer's hooks.
        matrix, shift = (self.part(part, self.active_name).to(rows.device) for part in ("image_map", "image_shift"))
        return nn.functional.linear(rows[:, : matrix.shape[1]].to(matrix.dtype), matrix, shift)

    def adapt(self, rows: Tensor) -> Tensor:
        """Rows ``f`` (B, d or d + 2D), whose first d columns are ``x``, to ``x' = normalise(x + A f + b)`` (B, d);
        without an image side to ``x``.

        Raises:
            ValueError: a row that is not finite, or zero because it ran over.
        """
        x = rows[:, : self.configs[self.active_name].embed_dim]
        if not self.has_image_side:
            return x
        adapted = nn.functional.normalize(x + self._change(rows), dim=-1)
        if not (torch.compiler.is_exporting() or adapted.is_meta):
            check_unit(adapted.detach(), "adapted image", "the TransMiter adapter")
        return adapted

    def _check(self, rows: Tensor) -> None:
        reads = self.configs[self.active_name].reads
        if self.reads_tower and rows.shape[1] != reads:
            raise ValueError(
                f"the adapter reads rows of {reads} columns, what the vision tower saw beside the embeddings, and "
                f"these have {rows.shape[1]}: embed the images with tower=True, on the model it was made for."
            )

    def forward(self, rows: Tensor, scale: Tensor, bias: Tensor | float = 0.0) -> Tensor:
        """Image rows (B, d), or (B, d + 2D) for an adapter that [`reads_tower`], to task logits (B, C) of the
        answering adapter; zero-shot when disabled.

        Raises:
            ValueError: no adapter is active, or the rows lack what it reads.
        """
        name = self.active_name
        if name is None:
            raise ValueError("no TransMiter adapter is active: call set_adapter with one of its names.")
        classes = len(self.configs[name].class_names)
        anchors = self.transmiter_anchors[name]
        self._check(rows)
        f = rows.to(anchors.dtype)
        x = self.adapt(f)
        scale, bias = (torch.as_tensor(value, dtype=x.dtype, device=x.device) for value in (scale, bias))
        if not self.disable_adapters and name in self.transmiter_basis:
            parts = (self.transmiter_norm[name], self.transmiter_up[name], self.transmiter_down[name])
            logits = refine(scale * x @ anchors.T + bias, self.transmiter_basis[name], *parts)[:, :classes]
        elif not self.disable_adapters and name in self.transmiter_class_vectors:
            vectors = self.transmiter_class_vectors[name]
            x = torch.cat([x, f[:, : vectors.shape[1] - x.shape[1]]], dim=-1)
            logits = scale * x @ vectors.T + self.transmiter_bias[name] + bias
        else:
            logits = scale * x @ anchors[:classes].T + bias
        return logits.to(rows.dtype)

    def detach(self) -> None:
        super().detach()
        for root in self.roots:
            _release(getattr(root, "visual_projection", nn.Identity()))
        self.roots = []

    # Hooks. Bound methods, so that copies and pickles of the model rebind them to their own layer. What belongs to one
    # call travels on its tensors, never on a module: several threads may share a model.
    def take_tokens(self, tower: nn.Module, args: tuple, output) -> None:
        """After the vision tower: its pooled vector takes along to the projection what the adapter reads. PEFT may
        have put another module there since (a LoRA's), or taken it off again."""
        hooks = self.roots[0].visual_projection._forward_hooks
        if self.adapt_projected not in hooks.values():
            with _LOCK:
                if self.adapt_projected not in hooks.values():  # another thread may have come first
                    _release(self.roots[0].visual_projection)
                    self.roots[0].visual_projection.register_forward_hook(self.adapt_projected)
        if self.reads_tower:
            output[1].transmiter_tokens = token_rows(output[0])

    def adapt_projected(self, projection: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
        """After the projection: p to ``p + ‖p‖ (A f + b)``, whose unit rows are x'."""
        if self.is_head:
            return None
        adapted = self._adapted(output, getattr(args[0], "transmiter_tokens", None))
        args[0].transmiter_rows = adapted.transmiter_rows  # some families keep this one in their output, some that one
        return adapted

    def adapt_pooled(self, tower: nn.Module, args: tuple, output):
        """After the vision tower of a family that has no projection: [`adapt_projected`] of its pooled vector."""
        if self.is_head:
            return None
        if torch.is_tensor(output):
            return self._adapted(output, None)
        output["pooler_output"] = self._adapted(output[1], token_rows(output[0]) if self.reads_tower else None)
        return output

    def _adapted(self, pooled: Tensor, tokens: Tensor | None) -> Tensor:
        rows = unit_rows(pooled)
        rows = rows if tokens is None else torch.cat([rows, tokens], dim=-1)
        if self.has_image_side:
            length = pooled.float().norm(dim=-1, keepdim=True)
            pooled = pooled + (length * self._change(rows)).to(pooled.dtype)
        pooled.transmiter_rows = rows
        return pooled

    def fill_text(self, root: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """Before the root's forward: images without texts get the smallest valid text, which `answer` discards."""
        if args or kwargs.get("input_ids") is not None or kwargs.get("pixel_values") is None or not self.active_name:
            return None
        text = dummy_text_inputs(root, kwargs["pixel_values"].device)
        text["input_ids"].transmiter_dummy = True
        return args, {**kwargs, **text}

    def answer(self, root: nn.Module, args: tuple, kwargs: dict, output):
        """After the root's forward: logits over the saved class names, unless the caller brought own texts."""
        self = getattr(root, "transmiter", self)  # of a copy for another device its own
        name, dummy = self.active_name, getattr(kwargs.get("input_ids"), "transmiter_dummy", False)
        if name is None or args or not dummy:
            return None
        if not isinstance(output, ModelOutput):
            raise ValueError("a TransMiter adapter answers in a ModelOutput: call the model with return_dict=True.")
        if self.fresh[name]:
            self._embed_names(name, root)
        scale, bias = logit_scale_and_bias(root)
        if self.is_head:
            rows = nn.functional.normalize(output["image_embeds"].float(), dim=-1)
        else:
            rows = output["vision_model_output"].pooler_output.transmiter_rows
        logits = self(rows, scale, bias).to(output["image_embeds"].dtype)
        output["logits_per_image"] = logits
        if output.get("text_embeds") is not None:
            output["text_embeds"] = self.transmiter_anchors[name][: logits.shape[1]].to(rows.dtype)
            output["logits_per_text"] = logits.T
        return output

    def _embed_names(self, name: str, root: nn.Module) -> None:
        """Gives a fresh adapter its anchors.

        Raises:
            ValueError: while the model is exported, when it is too late.
        """
        if torch.compiler.is_exporting():
            raise ValueError("the adapter's names are not embedded yet: call the model once before it is exported.")
        with _LOCK:
            # transformers' own loader puts weights here without telling.
            self.fresh[name] = self.fresh[name] and not self.transmiter_anchors[name].any()
            if self.fresh[name]:
                anchors = self.configs[name].anchors
                self.set_anchors(name, DualEncoder(root).embed_names(anchors.names, anchors.templates))
