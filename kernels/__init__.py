"""Triton and Gluon kernels, each beside a torch reference; see README.md."""

BACKENDS = ("auto", "triton", "torch")  # which implementation of the operations runs
QUANTIZATIONS = ("fp8", "int8", "int4")  # of the weights of layers' products
KV_CACHE_DTYPES = ("auto", "fp8", "int8")  # auto: the weights' dtype, before they are quantised
