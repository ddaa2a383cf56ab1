"""Compressed activations: codecs, autograd functions, and the glue that puts them into a model."""
