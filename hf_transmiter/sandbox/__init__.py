"""A synthetic visual world and tiny CLIP models pre-trained on it: the whole method offline, in seconds.

Pictures of 32 x 32 pixels show a ``"{texture} {colour} {shape}"``. The models were pre-trained on two domains (studio,
street); tasks come from shifted ones (print, night, neon) or use words without a visual meaning (jargon).

```python
from transformers import CLIPModel, CLIPProcessor
from hf_transmiter import sandbox

model = CLIPModel.from_pretrained(sandbox.model_path("weak"))
processor = CLIPProcessor.from_pretrained(sandbox.model_path("weak"))
dataset = sandbox.load_dataset("print", "test")
```

Read `words` (what things are called), `world` (the renderer), then `data` (the datasets and models). How the models
and their tokenizer were made is in `tests/making/` of the source repository.
"""

from .data import domains, load_dataset, model_path
from .words import vocabulary


__all__ = ["domains", "load_dataset", "model_path", "vocabulary"]
