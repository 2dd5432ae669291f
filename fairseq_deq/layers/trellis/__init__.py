"""The DEQ-TrellisNet layer: a causal convolution of the hidden state, and the gates of an LSTM.

`reference.py` is the equations on one page. `segment.py` holds data; `whole.py`, `restricted.py` and
`adjoint.py` evaluate the equations at all positions, at some (or one after another), and transposed.
"""
