"""hf_transmiter: carry a fine-tuned CLIP over to a stronger CLIP."""

__version__ = "0.1.0"
