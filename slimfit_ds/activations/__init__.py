"""What a model keeps for the backward pass, compressed. From the outside in:

`config`: the block of settings. `apply`: `compress(model, config)` walks over a model and reports what it did, `recognise`
finds out what a module computes, `patch` and `hf_attention` replace the forwards of single modules, `language_head` the loss.
`proof`: changed parts against themselves unchanged on the first batch, each run by `twin`.
`ops/`: one operation, one file (norm, activation function, dropout, attention, cross-entropy), its kernels beside it.
`checkpoint`: keep the input of a block and recompute the rest, with `replay` (random numbers, autocast, chunks),
`autograd_graph`, and `tiles` for long sequences (`tile_proof`: may a block be cut). `saved_tensors`: how operations hand what they keep to autograd, once for all that keep the same.
`codecs/`: pure functions from a tensor to fewer bytes and back.
"""
