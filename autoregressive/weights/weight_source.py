"""What every kind of checkpoint looks like to the code that loads it: plain names, shapes, a way to
read one tensor.

Nothing is read until it is asked for, and then one tensor at a time, so that memory never holds a
second copy of the weights.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from autoregressive.errors import UserError, shortened

# The keys under which training code keeps the weights, in the order that LlamaGen tries them.
WRAPPERS = ("model", "module", "state_dict")
AVERAGED_WEIGHTS = "ema"

# What training keeps beside the weights. Never read; named so that any other surplus key is an
# error.
TRAINING_STATE = (
    "optimizer",
    "optim",
    "optimizer_disc",
    "discriminator",
    "steps",
    "args",
    AVERAGED_WEIGHTS,
)

# DistributedDataParallel prefixes the whole name; the other wrappers may wrap any submodule: their
# mark is anywhere.
_LEADING_PREFIX = "module."
_MARKS_ANYWHERE = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
# Under which stores that flatten nested dictionaries have the weights: torch's examples save
# {"app": {"model": ...}}.
_FOLDERS = ("app", *WRAPPERS, AVERAGED_WEIGHTS)

_DEEPEST_FOLDER = 4

_LONGEST_NAME = 500
_MOST_WEIGHTS = 20_000  # the state of an optimizer is not counted
_LONGEST_MESSAGE, _LONGEST_PATH = 500, 298

DAMAGED = "is damaged or cut short; download or copy it again"


class CheckpointError(UserError):
    """A checkpoint that cannot be loaded.

    The message is one line of at most 500 characters, begins with the path, and says what to do. It
    is cut, for it can quote what a hostile file has. A long path is cut in its middle.
    """

    def __init__(self, path: Path, reason: str) -> None:
        shown = str(path)
        if len(shown) > _LONGEST_PATH:
            half = (_LONGEST_PATH - 3) // 2
            shown = f"{shown[:half]}...{shown[-half:]}"
        super().__init__(f"{shown}: {shortened(reason, _LONGEST_MESSAGE - len(shown) - 2)}")


class BadContentError(Exception):
    """Content of a checkpoint that is not what it should be; the message says how. Readers turn it
    into a `CheckpointError`, for they know which file it is.
    """


def require(holds: bool, problem: str) -> None:
    """Raises `BadContentError` with that message unless the condition holds."""
    if not holds:
        raise BadContentError(problem)


class Readable(Protocol):
    """A tensor in a checkpoint."""

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the file stores the tensor in."""

    @property
    def shape(self) -> torch.Size:
        """The sides of the tensor."""

    def read_into(self, target: Tensor) -> None:
        """Copies it into a tensor of its shape, converting dtype and device; `CheckpointError` if
        damaged.
        """


@dataclass(frozen=True)
class WeightSource:
    """One set of weights in a checkpoint."""

    path: Path
    tensors: Mapping[str, Readable]  # by the names that the model gives its parameters
    # may be what --from-fsdp means: a flat full state dict, a sharded directory, any .safetensors
    is_fsdp: bool = True

    @cached_property
    def shapes(self) -> dict[str, torch.Size]:
        """The shape of each weight."""
        return {name: tensor.shape for name, tensor in self.tensors.items()}

    @cached_property
    def dtypes(self) -> dict[str, torch.dtype]:
        """The dtype that each weight is stored in."""
        return {name: tensor.dtype for name, tensor in self.tensors.items()}

    def read_into(self, name: str, target: Tensor) -> None:
        """Copies the named tensor into one of its shape, converting dtype and device.

        Raises:
            CheckpointError: it is damaged.
        """
        try:
            self.tensors[name].read_into(target)
        except CheckpointError:
            raise
        except Exception as error:  # whatever no check foresaw
            if _is_of_the_machine(error):
                raise
            told = f"{name} cannot be read ({type(error).__name__})"
            raise CheckpointError(self.path, f"{told}; download or copy it again") from error


def _is_of_the_machine(error: Exception) -> bool:
    """Whether memory or the device failed rather than the checkpoint."""
    if isinstance(error, (torch.OutOfMemoryError, torch.AcceleratorError, MemoryError)):
        return True
    return "DefaultCPUAllocator" in str(error)


def plain_name(name: str) -> str:
    """The name without what DistributedDataParallel, FSDP, torch.compile and activation
    checkpointing add to it.
    """
    for mark in _MARKS_ANYWHERE:
        name = name.replace(mark, "")
    while name.startswith(_LEADING_PREFIX):
        name = name.removeprefix(_LEADING_PREFIX)
    return name


def plain_names(names: Iterable[str], path: Path) -> dict[str, str]:
    """Plain name -> name in the checkpoint.

    Raises:
        CheckpointError: two names become the same one, one is so long that it is none, or there are
            too many.
    """
    plain: dict[str, str] = {}
    for name in names:
        if len(name) > _LONGEST_NAME:
            told = f"holds a name of {len(name):,} characters, which no weight has"
            raise CheckpointError(path, f"{told} ({name[:50]}...); use another file")
        if len(plain) == _MOST_WEIGHTS:
            told = f"holds more than {_MOST_WEIGHTS:,} weights, which no model here has"
            raise CheckpointError(path, f"{told}; use another file")
        other = plain.setdefault(plain_name(name), name)
        if other != name:
            raise CheckpointError(path, f"holds {plain_name(name)} twice, as {other} and as {name}")
    return plain


def no_averaged_weights(path: Path) -> CheckpointError:
    """The error for `--ema` with a checkpoint that has none."""
    return CheckpointError(
        path, f"holds no averaged weights ('{AVERAGED_WEIGHTS}'); leave --ema out"
    )


def select_flattened(names: Iterable[str], path: Path, ema: bool) -> dict[str, str]:
    """Picks the weights among the names of a store that flattens nested dictionaries
    ("model.norm.weight", "optim...").

    Returns:
        Plain name -> name in the checkpoint.

    Raises:
        CheckpointError: `ema` is asked for and not there, several sets of weights are there, or two
            names become the same one.
    """
    names = list(names)
    # folder -> name in it -> name in the checkpoint
    sets: dict[tuple[str, ...], dict[str, str]] = {}
    for name in names:
        folder, inside = _split_folder(name)
        if (
            folder
            and (AVERAGED_WEIGHTS in folder) == ema
            and inside.partition(".")[0] not in TRAINING_STATE
        ):
            sets.setdefault(folder, {})[inside] = name
    if len(sets) > 1:
        folders = " and ".join(".".join(folder) for folder in sorted(sets))
        raise CheckpointError(
            path,
            f"holds several sets of weights, under {folders}; save the one that you want alone",
        )
    if sets:
        (inside_names,) = sets.values()
        return {
            plain: inside_names[short] for plain, short in plain_names(inside_names, path).items()
        }
    if ema:
        raise no_averaged_weights(path)
    training_prefixes = tuple(f"{key}." for key in TRAINING_STATE)
    weights = [
        name
        for name in names
        if name not in TRAINING_STATE and not name.startswith(training_prefixes)
    ]
    return plain_names(weights, path)


def _split_folder(name: str) -> tuple[tuple[str, ...], str]:
    """The folders that a name begins with, and the name in them."""
    folder: list[str] = []
    while len(folder) < _DEEPEST_FOLDER:
        first, dot, rest = name.partition(".")
        if not dot or first not in _FOLDERS:
            break
        folder.append(first)
        name = rest
    return tuple(folder), name
