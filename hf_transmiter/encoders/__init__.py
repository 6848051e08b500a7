"""Any two-tower CLIP: pictures and names to unit rows in one space.

In reading order: `families` (what transformers' two-tower models share and where they differ), `open_clip` (that
library's models as one more family), `identity` (what identifies a model), `pictures` (the one way to read a picture),
`dual_encoder` ([`DualEncoder`]).

Notation: x (N, d) unit image rows, a and u (K, d) unit text rows, s the logit scale.
"""
