"""Fetches LlamaGen's published checkpoints: the same as the command `llamagen-download`."""

from autoregressive.cli.command import run_command
from autoregressive.cli.download import main

if __name__ == "__main__":
    run_command(main)
