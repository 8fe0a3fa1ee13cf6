"""Quantised weights in safetensors, as the library `compressed-tensors` lays them out: which names
a matrix has, and the config that says how it is quantised.

The library itself pulls in transformers, so that this reads and writes the few layouts that the
layers here have: fp8 (e4m3) and int8 with a scale an output or one for all, and int4 in groups; all
of them symmetric. A file has its config in its metadata, and a folder in config.json.
"""

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from autoregressive.weights.quantized import PRODUCTS
from autoregressive.weights.safetensors_file import SUFFIX, read_safetensors
from autoregressive.weights.stored_tensor import (
    BadContentError,
    StoredFile,
    reading,
    require,
    visible_names,
)
from kernels.quantization import (
    BYTE_DTYPES,
    FP8,
    INT4_GROUP,
    LARGEST,
    QuantizedMatrix,
    empty_matrix,
)

CONFIG_KEY = "quantization_config"
CONFIG_FILE = "config.json"
_METHOD = "compressed-tensors"
_MOST_CONFIG_BYTES = 2**20
_FORMATS = ("float-quantized", "int-quantized", "naive-quantized", "pack-quantized")
# (type, num_bits) of a config, and how it is written
_SCHEMES = {("float", 8): "fp8", ("int", 8): "int8", ("int", 4): "int4"}
_WRITTEN_FORMATS = {"fp8": "float-quantized", "int8": "pack-quantized", "int4": "pack-quantized"}
_PARTS = ("weight_packed", "weight_scale", "weight_shape")
_FP8_NAN = 0x7F  # without the sign
_PRODUCT = re.compile(rf"layers\.\d+\.(?:{'|'.join(map(re.escape, PRODUCTS))})")
# Names by which the files of other methods are known where there is no config.
_OTHER_METHODS = {"qweight": "GPTQ or AWQ"}
# What a config may say beside how weights are quantised.
_MORE_METHODS = {
    "transform_config": "rotated weights",
    "sparsity_config": "sparse weights",
    "kv_cache_scheme": "scales of keys and values",
}
_METHOD_NAMES = {"gptq": "GPTQ", "awq": "AWQ"}
_COPY = "copy all of it again"
_CONVERT = "convert the original weights with scripts/convert_checkpoint.py --quantization"


class Stored(Protocol):
    """A tensor in a file, or in the files of a folder."""

    @property
    def dtype(self) -> torch.dtype:
        """As it is stored."""

    @property
    def shape(self) -> torch.Size:
        """As it is stored."""

    def read_into(self, target: Tensor) -> None:
        """Copies it into a tensor of its shape."""


@dataclass(frozen=True)
class StoredMatrix:
    """A quantised matrix in a file; its shapes have been checked.

    Attributes:
        values: bytes as in memory, or int32 with four of int8 or eight of int4 each.
        groups: of an output's inputs, of int4.
        stored_shape: integers [2], which packed values come with.
    """

    scheme: str
    shape: torch.Size
    values: Stored
    scales: Stored
    groups: int | None
    stored_shape: Stored | None = None

    dtype = torch.float32  # what its numbers stand for

    def read_matrix_into(self, matrix: QuantizedMatrix) -> None:
        """Copies values and scales into a matrix of this scheme and shape.

        Raises:
            BadContentError: a weight would not be finite, a scale is not positive, or the stored
                shape is another one.
        """
        self._check_stored_shape()
        values = matrix.values
        self.values.read_into(values.view(self.values.dtype) if self._packed else values)
        if self._packed and self.scheme == "int8":
            values.view(torch.uint8).bitwise_xor_(128)  # 128 has been added to each
        scales = torch.empty(self.scales.shape, dtype=torch.float32)
        self.scales.read_into(scales)
        fitting = (scales > 0) & (scales * LARGEST[FP8]).isfinite()
        require(bool(fitting.all()), f"has a scale that is no positive finite number; {_COPY}")
        scales = scales.flatten()  # one for each output or group, or one for all
        matrix.scales.copy_(scales.view_as(matrix.scales) if len(scales) > 1 else scales)
        if self.scheme == "fp8":
            no_number = values.view(torch.uint8) & _FP8_NAN == _FP8_NAN
            require(not no_number.any(), f"has a weight that is no number; {_COPY}")

    def read_into(self, target: Tensor) -> None:
        """Copies it into a tensor of its shape, dequantised."""
        matrix = empty_matrix(self.scheme, self.shape, target.device, self.groups)
        self.read_matrix_into(matrix)
        target.copy_(matrix.dequantized(torch.float32))

    def _check_stored_shape(self) -> None:
        if self.stored_shape is not None:
            shape = torch.empty(2, dtype=torch.int64)
            self.stored_shape.read_into(shape)
            told = f"has {[*self.shape]} weights, and its shape as {shape.tolist()}; {_COPY}"
            require(shape.tolist() == [*self.shape], told)

    @property
    def _packed(self) -> bool:
        return self.values.dtype == torch.int32


