"""Tiny random two-tower models of every supported family, with matching tokenizers, built without any download.

``build(family, seed=0)`` returns ``(model, processor)``; ``save(family, folder)`` writes both so that
``AutoModel.from_pretrained`` and ``AutoProcessor.from_pretrained`` read them back. Images are 16 x 16 after
preprocessing, embeddings 16-dimensional, texts at most 16 tokens (32 for BERT-likes).
"""

import string

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    AlignConfig,
    AlignModel,
    AlignProcessor,
    AltCLIPConfig,
    AltCLIPModel,
    AltCLIPProcessor,
    BertTokenizer,
    ChineseCLIPConfig,
    ChineseCLIPImageProcessorPil,
    ChineseCLIPModel,
    ChineseCLIPProcessor,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPProcessor,
    CLIPTokenizer,
    EfficientNetImageProcessorPil,
    MetaClip2Config,
    MetaClip2Model,
    PreTrainedTokenizerFast,
    Siglip2Config,
    Siglip2ImageProcessorPil,
    Siglip2Model,
    Siglip2Processor,
    Siglip2Tokenizer,
    SiglipConfig,
    SiglipImageProcessorPil,
    SiglipModel,
    SiglipProcessor,
    VisionTextDualEncoderConfig,
    VisionTextDualEncoderModel,
    VisionTextDualEncoderProcessor,
    ViTImageProcessorPil,
    XLMRobertaTokenizer,
)


WORDS = "a photo of the cat dog car tree ship drawing red blue old big this is good".split()
IMAGE_SIZE = 16
CONTEXT = 16
WIDTH = 16

_TOWER = {"hidden_size": WIDTH, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
_VISION = {**_TOWER, "image_size": IMAGE_SIZE, "patch_size": 8}
_SIZE = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}


def clip_tokenizer(context: int = CONTEXT) -> CLIPTokenizer:
    """CLIP byte-pair encoding: one token per word of `WORDS`, letters for the rest (``</w>`` ends a word)."""
    vocab, merges = {}, []

    def add(token):
        vocab.setdefault(token, len(vocab))

    for char in string.ascii_lowercase + string.digits + ".,-'":
        add(char)
        add(char + "</w>")
    for word in WORDS:
        symbols = [*word[:-1], word[-1] + "</w>"]
        while len(symbols) > 1:
            if (symbols[0], symbols[1]) not in merges:
                merges.append((symbols[0], symbols[1]))
            symbols = [symbols[0] + symbols[1], *symbols[2:]]
            add(symbols[0])
    add("<|startoftext|>")
    add("<|endoftext|>")
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=context)


def bert_tokenizer(context: int = 32) -> BertTokenizer:
    """WordPiece over `WORDS` and single letters."""
    letters = list(string.ascii_lowercase + string.digits)
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ".", ",", *letters, *("##" + c for c in letters)]
    tokens += [word for word in WORDS if word not in tokens]
    return BertTokenizer(vocab={token: i for i, token in enumerate(tokens)}, model_max_length=context)


