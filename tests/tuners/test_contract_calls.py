"""What every PEFT method of this package owes its users who call one model from several places, or export it: one
matrix, as in `test_contract`."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from contract import MATRIX, METHODS, ask, call, matrix, same, stir
from peft import get_peft_model


NAMES = ["cat", "old dog", "car", "a small tree", "ship"]


@pytest.fixture(scope="session")
def calls(encoders, make_images):
    """``calls(method, root)``: calls with other pictures, texts and shapes each."""

    def make(method, root):
        encoder, names = encoders(root), NAMES
        if getattr(method.make(), "class_specific", False):
            names = method.make().class_names
        found = []
        for i in range(6):
            asked = [f"{names[(i + k) % len(names)]}." for k in range(1 + i % len(names))]
            pixels = encoder.preprocess(make_images(1 + i % 3, seed=i))
            found.append(call(method, {"pixel_values": pixels, **encoder.tokenize(asked)}))
        return found

    return make


@torch.no_grad()
def answers(model, given):
    return [model(**one).logits_per_image.clone() for one in given]


def in_threads(model, given, count=4):
    """The answers to the calls of each of several threads, each of which begins with another one."""

    def work(first):
        order = [(first + i) % len(given) for i in range(len(given))]
        found = dict(zip(order, answers(model, [given[i] for i in order]), strict=True))
        return [found[i] for i in range(len(given))]

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(work, range(count)))


@matrix
def test_threads_get_the_answers_of_one(method, root, tuned, calls, restless):
    model, _, _ = tuned(method, root)
    given = calls(method, root)
    expected = answers(model, given)
    for found in in_threads(model, given):
        for left, right in zip(found, expected, strict=True):
            same(left, right)


@pytest.mark.parametrize(("method", "root"), [case for case in MATRIX if not case.values[0].texts])
def test_threads_of_a_fresh_adapter(method, root, new, calls, restless):
    """Its names are embedded in the first call."""
    given = calls(method, root)
    expected = answers(get_peft_model(new(root), method.make()), given)
    for _ in range(3):
        for found in in_threads(get_peft_model(new(root), method.make()), given):
            for left, right in zip(found, expected, strict=True):
                same(left, right)


def replicas(model, count):
    """Copies as `nn.DataParallel` makes them: shallow ones, with tensors of their own in place of parameters."""

    def replica():
        twins = {module: module._replicate_for_data_parallel() for module in model.modules()}
        for module, twin in twins.items():
            twin._modules = {name: child and twins[child] for name, child in module._modules.items()}
            for name, parameter in module._parameters.items():
                setattr(twin, name, parameter if parameter is None else parameter * 1)
        return twins[model]

    return [replica() for _ in range(count)]


@matrix
def test_replicas_answer_and_learn(method, root, tuned, inputs, restless):
    model, expected, _ = tuned(method, root)
    given = call(method, inputs(root))
    parts = [{**given, "pixel_values": pixels[None]} for pixels in given["pixel_values"]]
    model(**given).logits_per_image.log_softmax(1)[:, 0].sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    with ThreadPoolExecutor(len(parts)) as pool:
        found = list(pool.map(lambda twin, part: twin(**part).logits_per_image, replicas(model, len(parts)), parts))
    same(torch.cat(found).detach(), expected)
    torch.cat(found).log_softmax(1)[:, 0].sum().backward()
    assert gradients and any(gradient.any() for gradient in gradients.values())
    for name, gradient in gradients.items():
        torch.testing.assert_close(dict(model.named_parameters())[name].grad, gradient, atol=1e-4, rtol=1e-3)


@matrix
def test_nothing_of_a_call_stays_on_the_model(method, root, tuned, inputs):
    model, _, _ = tuned(method, root)
    layer = next(module for module in model.modules() if hasattr(module, "configs"))

    def kept():
        return {key: repr(value) for key, value in vars(layer).items() if key not in ("roots", "_modules")}

    before, given = kept(), inputs(root)
    ask(model, method, {key: value.flip(0)[:1] for key, value in given.items()})
    assert kept() == before


@matrix
def test_another_type_after_the_first_call(method, root, tuned, inputs):
    model, answer, _ = tuned(method, root)
    model.double()
    given = {key: value.double() if value.is_floating_point() else value for key, value in inputs(root).items()}
    torch.testing.assert_close(ask(model, method, given).float(), answer, atol=1e-3, rtol=1e-3)


@matrix
def test_float64_by_default(method, root, new, inputs):
    expected = get_peft_model(new(root), method.make())
    answer = ask(expected, method, inputs(root))
    torch.set_default_dtype(torch.float64)
    try:
        model = get_peft_model(new(root), method.make())
        torch.testing.assert_close(ask(model, method, inputs(root)).float(), answer, atol=1e-3, rtol=1e-3)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.isfinite(answer).all()


class Logits(torch.nn.Module):
    """What is exported: names of tensors in, one tensor out."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, pixel_values, input_ids=None, attention_mask=None):
        texts = {"input_ids": input_ids, "attention_mask": attention_mask}
        texts = {key: value for key, value in texts.items() if value is not None}
        return self.model(pixel_values=pixel_values, **texts).logits_per_image


