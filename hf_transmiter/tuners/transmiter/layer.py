"""[`TransMiterLayer`]: the adapter's weights and its forward pass, one child module on a dual encoder's root."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.utils import ModelOutput

from ...algebra import standardise
from ...encoders.dual_encoder import DualEncoder
from ...encoders.families import dummy_text_inputs, logit_scale_and_bias
from ..registration import AdapterLayer
from .config import TransMiterConfig


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
    (4D to D, zero at start); form "class_vectors": `class_vectors` T (C, d) and `bias` (C,).
    """

    prefix = "transmiter_"
    parts = ("anchors", "basis", "class_vectors", "bias")
    modules_of = ("norm", "up", "down")
    other_param_names = ("configs",)
    # BaseTunerLayer reads these off a wrapped layer; this one wraps none.
    weight = bias = None

    def __init__(self):
        super().__init__()
        self.frozen_peft_weight_names = {}
        self.dummy_text: dict[str, Tensor] | None = None

    def update_layer(self, name: str, config: TransMiterConfig, like: Tensor) -> None:
        """Adds an adapter that starts as the identity, on the device of `like`, in float32."""
        k, c, d = config.anchors.num_anchors, len(config.class_names), config.embed_dim
        generator = torch.Generator().manual_seed(config.seed)
        self.configs[name] = config
        parts, frozen = {"anchors": torch.zeros(k, d)}, ("transmiter_anchors",)
        if config.form == "class_vectors":
            parts |= {"class_vectors": torch.zeros(c, d), "bias": torch.zeros(c)}
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
            vectors.data.copy_(embeds[: len(vectors)])

    def set_tensors(self, name: str, tensors: dict[str, Tensor]) -> None:
        """Overwrites all weights of one adapter by what [`tensors`] of another one gave, which is checked."""
        self.check_tensors(name, tensors)
        for key, tensor in self.tensors(name).items():
            tensor.copy_(tensors[key])

    def forward(self, image_embeds: Tensor, scale: Tensor, bias: Tensor | float = 0.0) -> Tensor:
        """Unit image embeddings (B, d) to task logits (B, C) of the answering adapter; zero-shot when disabled."""
        name = self.active_name
        if name is None:
            raise ValueError("no TransMiter adapter is active: call set_adapter with one of its names.")
        classes = len(self.configs[name].class_names)
        anchors = self.transmiter_anchors[name]
        x = image_embeds.to(anchors.dtype)
        scale, bias = (torch.as_tensor(value, dtype=x.dtype, device=x.device) for value in (scale, bias))
        if self.disable_adapters:
            logits = scale * x @ anchors[:classes].T + bias
        elif name in self.transmiter_class_vectors:
            vectors = self.transmiter_class_vectors[name]
            logits = scale * x @ vectors.T + self.transmiter_bias[name] + bias
        else:
            parts = (self.transmiter_norm[name], self.transmiter_up[name], self.transmiter_down[name])
            logits = refine(scale * x @ anchors.T + bias, self.transmiter_basis[name], *parts)[:, :classes]
        return logits.to(image_embeds.dtype)

    # Hooks of the root. Bound methods, so that copies and pickles of the model rebind them to their own layer.
    def fill_text(self, root: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """Before the root's forward: images without texts get the smallest valid text, which `answer` discards."""
        if args or kwargs.get("input_ids") is not None or kwargs.get("pixel_values") is None or not self.active_name:
            return None
        if self.dummy_text is None:
            self.dummy_text = dummy_text_inputs(root, kwargs["pixel_values"].device)
        return args, {**kwargs, **self.dummy_text}

    def answer(self, root: nn.Module, args: tuple, kwargs: dict, output):
        """After the root's forward: logits over the saved class names, unless the caller brought own texts."""
        name = self.active_name
        own_text = kwargs.get("input_ids") is not (self.dummy_text or {}).get("input_ids")
        if name is None or args or own_text or kwargs.get("pixel_values") is None:
            return None
        if not isinstance(output, ModelOutput):
            raise ValueError("a TransMiter adapter answers in a ModelOutput: call the model with return_dict=True.")
        if not self.transmiter_anchors[name][0].any():  # a fresh adapter: the names were not embedded yet
            anchors = self.configs[name].anchors
            self.set_anchors(name, DualEncoder(root).embed_names(anchors.names, anchors.templates))
        scale, bias = logit_scale_and_bias(root)
        image_embeds = nn.functional.normalize(output["image_embeds"].float(), dim=-1)
        logits = self(image_embeds, scale, bias).to(output["image_embeds"].dtype)
        output["logits_per_image"] = logits
        if output.get("text_embeds") is not None:
            output["text_embeds"] = self.transmiter_anchors[name][: logits.shape[1]].to(image_embeds.dtype)
            output["logits_per_text"] = logits.T
        return output