def xlmr_tokenizer(context: int = CONTEXT) -> XLMRobertaTokenizer:
    """Unigram pieces as in XLM-R: ids 0 to 3 are ``<s> <pad> </s> <unk>``."""
    pieces = [("<s>", 0.0), ("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    pieces += [("▁" + word, -2.0) for word in WORDS]
    pieces += [(char, -8.0) for char in "▁" + string.ascii_lowercase + string.digits + ".,"]
    pieces = list(dict(pieces).items()) + [("<mask>", 0.0)]
    return XLMRobertaTokenizer(vocab=pieces, model_max_length=context)


def siglip_tokenizer(context: int = CONTEXT) -> PreTrainedTokenizerFast:
    """Lower-cased Unigram, ``</s>`` appended and used for padding, as SigLIP's sentencepiece model does."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)] + [("▁" + word, -2.0) for word in WORDS]
    pieces += [(char, -8.0) for char in "▁" + string.ascii_lowercase + string.digits + ".,"]
    backend = Tokenizer(models.Unigram(list(dict(pieces).items()), unk_id=2))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="</s>", pad_token="</s>", unk_token="<unk>", model_max_length=context
    )


def siglip2_tokenizer(context: int = 48) -> Siglip2Tokenizer:
    """Gemma-style byte-pair encoding of single letters, ``<eos>`` appended, padded on the right."""
    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *("▁" + string.ascii_lowercase + string.digits + ".,")]
    tokenizer = Siglip2Tokenizer(
        vocab={token: i for i, token in enumerate(tokens)}, merges=[], model_max_length=context, padding_side="right"
    )
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <eos>", special_tokens=[("<eos>", 1)]
    )
    return tokenizer


def _clip_images() -> CLIPImageProcessorPil:
    return CLIPImageProcessorPil(size={"shortest_edge": IMAGE_SIZE}, crop_size=_SIZE)


def _text(tokenizer, positions: int = CONTEXT, **extra) -> dict:
    special = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    special = {name: token for name, token in special.items() if token is not None}
    shape = {"vocab_size": len(tokenizer), "max_position_embeddings": positions}
    return {**_TOWER, **shape, "pad_token_id": tokenizer.pad_token_id, **special, **extra}


def clip(legacy_eos: bool = False, width: int = WIDTH):
    """`legacy_eos` makes the config of the first OpenAI checkpoints: ``eos_token_id = 2``, pooling at the argmax."""
    tokenizer = clip_tokenizer()
    text = _text(tokenizer, hidden_size=width, **({"eos_token_id": 2} if legacy_eos else {}))
    config = CLIPConfig(text_config=text, vision_config={**_VISION, "hidden_size": width}, projection_dim=width)
    return CLIPModel(config), CLIPProcessor(_clip_images(), tokenizer)


def siglip():
    tokenizer = siglip_tokenizer()
    config = SiglipConfig(text_config=_text(tokenizer, projection_size=WIDTH), vision_config=dict(_VISION))
    return SiglipModel(config), SiglipProcessor(SiglipImageProcessorPil(size=_SIZE), tokenizer)


def siglip2():
    tokenizer = siglip2_tokenizer()
    vision = {**_TOWER, "patch_size": 8, "num_patches": (IMAGE_SIZE // 8) ** 2}
    text = _text(tokenizer, positions=48, bos_token_id=2, projection_size=WIDTH)  # 48: one token per letter
    config = Siglip2Config(text_config=text, vision_config=vision)
    images = Siglip2ImageProcessorPil(patch_size=8, max_num_patches=vision["num_patches"])
    return Siglip2Model(config), Siglip2Processor(images, tokenizer)


def metaclip_2():
    tokenizer = xlmr_tokenizer()
    config = MetaClip2Config(text_config=_text(tokenizer), vision_config=dict(_VISION), projection_dim=WIDTH)
    return MetaClip2Model(config), CLIPProcessor(_clip_images(), tokenizer)


def altclip():
    tokenizer = xlmr_tokenizer()
    # RoBERTa positions start after the padding id, so two entries of the table are never used.
    text = _text(tokenizer, positions=CONTEXT + 2, project_dim=WIDTH)
    config = AltCLIPConfig(text_config=text, vision_config=dict(_VISION), projection_dim=WIDTH)
    return AltCLIPModel(config), AltCLIPProcessor(_clip_images(), tokenizer)


def chinese_clip():
    tokenizer = bert_tokenizer()
    config = ChineseCLIPConfig(text_config=_text(tokenizer, 32), vision_config=dict(_VISION), projection_dim=WIDTH)
    images = ChineseCLIPImageProcessorPil(size={"shortest_edge": IMAGE_SIZE}, crop_size=_SIZE)
    return ChineseCLIPModel(config), ChineseCLIPProcessor(images, tokenizer)


def align():
    tokenizer = bert_tokenizer()
    vision = {
        "image_size": IMAGE_SIZE,
        "width_coefficient": 1.0,
        "depth_coefficient": 1.0,
        "kernel_sizes": [3],
        "in_channels": [32],
        "out_channels": [16],
        "strides": [2],
        "num_block_repeats": [1],
        "expand_ratios": [1],
        "hidden_dim": WIDTH,
    }
    config = AlignConfig(text_config=_text(tokenizer, 32), vision_config=vision, projection_dim=WIDTH)
    config.temperature_init_value = 0.07
    images = EfficientNetImageProcessorPil(size=_SIZE, do_center_crop=False)
    return AlignModel(config), AlignProcessor(images, tokenizer)


def vision_text_dual_encoder():
    tokenizer = bert_tokenizer()
    config = VisionTextDualEncoderConfig(
        text_config={"model_type": "bert", **_text(tokenizer, 32)},
        vision_config={"model_type": "vit", **_VISION},
        projection_dim=WIDTH,
    )
    images = ViTImageProcessorPil(size=_SIZE)
    return VisionTextDualEncoderModel(config), VisionTextDualEncoderProcessor(images, tokenizer)


BUILDERS = {
    "clip": clip,
    "siglip": siglip,
    "siglip2": siglip2,
    "metaclip_2": metaclip_2,
    "altclip": altclip,
    "chinese_clip": chinese_clip,
    "align": align,
    "vision-text-dual-encoder": vision_text_dual_encoder,
}
FAMILIES = tuple(BUILDERS)


def build(family: str = "clip", seed: int = 0, **kwargs):
    """``(model, processor)`` of `family`, random weights from `seed`, in eval mode."""
    torch.manual_seed(seed)
    model, processor = BUILDERS[family](**kwargs)
    # Fresh transformers weights have a standard deviation of 0.02: all texts would look alike and a wrong
    # pooling position or a leaking pad token would go unnoticed.
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(std=0.3)
        for module in model.modules():
            if isinstance(module, torch.nn.Embedding) and module.padding_idx is not None:
                module.weight[module.padding_idx] = 0
        if hasattr(model, "logit_bias"):  # SigLIP's own start: a scale of 10 and a bias of -10
            model.logit_scale.fill_(2.3026)
            model.logit_bias.fill_(-10.0)
    return model.eval(), processor


def save(family: str, folder, seed: int = 0, **kwargs) -> str:
    """Write `build(family, seed)` to `folder`; returns its path as a string."""
    model, processor = build(family, seed, **kwargs)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)
