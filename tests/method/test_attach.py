"""Saved prompts on another base model: the same answers where nothing changed, the new model's own where it did, and a
clear refusal of everything that does not fit."""

import copy
import json
import shutil

import pytest
import tiny_models
import torch
from peft import LoHaConfig, LoraConfig, PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModel, CLIPConfig, CLIPModel, CLIPProcessor, CLIPTokenizer

from hf_transmiter.data.anchors import Anchors
from hf_transmiter.encoders.dual_encoder import DualEncoder
from hf_transmiter.method.attach import Incompatible, attach, copy_adapter
from hf_transmiter.method.classifier import AnchorClassifier
from hf_transmiter.tuners import (
    CoCoOpConfig,
    ContCoOpConfig,
    CoOpConfig,
    IVLPConfig,
    KgCoOpConfig,
    MaPLeConfig,
    PromptSRCConfig,
    TransMiterConfig,
    inject,
    save_adapter,
)
from hf_transmiter.tuners.prompts import prompt_layer, set_classes


NAMES = ("cat", "red dog", "car")
PHRASE = "a photo of a"
CONFIGS = {
    "coop": lambda: CoOpConfig(init_phrase=PHRASE),
    "middle": lambda: CoOpConfig(init_phrase=PHRASE, position="middle"),
    "noise": lambda: CoOpConfig(n_ctx=3),
    "specific": lambda: CoOpConfig(init_phrase=PHRASE, class_specific=True, class_names=list(NAMES)),
    "deeper": lambda: CoOpConfig(init_phrase=PHRASE, layer=1),
    "kgcoop": lambda: KgCoOpConfig(),
    "cocoop": lambda: CoCoOpConfig(),
    "contcoop": lambda: ContCoOpConfig(),
    "text_feature": lambda: ContCoOpConfig(class_embed="text_feature"),
    "ivlp": lambda: IVLPConfig(text_depth=2, vision_depth=2),
    "maple": lambda: MaPLeConfig(depth=2),
    "promptsrc": lambda: PromptSRCConfig(text_depth=2, vision_depth=1),
}


@pytest.fixture(scope="module")
def saved(model_dir, tmp_path_factory):
    """``saved(kind)``: the folder of an adapter whose learnt tensors are all random, and the model with it."""
    made = {}

    def get(kind: str):
        if kind not in made:
            encoder = DualEncoder.from_pretrained(model_dir("clip"))
            inject(encoder.model, CONFIGS[kind]())
            generator = torch.Generator().manual_seed(5)
            layer = prompt_layer(encoder.model)
            for store in layer.adapter_layer_names:
                for parameter in getattr(layer, store).parameters():
                    parameter.data.normal_(std=0.5, generator=generator)
            folder = tmp_path_factory.mktemp(kind) / "adapter"
            save_adapter(encoder.model, folder)
            made[kind] = folder, encoder
        return made[kind]

    return get


@pytest.fixture
def damaged(saved, tmp_path):
    """``damaged(change, kind="coop")``: a copy of an adapter's folder whose tensors went through `change`."""

    def get(change, kind: str = "coop"):
        folder = shutil.copytree(saved(kind)[0], tmp_path / "damaged")
        tensors = load_file(folder / "adapter_model.safetensors")
        save_file(change(tensors), folder / "adapter_model.safetensors")
        return folder

    return get


def variant(*, text=None, vision=None, projection=16, tokenizer=None):
    """A tiny CLIP in memory that differs from the others as told."""
    tokenizer = tokenizer or tiny_models.clip_tokenizer()
    config = CLIPConfig(
        text_config=tiny_models._text(tokenizer, **(text or {})),
        vision_config={**tiny_models._VISION, **(vision or {})},
        projection_dim=projection,
    )
    torch.manual_seed(3)
    model = CLIPModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(std=0.3)
    return DualEncoder(model, CLIPProcessor(tiny_models._clip_images(), tokenizer))


def logits(encoder, images):
    classifier = AnchorClassifier(encoder, Anchors(NAMES, (), ("{}.",)))
    return classifier.classify(encoder.embed_images(images))


