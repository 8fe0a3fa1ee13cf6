"""Fetches LlamaGen's published checkpoints to where the commands look for them."""

import argparse
import contextlib
from pathlib import Path
from typing import NoReturn

from autoregressive.cli.command import (
    OneLineParser,
    add_version_flag,
    run_command,
    slow_imports,
)
from autoregressive.errors import SettingName, UserError, did_you_mean
from autoregressive.folders import pretrained_folder
from autoregressive.weights.published import (
    HUB_REPOSITORY,
    PUBLISHED_FILES,
    UNPUBLISHED,
    PublishedFile,
)

EXAMPLES = f"""\
examples:
  llamagen-download --list
  llamagen-download GPT-B VQ-16 --image-size 256
  llamagen-download c2i_XL_384.pt vq_ds16_c2i.pt

The files come from the hub repository {HUB_REPOSITORY}. A download that broke off goes on where it
stopped, each file's SHA-256 is checked, and what is there is not fetched again. Not everything
exists: {UNPUBLISHED}.
"""


def parse_arguments() -> argparse.Namespace:
    """The command line; ends the process on a mistake."""
    parser = OneLineParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "names",
        nargs="*",
        metavar="NAME",
        help="a model (GPT-B, VQ-16, ...) or a file (c2i_B_256.pt, ...)",
    )
    parser.add_argument(
        "--image-size",
        type=int,
        choices=[256, 384, 512],
        help="of a model given by name (default: all)",
    )
    parser.add_argument("--all", action="store_true", help="fetch everything that is published")
    parser.add_argument(
        "--list",
        action="store_true",
        help="show what is published and what is there, fetch nothing",
    )
    parser.add_argument(
        "--folder",
        type=Path,
        default=pretrained_folder(),
        metavar="DIR",
        help="where to (default: %(default)s)",
    )
    parser.add_argument(
        "--endpoint",
        metavar="URL",
        help="a mirror of the hub (default: the hub, or what HF_ENDPOINT says)",
    )
    add_version_flag(parser)
    arguments = parser.parse_args()
    if not (arguments.names or arguments.all or arguments.list):
        parser.error("name a model or a file, or give --all or --list")
    return arguments


def choose(names: list[str], image_size: int | None) -> list[PublishedFile]:
    """The published files that are meant, each once, in the order of the names.

    Raises:
        UserError: a name is unknown, or nothing is published under it.
    """
    chosen: dict[PublishedFile, None] = {}
    for name in names:
        of_model = [file for file in PUBLISHED_FILES if file.model.lower() == name.lower()]
        found = [file for file in PUBLISHED_FILES if file.file_name.lower() == name.lower()] or [
            file for file in of_model if image_size is None or file.image_size in (image_size, None)
        ]
        if not found:
            size = f" for {image_size} px" if image_size is not None else ""
            known = {name for file in PUBLISHED_FILES for name in (file.file_name, file.model)}
            close = "" if of_model else did_you_mean(name, sorted(known))
            raise UserError(
                f"nothing is published as {name}{size}{close}; {UNPUBLISHED}; ",
                SettingName("list"),
                " shows what there is",
            )
        chosen.update(dict.fromkeys(found))
    return list(chosen)


def check_folder(folder: Path) -> None:
    """Raises UserError if nothing can ever lie there; a folder that does not exist yet is fine."""
    try:
        str(folder).encode()
        with contextlib.suppress(FileNotFoundError):
            (folder / PUBLISHED_FILES[0].file_name).lstat()
    except (UnicodeEncodeError, OSError) as error:
        why = error.strerror if isinstance(error, OSError) else "its name is not UTF-8"
        raise UserError(
            f"{folder}: cannot be used: {why}; choose another ", SettingName("folder")
        ) from error


def main() -> None:
    """Does what the command line says."""
    arguments = parse_arguments()
    check_folder(arguments.folder)
    if arguments.list:
        print(f"{'file':<18} {'model':<8} {'pixels':<7} in {arguments.folder}")
        for file in PUBLISHED_FILES:
            state = "yes" if (arguments.folder / file.file_name).exists() else "no"
            print(f"{file.file_name:<18} {file.model:<8} {file.image_size or 'any':<7} {state}")
        print(f"\nNot everything exists: {UNPUBLISHED}.")
        return
    chosen = choose(arguments.names, arguments.image_size)
    with slow_imports("__main__"):
        from autoregressive.weights.hub import fetch
    for file in PUBLISHED_FILES if arguments.all else chosen:
        there = (arguments.folder / file.file_name).exists()
        path = fetch(file, arguments.folder, endpoint=arguments.endpoint)
        print(
            f"{path}: {'was there' if there else 'fetched'}, and is the published file "
            "(SHA-256 checked)"
        )


def command() -> NoReturn:
    """Runs the installed command `llamagen-download`."""
    run_command(main)
