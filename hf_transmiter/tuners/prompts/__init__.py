"""Prompt learners: vectors in the token-embedding space of a text tower, learnt instead of written.

The names stay words: prompts of a model tuned this way are ``"{}."``, the learnt context comes beside them by itself.

Under `Trainer`, which knows no labels of a `CLIPModel`:

```python
>>> class PromptTrainer(Trainer):
...     def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
...         logits = model(pixel_values=inputs["pixel_values"]).logits_per_image
...         loss = torch.nn.functional.cross_entropy(logits, inputs["labels"])
...         return (loss, {"logits": logits}) if return_outputs else loss
>>> model = get_peft_model(clip, CoOpConfig(init_phrase="a photo of a", class_names=["cat", "dog", "car"]))
>>> arguments = TrainingArguments("out", remove_unused_columns=False, label_names=["labels"], learning_rate=2e-3)
>>> trainer = PromptTrainer(model, arguments, train_dataset=labelled.with_transform(prepare))
>>> trainer.train()
>>> trainer.save_model("my-prompt")
```

where `prepare` makes ``{"pixel_values": ..., "labels": ...}`` of a batch.
"""

from .config import PromptConfig
from .layer import PromptLayer, layers
from .logits import (
    class_vectors,
    image_conditioned,
    image_conditioned_logits,
    prompt_layer,
    set_classes,
)
from .model import PromptModel  # with its subclasses, which register the methods
from .texts import class_inputs, phrase_token_ids


__all__ = [
    "PromptConfig",
    "PromptLayer",
    "PromptModel",
    "class_inputs",
    "class_vectors",
    "image_conditioned",
    "image_conditioned_logits",
    "layers",
    "phrase_token_ids",
    "prompt_layer",
    "set_classes",
]