@pytest.mark.parametrize("kind", CONFIGS)
def test_on_its_own_model_it_answers_as_before(saved, model_dir, make_images, tmp_path, kind):
    folder, tuned = saved(kind)
    images, encoder = make_images(4), DualEncoder.from_pretrained(model_dir("clip"))
    plain, fingerprint = logits(encoder, images), encoder.fingerprint
    attached = attach(folder, encoder)
    assert torch.allclose(logits(attached, images), logits(tuned, images), atol=1e-5)
    assert not torch.allclose(logits(attached, images), plain, atol=1e-2)
    assert encoder.fingerprint == fingerprint and torch.equal(logits(encoder, images), plain)
    assert not any(parameter.requires_grad for parameter in attached.model.parameters())
    save_adapter(attached.model, tmp_path / "again")
    assert torch.equal(logits(attach(tmp_path / "again", encoder), images), logits(attached, images))


@pytest.mark.parametrize("kind", CONFIGS)
def test_on_another_model_everything_else_is_that_model(saved, model_dir, make_images, kind):
    """PEFT's own loader as the reference: it too has only the new model and the saved tensors."""
    folder, tuned = saved(kind)
    new = DualEncoder.from_pretrained(model_dir("clip", 1))
    images, attached = make_images(4), attach(str(folder), new)
    reference = DualEncoder(PeftModel.from_pretrained(AutoModel.from_pretrained(new.name_or_path), str(folder)))
    assert torch.allclose(logits(attached, images), logits(reference, images), atol=1e-5)
    assert not torch.allclose(logits(attached, images), logits(tuned, images), atol=1e-2)
    assert attached.logit_scale == new.logit_scale
    config = attached.model.peft_config["default"]
    assert config.base_model_name_or_path == new.name_or_path and config.base["vocabulary"]


def test_prompts_read_the_new_token_table(saved, model_dir):
    new = DualEncoder.from_pretrained(model_dir("clip", 1))
    attached = attach(saved("contcoop")[0], new)
    layer, config = prompt_layer(attached.model), attached.model.peft_config["default"]
    table = new.model.text_model.embeddings.token_embedding.weight
    assert torch.equal(layer.initial_context(config), table[config.init_token_ids])
    assert layer.get_base_layer().weight.data_ptr() != table.data_ptr() and torch.equal(
        layer.get_base_layer().weight, table
    )
    set_classes(attached.model, ["blue ship"])
    assert attached.model(pixel_values=torch.zeros(2, 3, 16, 16)).logits_per_image.shape == (2, 1)


def swapped_tokenizer():
    vocab = tiny_models.clip_tokenizer().get_vocab()
    vocab["cat</w>"], vocab["dog</w>"] = vocab["dog</w>"], vocab["cat</w>"]
    merges = tiny_models.clip_tokenizer().backend_tokenizer
    merges = [tuple(pair) for pair in json.loads(merges.to_str())["model"]["merges"]]
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=tiny_models.CONTEXT)


def longer_tokenizer():
    tokenizer = tiny_models.clip_tokenizer()
    tokenizer.add_tokens(["sandbox"])
    return tokenizer


REFUSALS = {
    "text width": ("contcoop", lambda: variant(text={"hidden_size": 32}), "text tower is 32 wide.* on 16"),
    "more tokens": ("kgcoop", lambda: variant(tokenizer=longer_tokenizer()), "tokenizer has 122 tokens.* with 121"),
    "other tokens": ("coop", lambda: variant(tokenizer=swapped_tokenizer()), "tokenizer has other tokens"),
    "image width": ("maple", lambda: variant(vision={"hidden_size": 32}), "image tower is 32 wide.* on 16"),
    "image width, ivlp": ("ivlp", lambda: variant(vision={"hidden_size": 32}), "image tower is 32 wide.* on 16"),
    "text depth": ("ivlp", lambda: variant(text={"num_hidden_layers": 1}), "2 layers of the text tower, which has 1"),
    "image depth": ("maple", lambda: variant(vision={"num_hidden_layers": 1}), "2 layers of the image tower.* has 1"),
    "layer": ("deeper", lambda: variant(text={"num_hidden_layers": 1}), "layer=1, but the text tower's last .* is 0"),
    "embeddings": ("cocoop", lambda: variant(projection=8), "embeddings have 8 dimensions.* on 16"),
    "positions": ("coop", lambda: variant(text={"max_position_embeddings": 6}), "leaves no room for a text"),
}


@pytest.mark.parametrize("why", REFUSALS)
def test_models_that_cannot_take_it(saved, why):
    kind, model, reason = REFUSALS[why]
    with pytest.raises(Incompatible, match=f"cannot be attached: .*{reason}") as caught:
        attach(saved(kind)[0], model())
    assert isinstance(caught.value, ValueError) and caught.value.reason in str(caught.value)


