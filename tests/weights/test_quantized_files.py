"""Quantised checkpoints: those that are written here, and those that the library compressed-tensors
has written (tests/reference/compressed_tensors).
"""

import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from autoregressive.models.config import GPTConfig
from autoregressive.models.gpt import GPT_models, Transformer
from autoregressive.models.ranks import Rank
from autoregressive.weights.checkpoint import CheckpointError, load_weights, open_checkpoint
from autoregressive.weights.conversion import convert
from autoregressive.weights.finding import FoundWeights
from autoregressive.weights.quantized import products_of, quantization_of, weights_of
from kernels import QUANTIZATIONS
from kernels.quantization import FP8, QuantizedMatrix, quantize

ROOT = Path(__file__).resolve().parents[2]
LIBRARY = ROOT / "tests/reference/compressed_tensors"
DEMO = ROOT / "pretrained_models/demo_gpt.safetensors"
SHAPE = GPTConfig(
    dim=64, n_layer=1, n_head=1, vocab_size=8, block_size=4, num_classes=2, multiple_of=32
)


def loaded(
    path: Path, shape: GPTConfig = SHAPE, quantization: str | None = None, **options: object
) -> Transformer:
    with torch.device("meta"):
        model = Transformer(shape)
    load_weights(
        model,
        path,
        device=torch.device("cpu"),
        dtype=torch.float32,
        quantization=quantization,
        **options,  # type: ignore[arg-type]
    )
    return model.eval()


def demo_shape() -> GPTConfig:
    with torch.device("meta"):
        return GPT_models["GPT-demo"](vocab_size=1024, num_classes=64).config


def matrices(model: Transformer) -> dict[str, QuantizedMatrix]:
    found = {name: weights_of(product) for name, product in products_of(model)}
    assert all(isinstance(each, QuantizedMatrix) for each in found.values())
    return found  # type: ignore[return-value]


def same(first: QuantizedMatrix, second: QuantizedMatrix) -> bool:
    pairs = ((first.values, second.values), (first.scales, second.scales))
    return all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in pairs)


@pytest.mark.parametrize("name", ["fp8", "fp8_tensor", "int8", "int4"])
@pytest.mark.parametrize("whole_folder", [True, False])
def test_what_the_library_has_written_is_read(name: str, whole_folder: bool) -> None:
    """Fails if a value, a scale or their order is read otherwise than the library reads it."""
    folder = LIBRARY / name
    model = loaded(folder if whole_folder else folder / "model.safetensors")
    expected = json.loads((folder / "expected.json").read_text())
    read = matrices(model)
    assert quantization_of(model) == name.partition("_")[0]
    assert read.keys() == expected.keys()
    for product, matrix in read.items():
        weight = matrix.dequantized(torch.float32)
        assert hashlib.sha256(weight.numpy().tobytes()).hexdigest() == expected[product], product
    assert torch.equal(
        model.output.weight, load_file(folder / "model.safetensors")["output.weight"].float()
    )


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_one_scale_of_a_matrix_may_have_any_shape(shape: tuple[int, ...], tmp_path: Path) -> None:
    """Fails if a scale that passes the checks ends in an error of torch's."""

    def reshape(tensors: dict[str, Tensor], config: dict[str, object]) -> None:
        tensors[SCALE] = tensors[SCALE].reshape(shape)

    read = matrices(loaded(change("fp8_tensor", reshape)(tmp_path)))
    expected = matrices(loaded(LIBRARY / "fp8_tensor"))
    for product, matrix in read.items():
        assert torch.equal(matrix.scales, expected[product].scales)


