"""Damages small good checkpoints and configurations in many ways, and checks how each ends.

One process tries a number of cases of one kind, which its seed decides. Each case is written to a
folder before it is tried, so that it is still there after a crash or a hang.
`test_checkpoint_fuzz.py` starts such processes and counts.
"""

import argparse
import copy
import io
import json
import pickletools
import random
import resource
import sys
import time
import warnings
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from safetensors.torch import save, save_file
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter

from autoregressive.errors import UserError
from autoregressive.serve.web.server_flags import read_arguments
from autoregressive.weights.checkpoint import CheckpointError, open_checkpoint

SECONDS, EXTRA_BYTES = 10.0, 256 * 2**20
_MOST_CPU_SECONDS = 300  # of the process: a case hangs
_READ_BYTES = 2**24  # larger tensors are not read: their shape alone takes no memory
_LONGEST_MESSAGE = 500

WEIGHTS = {
    "norm.weight": torch.arange(4.0),
    "output.weight": torch.arange(6.0).view(2, 3).t(),
    "layers.0.scale": torch.zeros(()),
    "freqs_cis": torch.zeros(2),
}
CONTIGUOUS = {name: tensor.contiguous() for name, tensor in WEIGHTS.items()}
CONFIG = (
    "port: 8000\nmax-num-seqs: 64\ndisable-docs: true\nlog-level: &level "
    "info\nserved-model-name: *level\n"
)

Case = dict[str, bytes]  # file's name -> content; one file without a folder if its name is empty
INTERESTING = [
    b"", b"\x00", b"\xff" * 8, b"\x7f\xff\xff\xff", b"(" * 2000, b"[" * 2000, b"{" * 2000,
    b")" + b"\x85" * 3000, b"}" * 500, b"q\x00",
    b"h\x00", b"\x94", b"N", b"R", b"b", b"s", b"u", b"t", b"Q", b"0", b".", b"a", b"e", b"\x81",
    b"\x93", b"\x8a\xff" + b"\x7f" * 255,
    b"X\xff\xff\xff\x7f", b"cos\nsystem\n", b"ctorch\nSize\n", b"cargparse\nNamespace\n",
    b"ccollections\nOrderedDict\n)R",
    b"G" + b"\x7f\xf8" + bytes(6), b"J\xff\xff\xff\xff", b"\x86" * 40, b"&a [*a]", b"? [a]\n: b\n",
    b"!!python/name:os.system ", b"<<: *level\n",
    b"999999999999999999999", b"-1", b"1e400", b"NaN", b"\"\\ud800\"", b"null", b"PK\x01\x02",
    b"PK\x05\x06", b"PK\x06\x06",
]  # fmt: skip
JSON_VALUES = [
    None, True, -1, 0, 1, 2**31, 2**53, 2**63, 2**64, 10**400, 0.5, "", "F32", "BF16", "U8",
    "../x", "a" * 3000, [], [0], [0, 0], [0, 16],
    [2**40, 2**40], [-1], [1] * 200, {}, {"a": 1}, {"dtype": "F32", "shape": [1],
    "data_offsets": [0, 4]},
]  # fmt: skip


def saved(new_format: bool) -> bytes:
    """A training checkpoint."""
    stream = io.BytesIO()
    content = {
        "model": WEIGHTS,
        "args": argparse.Namespace(lr=1e-4),
        "optimizer": {"state": {0: torch.zeros(2)}},
        "steps": 5,
    }
    torch.save(content, stream, _use_new_zipfile_serialization=new_format)
    return stream.getvalue()


def directory(folder: Path) -> Case:
    """The files of a folder."""
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def good_case(kind: str, folder: Path) -> Case:
    """What is damaged."""
    folder.mkdir(parents=True)
    if kind in ("zip", "zip pickle"):
        return {"": saved(True)}
    if kind in ("legacy", "legacy pickle"):
        return {"": saved(False)}
    if kind in ("safetensors", "safetensors header"):
        return {"": save(CONTIGUOUS, {"format": "pt"})}
    if kind == "config":
        return {"": CONFIG.encode()}
    if kind in ("metadata", "metadata pickle", "shards"):
        dcp.save({"app": {"model": CONTIGUOUS, "steps": 5}}, checkpoint_id=folder, no_dist=True)
    elif kind == "index":
        names = list(CONTIGUOUS)
        for part in (0, 1):
            save_file(
                {name: CONTIGUOUS[name] for name in names[part::2]},
                folder / f"model-0000{part + 1}-of-00002.safetensors",
            )
        places = {
            name: f"model-0000{1 + place % 2}-of-00002.safetensors"
            for place, name in enumerate(names)
        }
        (folder / "model.safetensors.index.json").write_text(
            json.dumps({"metadata": {}, "weight_map": places})
        )
    else:
        writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
        dcp.save(dict(CONTIGUOUS), storage_writer=writer, no_dist=True)
    return directory(folder)


