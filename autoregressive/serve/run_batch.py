"""Answers a file of requests, in OpenAI's batch format, without HTTP: the command `llamagen-batch`.

The flags are read before torch is imported, so that --help and a typo are answered at once.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from autoregressive.cli.command import (
    OneLineParser,
    add_version_flag,
    run_command,
    slow_imports,
)

with slow_imports(__name__):
    from autoregressive.cli.flags import add_model_flags
    from autoregressive.folders import command_line
    from autoregressive.serve.engine_flags import MOST_ROWS, add_engine_flags

COMMAND = "autoregressive/serve/run_batch.py"
_PURPOSE = """\
Answers a file of requests for images, in the format of OpenAI's Batch API, without a service.
Each line of REQUESTS.jsonl is a request:
  {"custom_id": "1", "method": "POST", "url": "/v1/images/generations", "body": {"prompt": "fox"}}
The body is that of the service, and so is the answer. Each answer is a line of ANSWERS.jsonl, in
the order in which they are ready. A run that broke off goes on with the same command: requests that
have an answer are skipped."""
_OF_SERVICE = ("data_parallel_size", "served_model_name")


def build_batch_parser() -> OneLineParser:
    """The command's flags, the engine's and the model's."""
    from autoregressive.serve.web.server_flags import SERVICE_FLAGS, TIMEOUT_FLAGS

    parser = OneLineParser(
        description=_PURPOSE,
        usage=f"{command_line(COMMAND)} REQUESTS.jsonl ANSWERS.jsonl [flags]",
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(
            prog, max_help_position=30, width=110
        ),
    )
    add_version_flag(parser)
    files = parser.add_argument_group("files")
    files.add_argument("requests", type=Path, metavar="REQUESTS.jsonl", help="one a line")
    files.add_argument("answers", type=Path, metavar="ANSWERS.jsonl", help="made, or gone on with")
    group = parser.add_argument_group("engines")
    for setting in _OF_SERVICE:
        SERVICE_FLAGS[setting].add_to(group, setting)
    TIMEOUT_FLAGS["step_timeout"].add_to(group, "step_timeout")
    add_model_flags(
        parser, if_none="the command does not start, unless told to with --random-weights"
    )
    add_engine_flags(parser, max_num_seqs=f"what the images need, at most {MOST_ROWS}")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Reads the flags (the process's own if None), answers, and prints how fast it went; returns
    the exit status.

    Raises:
        UserError: anything that the user can mend.
    """
    with slow_imports("__main__" if argv is None else __name__):
        arguments = build_batch_parser().parse_args(argv)
        from autoregressive.serve import batch_job
    return batch_job.run(arguments)


def command() -> NoReturn:
    """Runs the installed command `llamagen-batch`."""
    run_command(main)


if __name__ == "__main__":
    command()