@pytest.mark.parametrize("kind", ["coop", "cocoop", "contcoop", "promptsrc"])
def test_what_does_not_matter_is_not_compared(saved, kind):
    """Towers may grow where nothing learnt reaches."""
    vision = {"num_hidden_layers": 3} if kind == "promptsrc" else {"hidden_size": 32, "num_hidden_layers": 1}
    attached = attach(saved(kind)[0], variant(text={"num_hidden_layers": 3}, vision=vision))
    assert attached.embed_names(NAMES, ("{}.",)).isfinite().all()


def test_the_encoders_own_tokenizer_is_compared(saved, model_dir):
    """Not the one beside the model, which has the right tokens here."""
    encoder = DualEncoder.from_pretrained(model_dir("clip"))
    encoder.processor.tokenizer = swapped_tokenizer()
    with pytest.raises(Incompatible, match="other tokens"):
        attach(saved("coop")[0], encoder)


def test_other_families(saved):
    align = DualEncoder(*tiny_models.build("align"))
    with pytest.raises(Incompatible, match="does not know the family 'align'"):
        attach(saved("coop")[0], align)
    with pytest.raises(Incompatible, match="text tower|tokenizer"):
        attach(saved("coop")[0], DualEncoder(*tiny_models.build("siglip")))


def test_adapters_that_are_no_prompts(encoder, saved, tmp_path):
    model = copy.deepcopy(encoder.model)
    inject(model, LoraConfig(target_modules=["q_proj"]))
    save_adapter(model, tmp_path / "lora")
    with pytest.raises(Incompatible, match="it is a LORA adapter, not a prompt learner's"):
        attach(tmp_path / "lora", encoder)
    classifier = AnchorClassifier(encoder, Anchors(NAMES))
    classifier.add_adapter(TransMiterConfig(class_names=list(NAMES), embed_dim=16)).save_pretrained(tmp_path / "logit")
    with pytest.raises(Incompatible, match="it is a TRANSMITER adapter"):
        attach(tmp_path / "logit", encoder)
    with pytest.raises(Incompatible, match="holds no adapter_config.json"):
        attach(encoder.name_or_path, encoder)
    with pytest.raises(FileNotFoundError, match="neither a local path nor a Hub id"):
        attach(tmp_path / "nowhere", encoder)
    with pytest.raises(ValueError, match="has adapters already"):
        attach(saved("coop")[0], DualEncoder(model, encoder.processor))


def test_only_safetensors_are_read(encoder, saved, tmp_path):
    folder = shutil.copytree(saved("coop")[0], tmp_path / "adapter")
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(Incompatible, match="holds no adapter_model.safetensors, and nothing else is read"):
        attach(folder, encoder)


def test_damaged_configurations(encoder, saved, tmp_path):
    folder = shutil.copytree(saved("coop")[0], tmp_path / "adapter")
    content = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**content, "n_ctx": 0}))
    with pytest.raises(Incompatible, match="configuration is damaged: .*n_ctx must be a whole number of 1 to 10,000"):
        attach(folder, encoder)
    (folder / "adapter_config.json").write_text("{")
    with pytest.raises(Incompatible, match="is damaged: .*is not valid JSON"):
        attach(folder, encoder)


def test_tensors_are_checked(encoder, damaged):
    key = "base_model.model.text_model.embeddings.token_embedding.coop_ctx"
    with pytest.raises(Incompatible, match=r"'ctx' hold NaN or infinite values"):
        attach(damaged(lambda tensors: {key: tensors[key].clone().fill_(torch.nan)}), encoder)


@pytest.mark.parametrize("kind", ["coop", "contcoop", "maple"])
def test_missing_tensors(encoder, damaged, kind):
    with pytest.raises(Incompatible, match=r"lacks \['base_model\.model\.text_model\.\S+_ctx'\]"):
        attach(damaged(lambda tensors: {k: v for k, v in tensors.items() if not k.endswith("ctx")}, kind), encoder)


