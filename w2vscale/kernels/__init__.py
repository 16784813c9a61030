"""Fast paths: each replaces one plain operation of the models, with the same signature, where it is faster.

`table.py` lists which kernel runs on which device, `replaceable.py` chooses it. With W2VSCALE_KERNELS=plain in the
environment every operation runs as the models state it.
"""
