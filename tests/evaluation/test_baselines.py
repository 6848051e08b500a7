import copy

import pytest
import tiny_models
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel
from torch.nn.functional import kl_div, normalize, one_hot
from transformers import AutoModel

from hf_transmiter import sandbox
from hf_transmiter.cli.demo import SANDBOX_TUNING
from hf_transmiter.data.embeddings import embed_dataset
from hf_transmiter.encoders.dual_encoder import DualEncoder
from hf_transmiter.evaluation.baselines import (
    TOKEN_RIDGE,
    carried_contexts,
    emulated_fine_tuning,
    linear_head,
    logit_ensemble,
    prompt_transfer,
    solve_token_map,
    why_no_prompt_transfer,
)
from hf_transmiter.method.attach import reattach_prompt, why_not_reattached
from hf_transmiter.method.teacher import teacher_logits
from hf_transmiter.method.tune import tune
from hf_transmiter.settings import FitConfig, TuningConfig
from hf_transmiter.tuners import (
    CoCoOpConfig,
    ContCoOpConfig,
    CoOpConfig,
    IVLPConfig,
    KgCoOpConfig,
    MaPLeConfig,
    PromptSRCConfig,
    inject,
    save_adapter,
)
from hf_transmiter.tuners.prompts import phrase_token_ids, prompt_layer


NAMES = ("cat", "dog", "red car")
PHRASE = "a photo of a"
LEARNERS = {
    "coop": CoOpConfig(init_phrase=PHRASE),
    "middle": CoOpConfig(init_phrase=PHRASE, position="middle"),
    "specific": CoOpConfig(n_ctx=2, class_specific=True, class_names=list(NAMES)),
    "kgcoop": KgCoOpConfig(),
    "cocoop": CoCoOpConfig(),
    "contcoop": ContCoOpConfig(),
    "ivlp": IVLPConfig(text_depth=2, vision_depth=2),
    "maple": MaPLeConfig(depth=2),
    "promptsrc": PromptSRCConfig(n_ctx=2, text_depth=2, vision_depth=2),
}
CONTEXTS = ("coop", "middle", "specific", "kgcoop")