@pytest.mark.parametrize("scheme", QUANTIZATIONS)
def test_a_converted_file_has_the_librarys_layout(scheme: str, tmp_path: Path) -> None:
    """Fails if a name, dtype or shape differs from those that the library gives the same model, or
    the config does.
    """
    original = tmp_path / "original.pt"
    model = Transformer(SHAPE)
    model.init_weights(torch.Generator().manual_seed(1), std=0.1)
    torch.save(model.state_dict(), original)
    written = tmp_path / "written.safetensors"
    source = open_checkpoint(original)
    with pytest.MonkeyPatch.context() as patch:
        # the shape of the fixtures is no model's
        patch.setattr("autoregressive.weights.conversion.identify", lambda shapes: "GPT-B")
        convert(source, written, "bfloat16", scheme)
    ours, theirs = load_file(written), load_file(LIBRARY / scheme / "model.safetensors")
    # The library keeps scales in the model's dtype.
    assert {name: tensor.shape for name, tensor in ours.items()} == {
        name: tensor.shape for name, tensor in theirs.items()
    }
    for name, tensor in ours.items():
        wanted = torch.float32 if name.endswith("weight_scale") else theirs[name].dtype
        assert tensor.dtype == wanted, name
    with safe_open(written, framework="pt") as file:
        config = json.loads(file.metadata()["quantization_config"])
    of_library = json.loads((LIBRARY / scheme / "config.json").read_text())["quantization_config"]
    (our_group,), (their_group,) = (each["config_groups"].values() for each in (config, of_library))
    assert our_group["weights"] == their_group["weights"]
    assert config["ignore"] == of_library["ignore"]


@pytest.mark.parametrize("scheme", QUANTIZATIONS)
def test_the_library_reads_what_is_written_here(scheme: str, tmp_path: Path) -> None:
    """Fails if the library makes other numbers of a file of ours. It is not among the locked
    packages, so that this runs where it was installed by hand.
    """
    compressors = pytest.importorskip("compressed_tensors.compressors")
    quantization = pytest.importorskip("compressed_tensors.quantization")
    written = tmp_path / "written.safetensors"
    convert(open_checkpoint(DEMO), written, None, scheme)
    with safe_open(written, framework="pt") as file:
        config = json.loads(file.metadata()["quantization_config"])
    (group,) = config["config_groups"].values()
    compressor = compressors.BaseCompressor.get_value_from_registry(group["format"])
    how = quantization.QuantizationScheme(**group)
    tensors = load_file(written)
    for product, matrix in matrices(loaded(written, demo_shape())).items():
        parts = {
            name.removeprefix(f"{product}."): tensor
            for name, tensor in tensors.items()
            if name.startswith(f"{product}.")
        }
        weight = compressor.decompress(parts, how)["weight"]
        assert torch.equal(weight.float(), matrix.dequantized(torch.float32)), product


@pytest.mark.parametrize("scheme", QUANTIZATIONS)
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_a_converted_file_is_what_loading_makes_of_the_original(
    scheme: str, dtype: str | None, tmp_path: Path
) -> None:
    """Fails if a converted file draws something else than --quantization from the original: if any
    bit of its weights differs.
    """
    written = tmp_path / "written.safetensors"
    convert(open_checkpoint(DEMO), written, dtype, scheme)
    from_file, from_original = (
        loaded(path, demo_shape(), quantization)
        for path, quantization in ((written, None), (DEMO, scheme))
    )
    assert quantization_of(from_file) == scheme
    wanted = matrices(from_original)
    for name, matrix in matrices(from_file).items():
        assert same(matrix, wanted[name]), name
    original = load_file(DEMO)["layers.0.attention.wqkv.weight"]
    assert same(wanted["layers.0.attention.wqkv"], quantize(original, scheme))
    loaded(written, demo_shape(), scheme)  # the same again is no contradiction


Edit = Callable[[dict[str, Tensor], dict[str, object]], None]


def change(name: str, edit: Edit) -> Callable[[Path], Path]:
    """Makes a copy of a folder of the library, with its tensors and its config edited."""

    def make(folder: Path) -> Path:
        copied = folder / "copy"
        shutil.copytree(LIBRARY / name, copied)
        tensors = load_file(copied / "model.safetensors")
        config = json.loads((copied / "config.json").read_text())
        edit(tensors, config)
        save_file(tensors, copied / "model.safetensors")
        (copied / "config.json").write_text(json.dumps(config))
        return copied

    return make


QKV = "layers.0.attention.wqkv"


def drop(*names: str) -> Edit:
    def edit(tensors: dict[str, Tensor], config: dict[str, object]) -> None:
        for name in names:
            del tensors[name]

    return edit


def settle(key: str, value: object) -> Edit:
    """Changes what the config says, by the path of its keys."""

    def edit(tensors: dict[str, Tensor], config: dict[str, object]) -> None:
        *path, last = key.split(".")
        place = config["quantization_config"]
        for part in path:
            place = place[part]  # type: ignore[index]
        place[last] = value  # type: ignore[index]

    return edit


