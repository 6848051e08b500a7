"""The method, one step per file, in the order in which data flows.

`classifier` (who answers), `stored_logits` and `teacher` (what the tuned model says), `experts` (with the strong one),
`lessons` and `tune` (the weak model learns from labels, or the strong one from a teacher), `refit` (a linear adapter
from soft labels, in closed form), `extract` (tuned minus weak, as an adapter), `moments` and `bridge` (from one
model's space to another's), `transfer` (the adapter on the strong model), `label_tune` (polished with labels),
`attach` (a prompt as it is on another base model), `saved` (all of these from where they were saved),
`image_classifier` (for pipelines).

Notation: N images, K anchors = C task names + A auxiliary names, d embedding width, D rows of the basis W; x unit
image rows, z logits, X a cross moment, P and Q bridges, T class vectors.
"""
