"""Loads weights of any kind LlamaGen's users have: .pt / .pth, .safetensors, FSDP's and Hugging
Face's directories.

The kind is found by looking, not by name. Each tensor is read straight to its place, dtype and
device; nothing is unpickled, and whatever goes wrong while reading is a `CheckpointError`.
"""

from pathlib import Path

import torch
from torch import nn

from autoregressive.weights.inert_pickle import Pairs, kind_of
from autoregressive.weights.mismatch import COMPUTED_HERE, TOLERATED, find_mismatch
from autoregressive.weights.safetensors_file import (
    is_safetensors_folder,
    open_safetensors_folder,
    read_safetensors,
)
from autoregressive.weights.sharded import METADATA_FILE, open_sharded
from autoregressive.weights.stored_tensor import StoredFile, StoredTensor, visible_names
from autoregressive.weights.torch_file import TorchFile, read_torch_archive, read_torch_stream
from autoregressive.weights.weight_source import (
    AVERAGED_WEIGHTS,
    TRAINING_STATE,
    WRAPPERS,
    CheckpointError,
    WeightSource,
    no_averaged_weights,
    plain_names,
    select_flattened,
)

__all__ = ["CheckpointError", "load_weights", "open_checkpoint"]

CONSOLIDATED_FILE = "consolidated.pth"  # LlamaGen's FSDP training

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

    Host memory grows by the model's own CPU tensors and about one tensor of the checkpoint. After
    an error the model is unusable.

    Args:
        model: its state dict says what is wanted; buffers outside of it are moved along.
        path: a file, or a directory that FSDP training left.
        ema: take the averaged weights that training kept beside the others.
        from_fsdp: LlamaGen's flag; not needed. Refused for a pickle whose weights are wrapped, as
            FSDP's are not; a .safetensors file does not tell where it came from and is accepted.

    Raises:
        CheckpointError: one line: the file is no checkpoint, is damaged or hostile, or belongs to
            another model.
    """
    source = open_checkpoint(path, ema=ema)
    if from_fsdp and not source.is_fsdp:
        raise CheckpointError(
            path, "is no FSDP checkpoint: its weights are wrapped; leave --from-fsdp out"
        )
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
        raise CheckpointError(source.path, mismatch)
    for name in wanted:
        if name in source.dtypes and not source.dtypes[name].is_floating_point:
            kind = str(source.dtypes[name]).removeprefix("torch.")
            raise CheckpointError(
                source.path, f"{name} is {kind}, and no floating-point numbers; use another file"
            )


def open_checkpoint(path: Path, *, ema: bool = False) -> WeightSource:
    """Finds out what is there and opens it, without reading the weights.

    Raises:
        CheckpointError: nothing is there, it is no checkpoint, is damaged or hostile, or `ema` is
            not there.
    """
    try:
        str(path).encode()
    except UnicodeEncodeError as error:
        raise CheckpointError(path, "its name is not UTF-8; rename it") from error
    try:
        return _open_directory(path, ema) if path.is_dir() else _open_file(path, ema)
    except CheckpointError:
        raise
    except OSError as error:
        raise CheckpointError(path, f"cannot be read: {error.strerror}; check the path") from error
    except Exception as error:  # whatever no check foresaw
        raise CheckpointError(
            path, f"is damaged ({type(error).__name__}); download or copy it again"
        ) from error


def _open_directory(path: Path, ema: bool) -> WeightSource:
    if (path / METADATA_FILE).is_file():
        return open_sharded(path, ema)
    if (path / CONSOLIDATED_FILE).is_file():
        return _open_file(path / CONSOLIDATED_FILE, ema)
    if is_safetensors_folder(path):
        return open_safetensors_folder(path, ema)
    if visible_names(path, ".distcp"):
        raise CheckpointError(
            path, f"{METADATA_FILE} is missing beside the shards; copy the whole directory again"
        )
    state = (
        "is an empty directory"
        if not any(path.iterdir())
        else "is a directory without a checkpoint"
    )
    raise CheckpointError(
        path,
        f"{state}; {CONSOLIDATED_FILE}, {METADATA_FILE} or .safetensors files are needed, or name "
        "a file",
    )


def _open_file(path: Path, ema: bool) -> WeightSource:
    file = StoredFile(path)
    start = file.read(0, min(file.size, 32))
    if not start:
        raise CheckpointError(path, "is empty; download or copy it again")
    if start.startswith(_LFS_START):
        raise CheckpointError(
            path, "is a Git LFS pointer, not the weights; fetch them with `git lfs pull`"
        )
    if start[8:9] == b"{":  # eight bytes of length, then JSON
        tensors = read_safetensors(path).tensors
        names = select_flattened(tensors, path, ema)
        return WeightSource(path, {plain: tensors[name] for plain, name in names.items()})
    if start.startswith(_ZIP_START):
        return _open_pickled(path, read_torch_archive(file), ema)
    if start.startswith(_PICKLE_START):
        return _open_pickled(path, read_torch_stream(file), ema)
    raise CheckpointError(path, "is not a checkpoint; a .pt, .pth or .safetensors file is needed")


def _open_pickled(path: Path, saved: TorchFile, ema: bool) -> WeightSource:
    if not isinstance(saved.content, Pairs):
        kind = kind_of(saved.content) if saved.tensor(saved.content) is None else "tensor"
        raise CheckpointError(
            path, f"holds a {kind}, not a dictionary of weights; use another file"
        )
    content = saved.content.entries()
    wrapper = next((key for key in WRAPPERS if isinstance(content.get(key), Pairs)), None)
    if ema:
        if not isinstance(content.get(AVERAGED_WEIGHTS), Pairs):
            raise no_averaged_weights(path)
        wrapper = AVERAGED_WEIGHTS
    weights: Pairs = content[wrapper] if wrapper is not None else saved.content
    values: dict[str, object] = {}
    for name, value in weights:
        if type(name) is not str:
            raise _no_weights(path, f"it has a name that is no text, but one {kind_of(name)}")
        if name not in COMPUTED_HERE and (wrapper is not None or name not in TRAINING_STATE):
            values[name] = value
    tensors: dict[str, StoredTensor] = {}
    for plain, name in plain_names(values, path).items():
        tensor = saved.tensor(values[name])
        if tensor is None:
            raise _no_weights(path, f"{name[:100]!r} is no plain tensor")
        tensors[plain] = tensor
    return WeightSource(path, tensors, is_fsdp=wrapper is None)


def _no_weights(path: Path, shown: str) -> CheckpointError:
    return CheckpointError(path, f"is no dictionary of weights: {shown}; use another file")
