"""Kernels compiled as their launchers would, without a GPU, and what the disassembler that comes
with Triton says of the result.

The product's own code decides what is launched: it runs on tensors that have shape, dtype and
device but no memory, and every launch is written down instead of carried out.
"""

import re
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from unittest.mock import patch

import pytest
import torch
import triton
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel
from triton.experimental.gluon._runtime import GluonASTSource, GluonJITFunction
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.runtime.jit import JITFunction

from autoregressive.serve.engine.batch import Batch

_TYPES = {
    torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.int32: "i32",
    torch.int64: "i64", torch.float8_e4m3fn: "fp8e4nv", torch.int8: "i8", torch.int16: "i16",
    torch.uint8: "u8"
}  # fmt: skip
_ALIGNMENT = 16  # bytes, or the divisor of a number, that Triton compiles for


@dataclass(frozen=True)
class Build:
    """What Triton compiles for one launch; launches that share it share the machine code."""

    kernel: JITFunction
    # of every argument, "constexpr" included; of a tuple those of its members
    types: tuple[tuple[str, str | tuple[str, ...]], ...]
    constants: tuple[tuple[str, Any], ...]
    aligned: tuple[str, ...]  # arguments that are multiples of 16
    options: tuple[tuple[str, Any], ...]

    @classmethod
    def of(
        cls, kernel: JITFunction, positional: tuple[Any, ...], named: Mapping[str, Any]
    ) -> "Build":
        """Of a launch's arguments, as Triton specialises them."""
        values = dict(zip(kernel.arg_names, positional, strict=False)) | {
            k: v for k, v in named.items() if k in kernel.arg_names
        }
        types: dict[str, str | tuple[str, ...]] = {}
        constants, aligned = {}, []
        for parameter in kernel.params:
            name, value = parameter.name, values[parameter.name]
            specialised = not parameter.do_not_specialize
            if (
                parameter.is_constexpr
                or value is None
                or (specialised and type(value) is int and value == 1)
            ):
                types[name], constants[name] = "constexpr", value
            elif isinstance(value, Tensor):
                types[name] = f"*{_TYPES[value.dtype]}"
                if value.storage_offset() * value.dtype.itemsize % _ALIGNMENT == 0:
                    aligned.append(name)
            elif isinstance(value, TensorDescriptor):
                types[name] = (
                    f"tensordesc<{_TYPES[value.base.dtype]}{list(value.block_shape)},{value.layout!r}>"
                )
            elif isinstance(value, tuple):  # of addresses
                types[name] = ("i64",) * len(value)
            elif isinstance(value, float):
                types[name] = "fp32"
            else:
                types[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
                if specialised and value % _ALIGNMENT == 0:
                    aligned.append(name)
        options = {k: v for k, v in named.items() if k not in kernel.arg_names}
        return cls(
            kernel,
            tuple(types.items()),
            tuple(constants.items()),
            tuple(aligned),
            tuple(sorted(options.items())),
        )

    @property
    def name(self) -> str:
        """The kernel's name."""
        return self.kernel.__name__

    def compiled(self, capability: int) -> CompiledKernel:
        """For an architecture, 90 for sm_90."""
        places = {name: place for place, name in enumerate(self.kernel.arg_names)}
        attributes = {(places[name],): [["tt.divisibility", _ALIGNMENT]] for name in self.aligned}
        kind = GluonASTSource if isinstance(self.kernel, GluonJITFunction) else ASTSource
        constants = {(places[name],): value for name, value in self.constants}
        source = kind(self.kernel, dict(self.types), constexprs=constants, attrs=attributes)
        return triton.compile(
            source, target=GPUTarget("cuda", capability, 32), options=dict(self.options)
        )


@contextmanager
def launches_of(capability: int) -> Iterator[list[Build]]:
    """Within it, tensors are made on a GPU of that capability that is not there; what would be
    launched is collected, once each.
    """
    builds: list[Build] = []

    def write_down(
        kernel: JITFunction, *positional: Any, grid: object, warmup: bool, **named: Any
    ) -> SimpleNamespace:
        if not warmup:  # the launch follows
            build = Build.of(kernel, positional, named)
            if build not in builds:
                builds.append(build)
        return SimpleNamespace(packed_metadata=(0, 0, 0), module="loaded")

    with (
        patch.object(JITFunction, "run", write_down),
        # looks at addresses, which are not there
        patch.object(TensorDescriptor, "__post_init__", lambda descriptor: None),
        patch.object(
            torch.cuda, "get_device_capability", lambda device=None: divmod(capability, 10)
        ),
        FakeTensorMode(),
        torch.device("cuda"),
        torch.no_grad(),
    ):
        yield builds


def without_memory(batch: Batch) -> Batch:
    """The tensors of a batch that was made outside `launches_of`, anew within it."""
    tensors = {name: value for name, value in vars(batch).items() if isinstance(value, Tensor)}
    made = {name: torch.zeros(value.shape, dtype=value.dtype) for name, value in tensors.items()}
    return cast(Batch, SimpleNamespace(**made))


def machine_code(kernel: CompiledKernel) -> list[str]:
    """The opcodes of a compiled kernel."""
    text = _disassembled(kernel, "--dump-sass")
    return re.findall(
        r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", text, flags=re.MULTILINE
    )


def overwritten_operands(kernel: CompiledKernel) -> list[str]:
    """Instructions that write a register which the matrix unit may still read: an operand of an
    asynchronous product that has not been waited for.
    """
    lines = re.findall(
        r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?) ;", _disassembled(kernel, "--dump-sass"), re.MULTILINE
    )
    code = {int(address, 16): text for address, text in lines}
    order = sorted(code)
    found = []
    for number, address in enumerate(order):
        product = re.match(r"HGMMA\S* R\d+, R(\d+), gdesc", code[address])
        if product is None:
            continue
        operands = set(range(int(product[1]), int(product[1]) + 4))
        # where to go on, and how many groups of products have been begun by then
        ahead, seen = [(number, 0)], set[tuple[int, int]]()
        while ahead:
            at, groups = ahead.pop()
            text = code[order[at]] if at < len(order) else "EXIT"
            waits = re.match(r"WARPGROUP.DEPBAR.LE gsb0, 0x(\d+)", text)
            ends = text.startswith("EXIT") or (waits and int(waits[1]) < groups)
            if ends or (at, groups) in seen:
                continue
            seen.add((at, groups))
            if at != number and _written_registers(text) & operands:
                found.append(f"{text} (operand of {code[address]})")
            groups = min(groups + (text.startswith("HGMMA") and text.endswith("gsb0")), 4)
            jump = re.match(r"(@!?U?P\w+ )?BRA.* 0x([0-9a-f]+)", text)
            if jump is not None and int(jump[2], 16) in code:
                ahead.append((order.index(int(jump[2], 16)), groups))
            if jump is None or jump[1] is not None:
                ahead.append((at + 1, groups))
    return found


