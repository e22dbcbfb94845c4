"""The Triton code that Inductor makes for an H100, on a machine without a GPU.

Dynamo, the passes and AOTAutograd run on CPU tensors. The graphs below are compiled by Inductor for
a GPU that is pretended (``pretended_gpu.py``). The generated modules run unmodified, their kernels
in Triton's interpreter (``measure.py``). In a second process every configuration of every kernel is
compiled for ``sm_90`` (``cubin.py``). What only a GPU shows is in ``tests/cuda/``.
"""
