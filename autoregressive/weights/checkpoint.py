"""Loads weights of any kind LlamaGen's users have: .pt / .pth, .safetensors, FSDP's and Hugging
Face's directories.

The kind is found by looking, not by name. Each tensor is read straight to its place, dtype and
device, one at a time, so that memory never holds a second copy of the weights; nothing is
unpickled, and whatever goes wrong while reading is a `CheckpointError`.
"""

import functools
import itertools
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from autoregressive.errors import SettingName
from autoregressive.models.ranks import ALONE, Rank, WeightPart
from autoregressive.weights.compressed_layout import (
    StoredMatrix,
    find_config,
    fold,
    refuse_quantized,
)
from autoregressive.weights.inert_pickle import Pairs, kind_of
from autoregressive.weights.mismatch import COMPUTED_HERE, TOLERATED, find_mismatch
from autoregressive.weights.quantized import QuantizedLinear, products_of
from autoregressive.weights.safetensors_file import (
    INDEX_SUFFIX,
    SUFFIX,
    open_safetensors_folder,
    read_safetensors,
)
from autoregressive.weights.sharded import METADATA_FILE, open_sharded
from autoregressive.weights.stored_tensor import (
    HAS_PROBLEM,
    CheckpointError,
    ChunkedTensor,
    StoredFile,
    StoredTensor,
    reading,
    require,
    visible_names,
)
from autoregressive.weights.torch_file import (
    SavedTensor,
    TorchFile,
    read_torch_archive,
    read_torch_stream,
)
from kernels.quantization import QuantizedMatrix, empty_matrix

__all__ = ["CheckpointError", "WeightSource", "load_weights", "open_checkpoint"]

CONSOLIDATED_FILE = "consolidated.pth"  # LlamaGen's FSDP training

# The keys under which training code keeps the weights, in the order that LlamaGen tries them.
WRAPPERS = ("model", "module", "state_dict")
AVERAGED_WEIGHTS = "ema"
_NO_AVERAGES = f"holds no averaged weights ('{AVERAGED_WEIGHTS}'); leave out", SettingName("ema")

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

# DistributedDataParallel prefixes the whole name; the other wrappers (FSDP, torch.compile,
# activation checkpointing) may wrap any submodule: their mark is anywhere.
_LEADING_MARKS = re.compile(r"^(module\.)+")
_MARKS_ANYWHERE = re.compile(r"_orig_mod\.|_fsdp_wrapped_module\.|_checkpoint_wrapped_module\.")
# Under which stores that flatten nested dictionaries have the weights: torch's examples save
# {"app": {"model": ...}}.
_FOLDERS = ("app", *WRAPPERS, AVERAGED_WEIGHTS)

_DEEPEST_FOLDER = 4

_LONGEST_NAME = 500
_MOST_WEIGHTS = 20_000  # the state of an optimizer is not counted