def _written_registers(text: str) -> set[int]:
    """The registers that an instruction writes, as far as its text tells."""
    operation = re.match(r"(?:@!?U?P\w+ )?([A-Z]\S*) (?:P\w+, )?R(\d+)", text)
    if operation is None or operation[1].startswith(("ST", "HGMMA", "BAR", "SYNCS")):
        return set()
    wide = re.search(r"\.(64|128|M88\.4)\b|M88\.4", operation[1])
    count = 4 if wide and wide[0] != ".64" else 2 if wide or ".WIDE" in operation[1] else 1
    return set(range(int(operation[2]), int(operation[2]) + count))


@dataclass(frozen=True)
class Resources:
    """What a thread of a compiled kernel holds."""

    registers: int
    local_bytes: int  # of memory, for what does not fit into registers


def resources(kernel: CompiledKernel) -> Resources:
    """Read from the machine code's own description."""
    text = _disassembled(kernel, "--dump-resource-usage")
    found = re.search(r"REG:(\d+) STACK:(\d+).* LOCAL:(\d+)", text)
    assert found is not None, text
    return Resources(int(found[1]), int(found[2]) + int(found[3]))


def _disassembled(kernel: CompiledKernel, flag: str) -> str:
    disassembler = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if not disassembler.exists():
        pytest.skip("this Triton brings no cuobjdump")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        return subprocess.run(
            [disassembler, flag, file.name], capture_output=True, text=True, check=True
        ).stdout
