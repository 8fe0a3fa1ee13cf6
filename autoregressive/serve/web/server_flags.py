"""The service's flags and their defaults."""

import argparse
from pathlib import Path
from typing import NoReturn

from autoregressive.cli.command import OneLineParser, add_version_flag
from autoregressive.cli.flags import add_model_flags
from autoregressive.errors import UserError, shortened
from autoregressive.folders import command_line
from autoregressive.serve.engine.config import SCHEDULING_POLICIES, EngineConfig, SchedulingPolicy
from autoregressive.serve.engine_flags import add_engine_flags
from autoregressive.serve.web.timeouts import Timeouts

COMMAND = "autoregressive/serve/api_server.py"
ENVIRONMENT = "LLAMAGEN_"  # and the flag's name in capitals: LLAMAGEN_MAX_NUM_SEQS
HOST, PORT, QUEUE_SIZE, STORED_IMAGES, BUFFERED_MIB = "127.0.0.1", 8000, 256, 1000, 256
POLICY: SchedulingPolicy = "fair"
TIMEOUTS = Timeouts()
LONGEST_MESSAGE = 500
_LEVELS = ("debug", "info", "warning", "error")
_PURPOSE = """\
Serves a model over HTTP: an API that OpenAI's clients speak, and a page.
Every flag may also be given in the environment (LLAMAGEN_MAX_NUM_SEQS=64) or in the YAML file that
--config names (max-num-seqs: 64); the command line counts first, then the environment, then the
file."""


class ServerParser(OneLineParser):
    """Says in its errors where the value came from.

    Attributes:
        origin: of the values, as a message begins with it.
    """

    origin = ""

    def error(self, message: str) -> NoReturn:
        """Raises a `UserError`."""
        raise UserError(
            f"{self.origin}{shortened(message, LONGEST_MESSAGE)} (--help shows the options)"
        )


def build_server_parser() -> ServerParser:
    """The service's flags, the engine's and the model's."""
    parser = ServerParser(
        description=_PURPOSE,
        usage=f"{command_line(COMMAND)} [flags]",
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(
            prog, max_help_position=30, width=110
        ),
        allow_abbrev=False,
    )
    add_version_flag(parser)
    service = parser.add_argument_group("service")
    _add_client_flags(service)
    _add_service_flags(service)
    _add_timeout_flags(parser.add_argument_group("timeouts"))
    add_model_flags(
        parser, if_none="the service does not start, unless told to with --random-weights"
    )
    add_engine_flags(parser, max_num_seqs=str(EngineConfig.max_num_seqs))
    return parser


def _add_client_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--host",
        metavar="ADDRESS",
        help=f"where to listen; beyond this machine only with a key (default: {HOST})",
    )
    group.add_argument(
        "--port", type=int, metavar="N", help=f"0: any that is free (default: {PORT})"
    )
    group.add_argument(
        "--api-key",
        metavar="KEYS",
        help="one or several, with commas between them; clients send one of them. "
        f"Better given as {ENVIRONMENT}API_KEY, which others do not see",
    )
    group.add_argument(
        "--max-queue-size",
        type=int,
        metavar="N",
        help=f"requests that may wait; more are refused with 429 (default: {QUEUE_SIZE})",
    )
    group.add_argument(
        "--scheduling-policy",
        choices=SCHEDULING_POLICIES,
        metavar="P",
        help="fair: clients (told apart by key and address) share the queue and the engines "
        "equally; "
        f"fcfs: first come, first served (default: {POLICY})",
    )
    group.add_argument(
        "--forwarded-allow-ips",
        metavar="LIST",
        help="addresses and networks of proxies whose X-Forwarded-For says where a client is, or * "
        "(default: none)",
    )
    group.add_argument(
        "--max-connections",
        type=int,
        metavar="N",
        help="of each process that answers HTTP "
        "(default: 4096, or what the limit of open files allows)",
    )
    group.add_argument(
        "--max-buffered-mib",
        type=int,
        metavar="MIB",
        help="of unread answers and unfinished requests, in each process that answers HTTP; above "
        "half of it drawings are refused, above it the slowest clients are dropped "
        f"(default: {BUFFERED_MIB})",
    )


def _add_service_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--data-parallel-size", type=int, metavar="N", help="engines, one a GPU (default: 1)"
    )
    group.add_argument(
        "--api-server-count",
        type=int,
        metavar="N",
        help="processes that answer HTTP (default: --data-parallel-size)",
    )
    group.add_argument(
        "--served-model-name",
        metavar="NAME",
        help="what clients call the model (default: --gpt-model's)",
    )
    group.add_argument(
        "--store-dir",
        type=Path,
        metavar="DIR",
        help="keep images there for response_format url (default: none)",
    )
    group.add_argument(
        "--store-images",
        type=int,
        metavar="N",
        help=f"how many, the oldest are deleted; for --store-dir (default: {STORED_IMAGES})",
    )
    group.add_argument(
        "--store-max-size",
        metavar="SIZE",
        help="of them together, such as 500M or 10G; for --store-dir (default: no limit)",
    )
    group.add_argument(
        "--public-url",
        metavar="URL",
        help="what clients reach the service by (default: where it listens)",
    )
    group.add_argument("--disable-docs", action="store_true", help="no /docs and no /openapi.json")
    group.add_argument(
        "--log-level", choices=_LEVELS, metavar="L", help=f"{', '.join(_LEVELS)} (default: info)"
    )
    group.add_argument(
        "--config",
        type=Path,
        metavar="FILE.yaml",
        help="flags by name, without the dashes in front",
    )


def _add_timeout_flags(group: argparse._ArgumentGroup) -> None:
    def seconds(flag: str, text: str, default: float | None) -> None:
        group.add_argument(
            flag, type=float, metavar="SECONDS", help=f"{text} (default: {default:g})"
        )

    seconds("--queue-timeout", "waiting for its turn, then 503; 0: no limit", TIMEOUTS.queue)
    seconds("--request-timeout", "being drawn, then 504; 0: no limit", TIMEOUTS.run)
    seconds(
        "--step-timeout",
        "an engine not heard of for so long hangs: the service ends with status 1",
        TIMEOUTS.step,
    )
    seconds(
        "--shutdown-timeout", "after SIGTERM, for accepted requests to finish", TIMEOUTS.shutdown
    )