# --- the config ---


@dataclass(frozen=True)
class Scheme:
    """What a config says of the weights of all products."""

    name: str  # fp8, int8 or int4
    group_size: int | None


def find_config(path: Path) -> dict[str, Any] | None:
    """The config of a file or a folder: in config.json, or in the metadata of the file or of the
    folder's first one. None if there is none.

    Raises:
        CheckpointError: it cannot be read, or is no table.
    """
    folder = path if path.is_dir() else path.parent
    files = [path] if path.is_file() else [folder / name for name in visible_names(folder, SUFFIX)]
    text = read_safetensors(files[0]).metadata.get(CONFIG_KEY) if files else None
    if text is not None:
        with reading(files[0], "is no description of weights: {}; use another file"):
            return _table(text)
    if not (folder / CONFIG_FILE).is_file():
        return None
    file = StoredFile(folder / CONFIG_FILE)
    with reading(file.path, "is no description of weights: {}; copy it again, or remove it"):
        require(file.size <= _MOST_CONFIG_BYTES, f"it has {file.size:,} bytes")
        config = _table(file.read(0, file.size)).get(CONFIG_KEY)
        require(config is None or isinstance(config, dict), f"{CONFIG_KEY} is no table")
    return config


def _table(text: str | bytes) -> dict[str, Any]:
    try:
        table = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadContentError("it is not JSON") from error
    require(isinstance(table, dict), "it is no table")
    return table


def config_for(scheme: str) -> dict[str, Any]:
    """The config of a file that is written here."""
    kind, bits = next(key for key, name in _SCHEMES.items() if name == scheme)
    grouped = scheme == "int4"
    weights = {
        "num_bits": bits,
        "type": kind,
        "symmetric": True,
        "strategy": "group" if grouped else "channel",
        "group_size": INT4_GROUP if grouped else None,
        "dynamic": False,
    }
    form = _WRITTEN_FORMATS[scheme]
    group = {
        "targets": [f"re:.*{name}$" for name in PRODUCTS],
        "weights": weights,
        "input_activations": None,
        "output_activations": None,
        "format": form,
    }
    return {
        "quant_method": _METHOD,
        "format": form,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["output"],
        "kv_cache_scheme": None,
    }


