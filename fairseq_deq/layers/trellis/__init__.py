"""The DEQ-TrellisNet layer: a causal convolution of the hidden state, and the gates of an LSTM.

Begin with `reference.py`, which has the equations on one page. `layer.py` has the parameters and `segment.py`
the data of a segment. `whole.py`, `restricted.py` and `adjoint.py` evaluate f at all positions
(side by side, or one after another), at some positions only, and its transposed Jacobian.

Letters in shapes: B samples, T positions of a segment, S positions of a text, H channels of h and of c,
C = 2*H channels of a state, k taps, n rows (one per position).
"""
