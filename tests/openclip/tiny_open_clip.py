"""Tiny models of open_clip with random weights, and one of transformers that has the same tokens."""

import torch
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPProcessor

from hf_transmiter.encoders.open_clip import OpenClipConfig, OpenClipModel, load_tokenizer


# The whole vocabulary of CLIP, so that its tokenizer fits; all else is small.
TEXT = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
RESNET = {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "patch_size": None}
EVA = {"image_size": 32, "timm_model_name": "eva02_for_tests", "timm_pool": "token", "timm_proj": None}
VIT = {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 16}
MODELS = {
    "resnet": {"embed_dim": 24, "quick_gelu": True, "vision_cfg": RESNET, "text_cfg": TEXT},
    "eva": {"embed_dim": 16, "quick_gelu": False, "vision_cfg": EVA, "text_cfg": TEXT},
    "vit": {"embed_dim": 16, "quick_gelu": False, "vision_cfg": VIT, "text_cfg": TEXT},
    "wide": {"embed_dim": 16, "quick_gelu": False, "vision_cfg": VIT, "text_cfg": {**TEXT, "width": 48}},
}
PREPROCESS = {
    "mean": [0.48145466, 0.4578275, 0.40821073],
    "std": [0.26862954, 0.26130258, 0.27577711],
    "interpolation": "bicubic",
    "resize_mode": "shortest",
}


def loud(model: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Weights with which texts and pictures differ a lot."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(std=min(0.3, 2 * parameter[0].numel() ** -0.5), generator=generator)
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.weight.fill_(1)
    return model.eval()


def build(kind: str, seed: int = 0) -> OpenClipModel:
    _register()
    config = OpenClipConfig(model_cfg=MODELS[kind], preprocess_cfg=PREPROCESS)
    return loud(OpenClipModel(config), seed)


def save_clip(folder, width: int = 32) -> str:
    """A `CLIPModel` with a text tower of this width and its processor."""
    tower = {"hidden_size": width, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    tokens = {"vocab_size": 49408, "bos_token_id": 49406, "eos_token_id": 49407, "pad_token_id": 49407}
    vision = {**tower, "image_size": 32, "patch_size": 16}
    text = {**tower, **tokens, "max_position_embeddings": 77}
    loud(CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)), 5).save_pretrained(folder)
    images = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    CLIPProcessor(images, load_tokenizer()).save_pretrained(folder)
    return str(folder)


def _register() -> None:
    """Makes the image tower of EVA02-B-16, small, known to timm."""
    from timm.models import is_model, register_model
    from timm.models.eva import Eva

    if is_model("eva02_for_tests"):
        return

    @register_model
    def eva02_for_tests(pretrained=False, pretrained_cfg=None, pretrained_cfg_overlay=None, cache_dir=None, **kwargs):
        size = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "ref_feat_shape": (4, 4)}
        kind = {"qkv_fused": False, "swiglu_mlp": True, "scale_mlp": True, "scale_attn_inner": True}
        return Eva(**size, **kind, mlp_ratio=8 / 3, use_rot_pos_emb=True, **kwargs)
