"""Compares a checkpoint's names and shapes with a model's, and says in one line what is wrong.

Strict: whatever is missing, surplus or of another shape is an error, but for the names listed here.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from autoregressive.models.config import GPT_SHAPES
from tokenizer.tokenizer_image.vq_model import VQ_CONFIGS

# Tables that old checkpoints may carry and that are computed here: never read.
COMPUTED_HERE = frozenset({"freqs_cis", "causal_mask"})
# What may be missing, surplus or of another shape. The last is a log of LlamaGen's training that
# nothing reads: zeros take its place where it does not fit.
TOLERATED = frozenset({*COMPUTED_HERE, "quantize.codebook_used"})

_SHOWN = 3  # names in a message

_CLASSES = "cls_embedding.embedding_table.weight"
_VOCABULARY = ("tok_embeddings.weight", "output.weight")
_CODEBOOK = "quantize.embedding.weight"
_CODEBOOK_NEIGHBOURS = ("quant_conv.weight", "quant_conv.bias", "post_quant_conv.weight")
_TEXT_PREFIX = "cls_embedding.cap_proj."

Shapes = Mapping[str, torch.Size]


@dataclass(frozen=True)
class _Identity:
    """Which of the known models some weights belong to."""

    name: str
    details: str
    flag: str  # that chooses the model
    file_flag: str  # that takes its weights


def find_mismatch(wanted: Shapes, found: Shapes) -> str | None:
    """What keeps the found weights from being the wanted ones, in one line that says what to do;
    None if they are.

    Args:
        wanted: the model's state dict.
        found: the checkpoint's tensors, by plain names.
    """
    missing = [name for name in wanted if name not in found and name not in TOLERATED]
    surplus = [name for name in found if name not in wanted and name not in TOLERATED]
    misshaped = [
        name
        for name in wanted
        if name in found and wanted[name] != found[name] and name not in TOLERATED
    ]
    if not (missing or surplus or misshaped):
        return None
    if not found:
        return "it holds no weights"
    if any(name.startswith(_TEXT_PREFIX) for name in found):
        return "this is a text-to-image transformer; only class-conditional ones (c2i) run here"
    return (
        _other_model(wanted, found)
        or _other_flags(wanted, found, missing + surplus, misshaped)
        or _list_keys(wanted, found, missing, surplus, misshaped)
    )


def identify(shapes: Shapes) -> str | None:
    """Name of the known model that weights of these names and shapes belong to, such as "GPT-B" or
    "VQ-16", or None.
    """
    identity = _identify(shapes)
    return identity.name if identity else None


def find_incomplete(wanted: Shapes, found: Shapes) -> str | None:
    """What the weights of a known model lack, in one line; None if they are complete.

    A part of a checkpoint that was not copied takes weights away, or the last rows of weights. The
    sizes that flags can change, and surplus weights, do not matter.

    Args:
        wanted: the model's state dict, with any sizes that flags can change.
        found: the checkpoint's tensors, by plain names.
    """
    flexible = {*TOLERATED, _CLASSES, *_VOCABULARY, _CODEBOOK, *_CODEBOOK_NEIGHBOURS}
    lacking = [
        name
        for name in wanted
        if (name not in found and name not in TOLERATED)
        or (name in found and found[name] != wanted[name] and name not in flexible)
    ]
    if not lacking:
        return None
    return (
        f"{len(lacking)} of {len(wanted)} weights are missing or have another shape: "
        f"{_first(lacking)}"
    )


def _identify(shapes: Shapes) -> _Identity | None:
    tokens, codebook, first = (
        shapes.get(name, torch.Size())
        for name in (_VOCABULARY[0], _CODEBOOK, "encoder.conv_in.weight")
    )
    if len(tokens) == 2:
        layers, width = _count_blocks(shapes, "layers."), tokens[1]
        for name, shape in GPT_SHAPES.items():
            if (shape.n_layer, shape.dim) == (layers, width):
                return _Identity(
                    name, f"{name} ({layers} layers, width {width})", "--gpt-model", "--gpt-ckpt"
                )
    if len(codebook) == 2 and len(first) == 4:
        resolutions, channels = _count_blocks(shapes, "decoder.conv_blocks."), first[0]
        for name, config in VQ_CONFIGS.items():
            if (len(config.ch_mult), config.ch) == (resolutions, channels):
                details = (
                    f"{name} (a tokenizer of {config.downsample_size} x "
                    f"{config.downsample_size} pixels a code)"
                )
                return _Identity(name, details, "--vq-model", "--vq-ckpt")
    return None


def _count_blocks(shapes: Shapes, prefix: str) -> int:
    return len(
        {name.removeprefix(prefix).partition(".")[0] for name in shapes if name.startswith(prefix)}
    )


def _other_model(wanted: Shapes, found: Shapes) -> str | None:
    there, asked = _identify(found), _identify(wanted)
    if there is None or there == asked:
        return None
    told = f"this is {there.details}; you asked for {asked.name if asked else 'another model'}"
    if asked is not None and asked.file_flag != there.file_flag:
        return (
            f"{told}: {there.file_flag} is the flag for this file, {asked.file_flag} takes another"
        )
    return f"{told}: use {there.flag} {there.name}, or another file"


def _other_flags(
    wanted: Shapes, found: Shapes, other_keys: list[str], misshaped: list[str]
) -> str | None:
    """The flags that would make the shapes agree, if flags alone would."""
    explained = (
        {_CLASSES, *_VOCABULARY} if _VOCABULARY[0] in found else {_CODEBOOK, *_CODEBOOK_NEIGHBOURS}
    )
    if other_keys or not explained.issuperset(misshaped):
        return None
    if any(0 in found[name] for name in misshaped) or (
        _CLASSES in misshaped and found[_CLASSES][:1] == (1,)
    ):
        return None  # no model has such sizes
    flags = []
    if _CLASSES in misshaped and len(found[_CLASSES]) == 2:
        flags.append(f"--num-classes {found[_CLASSES][0] - 1}")
    for name in (_VOCABULARY[0], _CODEBOOK):
        if name in misshaped and len(found[name]) == 2:
            (size, width), (wanted_size, wanted_width) = found[name], wanted[name]
            if size != wanted_size:
                flags.append(f"--codebook-size {size}")
            if width != wanted_width and name == _CODEBOOK:
                flags.append(f"--codebook-embed-dim {width}")
    return (
        f"these weights belong to a model of other sizes: use {' '.join(flags)}" if flags else None
    )


def _list_keys(
    wanted: Shapes, found: Shapes, missing: list[str], surplus: list[str], misshaped: list[str]
) -> str:
    parts = []
    if missing:
        parts.append(f"{len(missing)} of {len(wanted)} weights are missing: {_first(missing)}")
    if surplus:
        parts.append(f"{len(surplus)} are unexpected: {_first(surplus)}")
    if misshaped:
        shown = [
            f"{name} is {list(found[name])} and should be {list(wanted[name])}"
            for name in misshaped
        ]
        parts.append(f"{len(misshaped)} have another shape: {_first(shown)}")
    return (
        f"these are not this model's weights ({'; '.join(parts)}); use another file or "
        "--gpt-model / --vq-model"
    )


def _first(items: list[str]) -> str:
    rest = len(items) - _SHOWN
    return ", ".join(items[:_SHOWN]) + (f" and {rest} more" if rest > 0 else "")