def parse_config(config: Mapping[str, Any]) -> Scheme:
    """What a config says.

    Raises:
        BadContentError: it is of another method, or of a scheme that is not read here. The message
            says how to convert.
    """
    method = config.get("quant_method")
    if method != _METHOD:
        named = _METHOD_NAMES.get(str(method).lower(), str(method))
        raise BadContentError(f"is quantised by {named}, which is not read here; {_CONVERT} int4")
    groups = config.get("config_groups")
    require(
        isinstance(groups, dict) and len(groups) == 1,
        f"is quantised in several ways, or in none; {_CONVERT} fp8",
    )
    (group,) = groups.values()  # type: ignore[union-attr]
    weights = group.get("weights") if isinstance(group, dict) else None
    require(isinstance(weights, dict), f"does not say how weights are quantised; {_CONVERT} fp8")
    assert weights is not None
    kind, bits, strategy = (weights.get(key) for key in ("type", "num_bits", "strategy"))
    known = isinstance(kind, str) and isinstance(bits, int)
    name = _SCHEMES.get((kind, bits)) if known else None
    strategies = ("group", "channel") if name == "int4" else ("channel", "tensor")
    form = group.get("format") or config.get("format")
    told = f"{bits} bits, {kind}, {strategy}, {form}"
    require(
        name is not None and strategy in strategies and form in _FORMATS,
        f"is quantised in a way that is not read here ({told}); {_CONVERT} fp8",
    )
    require(
        weights.get("symmetric", True) is True and weights.get("actorder") in (None, "weight"),
        f"has zero points or reordered groups, which are not read here; {_CONVERT} int4",
    )
    for side in ("input_activations", "output_activations"):
        scales = group.get(side)
        require(
            scales is None or (isinstance(scales, dict) and scales.get("dynamic") is True),
            f"has static scales of activations, which destroy these models; {_CONVERT} fp8",
        )
    for key, told in _MORE_METHODS.items():
        require(not config.get(key), f"has {told}, which are not read here; {_CONVERT} {name}")
    size = weights.get("group_size") if strategy == "group" else None
    require(
        strategy != "group" or (type(size) is int and size > 0 and size % 2 == 0),
        f"has groups of {size} inputs; {_CONVERT} int4",
    )
    assert name is not None
    return Scheme(name, size)


# --- the tensors ---


def refuse_quantized(names: Iterable[str]) -> None:
    """Refuses quantised weights in a format that says nothing of how they are.

    Raises:
        BadContentError: the names are those of parts of quantised matrices.
    """
    products = _quantized_products(names)
    told = "holds quantised weights, which are read from .safetensors alone"
    require(not products, f"{told} ({min(products, default='')}); {_CONVERT} int8")


def _quantized_products(names: Iterable[str]) -> set[str]:
    """The names of matrices that have parts.

    Raises:
        BadContentError: they are of another method, which their names tell.
    """
    parts = [(product, part) for product, _, part in (name.rpartition(".") for name in names)]
    for _, part in parts:
        method = _OTHER_METHODS.get(part)
        told = f"is quantised by {method}, which is not read here; {_CONVERT} int4"
        require(method is None, told)
    return {product for product, part in parts if part in _PARTS}


def fold(
    tensors: Mapping[str, Stored], find_config: Callable[[], dict[str, Any] | None]
) -> tuple[dict[str, Any], str | None]:
    """Puts the parts of each quantised matrix together under the name of its weight.

    Args:
        tensors: of a file or a folder.
        find_config: called if any of them is a part.

    Returns:
        The tensors by the names that the model gives them, and how products are quantised; None if
        they are not.

    Raises:
        BadContentError: a part is missing or does not fit, something else than a layer's product
            is quantised, or the config is not one that is read here.
    """
    products = _quantized_products(tensors)
    bare = [
        name
        for name, tensor in tensors.items()
        if is_product_weight(name)
        and tensor.dtype in (FP8, torch.int8)
        and f"{name}_scale" not in tensors
    ]
    require(not bare, f"has no scales for {', '.join(bare[:1])}; {_COPY}")
    if not products:
        return dict(tensors), None
    config = find_config()
    told = f"does not say how its weights are quantised; copy its {CONFIG_FILE}, too"
    require(config is not None, told)
    assert config is not None
    scheme = parse_config(config)
    whole = {
        name.rpartition(".")[0]
        for name in tensors
        if name.endswith(".weight") and _PRODUCT.fullmatch(name.rpartition(".")[0])
    }
    mixed = sorted((whole - products) | {name for name in products if not _PRODUCT.fullmatch(name)})
    require(
        not mixed,
        f"is quantised in other layers than here, where those of the layers' products are "
        f"({', '.join(mixed[:1])}); {_CONVERT} {scheme.name}",
    )
    surplus = [
        name
        for name in tensors
        if name.rpartition(".")[0] in products
        and name.rpartition(".")[2] not in ("weight", *_PARTS)
    ]
    told = f"has {', '.join(surplus[:1])}, which is not read here; {_CONVERT} {scheme.name}"
    require(not surplus, told)
    folded: dict[str, Any] = {
        name: tensor for name, tensor in tensors.items() if name.rpartition(".")[0] not in products
    }
    for product in sorted(products):
        folded[f"{product}.weight"] = _stored_matrix(tensors, product, scheme)
    return folded, scheme.name


