"""Draws many images of ImageNet's classes for an evaluation such as FID, on one GPU or on many, and
goes on where it was interrupted.

    torchrun --nproc_per_node=8 autoregressive/sample/sample_c2i_ddp.py --gpt-model GPT-XL ...

The name is that of LlamaGen's command, whose flags, files and pixels this one has. It runs the
engine, so the command itself is autoregressive/serve/bulk/command.py.
"""

from autoregressive.serve.bulk.command import command, main

__all__ = ["main"]

if __name__ == "__main__":
    command()
