"""The DEQ-Transformer layer: attention and a feed-forward part, with the input injected into q, k and v.

`reference.py` is the equations on one page. `norm.py`, `activation.py` and `positions.py` are the parts that
can be chosen, the first two with their slopes. `weights.py` and `segment.py` hold data; `whole.py`,
`restricted.py`, `adjoint.py` and `token.py` evaluate the equations at all positions, at some, transposed, and
at one new position.
"""