# --- damage ---


def edited(pieces: Sequence[bytes], chance: random.Random, pool: Sequence[bytes]) -> list[bytes]:
    """A few pieces are removed, repeated, exchanged, replaced, or changed in a bit."""
    result = list(pieces)
    for _ in range(chance.choice((1, 1, 2, 3, 8))):
        if not result:
            return [chance.choice(pool)]
        at, other = chance.randrange(len(result)), chance.randrange(len(result))
        match chance.randrange(7):
            case 0:
                del result[at : at + chance.choice((1, 1, 2, 10, 100))]
            case 1:
                result[at:at] = [result[at]] * chance.choice((1, 2, 100, 10_000))
            case 2:
                result[at], result[other] = result[other], result[at]
            case 3:
                result[at] = chance.choice(pool)
            case 4:
                result.insert(at, chance.choice(pool))
            case 5:
                first, last = sorted((at, other))
                result[last:last] = result[first:last]
            case _:
                piece = bytearray(result[at])
                if piece:
                    piece[chance.randrange(len(piece))] ^= 1 << chance.randrange(8)
                result[at] = bytes(piece)
    return result


def damaged_bytes(content: bytes, chance: random.Random) -> bytes:
    """Anywhere; often only in some bits, now and then only cut short."""
    if chance.random() < 0.1:
        return content[: chance.randrange(len(content) + 1)]
    if chance.random() < 0.4:
        changed = bytearray(content)
        for _ in range(chance.choice((1, 2, 8, 64))):
            changed[chance.randrange(len(changed))] ^= 1 << chance.randrange(8)
        return bytes(changed)
    return b"".join(edited([content[i : i + 1] for i in range(len(content))], chance, INTERESTING))


def damaged_pickle(content: bytes, chance: random.Random) -> bytes:
    """Instruction by instruction, so that most of what follows still makes sense."""
    starts = [position for _, _, position in pickletools.genops(content) if position is not None]
    ends = [*starts[1:], len(content)]
    return b"".join(
        edited([content[a:b] for a, b in zip(starts, ends, strict=True)], chance, INTERESTING)
    )


def damaged_zip(content: bytes, chance: random.Random) -> bytes:
    """A good archive around a damaged pickle, and now and then compressed or with members
    changed.
    """
    result = io.BytesIO()
    compression = zipfile.ZIP_DEFLATED if chance.random() < 0.1 else zipfile.ZIP_STORED
    with (
        zipfile.ZipFile(io.BytesIO(content)) as source,
        zipfile.ZipFile(result, "w", compression) as target,
    ):
        for member in source.namelist():
            data = source.read(member)
            if member.endswith("data.pkl"):
                data = damaged_pickle(data, chance)
            elif chance.random() < 0.1:
                data = damaged_bytes(data, chance)
            if chance.random() > 0.02:
                target.writestr(member, data)
    return result.getvalue()


def damaged_legacy(content: bytes, chance: random.Random) -> bytes:
    """One of the five pickles."""
    stream, parts = io.BytesIO(content), []
    for _ in range(5):
        start = stream.tell()
        for _ in pickletools.genops(stream):
            pass
        parts.append(content[start : stream.tell()])
    which = chance.randrange(5)
    parts[which] = damaged_pickle(parts[which], chance)
    return b"".join(parts) + content[stream.tell() :]


def damaged_json(text: str, chance: random.Random) -> str:
    """A value somewhere is another, is gone, or has another name; text that is JSON itself is gone
    into.
    """
    value = json.loads(text)
    for _ in range(chance.choice((1, 1, 2, 4))):
        table: Any = value
        while isinstance(table, dict) and table:
            key = chance.choice(list(table))
            inner = table[key]
            if isinstance(inner, str) and inner.startswith("{") and chance.random() < 0.8:
                table[key] = damaged_json(inner, chance)
                break
            if isinstance(inner, dict) and inner and chance.random() < 0.8:
                table = inner
                continue
            match chance.randrange(4):
                case 0:
                    del table[key]
                case 1:
                    table[str(chance.choice(JSON_VALUES))] = inner
                case _:
                    # A copy: what a later damage puts into it must not reach other cases, or
                    # itself.
                    table[key] = copy.deepcopy(chance.choice(JSON_VALUES))
            break
    return json.dumps(value)


def damaged_header(content: bytes, chance: random.Random) -> bytes:
    """Of a .safetensors file: its table, with its length right more often than not."""
    size = int.from_bytes(content[:8], "little")
    text = damaged_json(content[8 : 8 + size].decode(), chance).encode()
    length = len(text) if chance.random() < 0.9 else chance.choice((0, 1, 2**31, 2**63, 2**64 - 1))
    return length.to_bytes(8, "little") + text + content[8 + size :]