def spoil(name: str, place: int, value: float) -> Edit:
    """Changes one number; of fp8, one byte."""

    def edit(tensors: dict[str, Tensor], config: dict[str, object]) -> None:
        tensor = tensors[name]
        numbers = tensor.view(torch.uint8) if tensor.dtype == FP8 else tensor
        numbers.view(-1)[place] = value

    return edit


def gptq(tensors: dict[str, Tensor], config: dict[str, object]) -> None:
    del tensors[f"{QKV}.weight_packed"], tensors[f"{QKV}.weight_scale"]
    tensors[f"{QKV}.qweight"] = torch.zeros(8, 192, dtype=torch.int32)
    tensors[f"{QKV}.scales"] = torch.zeros(2, 192)


def add(name: str, tensor: Tensor) -> Edit:
    def edit(tensors: dict[str, Tensor], config: dict[str, object]) -> None:
        tensors[name] = tensor

    return edit


def drop_scales(tensors: dict[str, Tensor], config: dict[str, object]) -> None:
    for name in [name for name in tensors if name.endswith("_scale")]:
        del tensors[name]


def whole_product(tensors: dict[str, Tensor], config: dict[str, object]) -> None:
    for part in ("packed", "scale", "shape"):
        del tensors[f"{QKV}.weight_{part}"]
    tensors[f"{QKV}.weight"] = torch.zeros(192, 64)


def twice(tensors: dict[str, Tensor], config: dict[str, object]) -> None:
    tensors[f"{QKV}.weight"] = torch.zeros(192, 64)


def no_values(tensors: dict[str, Tensor], config: dict[str, object]) -> None:
    del tensors[f"{QKV}.weight_packed"]


def no_config(tensors: dict[str, Tensor], config: dict[str, object]) -> None:
    config.clear()