def prompted(folder: str, config, seed: int = 0) -> DualEncoder:
    """A tiny model with random prompts."""
    encoder = DualEncoder.from_pretrained(folder)
    inject(encoder.model, copy.deepcopy(config))
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in encoder.model.named_parameters():
        if ".default" in name:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    encoder.model.requires_grad_(False)
    return encoder


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A CLIP of width 24 whose token table is a linear map of the one of width 16."""
    folder = tiny_models.save("clip", tmp_path_factory.mktemp("wide"), 1, width=24)
    narrow = tiny_models.build("clip", 0)[0].text_model.embeddings.token_embedding.weight.detach()
    model = AutoModel.from_pretrained(folder)
    planted = torch.randn(16, 24, generator=torch.Generator().manual_seed(5))
    model.text_model.embeddings.token_embedding.weight.data = narrow @ planted
    model.save_pretrained(folder)

    encoder = DualEncoder.from_pretrained(folder)
    encoder.planted = planted
    return encoder


def context(encoder: DualEncoder) -> torch.Tensor:
    return prompt_layer(encoder.model).part("ctx", "default").detach()


# Without the text tower


def test_emulated_fine_tuning_adds_the_change_of_the_weak_model():
    strong, tuned, weak = (torch.randn(5, 3) for _ in range(3))
    assert torch.allclose(emulated_fine_tuning(strong, tuned, weak), strong + tuned - weak, atol=1e-6)
    assert torch.equal(emulated_fine_tuning(strong, tuned, tuned), strong)


def test_logit_ensemble_is_a_product_of_probabilities():
    strong, tuned = torch.randn(5, 3), torch.randn(5, 3)
    product = strong.softmax(1) * tuned.softmax(1)
    assert torch.allclose(logit_ensemble(strong, tuned).softmax(1), product / product.sum(1, keepdim=True), atol=1e-6)
    shifted = strong + torch.randn(5, 1)
    assert torch.allclose(logit_ensemble(shifted, tuned), logit_ensemble(strong, tuned), atol=1e-5)


@pytest.mark.parametrize("soft", [False, True])
def test_linear_head_learns_labels_and_soft_labels(soft):
    torch.manual_seed(0)
    true = normalize(torch.randn(4, 8), dim=-1)
    labels = torch.arange(4).repeat(30)
    x = normalize(true[labels] + 0.2 * torch.randn(120, 8), dim=-1)
    start = normalize(torch.randn(4, 8), dim=-1)
    target = one_hot(labels).float() if soft else labels
    config = FitConfig(epochs=150, lr=3e-2, weight_decay=0.0)
    vectors = linear_head(x, target, start, 20.0, config, progress=False)
    assert torch.allclose(vectors.norm(dim=1), torch.ones(4), atol=1e-5)
    assert ((x @ start.T).argmax(1) == labels).float().mean() < 0.7
    assert ((x @ vectors.T).argmax(1) == labels).float().mean() > 0.95
    assert torch.equal(vectors, linear_head(x, target, start, 20.0, config, progress=False))


# The token map


@given(st.integers(0, 2**31), st.integers(1, 8), st.integers(1, 8), st.integers(0, 30))
def test_the_token_map_recovers_a_planted_map(seed, old, new, more):
    generator = torch.Generator().manual_seed(seed)
    table = torch.randn(old + 4 + more, old, generator=generator, dtype=torch.float64)
    planted = torch.randn(old, new, generator=generator, dtype=torch.float64)
    found = solve_token_map(table, table @ planted)
    assert found.shape == (old, new) and (found - planted).abs().max() < 1e-4


def test_the_token_map_is_the_least_squares_solution():
    table, target = torch.randn(50, 6), torch.randn(50, 4)
    expected = torch.linalg.lstsq(table.double(), target.double()).solution
    assert torch.allclose(solve_token_map(table, target).double(), expected, atol=1e-6)
    lam = 0.3 * (table.T @ table).trace() / 6
    ridged = torch.linalg.solve(table.T @ table + lam * torch.eye(6), table.T @ target)
    assert torch.allclose(solve_token_map(table, target, 0.3), ridged, atol=1e-5)
    # Fewer tokens than dimensions: the smallest of the maps that fit.
    few = solve_token_map(table[:3], target[:3])
    assert torch.allclose(few, torch.linalg.pinv(table[:3]) @ target[:3], atol=1e-5)


@pytest.mark.parametrize(
    ("old", "new", "ridge", "message"),
    [
        (torch.zeros(5, 2), torch.zeros(4, 2), 0.0, "a row for each token of one vocabulary"),
        (torch.zeros(5, 2), torch.zeros(5, 2), -1.0, "must not be negative"),
        (torch.zeros(5, 2), torch.full((5, 2), torch.nan), 0.0, "NaN or infinite"),
    ],
)
def test_the_token_map_refuses(old, new, ridge, message):
    with pytest.raises(ValueError, match=message):
        solve_token_map(old, new, ridge)


# Re-attached


@pytest.mark.parametrize("learner", LEARNERS)
def test_a_reattached_prompt_is_the_same_prompt(model_dir, make_images, learner):
    tuned = prompted(model_dir("clip"), LEARNERS[learner])
    same, other = (DualEncoder.from_pretrained(model_dir("clip", seed=seed)) for seed in (0, 1))
    before = {name: tensor.clone() for name, tensor in other.model.state_dict().items()}
    back = reattach_prompt(tuned, same)
    images = make_images(3)
    assert (tuned.embed_names(NAMES, ("{}.",)) - same.embed_names(NAMES)).abs().max() > 1e-3
    assert torch.allclose(back.embed_names(NAMES, ("{}.",)), tuned.embed_names(NAMES, ("{}.",)), atol=1e-5)
    assert torch.allclose(back.embed_images(images), tuned.embed_images(images), atol=1e-5)
    moved = reattach_prompt(tuned, other)
    learnt = {name: value for name, value in tuned.model.state_dict().items() if ".default" in name}
    assert learnt and all(torch.equal(moved.model.state_dict()[name], value) for name, value in learnt.items())
    assert all(torch.equal(other.model.state_dict()[name], value) for name, value in before.items())
    assert not any(parameter.requires_grad for parameter in moved.model.parameters())


def test_what_is_not_reattached(model_dir, wide):
    tuned, plain = prompted(model_dir("clip"), LEARNERS["coop"]), DualEncoder.from_pretrained(model_dir("clip"))
    assert why_not_reattached(tuned, plain) is None
    assert why_not_reattached(plain, plain) == "the tuned model has no prompt learner on it"
    assert why_not_reattached(tuned, wide) == "the text tower is 24 wide, the one it was learnt on 16"
    assert "tokens" in why_not_reattached(tuned, DualEncoder.from_pretrained(model_dir("siglip")))
    assert "does not know the family 'align'" in why_not_reattached(
        tuned, DualEncoder.from_pretrained(model_dir("align"))
    )
    assert "adapters already" in why_not_reattached(tuned, tuned)
    with pytest.raises(ValueError, match="cannot be re-attached: the text tower is 24 wide"):
        reattach_prompt(tuned, wide)


# Prompt Transfer's start


@pytest.mark.parametrize("learner", CONTEXTS)
def test_the_context_goes_through_the_planted_map(model_dir, wide, learner):
    tuned = prompted(model_dir("clip"), LEARNERS[learner])
    start = carried_contexts(tuned, wide)[0]
    tables = [prompt_layer(model).get_base_layer().weight for model in (tuned.model, start.model)]
    assert torch.allclose(tables[1], tables[0] @ wide.planted, atol=1e-4)
    assert torch.allclose(context(start), context(tuned) @ solve_token_map(*tables, TOKEN_RIDGE), atol=1e-5)
    # The ridge takes a tenth of the length, but leaves the direction.
    cosine = torch.cosine_similarity(context(start), context(tuned) @ wide.planted, dim=-1)
    assert cosine.min() > 0.98
    config = prompt_layer(start.model).active_config
    assert (config.peft_type, config.position) == (LEARNERS[learner].peft_type, LEARNERS[learner].position)
    assert config.base["text_width"] == 24
    assert start.embed_names(NAMES, ("{}.",)).shape == (3, 24)


def test_with_other_words_the_phrase_is_written_anew(model_dir):
    tuned = prompted(model_dir("clip"), LEARNERS["coop"])
    strong = DualEncoder.from_pretrained(model_dir("siglip"))
    start = carried_contexts(tuned, strong)[0]
    assert torch.allclose(start.embed_names(NAMES, ("{}.",)), strong.embed_names(NAMES), atol=1e-5)
    ids = phrase_token_ids(strong.processor.tokenizer, PHRASE)
    assert prompt_layer(start.model).active_config.init_token_ids == ids


def test_what_cannot_be_carried(model_dir):
    plain = DualEncoder.from_pretrained(model_dir("clip"))
    assert "the tuned model has no prompt learner" in why_no_prompt_transfer(plain, plain)
    for learner in set(LEARNERS) - set(CONTEXTS):
        tuned = prompted(model_dir("clip"), LEARNERS[learner])
        reason = why_no_prompt_transfer(tuned, plain)
        assert reason.endswith(f"the tuned model has a {LEARNERS[learner].peft_type.value} adapter")
        with pytest.raises(ValueError, match="no prompt transfer: it is for contexts of CoOp or KgCoOp"):
            carried_contexts(tuned, plain)[0]
    lora = DualEncoder.from_pretrained(model_dir("clip"))
    inject(lora.model, LoraConfig(r=2, target_modules=["q_proj"]))
    assert "no prompt learner" in why_no_prompt_transfer(lora, plain)
    tuned = prompted(model_dir("clip"), LEARNERS["coop"])
    assert "adapters already" in why_no_prompt_transfer(tuned, lora)
    assert "'align'" in why_no_prompt_transfer(tuned, DualEncoder.from_pretrained(model_dir("align")))
    deeper = prompted(model_dir("clip"), CoOpConfig(init_phrase=PHRASE, layer=1))
    assert why_no_prompt_transfer(deeper, plain) == "a context at a deeper layer is none among token embeddings"


# Prompt Transfer


@pytest.mark.parametrize("learner", CONTEXTS)
def test_prompt_transfer_learns_the_context_and_nothing_else(model_dir, wide, learner, tmp_path):
    torch.manual_seed(0)
    tuned = prompted(model_dir("clip"), LEARNERS[learner])
    frozen = {name: tensor.clone() for name, tensor in wide.model.state_dict().items()}
    x = normalize(torch.randn(40, 24), dim=-1)
    target = torch.softmax(3 * torch.randn(40, 3), dim=1)
    config = FitConfig(epochs=8, batch_size=16, lr=5e-3, weight_decay=0.0)
    found = [prompt_transfer(tuned, wide, x, target, NAMES, config, progress=False) for _ in range(2)]
    assert torch.equal(context(found[0]), context(found[1]))  # follows from the seed

    def kl(encoder: DualEncoder) -> float:
        said = wide.logits(x, encoder.embed_names(NAMES, ("{}.",))).log_softmax(1)
        return float(kl_div(said, target, reduction="batchmean"))

    assert kl(found[0]) < kl(carried_contexts(tuned, wide)[0]) - 0.02
    assert kl(found[0]) < kl(wide) - 0.02
    after = found[0].model.state_dict()
    table = "text_model.embeddings.token_embedding."  # PEFT renames what it wraps
    for name, value in frozen.items():
        assert torch.equal(wide.model.state_dict()[name], value)
        assert torch.equal(after[name.replace(table, table + "base_layer.")], value)
    assert not any(parameter.requires_grad for parameter in found[0].model.parameters())
    save_adapter(found[0].model, tmp_path)
    loaded = PeftModel.from_pretrained(AutoModel.from_pretrained(wide.name_or_path), tmp_path)
    loaded = DualEncoder(loaded, wide.processor)
    assert torch.allclose(loaded.embed_names(NAMES, ("{}.",)), found[0].embed_names(NAMES, ("{}.",)), atol=1e-6)


def test_of_two_starts_the_lower_loss_is_kept(model_dir, wide):
    """The tuned model says what one of the two starts says already: training stays there, the other start loses."""
    torch.manual_seed(0)
    tuned, x = prompted(model_dir("clip"), LEARNERS["coop"]), normalize(torch.randn(40, 24), dim=-1)
    config = FitConfig(epochs=2, batch_size=20, lr=1e-3, weight_decay=0.0)
    mapped = carried_contexts(tuned, wide)[0]
    layer = prompt_layer(mapped.model)
    phrase = layer.get_base_layer().weight[layer.active_config.learned_ids]
    answers = {"mapped": mapped.embed_names(NAMES, ("{}.",)), "written": wide.embed_names(NAMES)}
    for start, expected in (("mapped", context(mapped)), ("written", phrase)):
        target = wide.logits(x, answers[start]).softmax(1)
        found = prompt_transfer(tuned, wide, x, target, NAMES, config, progress=False)
        assert (context(found) - expected).abs().max() < 4 * 1e-3 + 1e-6  # four steps
    assert (context(mapped) - phrase).abs().max() > 1


def test_prompt_transfer_refuses_what_does_not_go_together(model_dir):
    tuned, strong = prompted(model_dir("clip"), LEARNERS["coop"]), DualEncoder.from_pretrained(model_dir("clip"))
    x, target = normalize(torch.randn(6, 16), dim=-1), torch.full((6, 3), 1 / 3)
    for odd in ((x[:, :8], target, NAMES), (x[:5], target, NAMES), (x, target, NAMES[:2])):
        with pytest.raises(ValueError, match=r"takes embeddings \(N, 16\) and probabilities \(N, [23]\)"):
            prompt_transfer(tuned, strong, *odd, progress=False)
    with pytest.raises(ValueError, match="tuned model's probabilities hold NaN"):
        prompt_transfer(tuned, strong, x, target * torch.nan, NAMES, progress=False)
    with pytest.raises(ValueError, match="shorten the name"):
        prompt_transfer(tuned, strong, x, target, ("cat", "dog", "abcdefghijklmnop"), progress=False)


def test_prompt_transfer_on_the_sandbox():
    """Words without a meaning, told by a context: the wider model learns from the tuned one what they mean."""
    weak, strong = (DualEncoder.from_pretrained(sandbox.model_path(name)) for name in ("weak", "strong"))
    train, images = sandbox.load_dataset("jargon", "train"), sandbox.load_dataset("jargon", "unlabelled")
    names, images = train.features["label"].names, images.select(range(500))
    config = TuningConfig(**{**SANDBOX_TUNING, "epochs": 8})
    tuned = tune(weak, train, "coop", config=config, progress=False)
    said = teacher_logits(tuned, images, names, progress=False)
    x = embed_dataset(strong, images, progress=False).embeds
    learnt, held_out = slice(0, 300), slice(300, None)
    fit = FitConfig(epochs=12, batch_size=32, lr=1e-2, weight_decay=0.0)
    moved = prompt_transfer(tuned.encoder, strong, x[learnt], said[learnt].softmax(1), names, fit, progress=False)
    start = carried_contexts(tuned.encoder, strong)[0]
    texts = {"zero-shot": strong.embed_names(names)}
    texts |= {name: e.embed_names(names, ("{}.",)) for name, e in (("start", start), ("moved", moved))}
    z = {name: strong.logits(x[held_out], text) for name, text in texts.items()}
    q, top = said[held_out].softmax(1), said[held_out].argmax(1)
    kl = {name: float(kl_div(logits.log_softmax(1), q, reduction="batchmean")) for name, logits in z.items()}
    agree = {name: float((logits.argmax(1) == top).float().mean()) for name, logits in z.items()}
    assert kl["moved"] < 0.75 * kl["start"] and kl["moved"] < 0.75 * kl["zero-shot"]
    assert agree["moved"] > agree["zero-shot"] + 0.1