def damage_of(kind: str) -> tuple[str, Callable[[bytes, random.Random], bytes]]:
    """Of which file, by what its name ends with, and how."""
    return {
        "zip": ("", damaged_bytes),
        "zip pickle": ("", damaged_zip),
        "legacy": ("", damaged_bytes),
        "legacy pickle": ("", damaged_legacy),
        "safetensors": ("", damaged_bytes),
        "safetensors header": ("", damaged_header),
        "metadata": (".metadata", damaged_bytes),
        "metadata pickle": (".metadata", damaged_pickle),
        "shards": (".distcp", damaged_bytes),
        "index": (".json", lambda content, chance: damaged_json(content.decode(), chance).encode()),
        "dcp safetensors": (".safetensors", damaged_header),
        "config": ("", damaged_bytes),
    }[kind]


KINDS = (
    "zip", "zip pickle", "legacy", "legacy pickle", "safetensors", "safetensors header",
    "metadata", "metadata pickle", "shards", "index",
    "dcp safetensors", "config",
)  # fmt: skip


def cases(kind: str, good: Case) -> SearchStrategy[Case]:
    """From a seed each, which Hypothesis chooses and tells of what fails."""
    ending, damage = damage_of(kind)
    wanted = sorted(name for name in good if name.endswith(ending))

    def damaged(number: int) -> Case:
        chance = random.Random(number)
        name = chance.choice(wanted)
        return {**good, name: damage(good[name], chance)}

    assert wanted
    return st.integers(0, 2**63).map(damaged)


# --- judgement ---


def peak_bytes() -> int:
    """The most memory since `forget_peak`, resident."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM:")).split()[1]) * 1024


def forget_peak() -> None:
    """From now on `peak_bytes` counts anew."""
    Path("/proc/self/clear_refs").write_text("5")


def attempt(path: Path, kind: str) -> str:
    """Reads it as commands do; "loaded" or the error's kind.

    Raises:
        AssertionError: an error that is not for the user, or one that is too long.
    """
    try:
        if kind == "config":
            read_arguments(["--config", str(path)], {})
            return "loaded"
        source = open_checkpoint(path)
        for name, shape in source.shapes.items():
            if shape.numel() * source.dtypes[name].itemsize <= _READ_BYTES:
                source.read_into(name, torch.empty(shape, dtype=source.dtypes[name]))
    except (CheckpointError, UserError) as error:
        failed: UserError = error
    else:
        return "loaded"
    message = str(failed)
    assert kind == "config" or isinstance(failed, CheckpointError), repr(failed)
    assert str(path) in message, message
    longest = _LONGEST_MESSAGE + len(str(path)) + 200
    assert len(message) <= longest, f"a message of {len(message)} characters: {message[:200]}"
    return "refused"


def run(kind: str, number: int, examples: int, folder: Path) -> dict[str, int]:
    """Tries so many cases; how they ended."""
    warnings.simplefilter("ignore")
    good = good_case(kind, folder / "good")
    path = folder / "case"
    outcomes: dict[str, int] = {"loaded": 0, "refused": 0, "slowest_ms": 0, "largest_kib": 0}

    @seed(number)
    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    @given(cases(kind, good))
    def check(case: Case) -> None:
        write_case(path, case)
        forget_peak()
        before, start = peak_bytes(), time.process_time()
        outcomes[attempt(path, kind)] += 1
        seconds, grown = time.process_time() - start, peak_bytes() - before
        outcomes["slowest_ms"] = max(outcomes["slowest_ms"], int(seconds * 1000))
        outcomes["largest_kib"] = max(outcomes["largest_kib"], grown // 1024)
        assert seconds <= SECONDS, f"it took {seconds:.1f} s"
        assert grown <= EXTRA_BYTES + sum(map(len, case.values())), f"it took {grown:,} bytes"

    write_case(path, good)
    assert attempt(path, kind) == "loaded", "what is to be damaged is not good"
    check()
    return outcomes


def write_case(path: Path, case: Case) -> None:
    """One file, or a folder."""
    for name, content in case.items():
        file = path / name if name else path
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(content)


def main() -> None:
    """Kind, seed, cases, folder; prints the outcomes as JSON."""
    kind, number, examples, folder = sys.argv[1:]
    resource.setrlimit(resource.RLIMIT_CPU, (_MOST_CPU_SECONDS, _MOST_CPU_SECONDS))
    print(json.dumps(run(kind, int(number), int(examples), Path(folder))))


if __name__ == "__main__":
    main()