@dataclass(frozen=True)
class WeightSource:
    """One set of weights in a checkpoint."""

    path: Path
    # by the names that the model gives its parameters
    tensors: Mapping[str, StoredTensor | ChunkedTensor | StoredMatrix]
    # may be what --from-fsdp means: a flat full state dict, a sharded directory, any .safetensors
    is_fsdp: bool = True
    quantization: str | None = None  # of the layers' products, which are `StoredMatrix` then

    @functools.cached_property
    def shapes(self) -> dict[str, torch.Size]:
        """The shape of each weight."""
        return {name: tensor.shape for name, tensor in self.tensors.items()}

    @functools.cached_property
    def dtypes(self) -> dict[str, torch.dtype]:
        """The dtype that each weight is stored in."""
        return {name: tensor.dtype for name, tensor in self.tensors.items()}

    def read_into(self, name: str, target: Tensor, part: WeightPart | None = None) -> None:
        """Copies the named tensor into one of its shape, or a part of it into one of the part's
        shape, converting dtype and device.

        Raises:
            CheckpointError: it is damaged.
        """
        stored = self.tensors[name]
        with reading(self.path, damage=f"{name} cannot be read ({{}}); download or copy it again"):
            if part is None:
                stored.read_into(target)
                return
            assert not isinstance(stored, StoredMatrix)
            for start, piece in part.places(target):
                stored.read_box_into(start, piece)

    def read_quantized(self, name: str, scheme: str, device: torch.device) -> QuantizedMatrix:
        """The named matrix as it is stored, or quantised from what is stored. Beside it, memory
        holds one matrix in float32.

        Raises:
            CheckpointError: it is damaged, or a weight is not finite.
        """
        stored = self.tensors[name]
        groups = stored.groups if isinstance(stored, StoredMatrix) else None
        matrix = empty_matrix(scheme, stored.shape, device, groups)
        if isinstance(stored, StoredMatrix):
            damage = f"{name} cannot be read ({{}}); download or copy it again"
            with reading(self.path, f"{name} {{}}", damage):
                stored.read_matrix_into(matrix)
        else:
            weights = torch.empty(stored.shape, dtype=torch.float32, device=device)
            self.read_into(name, weights)
            matrix.fill(weights)
            if not matrix.scales.isfinite().all():
                told = f"{name} has a weight that is not finite; use another file"
                raise CheckpointError(self.path, told)
        return matrix


