"""What every kind of checkpoint looks like to the code that loads it: plain names, shapes, a way to read one tensor.

Nothing is read until it is asked for, and then one tensor at a time, so that memory never holds a second copy of the
weights.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from autoregressive.common.errors import UserError

# The keys under which training code keeps the weights, in the order that LlamaGen tries them.
WRAPPERS = ("model", "module", "state_dict")
AVERAGED_WEIGHTS = "ema"

# What training keeps beside the weights. Never read; named so that any other surplus key is an error.
TRAINING_STATE = ("optimizer", "optim", "optimizer_disc", "discriminator", "steps", "args", AVERAGED_WEIGHTS)

# DistributedDataParallel prefixes the whole name; the other wrappers may wrap any submodule: their mark is anywhere.
_LEADING_PREFIX = "module."
_MARKS_ANYWHERE = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")


class CheckpointError(UserError):
    """A checkpoint that cannot be loaded. The message is one line, begins with the path, and says what to do."""


@dataclass(frozen=True)
class WeightSource:
    """One set of weights in a checkpoint, by the names that the model gives its parameters."""

    path: Path
    is_fsdp: bool  # may be what --from-fsdp means: a flat full state dict, a sharded directory, any .safetensors
    shapes: Mapping[str, torch.Size]
    dtypes: Mapping[str, torch.dtype]
    read_into: Callable[[str, Tensor], None]
    """Copies the named tensor into one of its shape, converting dtype and device; `CheckpointError` if damaged."""


def plain_name(name: str) -> str:
    """The name without what DistributedDataParallel, FSDP, torch.compile and activation checkpointing add to it."""
    for mark in _MARKS_ANYWHERE:
        name = name.replace(mark, "")
    while name.startswith(_LEADING_PREFIX):
        name = name.removeprefix(_LEADING_PREFIX)
    return name


def plain_names(names: Iterable[str], path: Path) -> dict[str, str]:
    """Plain name -> name in the checkpoint.

    Raises:
        CheckpointError: two names become the same one.
    """
    plain: dict[str, str] = {}
    for name in names:
        other = plain.setdefault(plain_name(name), name)
        if other != name:
            raise CheckpointError(f"{path}: holds {plain_name(name)} twice, as {other} and as {name}")
    return plain


def named_in_refusal(error: Exception) -> str | None:
    """The class or function over which torch refused to unpickle a file; None if it failed over something else."""
    named = re.search(r"GLOBAL ([\w.]+)|class ([\w.]+)", str(error))
    return (named[1] or named[2]) if named else None


def no_averaged_weights(path: Path) -> CheckpointError:
    """The error for `--ema` with a checkpoint that has none."""
    return CheckpointError(f"{path}: holds no averaged weights ('{AVERAGED_WEIGHTS}'); leave --ema out")


def select_flattened(names: Iterable[str], path: Path, ema: bool) -> dict[str, str]:
    """Picks the weights among the names of a store that flattens nested dictionaries ("model.norm.weight", "optim...").

    Returns:
        Plain name -> name in the checkpoint.

    Raises:
        CheckpointError: `ema` is asked for and not there, or two names become the same one.
    """
    names = list(names)
    folders = (AVERAGED_WEIGHTS,) if ema else WRAPPERS
    for folder in folders:
        inside = {name.removeprefix(f"{folder}."): name for name in names if name.startswith(f"{folder}.")}
        if inside:
            return {plain: inside[short] for plain, short in plain_names(inside, path).items()}
    if ema:
        raise no_averaged_weights(path)
    training_prefixes = tuple(f"{key}." for key in TRAINING_STATE)
    weights = [name for name in names if name not in TRAINING_STATE and not name.startswith(training_prefixes)]
    return plain_names(weights, path)
