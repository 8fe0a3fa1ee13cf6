"""Triton and Gluon kernels, each beside a torch reference; see README.md."""

BACKENDS = ("auto", "triton", "torch")  # which implementation of the operations runs
