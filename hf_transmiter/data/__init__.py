"""What is asked, and of which pictures.

In reading order: `class_names`, `folders` and `images` (names and pictures as people have them), `splits` (few-shot
draws, base and novel halves), `catalogue` (the papers' datasets, and rows of your own), `vocabulary` and `anchors`
(the K = C + A names that are asked about), `table` (rows that are there), `pixels` (pictures prepared in worker
processes), `embeddings` (pictures embedded once, cached, resumable, in shares) and `embed` (the same as a function of
a batch, for engines that spread rows over machines).
"""
