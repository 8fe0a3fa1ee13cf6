"""Loads weights of any kind LlamaGen's users have: .pt / .pth, .safetensors, and FSDP's directories.

The kind is found by looking, not by name. Files are memory-mapped and each tensor goes straight to its place, dtype and
device; no pickle may build anything but tensors, plain containers and `argparse.Namespace`.
"""

import argparse
import pickle
import stat
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from autoregressive.common.strictness import COMPUTED_HERE, TOLERATED, find_mismatch
from autoregressive.common.weight_source import (
    AVERAGED_WEIGHTS,
    TRAINING_STATE,
    WRAPPERS,
    CheckpointError,
    WeightSource,
    named_in_refusal,
    no_averaged_weights,
    plain_names,
    select_flattened,
)

__all__ = ["CheckpointError", "load_weights", "open_checkpoint"]

CONSOLIDATED_FILE = "consolidated.pth"  # LlamaGen's FSDP training
SHARDED_FILE = ".metadata"  # torch.distributed.checkpoint

_ZIP_START, _PICKLE_START, _LFS_START = b"PK\x03\x04", b"\x80", b"version https://git-lfs"


def load_weights(
    model: nn.Module,
    path: Path,
    *,
    device: torch.device,
    dtype: torch.dtype,
    ema: bool = False,
    from_fsdp: bool = False,
) -> None:
    """Gives a model built under `torch.device("meta")` its weights, on the device and in the dtype.

    Host memory grows by the model's own CPU tensors and about one tensor of the checkpoint. After an error the model is
    unusable.

    Args:
        model: its state dict says what is wanted; buffers outside of it are moved along.
        path: a file, or a directory that FSDP training left.
        ema: take the averaged weights that training kept beside the others.
        from_fsdp: LlamaGen's flag; not needed. Refused for a pickle whose weights are wrapped, as FSDP's are not; a
            .safetensors file does not tell where it came from and is accepted.

    Raises:
        CheckpointError: one line: the file is no checkpoint, is damaged or hostile, or belongs to another model.
    """
    source = open_checkpoint(path, ema=ema)
    if from_fsdp and not source.is_fsdp:
        raise CheckpointError(f"{path}: is no FSDP checkpoint: its weights are wrapped; leave --from-fsdp out")
    check_match(model, source)
    model.to(dtype)
    model.to_empty(device=device)
    with torch.no_grad():
        for name, target in model.state_dict().items():
            if name in TOLERATED and source.shapes.get(name) != target.shape:
                target.zero_()
            else:
                source.read_into(name, target)


def check_match(model: nn.Module, source: WeightSource) -> None:
    """Ends in an error unless the source holds exactly this model's weights.

    Raises:
        CheckpointError: says which other model it is, which flag would help, or which keys differ.
    """
    wanted = {name: tensor.shape for name, tensor in model.state_dict().items()}
    mismatch = find_mismatch(wanted, source.shapes)
    if mismatch is not None:
        raise CheckpointError(f"{source.path}: {mismatch}")
    for name in wanted:
        if name in source.dtypes and not source.dtypes[name].is_floating_point:
            kind = str(source.dtypes[name]).removeprefix("torch.")
            raise CheckpointError(f"{source.path}: {name} is {kind}, and no floating-point numbers; use another file")


def open_checkpoint(path: Path, *, ema: bool = False) -> WeightSource:
    """Finds out what is there and opens it, without reading the weights.

    Raises:
        CheckpointError: nothing is there, it is no checkpoint, is damaged or hostile, or `ema` is not there.
    """
    try:
        str(path).encode()
    except UnicodeEncodeError as error:  # the libraries take no such names
        raise CheckpointError(f"{path}: its name is not UTF-8; rename it") from error
    try:
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            return _open_directory(path, ema)
        if not stat.S_ISREG(mode):  # reading from a pipe would wait for ever
            raise CheckpointError(f"{path}: is neither a file nor a directory; name one")
        with path.open("rb") as stream:
            start = stream.read(32)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}; check the path") from error
    if not start:
        raise CheckpointError(f"{path}: is empty; download or copy it again")
    if start.startswith(_LFS_START):
        raise CheckpointError(f"{path}: is a Git LFS pointer, not the weights; fetch them with `git lfs pull`")
    if start[8:9] == b"{":  # eight bytes of length, then JSON
        tensors = _read_safetensors(path)
        names = select_flattened(tensors, path, ema)
        return _source(path, {plain: tensors[stored] for plain, stored in names.items()}, is_fsdp=True)
    if start.startswith((_ZIP_START, _PICKLE_START)):
        return _open_pickled(path, _read_pickled(path, memory_mapped=start.startswith(_ZIP_START)), ema)
    raise CheckpointError(f"{path}: is not a checkpoint; a .pt, .pth or .safetensors file is needed")