def exported(model, given):
    """The program of any number of pictures up to 64."""
    batch = torch.export.Dim("batch", min=1, max=64)
    shapes = {key: {0: batch} if key == "pixel_values" else None for key in given}
    root = Logits(model.get_base_model()).eval()
    return torch.export.export(root, (), given, dynamic_shapes=shapes, strict=False).module()


QUICK = ("mlp", "image_side", "image_side_tower", "coop", "coop_class_specific", "cocoop", "contcoop", "ivlp")
EXPORTS = [
    pytest.param(
        *case.values,
        texts,
        marks=() if case.id in [f"{name}-clip" for name in QUICK] and not texts else pytest.mark.slow,
    )
    for case in MATRIX
    for texts in (False, True)
]


@pytest.mark.parametrize(("method", "root", "texts"), EXPORTS)
def test_export(method, root, texts, tuned, inputs):
    model, _, _ = tuned(method, root)
    if method.chosen and not texts:
        model.set_classes(["cat", "old dog"])
    given = call(method, inputs(root), texts)
    expected = ask(model, method, given, texts)
    program = exported(model, given)
    same(program(**given), expected)
    more = {**given, "pixel_values": torch.cat([given["pixel_values"], 1 - given["pixel_values"][:2]])}
    same(program(**more), ask(model, method, more, texts))


@pytest.mark.parametrize("name", ["coop", "contcoop"])
def test_an_exported_prompt_says_what_does_not_fit(name, tuned, inputs):
    """The lengths of texts are known when the program runs, not when it is made."""
    model, _, _ = tuned(METHODS[name], "clip")
    given = inputs("clip")
    program = exported(model, given)
    with pytest.raises(RuntimeError, match="padded on the right"):
        program(**{**given, "attention_mask": given["attention_mask"].flip(1)})
    long = {key: torch.ones(2, 16, dtype=torch.long) for key in ("input_ids", "attention_mask")}
    long["input_ids"] *= given["input_ids"][0, 1]
    program = exported(model, {**given, **long})
    with pytest.raises(RuntimeError, match="a text has more than"):
        program(**{**given, **long})


def test_a_fresh_adapter_is_not_exported(new, inputs):
    model = get_peft_model(new("clip"), METHODS["mlp"].make())
    given = {"pixel_values": inputs("clip")["pixel_values"]}
    with pytest.raises(ValueError, match="call the model once before it is exported"):
        exported(model, given)
    expected = ask(model, METHODS["mlp"], given)
    stir(model, METHODS["mlp"], std=0.0)
    same(exported(model, given)(**given), expected)
