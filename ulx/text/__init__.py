"""Captions to token embeddings, which a model is conditioned on. Nothing is imported here; take the module you need:

* `encoders`: what a text encoder is (`TextEncoder`), and the packaged one, `MiniLM`.
* `precomputed`: any other encoder's embeddings, out of a file; `cached` embeds many captions once and keeps them so.
* `examples`: captions as fields of a data set's examples, and prompts.
* `bert`: MiniLM's network. `wordpiece`: its tokeniser.
"""