def test_shapes_are_compared_before_anything_is_read(encoder, saved, tmp_path):
    """A file that says it holds 4 GiB, and does, sparsely: reading it would take long and all the memory."""
    folder = shutil.copytree(saved("coop")[0], tmp_path / "adapter")
    key, size = "base_model.model.text_model.embeddings.token_embedding.coop_ctx", 2**32
    header = json.dumps({key: {"dtype": "F32", "shape": [4, size // 16], "data_offsets": [0, size]}}).encode()
    with open(folder / "adapter_model.safetensors", "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + size)
    with pytest.raises(Incompatible, match=r"coop_ctx must have the shape \(4, 16\), it has \(4, 268435456\)"):
        attach(folder, encoder)
    (folder / "adapter_model.safetensors").write_bytes(b"not a file of tensors")
    with pytest.raises(Incompatible, match="adapter_model.safetensors is damaged"):
        attach(folder, encoder)


# Layers of LoRA, copied as they are


def with_layers(encoder: DualEncoder, config) -> DualEncoder:
    """A copy with an adapter whose weights are drawn."""
    model = copy.deepcopy(encoder.model)
    inject(model, config)
    torch.manual_seed(3)
    for name, parameter in model.named_parameters():
        if ".default" in name:
            parameter.data = 0.2 * torch.randn(parameter.shape)
    return DualEncoder(model.eval().requires_grad_(False), encoder.processor)


def sandboxed(name: str) -> DualEncoder:
    return DualEncoder.from_pretrained(f"sandbox:{name}")


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(r=4, target_modules=["q_proj", "fc2"]),
        LoraConfig(r=4, target_modules=r"vision_model.*\.v_proj", use_dora=True),
        LoHaConfig(r=2, target_modules=["q_proj"]),
    ],
    ids=["lora", "dora", "loha"],
)
def test_layers_are_copied_onto_other_weights_of_the_same_shape(config):
    """``W_strong + ΔW``, ΔW that of the tuned model; nothing else changes."""
    weak, strong = sandboxed("weak"), sandboxed("weak")
    for parameter in strong.model.parameters():
        parameter.data *= 1.1
    before, state = copy.deepcopy(strong.model.state_dict()), torch.get_rng_state()
    tuned = with_layers(weak, config)
    torch.set_rng_state(state)
    copied = copy_adapter(tuned, strong)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in strong.model.state_dict().items())
    own, theirs = (dict(model.model.named_parameters()) for model in (copied, tuned))
    learnt = [name for name in own if ".default" in name]
    assert learnt and all(torch.equal(own[name], theirs[name]) for name in learnt)
    base = {name: value for name, value in own.items() if name not in learnt}
    assert all(torch.allclose(value, 1.1 * theirs[name]) for name, value in base.items())
    pixels = torch.rand(2, 3, weak.image_size, weak.image_size)
    assert (copied.embed_pixels(pixels) - strong.embed_pixels(pixels)).abs().max() > 1e-2
    on_itself = copy_adapter(tuned, sandboxed("weak"))
    torch.testing.assert_close(on_itself.embed_pixels(pixels), tuned.embed_pixels(pixels))


def test_layers_of_one_tower_need_that_tower_alone():
    """The text towers of these two are of one shape, the image towers are not."""
    weak, upgraded = sandboxed("weak"), sandboxed("weak-upgraded")
    text = with_layers(weak, LoraConfig(r=4, target_modules=r"text_model.*\.q_proj"))
    copied = copy_adapter(text, upgraded)
    assert (copied.embed_names(["red disc"]) - upgraded.embed_names(["red disc"])).abs().max() > 1e-2
    images = with_layers(weak, LoraConfig(r=4, target_modules=r"vision_model.*\.q_proj"))
    for other in (upgraded, sandboxed("strong")):
        with pytest.raises(ValueError, match="the tuned layers have other names or shapes in the strong model"):
            copy_adapter(images, other)


def test_layers_that_are_not_there_are_not_copied(tmp_path):
    weak = sandboxed("weak")
    deeper = DualEncoder.from_pretrained(tiny_models.save("siglip", tmp_path, 1))
    tuned = with_layers(weak, LoraConfig(r=4, target_modules=["visual_projection"]))
    with pytest.raises(ValueError, match="the strong model has none of the tuned model's layers"):
        copy_adapter(tuned, deeper)
    with pytest.raises(ValueError, match="has adapters already"):
        copy_adapter(tuned, tuned)
    for model in (weak, with_layers(weak, CoOpConfig(n_ctx=2))):
        with pytest.raises(ValueError, match="the tuned model has no layers of LoRA or the like"):
            copy_adapter(model, weak)