def load_weights(
    model: nn.Module,
    path: Path,
    *,
    device: torch.device,
    dtype: torch.dtype,
    ema: bool = False,
    from_fsdp: bool = False,
    quantization: str | None = None,
    rank: Rank = ALONE,
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
        quantization: of the weights of a transformer's layers' products, "fp8", "int8" or "int4";
            None: as the checkpoint has them.
        rank: which part of the weights the model holds; no more is read than that.

    Raises:
        CheckpointError: one line: the file is no checkpoint, is damaged or hostile, or belongs to
            another model: which one, which setting would help, or which keys differ.
    """
    source = open_checkpoint(path, ema=ema)
    if from_fsdp and not source.is_fsdp:
        raise CheckpointError(
            path,
            "is no FSDP checkpoint: its weights are wrapped; leave out",
            SettingName("from_fsdp"),
        )
    parts = {name: rank.part_of(name) for name in model.state_dict()}
    wanted = {
        name: tensor.shape if (part := parts[name]) is None else part.whole_shape(tensor.shape)
        for name, tensor in model.state_dict().items()
    }
    mismatch = find_mismatch(wanted, source.shapes)
    if mismatch is not None:
        raise CheckpointError(source.path, *mismatch)
    for name in wanted:
        dtype_there = source.dtypes.get(name, dtype)
        # beside quantised weights, numbers of a byte have lost their scales
        lost = source.quantization is not None and dtype_there.itemsize < 2
        if lost or not dtype_there.is_floating_point:
            kind = str(dtype_there).removeprefix("torch.")
            told = f"{name} is {kind}" + (
                " without scales" if lost else ", and no floating-point numbers"
            )
            raise CheckpointError(
                source.path, f"{told}; use another file, or convert the original weights"
            )
    scheme = loaded_quantization(source.path, source.quantization, quantization)
    if scheme is not None and rank != ALONE:
        raise CheckpointError(
            source.path,
            f"holds {scheme} weights, which are not split among processes; leave out",
            SettingName("tensor_parallel_size"),
        )
    model.to(dtype)
    if scheme is not None:
        with torch.no_grad():
            for name, _ in list(products_of(model)):
                matrix = source.read_quantized(f"{name}.weight", scheme, device)
                model.set_submodule(name, QuantizedLinear(matrix))
    model.to_empty(device=device)
    with torch.no_grad():
        for name, target in model.state_dict().items():
            if name in TOLERATED and source.shapes.get(name) != target.shape:
                target.zero_()
            else:
                source.read_into(name, target, parts[name])


def loaded_quantization(path: Path, stored: str | None, asked: str | None) -> str | None:
    """How weights are quantised once they are loaded; None if they are not.

    Args:
        stored: how they are in the checkpoint.
        asked: how they were asked for; None: as they are stored.

    Raises:
        CheckpointError: they are quantised in another way. A second quantisation would add its
            errors to those of the first.
    """
    if stored is not None and asked not in (None, stored):
        told = f"holds {stored} weights; use the original ones, or leave out"
        raise CheckpointError(path, told, SettingName("quantization"))
    return stored or asked


def stored_quantization(path: Path, ema: bool) -> str | None:
    """How a checkpoint's weights are quantised; None if they are not. Nothing but .safetensors can
    be, so nothing else is opened.

    Raises:
        CheckpointError: as `open_checkpoint`, or they are quantised in a way that is not read here.
    """
    if path.is_dir():
        there = bool(visible_names(path, SUFFIX))
    else:
        there = path.is_file() and _is_safetensors(_start_of(StoredFile(path)))
    return open_checkpoint(path, ema=ema).quantization if there else None


def _start_of(file: StoredFile) -> bytes:
    return file.read(0, min(file.size, 32))


def _is_safetensors(start: bytes) -> bool:
    return start[8:9] == b"{"  # eight bytes of length, then JSON


def open_checkpoint(path: Path, *, ema: bool = False) -> WeightSource:
    """Finds out what is there and opens it, without reading the weights.

    Raises:
        CheckpointError: nothing is there, it is no checkpoint, is damaged or hostile, or `ema` is
            not there.
    """
    with reading(path, damage=HAS_PROBLEM):
        try:
            str(path).encode()
        except UnicodeEncodeError as error:
            raise CheckpointError(path, "its name is not UTF-8; rename it") from error
        return _open_directory(path, ema) if path.is_dir() else _open_file(path, ema)


def _open_directory(path: Path, ema: bool) -> WeightSource:
    choose = functools.partial(select_flattened, ema=ema)
    if (path / METADATA_FILE).is_file():
        tensors = open_sharded(path, choose)
        refuse_quantized(tensors)
        return WeightSource(path, tensors)
    if (path / CONSOLIDATED_FILE).is_file():
        return open_checkpoint(path / CONSOLIDATED_FILE, ema=ema)
    if visible_names(path, SUFFIX) or visible_names(path, INDEX_SUFFIX):
        tensors = open_safetensors_folder(path, choose)
        folded, scheme = fold(tensors, functools.partial(find_config, path))
        return WeightSource(path, folded, quantization=scheme)
    require(
        not visible_names(path, ".distcp"),
        f"{METADATA_FILE} is missing beside the shards; copy the whole directory again",
    )
    state = "a directory without a checkpoint" if any(path.iterdir()) else "an empty directory"
    raise CheckpointError(
        path,
        f"is {state}; {CONSOLIDATED_FILE}, {METADATA_FILE} or .safetensors files are needed, or "
        "name a file",
    )


def _open_file(path: Path, ema: bool) -> WeightSource:
    file = StoredFile(path)
    start = _start_of(file)
    require(bool(start), "is empty; download or copy it again")
    require(
        not start.startswith(b"version https://git-lfs"),
        "is a Git LFS pointer, not the weights; fetch them with `git lfs pull`",
    )
    if _is_safetensors(start):
        tensors = read_safetensors(path).tensors
        names = select_flattened(tensors, ema)
        plain_tensors = {plain: tensors[name] for plain, name in names.items()}
        folded, scheme = fold(plain_tensors, functools.partial(find_config, path))
        return WeightSource(path, folded, quantization=scheme)
    if start.startswith(b"PK\x03\x04"):  # a zip archive
        return _open_pickled(path, read_torch_archive(file), ema)
    if start.startswith(b"\x80"):  # a pickle
        return _open_pickled(path, read_torch_stream(file), ema)
    raise CheckpointError(path, "is not a checkpoint; a .pt, .pth or .safetensors file is needed")


def _open_pickled(path: Path, saved: TorchFile, ema: bool) -> WeightSource:
    whole = saved.content
    kind = "tensor" if isinstance(whole, SavedTensor) else kind_of(whole)
    require(
        isinstance(whole, Pairs),
        f"holds a {kind}, not a dictionary of weights; use another file",
    )
    content = whole.entries()
    wrapper = next((key for key in WRAPPERS if isinstance(content.get(key), Pairs)), None)
    if ema:
        require(isinstance(content.get(AVERAGED_WEIGHTS), Pairs), *_NO_AVERAGES)
        wrapper = AVERAGED_WEIGHTS
    weights: Pairs = content[wrapper] if wrapper is not None else whole
    not_read = COMPUTED_HERE if wrapper is not None else {*COMPUTED_HERE, *TRAINING_STATE}
    with reading(path, "is no dictionary of weights: {}; use another file"):
        for name, _ in weights.items:
            require(type(name) is str, f"it has a name that is no text, but one {kind_of(name)}")
    values = {name: value for name, value in weights.items if name not in not_read}
    names = plain_names(values)
    refuse_quantized(names)
    with reading(path, "is no dictionary of weights: {} is no plain tensor; use another file"):
        for name in names.values():
            require(isinstance(values[name], SavedTensor), repr(name[:100]))
    tensors = {plain: saved.find(values[name]) for plain, name in names.items()}
    return WeightSource(path, tensors, is_fsdp=wrapper is None)


# --- names ---


def plain_names(names: Iterable[str]) -> dict[str, str]:
    """Name without what DistributedDataParallel, FSDP, torch.compile and activation checkpointing
    add to it -> name in the checkpoint.

    Raises:
        BadContentError: two names become the same one, one is so long that it is none, or there are
            too many.
    """
    plain: dict[str, str] = {}
    for name in names:
        require(
            len(name) <= _LONGEST_NAME,
            f"holds a name of {len(name):,} characters, which no weight has ({name[:50]}...); use "
            "another file",
        )
        require(
            len(plain) < _MOST_WEIGHTS,
            f"holds more than {_MOST_WEIGHTS:,} weights, which no model here has; use another file",
        )
        short = _LEADING_MARKS.sub("", _MARKS_ANYWHERE.sub("", name))
        other = plain.setdefault(short, name)
        require(other == name, f"holds {short} twice, as {other} and as {name}")
    return plain


def select_flattened(names: Iterable[str], ema: bool) -> dict[str, str]:
    """Picks the weights among the names of a store that flattens nested dictionaries
    ("model.norm.weight", "optim...").

    Returns:
        Plain name -> name in the checkpoint.

    Raises:
        BadContentError: `ema` is asked for and not there, several sets of weights are there, or two
            names become the same one.
    """
    # folder -> name in it -> name in the checkpoint
    sets: dict[tuple[str, ...], dict[str, str]] = {}
    for name in names:
        parts = name.split(".", _DEEPEST_FOLDER)
        folder = tuple(itertools.takewhile(_FOLDERS.__contains__, parts[:-1]))
        inside = parts[len(folder) :]
        if (AVERAGED_WEIGHTS in folder) == ema and inside[0] not in TRAINING_STATE:
            sets.setdefault(folder, {})[".".join(inside)] = name
    flat = sets.pop((), {})
    folders = " and ".join(".".join(folder) for folder in sorted(sets))
    require(
        len(sets) <= 1,
        f"holds several sets of weights, under {folders}; save the one that you want alone",
    )
    require(bool(sets) or not ema, *_NO_AVERAGES)
    chosen = next(iter(sets.values()), flat)
    return {plain: chosen[short] for plain, short in plain_names(chosen).items()}