SCALE = f"{QKV}.weight_scale"
NO_SCALE = f"{QKV}.weight has a scale that is no positive finite number"
WEIGHTS = "config_groups.group_0.weights"
BAD = {
    "no scale of fp8": (change("fp8", drop(f"{QKV}.weight_scale")), "has no scales for layers.0"),
    "no scale of int4": (change("int4", drop(f"{QKV}.weight_scale")), "has no scales for layers.0"),
    "no scales at all": (change("fp8", drop_scales), "has no scales for layers.0"),
    "scales of another shape": (
        change("int4", add(f"{QKV}.weight_scale", torch.ones(192, 3))),
        "which is no int4; copy all of it again",
    ),
    "integers as fp8": (
        change("fp8", add(f"{QKV}.weight", torch.zeros(192, 64, dtype=torch.int8))),
        "which is no fp8",
    ),
    "no config": (change("int8", no_config), "does not say how its weights are quantised"),
    "GPTQ": (change("int4", gptq), "quantised by GPTQ or AWQ, which is not read here; convert the"),
    "AWQ": (change("int4", settle("quant_method", "awq")), "by AWQ, which is not read here"),
    "an unknown method": (change("int4", settle("quant_method", "hqq")), "quantised by hqq"),
    "no method": (change("int4", settle("quant_method", None)), "quantised by None"),
    "an unknown format": (
        change("fp8", settle("config_groups.group_0.format", "marlin-24")),
        "not read here (8 bits, float, channel, marlin-24)",
    ),
    "two bits": (change("int4", settle(f"{WEIGHTS}.num_bits", 2)), "2 bits, int, group"),
    "bits that are none": (change("int4", settle(f"{WEIGHTS}.num_bits", [4])), "not read here"),
    "zero points": (change("int4", settle(f"{WEIGHTS}.symmetric", False)), "has zero points"),
    "groups of zero": (change("int4", settle(f"{WEIGHTS}.group_size", 0)), "has groups of 0"),
    "static activations": (
        change("fp8", settle("config_groups.group_0.input_activations", {"dynamic": False})),
        "static scales of activations",
    ),
    "two groups": (
        change("fp8", settle("config_groups", {"a": {}, "b": {}})),
        "in several ways, or in none",
    ),
    "weights that are no table": (change("fp8", settle(WEIGHTS, 7)), "does not say how weights"),
    "reordered groups": (
        change("int4", add(f"{QKV}.weight_g_idx", torch.zeros(64, dtype=torch.int32))),
        f"has {QKV}.weight_g_idx",
    ),
    "a quantised head": (
        change("fp8", add("output.weight_scale", torch.ones(8, 1))),
        "(output); convert",
    ),
    "a head of fp8 without scales": (
        change("fp8", add("output.weight", torch.zeros(8, 64, dtype=torch.float8_e4m3fn))),
        "output.weight is float8_e4m3fn without scales; use another file",
    ),
    "odd groups": (change("int4", settle(f"{WEIGHTS}.group_size", 31)), "has groups of 31 inputs"),
    "groups that do not fit": (
        change("int4", settle(f"{WEIGHTS}.group_size", 34)),
        "which is no int4",
    ),
    "a scale that is NaN": (change("fp8", spoil(SCALE, 3, float("nan"))), NO_SCALE),
    "an infinite scale": (change("int8", spoil(SCALE, 3, float("inf"))), NO_SCALE),
    "a scale that overflows": (change("int4", spoil(SCALE, 3, 1e37)), NO_SCALE),
    "a negative scale": (change("int8", spoil(SCALE, 3, -1.0)), NO_SCALE),
    "a scale of zero": (change("int4", spoil(SCALE, 3, 0.0)), NO_SCALE),
    "scales in integers": (
        change("int8", add(SCALE, torch.ones(192, 1, dtype=torch.int32))),
        "which is no int8",
    ),
    "a weight of fp8 that is NaN": (
        change("fp8", spoil(f"{QKV}.weight", 70, 0x7F)),
        f"{QKV}.weight has a weight that is no number",
    ),
    "a negative NaN of fp8": (
        change("fp8_tensor", spoil(f"{QKV}.weight", 70, 0xFF)),
        "has a weight that is no number",
    ),
    "another shape than it says": (
        change("int4", add(f"{QKV}.weight_shape", torch.tensor([192, 60]))),
        f"{QKV}.weight has [192, 64] weights, and its shape as [192, 60]",
    ),
    "a shape that is none": (
        change("int4", add(f"{QKV}.weight_shape", torch.tensor([192]))),
        f"has no shape of two numbers for {QKV}",
    ),
    "weights packed and not": (change("int8", twice), f"has weights for {QKV} twice"),
    "no weights": (change("int8", no_values), f"has no weights for {QKV}"),
    "static scales of results": (
        change("fp8", settle("config_groups.group_0.output_activations", {"dynamic": False})),
        "static scales of activations",
    ),
    "rotated weights": (
        change("fp8", settle("transform_config", {"config_groups": {"u": {"type": "hadamard"}}})),
        "has rotated weights, which are not read here",
    ),
    "sparse weights": (
        change("fp8", settle("sparsity_config", {"format": "sparse-24-bitmask"})),
        "has sparse weights, which are not read here",
    ),
    "scales of keys and values": (
        change("fp8", settle("kv_cache_scheme", {"num_bits": 8, "type": "float"})),
        "has scales of keys and values, which are not read here",
    ),
    "a product that is not quantised": (change("int4", whole_product), f"({QKV}); convert"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_read_is_told_in_one_line(name: str, tmp_path: Path) -> None:
    """Fails if a file is read as something that it is not, or the message does not say what to
    do.
    """
    make, told = BAD[name]
    path = make(tmp_path)
    with pytest.raises(CheckpointError) as raised:
        loaded(path)
    message = str(raised.value)
    assert told in message
    assert message.startswith(str(path))
    assert "\n" not in message
    assert any(word in message for word in ("copy", "convert the original weights"))


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("qweight", "is quantised by GPTQ or AWQ, which is not read here; convert the original"),
        ("weight_scale", f"are read from .safetensors alone ({QKV}); convert the original"),
    ],
)
def test_quantised_weights_in_a_pickle_are_refused(name: str, told: str, tmp_path: Path) -> None:
    """Fails if such a file is called another model's, which helps nobody."""
    torch.save({f"{QKV}.{name}": torch.ones(192)}, tmp_path / "x.pt")
    with pytest.raises(CheckpointError) as raised:
        open_checkpoint(tmp_path / "x.pt")
    assert told in str(raised.value)


