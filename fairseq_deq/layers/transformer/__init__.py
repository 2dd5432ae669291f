"""The DEQ-Transformer layer: relative attention and a feed-forward part, with the input injected into q, k
and v.

`reference.py` is the equations on one page. `norm.py` and `activation.py` are what it can be made of, each
with its slopes. `weights.py` and `segment.py` hold data; `whole.py`,
`restricted.py`, `adjoint.py` and `token.py` evaluate the equations at all positions, at some, transposed,
and at one new position.
"""
