"""The DEQ-Transformer layer: attention and a feed-forward part, with the input injected into q, k and v.

Begin with `reference.py`, which has the equations on one page. The other files:
    layer.py                               the parameters
    norm.py, activation.py, positions.py   the parts of which there are several kinds
    weights.py, segment.py                 the data of one forward pass, and of one segment of a text
    whole.py, restricted.py                f at all positions of a segment, and at some positions only
    adjoint.py                             the transposed Jacobian of f
    token.py, cache.py                     f at one new position in generation, and the cache that it reads
    equations.py, packing.py               code that several of these share

Letters in shapes: B samples, T positions of a segment, M positions of its context, S positions that have keys
and values, H heads, D channels per head, C channels of a state, F channels inside the feed-forward part, W
distances between a query and a key, n rows (one per position). T' and `columns` are T and M + T rounded up to
a multiple of 16: see `Segment`.
"""
