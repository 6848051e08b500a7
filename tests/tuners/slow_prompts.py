"""Prompt learners written out by hand, one sentence at a time and one layer at a time, to compare with.

For the causal towers of CLIP and MetaCLIP 2 and for SigLIP, on models without an adapter.
"""

import torch


def start(model) -> int:
    """Tokens before the first word."""
    return 0 if model.config.model_type == "siglip" else 1


def table(model):
    return model.text_model.embeddings.token_embedding.weight


def rows(model, tokenizer, name, context, before=None, words=()):
    """(L, width): ``[start] v_1 … v_before [name] v_… [words] [.] [end]`` and its length; before is all of them."""
    before = len(context) if before is None else before
    ids = tokenizer(f"{name}.")["input_ids"]
    name_length = len(tokenizer(name, add_special_tokens=False)["input_ids"])
    first = start(model)
    embeds = table(model)[torch.tensor([*ids[:first], *words, *ids[first:]])]
    cut = first + len(words) + name_length
    return torch.cat([embeds[:first], context[:before], embeds[first:cut], context[before:], embeds[cut:]])


def text_features(model, sequences, put=None):
    """Projected features (B, d) of token embeddings [(L, width)]; `put(layer, hidden)` may change a layer's input."""
    return torch.cat([_text_features(model, sequence, put) for sequence in sequences])


def _text_features(model, sequence, put):
    text, siglip = model.text_model, model.config.model_type == "siglip"
    if siglip:  # reads every position, the end token fills them
        positions = text.embeddings.position_embedding.num_embeddings
        end = table(model)[model.config.text_config.eos_token_id]
        sequence = torch.cat([sequence, end.expand(positions - len(sequence), -1)])
    length = len(sequence)
    hidden = (sequence + text.embeddings.position_embedding.weight[:length])[None]
    mask = None if siglip else torch.full((1, 1, length, length), torch.finfo(torch.float32).min).triu(1)
    for index, layer in enumerate(text.encoder.layers):
        hidden = hidden if put is None else put(index, hidden)
        hidden = layer(hidden, mask)
    last = text.final_layer_norm(hidden)[:, -1]
    return text.head(last) if siglip else model.text_projection(last)


def overwrite(model, prompts):
    """A `put` that writes ``prompts[layer]`` (M, width) over the positions behind the start token."""

    def put(layer, hidden):
        if layer in prompts:
            hidden = hidden.clone()
            first = start(model)
            hidden[:, first : first + len(prompts[layer])] = prompts[layer]
        return hidden

    return put


def image_features(model, pixels, prompts):
    """Projected features (B, d) with ``prompts[layer]`` (n, width) behind the patches, fresh at each of them."""
    vision = model.vision_model
    hidden = vision.embeddings(pixels)
    length = hidden.shape[1]
    if 0 in prompts:
        hidden = torch.cat([hidden, prompts[0].expand(len(hidden), -1, -1)], 1)
    if hasattr(vision, "pre_layrnorm"):
        hidden = vision.pre_layrnorm(hidden)
    for index, layer in enumerate(vision.encoder.layers):
        if index and index in prompts:
            hidden = torch.cat([hidden[:, :length], prompts[index].expand(len(hidden), -1, -1)], 1)
        hidden = layer(hidden, None)
    if model.config.model_type == "siglip":
        return vision.head(vision.post_layernorm(hidden))
    return model.visual_projection(vision.post_layernorm(hidden[:, 0]))
