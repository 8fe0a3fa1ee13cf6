"""Fetches LlamaGen's published checkpoints: the same as the command `llamagen-download`."""

from autoregressive.cli.download import command

if __name__ == "__main__":
    command()