def _stored_matrix(tensors: Mapping[str, Stored], product: str, scheme: Scheme) -> StoredMatrix:
    packed, scales, shape = (tensors.get(f"{product}.{part}") for part in _PARTS)
    plain = tensors.get(f"{product}.weight")
    values = plain if packed is None else packed
    require(values is not None, f"has no weights for {product}; {_COPY}")
    assert values is not None
    require(packed is None or plain is None, f"has weights for {product} twice; {_COPY}")
    require(scales is not None, f"has no scales for {product}; {_COPY}")
    assert scales is not None
    per_word = {"int8": 4, "int4": 8}.get(scheme.name)
    told = f"has {product} as {_kind(values)} and its scales as {_kind(scales)}, which is no "
    misfit = f"{told}{scheme.name}; {_COPY}"
    if packed is None:
        expected = BYTE_DTYPES.get(scheme.name)
        require(values.dtype == expected and len(values.shape) == 2, misfit)
        outputs, inputs = values.shape
    else:
        fits = per_word is not None and values.dtype == torch.int32 and len(values.shape) == 2
        require(fits, misfit)
        assert per_word is not None
        outputs, inputs = values.shape[0], values.shape[1] * per_word
    groups = None
    if scheme.name == "int4":
        size = scheme.group_size or inputs
        groups = max(1, inputs // size)
        require(inputs % size == 0 and scales.shape == (outputs, groups), misfit)
    else:
        require(tuple(scales.shape) in ((outputs, 1), (outputs,), (1,), (1, 1), ()), misfit)
    require(scales.dtype.is_floating_point, misfit)
    fits = shape is None or (shape.shape == (2,) and shape.dtype in (torch.int32, torch.int64))
    require(fits, f"has no shape of two numbers for {product}; {_COPY}")
    return StoredMatrix(scheme.name, torch.Size((outputs, inputs)), values, scales, groups, shape)


def _kind(tensor: Stored) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def is_product_weight(name: str) -> bool:
    """Whether a weight is that of a layer's product."""
    product, _, part = name.rpartition(".")
    return part == "weight" and _PRODUCT.fullmatch(product) is not None


def written_parts(
    product: str, scheme: str, outputs: int, inputs: int
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """The tensors that a quantised product is written as: name -> dtype and shape."""
    groups = inputs // INT4_GROUP if scheme == "int4" else 1
    scales = {f"{product}.weight_scale": (torch.float32, (outputs, groups))}
    if scheme == "fp8":
        return {f"{product}.weight": (FP8, (outputs, inputs)), **scales}
    words = inputs // {"int8": 4, "int4": 8}[scheme]
    return {
        f"{product}.weight_packed": (torch.int32, (outputs, words)),
        f"{product}.weight_shape": (torch.int64, (2,)),
        **scales,
    }


def written_tensors(product: str, matrix: QuantizedMatrix) -> dict[str, Tensor]:
    """The tensors of `written_parts`."""
    scales = matrix.scales.view(len(matrix.scales), -1)
    if matrix.scheme == "fp8":
        return {f"{product}.weight": matrix.values, f"{product}.weight_scale": scales}
    digits = matrix.values.view(torch.uint8)
    if matrix.scheme == "int8":
        digits = digits ^ 128
    return {
        f"{product}.weight_packed": digits.view(torch.int32),
        f"{product}.weight_shape": torch.tensor(matrix.shape),
        f"{product}.weight_scale": scales,
    }
