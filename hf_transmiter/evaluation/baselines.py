"""What a transfer has to beat: every cheap alternative a practitioner has, on the same embeddings and scored alike."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div, normalize

from ..algebra import check_finite
from ..encoders.dual_encoder import DualEncoder
from ..encoders.identity import vocabulary_hash
from ..method.attach import active_prompts, why_closed, with_adapter
from ..settings import FitConfig
from ..training.loop import fit
from ..tuners import CoOpConfig
from ..tuners.prompts import class_inputs, class_vectors, phrase_token_ids, prompt_layer
from ..tuners.prompts.model import base_facts


# λ of the token map: on the sandbox it tells more of unrelated models' held-out tokens than 0, and hardly less of an
# upgrade's.
TOKEN_RIDGE = 0.1


def emulated_fine_tuning(strong: Tensor, tuned: Tensor, weak: Tensor) -> Tensor:
    """``z_strong + (z_tuned - z_weak)`` of task logits (N, C), scale included: needs the weak model and its tuned
    version for every prediction (EFT, Mitchell et al., arXiv 2310.12962)."""
    return strong + (tuned - weak)


def logit_ensemble(strong: Tensor, tuned: Tensor) -> Tensor:
    """Sum of log-probabilities (N, C) of the strong and the tuned weak model; needs both for every prediction."""
    return strong.log_softmax(1) + tuned.log_softmax(1)


def linear_head(
    x: Tensor, target: Tensor, zero_shot: Tensor, scale: float, config: FitConfig | None = None, progress: bool = True
) -> Tensor:
    """Unit class vectors fitted by cross-entropy on ``s · x Tᵀ``, from the zero-shot ones.

    With labels (N,) as `target` this is a linear probe, with a teacher's probabilities (N, C) its distillation.

    Args:
        x (`Tensor`): (N, d) unit image embeddings.
        target (`Tensor`): labels (N,) or probabilities (N, C).
        zero_shot (`Tensor`): (C, d) unit text embeddings.
        scale (`float`): s.
        config (`FitConfig`, *optional*): 30 epochs of AdamW at 2e-3 without decay when omitted.

    Returns:
        `Tensor`: T (C, d), unit rows.
    """
    config = config or FitConfig(epochs=30, lr=2e-3, weight_decay=0.0)
    vectors = nn.Parameter(zero_shot.clone())

    def step(rows: Tensor, generator: torch.Generator) -> Tensor:
        return cross_entropy(scale * x[rows] @ normalize(vectors, dim=-1).T, target[rows])

    fit([vectors], step, len(x), config, description="Linear head", progress=progress)
    return normalize(vectors.detach(), dim=-1)


def why_no_prompt_transfer(tuned: DualEncoder, strong: DualEncoder) -> str | None:
    """Why [`prompt_transfer`] is not possible between two models, `None` where it is."""
    layer = active_prompts(tuned)
    if layer is None or not isinstance(layer.active_config, CoOpConfig):
        kind = "no prompt learner" if layer is None else f"a {layer.active_config.peft_type.value} adapter"
        return f"it is for contexts of CoOp or KgCoOp, and the tuned model has {kind}"
    if layer.active_config.layer:
        return "a context at a deeper layer is none among token embeddings"
    return why_closed(strong)


def solve_token_map(old: Tensor, new: Tensor, ridge: float = 0.0) -> Tensor:
    """The linear map between two token tables of one vocabulary, for what lives among an old model's token embeddings.

    ``argmin_M ‖E_old M - E_new‖² + λ·ē·‖M‖²`` with ē the mean eigenvalue of ``E_oldᵀ E_old``; of several minima, the
    smallest. A context ``v`` (M, d_old) becomes ``v @ solve_token_map(...)`` (M, d_new).

    Args:
        old, new (`Tensor`): E_old (V, d_old) and E_new (V, d_new), row i the embedding of token i.
        ridge (`float`, *optional*, defaults to 0.0): λ.

    Returns:
        `Tensor`: (d_old, d_new), float32.

    Raises:
        ValueError: tables of different lengths, a negative λ, or a value that is not finite.
    """
    if old.ndim != 2 or new.ndim != 2 or len(old) != len(new):
        found = f"{tuple(old.shape)} and {tuple(new.shape)}"
        raise ValueError(f"token tables must have a row for each token of one vocabulary, got {found}.")
    if ridge < 0:
        raise ValueError(f"ridge must not be negative, got {ridge}.")
    x, y = (check_finite(table.detach().cpu(), "the token embeddings").double() for table in (old, new))
    gram = x.T @ x
    gram.diagonal().add_(ridge * gram.diagonal().mean())
    return (torch.linalg.pinv(gram, hermitian=True) @ (x.T @ y)).float()


def prompt_transfer(
    tuned: DualEncoder,
    strong: DualEncoder,
    x: Tensor,
    target: Tensor,
    class_names: Sequence[str],
    config: FitConfig | None = None,
    *,
    accelerator=None,
    progress: bool = True,
) -> DualEncoder:
    """Prompt Transfer, the baseline of arXiv 2508.08604: the context moves and is then taught by the tuned model.

    Minimises ``KL(q ‖ softmax(s · x wᵀ))`` over unlabelled images, batch mean, with q the tuned weak model's
    probabilities and w the strong model's class vectors with the context in it. Needs a backward pass through its text
    tower in every step, for all C classes.

    With one vocabulary it is trained twice, from both of [`carried_contexts`], and the lower loss on these images is
    kept: either start alone ends in a bad minimum now and then, from the map above all where the two models have
    nothing in common.

    Args:
        tuned (`DualEncoder`): with a context of CoOp or KgCoOp on it.
        strong (`DualEncoder`): stays untouched.
        x (`Tensor`): (N, d) unit image embeddings of the strong model.
        target (`Tensor`): q (N, C), the tuned model's probabilities on the same images.
        class_names (`Sequence[str]`): C names, columns of q.
        config (`FitConfig`, *optional*): 20 epochs of AdamW at 1e-2 without decay when omitted.

    Returns:
        `DualEncoder`: the strong model with its context; prompts of it are ``"{}."``. Saved and loaded as any PEFT
        adapter: ``save_adapter(found.model, folder)``.

    Raises:
        ValueError: as [`why_no_prompt_transfer`] says; embeddings, probabilities and names that do not go together; a
            name too long for the text tower beside the context.
    """
    config = config or FitConfig(epochs=20, batch_size=64, lr=1e-2, weight_decay=0.0)
    if x.shape != (len(target), strong.embed_dim) or target.shape[1:] != (len(class_names),):
        raise ValueError(
            f"prompt transfer takes embeddings (N, {strong.embed_dim}) and probabilities (N, {len(class_names)}) of "
            f"the same images, got {tuple(x.shape)} and {tuple(target.shape)}."
        )
    check_finite(x, "the embeddings")
    check_finite(target, "the tuned model's probabilities")
    starts = carried_contexts(tuned, strong)
    layer = prompt_layer(starts[0].model)
    length = len(layer.slot_ids(layer.active_config))
    inputs = class_inputs(class_names, strong.processor.tokenizer, strong.family, strong.context_length, length)
    inputs = {key: value.to(strong.device) for key, value in inputs.items()}
    x, target, scale = x.to(strong.device), target.to(strong.device), strong.logit_scale

    def loss(model: nn.Module, rows: Tensor | slice) -> Tensor:
        z = scale * x[rows] @ class_vectors(model, inputs).T
        return kl_div(z.log_softmax(1), target[rows], reduction="batchmean")

    ends, options = [], {"accelerator": accelerator, "description": "Prompt transfer", "progress": progress}
    for prompted in starts:
        layer = prompt_layer(prompted.model)
        context = layer.part("ctx", layer.active_name).requires_grad_()
        fit([context], lambda rows, _, model=prompted.model: loss(model, rows.to(x.device)), len(x), config, **options)
        context.requires_grad_(False)
        ends.append(float(loss(prompted.model, slice(None))))
    return starts[ends.index(min(ends))]


def carried_contexts(tuned: DualEncoder, strong: DualEncoder) -> list[DualEncoder]:
    """Copies of the strong model, of any width, with the contexts that Prompt Transfer starts from.

    With one vocabulary first ``v @ M``, v (M, width) the tuned model's context and M the map between the two token
    tables ([`solve_token_map`]); then, or with two vocabularies alone, the strong model's own embeddings of the phrase
    the context started from.

    Raises:
        ValueError: as [`why_no_prompt_transfer`] says.
    """
    reason = why_no_prompt_transfer(tuned, strong)
    if reason is not None:
        raise ValueError(f"no prompt transfer: {reason}.")
    layer = active_prompts(tuned)
    old, tokenizer = layer.active_config, strong.processor.tokenizer
    shared = vocabulary_hash(tuned.processor.tokenizer) == vocabulary_hash(tokenizer)
    ids, count = old.init_token_ids if shared else None, old.n_ctx
    if not shared and old.init_phrase is not None:
        ids = phrase_token_ids(tokenizer, old.init_phrase)
        count = max(count, len(ids))
    config = type(old)(
        **{name: getattr(old, name) for name in ("init_phrase", "seed", "class_names", "position", "class_specific")},
        n_ctx=count,
        init_token_ids=ids,
        period_id=old.period_id if shared else None,
        base=base_facts(strong.model, tokenizer),
        provenance={"step": "prompt transfer", "before": old.provenance},
        revision=strong.revision,
    )
    written = with_adapter(strong, copy.deepcopy(config))
    if not shared:
        return [written]
    mapped = with_adapter(strong, config)
    new = prompt_layer(mapped.model)
    tables = [found.get_base_layer().weight for found in (layer, new)]
    rows = min(map(len, tables))  # some tables are padded
    context = layer.part("ctx", layer.active_name).detach().cpu().float()
    token_map = solve_token_map(*(table[:rows] for table in tables), TOKEN_RIDGE)
    new.part("ctx", new.active_name).data.copy_(context @ token_map)
    return [mapped, written]