@pytest.mark.parametrize("scheme", QUANTIZATIONS)
def test_weights_that_are_not_finite_are_not_quantised(scheme: str, tmp_path: Path) -> None:
    """Fails if a NaN becomes a number on its way through a scheme that has none for it, or a file
    is left that draws nothing.
    """
    tensors = load_file(DEMO)
    tensors["layers.1.feed_forward.w2.weight"][5, 7] = float("nan")
    save_file(tensors, tmp_path / "nan.safetensors")
    told = "layers.1.feed_forward.w2.weight has a weight that is not finite; use another file"
    with pytest.raises(CheckpointError, match=told):
        loaded(tmp_path / "nan.safetensors", demo_shape(), scheme)
    source, written = open_checkpoint(tmp_path / "nan.safetensors"), tmp_path / "out.safetensors"
    with pytest.raises(CheckpointError, match=told):
        convert(source, written, None, scheme)
    assert [path.name for path in tmp_path.iterdir()] == ["nan.safetensors"]


def test_a_quantised_file_of_any_name_is_recognised(tmp_path: Path) -> None:
    """Fails if pictures of a quantised file that has another suffix are recorded as others."""
    renamed = tmp_path / "weights.bin"
    shutil.copy(LIBRARY / "fp8/model.safetensors", renamed)
    shutil.copy(LIBRARY / "fp8/config.json", tmp_path)
    assert FoundWeights(renamed, None).quantization == "fp8"
    assert FoundWeights(LIBRARY / "int4", None).quantization == "int4"
    assert FoundWeights(DEMO, None).quantization is None


def test_a_quantised_file_of_another_model_says_which(tmp_path: Path) -> None:
    """Fails if a packed shape is compared with a model's, or loading ends in a traceback."""
    written = tmp_path / "written.safetensors"
    convert(open_checkpoint(DEMO), written, None, "int4")
    with torch.device("meta"):
        model = GPT_models["GPT-B"]()
    with pytest.raises(CheckpointError, match=r"this is GPT-demo .*; you asked for GPT-B"):
        load_weights(model, written, device=torch.device("cpu"), dtype=torch.float32)


def test_a_quantised_file_is_not_split_among_ranks(tmp_path: Path) -> None:
    """Fails if a rank reads the first part of each matrix, or all of it, without a word."""
    written = tmp_path / "written.safetensors"
    convert(open_checkpoint(DEMO), written, None, "int8")
    shape = replace(demo_shape(), ranks=2)
    told = "holds int8 weights, which are not split among processes; leave out tensor_parallel_size"
    with pytest.raises(CheckpointError, match=told):
        loaded(written, shape, rank=Rank(1, 2))


def test_a_file_that_is_quantised_in_another_way_is_refused() -> None:
    """Fails if a second quantisation adds its errors to the first one's."""
    told = "holds int8 weights; use the original ones, or leave out quantization"
    with pytest.raises(CheckpointError, match=told):
        loaded(LIBRARY / "int8", quantization="fp8")
    with pytest.raises(CheckpointError, match="holds int8 weights already; convert the original"):
        convert(open_checkpoint(LIBRARY / "int8"), Path("unused.safetensors"), None, "fp8")


def test_only_transformers_are_quantised(tmp_path: Path) -> None:
    """Fails if a tokenizer is written as it is, though it was to be quantised."""
    tokenizer = open_checkpoint(ROOT / "pretrained_models/demo_vq.safetensors")
    with pytest.raises(CheckpointError, match="is VQ-demo, and transformers alone are quantised"):
        convert(tokenizer, tmp_path / "out.safetensors", None, "fp8")
    assert list(tmp_path.iterdir()) == []


def test_the_script_converts_and_refuses(tmp_path: Path) -> None:
    """Fails if the flag does not reach the conversion, or a mistake is a traceback."""
    output = tmp_path / "out.safetensors"
    command = [sys.executable, "scripts/convert_checkpoint.py", str(DEMO), str(output)]

    def run(*flags: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*command, *flags], cwd=ROOT, capture_output=True, text=True, timeout=60
        )

    done = run("--quantization", "int4", "--dtype", "bfloat16")
    assert done.returncode == 0, done.stderr
    assert "GPT-demo, 7.4 million numbers" in done.stdout
    assert output.stat().st_size < 0.4 * DEMO.stat().st_size
    for flags, told in (
        (["--quantization", "int3"], "there is no int3: did you mean int8?"),
        (["--quantization", "fp8"], "exists already"),
    ):
        done = run(*flags)
        assert done.returncode == 2
        assert told in done.stderr.splitlines()[-1]
