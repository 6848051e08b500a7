"""Adapters put into a model and saved from it, by PEFT's public functions alone.

transformers has methods for both (`add_adapter`, `save_pretrained` of a model with adapters inside), but raises the
version of PEFT they demand with nearly every release, at times above the newest there is.
"""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

from peft import PeftConfig, get_peft_model_state_dict, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import save_file
from torch import nn

from ..algebra import check_weights
from ..hub.adapter_files import CONFIG, WEIGHTS
from ..hub.checks import load_json
from ..hub.files import replace_file


def inject(model: nn.Module, config: PeftConfig) -> None:
    """Puts an adapter into a model, in place, and makes it the one that answers; every other parameter is frozen. Its
    weights are float32 whatever the model's are: half precision is too coarse for an optimizer's steps.

    Raises:
        ValueError: there are adapters inside already, or the model is none that the method fits.
    """
    if getattr(model, "peft_config", None):
        raise ValueError("the model has adapters already: merge or unload them before adding one.")
    config.base_model_name_or_path = getattr(model, "name_or_path", None)
    inject_adapter_in_model(config, model)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def save_adapter(model: nn.Module, folder: str | os.PathLike) -> None:
    """Writes the adapter that answers inside `model` (the first one where there are several; no `PeftModel` is around
    it) in PEFT's format: `adapter_model.safetensors` and `adapter_config.json`.

    Raises:
        ValueError: there is no adapter in the model, its weights are not finite, or its configuration would
            be refused on loading.
    """
    names = (name for layer in model.modules() if isinstance(layer, BaseTunerLayer) for name in layer.active_adapters)
    folder, name = Path(folder), next(names, None)
    if name is None:
        raise ValueError("there is no adapter to save: tune the model, or attach an adapter to it.")
    # Not "auto": PEFT would ask the Hub whether the vocabulary grew. Adapters here never resize it.
    state = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    check_weights(state, "the weights '{}'")
    tensors = {f"base_model.model.{key}": tensor.detach().cpu().contiguous().clone() for key, tensor in state.items()}
    save = model.peft_config[name].save_pretrained  # into a folder, under the usual name
    replace_file(folder / WEIGHTS, lambda temporary: save_file(tensors, temporary, metadata={"format": "pt"}))
    check = partial(load_json, kind="adapter_config")
    replace_file(folder / CONFIG, lambda temporary: save(os.fspath(temporary.parent)), check)