def _open_directory(path: Path, ema: bool) -> WeightSource:
    if (path / SHARDED_FILE).is_file():
        from autoregressive.common.sharded import open_sharded  # here, for it takes half a second to import

        return open_sharded(path, ema)
    if (path / CONSOLIDATED_FILE).is_file():
        return open_checkpoint(path / CONSOLIDATED_FILE, ema=ema)
    if any(path.glob("*.distcp")):
        raise CheckpointError(f"{path}: {SHARDED_FILE} is missing beside the shards; copy the whole directory again")
    state = "is an empty directory" if not any(path.iterdir()) else "is a directory without a checkpoint"
    raise CheckpointError(f"{path}: {state}; {CONSOLIDATED_FILE} or {SHARDED_FILE} is needed, or name a file")


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path, device="cpu")  # memory-mapped
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path}: is damaged or cut short ({_first_sentence(error)}); download or copy it again") from error


def _read_pickled(path: Path, memory_mapped: bool) -> object:
    """What `torch.save` wrote; files of before torch 1.6 are no zip archives and cannot be mapped."""
    try:
        # One line is enough: torch would add a warning about TorchScript to the error.
        with warnings.catch_warnings(action="ignore"), torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=memory_mapped)
    except pickle.UnpicklingError as error:
        named = named_in_refusal(error)
        if named is None:
            raise CheckpointError(f"{path}: is damaged or not a checkpoint; download it again") from error
        raise CheckpointError(
            f"{path}: refused, it holds more than weights and could run code ({named}); "
            "use a file that you trust to hold weights alone"
        ) from error
    except Exception as error:  # a damaged archive or pickle can raise anything
        if "TorchScript" in str(error):
            raise CheckpointError(f"{path}: is a TorchScript program, which is code; a file of weights is needed") from error
        raise CheckpointError(f"{path}: is damaged or cut short ({_first_sentence(error)}); download or copy it again") from error


def _open_pickled(path: Path, content: object, ema: bool) -> WeightSource:
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path}: holds a {type(content).__name__}, not a dictionary of weights; use another file")
    wrapper = next((key for key in WRAPPERS if isinstance(content.get(key), Mapping)), None)
    if ema:
        if not isinstance(content.get(AVERAGED_WEIGHTS), Mapping):
            raise no_averaged_weights(path)
        wrapper = AVERAGED_WEIGHTS
    if wrapper is not None:
        weights = content[wrapper]
    else:
        weights = {key: value for key, value in content.items() if key not in TRAINING_STATE}
    odd = [name for name, value in weights.items() if not (isinstance(name, str) and _is_plain_tensor(value))]
    odd = [name for name in odd if name not in COMPUTED_HERE]
    if odd:
        raise CheckpointError(f"{path}: is no dictionary of weights: {odd[0]!r} is no plain tensor; use another file")
    names = plain_names((name for name in weights if name not in COMPUTED_HERE), path)
    return _source(path, {plain: weights[stored] for plain, stored in names.items()}, is_fsdp=wrapper is None)


def _is_plain_tensor(value: object) -> bool:
    return isinstance(value, Tensor) and value.layout == torch.strided and value.device.type == "cpu" and not value.is_quantized


def _source(path: Path, tensors: Mapping[str, Tensor], is_fsdp: bool) -> WeightSource:
    def read_into(name: str, target: Tensor) -> None:
        target.copy_(Tensor.detach(tensors[name]))  # a Parameter in a pickle can carry attributes of such names

    return WeightSource(
        path=path,
        is_fsdp=is_fsdp,
        shapes={name: tensor.shape for name, tensor in tensors.items()},
        dtypes={name: tensor.dtype for name, tensor in tensors.items()},
        read_into=read_into,
    )


def _first_sentence(error: Exception) -> str:
    """What an exception says, its first sentence: torch's go on with guesses, across lines."""
    return (str(error).strip() or type(error).__name__).partition("\n")[0].partition(". ")[0].rstrip(".:")[:200]
