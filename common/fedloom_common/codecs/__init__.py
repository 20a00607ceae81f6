"""Codecs: how a model's tensors are made smaller for the wire, and read back in pieces.

    spec.py      what a run spec says: a chain of stages, such as [topk, int8, zstd]
    chain.py     a chain at work: which parts each tensor becomes, and how large they may be
    encoder.py   a trained model and its base → an encoded file
    decoder.py   an encoded file and its base → values, in pieces; every check of a peer's file
    feedback.py  what lossy stages left out, kept for the next round
    values.py topk.py frames.py              the stages themselves
    storage.py readers.py checks.py          where parts lie in a file, tensors in pieces, what values must be

An encoded update is one safetensors file. Its ``__metadata__`` names the chain
(``fedloom.codec``, JSON) and the digest of the base model (``fedloom.base``).
Sizes follow from the model's shapes alone; a piece is 65,536 values. Tensor
``w`` of the model becomes, as its change against the base in fp32,

    bf16 fp16   w         BF16, F16
    int8        w.q       I8, in w's shape; w.scale F32, one for each block: value = q · scale
    int4        w.q       U8: steps plus 8, two to a byte; the first half of each piece (the larger, of an
                          odd one) in the low nibbles, the rest in the high ones; w.scale F32
    topk        w.count   U32, values kept in each piece; w.gap U16, values left out before each one kept,
                          counted anew in every piece; the values kept as w.value (F32, BF16, F16), or as
                          w.q and w.scale: these have pieces of their own, of 65,536 kept values

With ``fp32`` alone w is as it was trained, in the model's own type, and needs no
base. With ``zstd`` w.zstd (U8) and w.frames (U32, the frames' sizes) take the place
of all parts but w.count: for each piece, for each of its parts (gaps, then values or
q, then scales), for each byte plane, that of the lowest bytes first, a zstd frame
that tells its content's size. Scales and single bytes are one plane. ``fp32`` with
``zstd`` is exact: the change is that of the bit patterns, as unsigned integers of the
width of the model's own type.

Tensors that are not floats, F64, empty ones and those without a dimension pass
as they are. A lossy change is rounded to nearest, ties to even: that halves the
error of stochastic rounding, needs no seed, and where its bias would matter,
error feedback carries it over to the next round.

On the way down both ends take what they decode as the new model, so that they never
drift apart. The coordinator keeps what its lossy change left out of the mean, and adds
it to the next round's change.

Nothing is imported here: the run spec needs ``spec.py`` without numpy.
"""
