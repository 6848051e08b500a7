"""[`TransMiterModel`]: hangs a [`TransMiterLayer`] on the root of a dual encoder and takes it off again."""

from __future__ import annotations

import logging

import torch
from torch import Tensor, nn

from ...algebra import check_semi_orthogonal
from ...encoders.dual_encoder import DualEncoder
from ...encoders.families import is_dual_encoder, shared_width
from ...encoders.identity import ModelId, same_model
from ...hub.repo import model_location, public_name
from ..registration import Tuner
from .config import TransMiterConfig
from .layer import TransMiterLayer


logger = logging.getLogger(__name__)


def check_base(config: TransMiterConfig, model: nn.Module, encoder: DualEncoder | None = None) -> None:
    """Whether an adapter was made for `model`: of its embedding width and, with the `encoder` around it, its weights.

    A raw model brings no processor, without which its fingerprint is not known: there the name decides, and a folder
    of another name, which may hold a copy, is a warning.

    Raises:
        ValueError: it is another model.
    """
    width, made_for = shared_width(model), config.base_model_name_or_path
    name = (model.config._name_or_path if encoder is None else encoder.name_or_path) or None
    fits = config.embed_dim in (None, width)
    if fits and made_for is None:
        return
    same = _is_same(config, name, encoder) if fits else False
    if same is None:
        logger.warning("cannot tell whether %r is %r, which the adapter was made for.", name, made_for)
    elif not same:
        revision = f" (revision {config.revision})" if config.revision else ""
        widths = "" if fits else f", whose embeddings have width {width} and not {config.embed_dim}"
        changed = " with other weights, or adapters switched on" if name == made_for and fits else ""
        raise ValueError(
            f"the adapter was made for {made_for!r}{revision}, this is {name!r}{widths}{changed}: load that model, or "
            f"carry the adapter over: hf-transmiter transfer ADAPTER --strong {name or 'MODEL'} --output-dir "
            "out/upgraded (hf_transmiter.transfer)."
        )


def _is_same(config: TransMiterConfig, name: str | None, encoder: DualEncoder | None) -> bool | None:
    """Whether a model of this name is the adapter's; `None` where that cannot be told."""
    made_for = config.base_model_name_or_path
    named = name is not None and model_location(name) == model_location(made_for)
    if encoder is None or config.base_fingerprint is None:
        if named:
            return True
    elif ModelId(made_for, config.revision, config.base_fingerprint).is_of(encoder):
        return True
    elif same_model(config.base_fingerprint, encoder.fingerprint) is not None:
        return False
    # Two ids of the Hub are two models; a folder may hold either.
    ids = name is not None and not named and all(public_name(each) == each for each in (name, made_for))
    return False if ids else None


class TransMiterModel(Tuner):
    """PEFT tuner of TransMiter. The root is a transformers two-tower model.

    The layer becomes the root's child `transmiter`; nothing is replaced. A hook before the root's forward lets
    `model(pixel_values=...)` go without texts, one after it writes the adapted logits. Hooks behind the vision tower
    and its projection let an image side change the image embeddings, those of `get_image_features` and of calls with
    texts included, also where a LoRA comes to that projection or goes from it later.

    Raises:
        ValueError: the model is not a dual encoder, the adapter was made for another embedding width, or its name
            is part of the parameter prefix.
    """

    prefix = TransMiterLayer.prefix
    tuner_layer_cls = TransMiterLayer
    target_module_mapping = {}

    def _prepare_adapter_config(self, peft_config: TransMiterConfig, model_config: dict) -> TransMiterConfig:
        root = self.model
        if not is_dual_encoder(root):
            said = f"TransMiter needs a two-tower model, got {type(root).__name__}"
            raise ValueError(f"{said}: load the whole model (for example CLIPModel), not one tower.")
        check_base(peft_config, root)
        peft_config.embed_dim = shared_width(root)
        # PEFT creates layers where a module name matches; matching the first child makes that happen once.
        peft_config.target_modules = next(name for name, _ in root.named_children())
        return peft_config

    def _create_and_replace(
        self, peft_config, adapter_name, target, target_name, parent, current_key, parameter_name=None
    ) -> None:
        root = self.model
        layer = getattr(root, "transmiter", None)
        if layer is None:
            layer = TransMiterLayer()
            layer._active_adapter = self.active_adapters
            root.transmiter = layer
            layer.hooks.append(root.register_forward_pre_hook(layer.fill_text, with_kwargs=True))
            layer.hooks.append(root.register_forward_hook(layer.answer, with_kwargs=True))
            if hasattr(root, "visual_projection"):
                layer.roots.append(root)
                layer.hooks.append(root.vision_model.register_forward_hook(layer.take_tokens))
            else:
                layer.hooks.append(root.vision_model.register_forward_hook(layer.adapt_pooled))
        layer.update_layer(adapter_name, peft_config, next(target.parameters()))

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: TransMiterConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        found = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        basis = next((tensor for key, tensor in state_dict.items() if key.endswith("_basis")), None)
        if basis is not None and not config.train_basis:
            check_semi_orthogonal(basis, "the adapter's basis", full_rank=True)
        return found

    def _unload_and_optionally_merge(self, merge: bool = True, **kwargs) -> nn.Module:
        if merge:
            self._merge()
        model = super()._unload_and_optionally_merge(merge=False, **kwargs)
        del model.transmiter
        return model

    @torch.no_grad()
    def _merge(self) -> None:
        """``P ← (1 + A) P`` in the projection: exact for an image side that reads embeddings and shifts nothing."""
        layer, projection = self.model.transmiter, getattr(self.model, "visual_projection", None)
        weights = {} if layer.active_name is None else layer.tensors(layer.active_name)
        matrix, shift = weights.get("image_map"), weights.get("image_shift")
        square = matrix is not None and matrix.shape[0] == matrix.shape[1] and not shift.any()
        if not square or "class_vectors" in weights or type(projection) is not nn.Linear:
            raise NotImplementedError(
                "this adapter cannot be merged into the model's weights, as only an image side that reads embeddings "
                "(image_side = d), with no shift and no text side, on a model with a visual_projection; use unload()."
            )
        weight = projection.weight.float()
        projection.weight.copy_(weight + matrix.float() @ weight)
