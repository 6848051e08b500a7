"""One loop for all that is trained on labelled pictures, and what it is given.

In reading order: `draws` (random numbers that processes share), `augmentation`, `objectives` (the losses), `batches`
(what the model in training and the frozen one say), `loop` ([`fit`]).
"""
