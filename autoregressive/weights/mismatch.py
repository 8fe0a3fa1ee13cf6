"""Compares a checkpoint's names and shapes with a model's, and says in one line what is wrong.

Strict: whatever is missing, surplus or of another shape is an error, but for the names listed here.
"""

from collections.abc import Mapping

import torch

from autoregressive.errors import SettingName
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

Shapes = Mapping[str, torch.Size]
Parts = tuple[str, *tuple[str | SettingName, ...]]  # of a message


def find_mismatch(wanted: Shapes, found: Shapes) -> Parts | None:
    """What keeps the found weights from being the wanted ones, in one line that says what to do;
    None if they are.

    Args:
        wanted: the model's state dict.
        found: the checkpoint's tensors, by plain names.
    """
    missing, misshaped = _lacking(wanted, found)
    surplus = [name for name in found if name not in wanted and name not in TOLERATED]
    if not (missing or surplus or misshaped):
        return None
    if not found:
        return ("it holds no weights",)
    if any(name.startswith("cls_embedding.cap_proj.") for name in found):
        return ("this is a text-to-image transformer; only class-conditional ones (c2i) run here",)
    other = _other_model(identify(wanted), identify(found))
    if other is None and not (missing or surplus):
        other = _other_sizes(wanted, found, misshaped)
    if other is not None:
        return other
    shown = [f"{name} is {[*found[name]]} and should be {[*wanted[name]]}" for name in misshaped]
    lists = {
        f"of {len(wanted)} weights are missing": missing,
        "are unexpected": surplus,
        "have another shape": shown,
    }
    told = "; ".join(f"{len(them)} {what}: {_first(them)}" for what, them in lists.items() if them)
    return (
        f"these are not this model's weights ({told}); use another file,",
        SettingName("gpt_model"),
        " or ",
        SettingName("vq_model"),
    )


def _lacking(wanted: Shapes, found: Shapes) -> tuple[list[str], list[str]]:
    """The wanted weights that are missing, and those of another shape."""
    strict = [name for name in wanted if name not in TOLERATED]
    missing = [name for name in strict if name not in found]
    return missing, [name for name in strict if name in found and found[name] != wanted[name]]


def identify(shapes: Shapes) -> str | None:
    """Name of the known model that weights of these names and shapes belong to, such as "GPT-B" or
    "VQ-16", or None.
    """
    tokens, codebook, first = (
        shapes.get(name, torch.Size())
        for name in (_VOCABULARY[0], _CODEBOOK, "encoder.conv_in.weight")
    )
    if len(tokens) == 2:
        there = _count_blocks(shapes, "layers."), tokens[1]
        known = {name: (shape.n_layer, shape.dim) for name, shape in GPT_SHAPES.items()}
    elif len(codebook) == 2 and len(first) == 4:
        there = _count_blocks(shapes, "decoder.conv_blocks."), first[0]
        known = {name: (len(config.ch_mult), config.ch) for name, config in VQ_CONFIGS.items()}
    else:
        return None
    return next((name for name, sizes in known.items() if sizes == there), None)


def _count_blocks(shapes: Shapes, prefix: str) -> int:
    inside = (name.removeprefix(prefix) for name in shapes if name.startswith(prefix))
    return len({name.partition(".")[0] for name in inside})


def find_incomplete(wanted: Shapes, found: Shapes) -> str | None:
    """What the weights of a known model lack, in one line; None if they are complete.

    A part of a checkpoint that was not copied takes weights away, or the last rows of weights. The
    sizes that settings can change, and surplus weights, do not matter.

    Args:
        wanted: the model's state dict, with any sizes that settings can change.
        found: the checkpoint's tensors, by plain names.
    """
    missing, misshaped = _lacking(wanted, found)
    flexible = {_CLASSES, *_VOCABULARY, _CODEBOOK, *_CODEBOOK_NEIGHBOURS}
    lacking = missing + [name for name in misshaped if name not in flexible]
    told = f"{len(lacking)} of {len(wanted)} weights are missing or have another shape"
    return f"{told}: {_first(lacking)}" if lacking else None


def _other_model(asked: str | None, there: str | None) -> Parts | None:
    if there is None or there == asked:
        return None
    if there in GPT_SHAPES:
        shape, kind = GPT_SHAPES[there], "gpt"
        details = f"{shape.n_layer} layers, width {shape.dim}"
    else:
        size, kind = VQ_CONFIGS[there].downsample_size, "vq"
        details = f"a tokenizer of {size} x {size} pixels a code"
    told = f"this is {there} ({details}); you asked for {asked or 'another model'}:"
    if asked is None or (asked in GPT_SHAPES) == (kind == "gpt"):
        return f"{told} use", SettingName(f"{kind}_model"), f" {there}, or another file"
    mine, other = ("gpt_ckpt", "vq_ckpt") if kind == "gpt" else ("vq_ckpt", "gpt_ckpt")
    return told, SettingName(mine), " takes this file, ", SettingName(other), " takes another"


def _other_sizes(wanted: Shapes, found: Shapes, misshaped: list[str]) -> Parts | None:
    """The settings that would make the shapes agree, if settings alone would."""
    transformer = _VOCABULARY[0] in found
    explained = {_CLASSES, *_VOCABULARY} if transformer else {_CODEBOOK, *_CODEBOOK_NEIGHBOURS}
    no_model = any(0 in found[name] for name in misshaped) or (
        _CLASSES in misshaped and found[_CLASSES][:1] == (1,)
    )
    if no_model or not explained.issuperset(misshaped):
        return None
    sizes: dict[str, int] = {}
    if _CLASSES in misshaped and len(found[_CLASSES]) == 2:
        sizes["num_classes"] = found[_CLASSES][0] - 1
    for name in (_VOCABULARY[0], _CODEBOOK):
        if name in misshaped and len(found[name]) == 2:
            (size, width), (wanted_size, wanted_width) = found[name], wanted[name]
            if size != wanted_size:
                sizes["codebook_size"] = size
            if width != wanted_width and name == _CODEBOOK:
                sizes["codebook_embed_dim"] = width
    told: list[str | SettingName] = []
    for name, size in sizes.items():
        told += [" " if told else "", SettingName(name), f" {size}"]
    return ("these weights belong to a model of other sizes: use", *told) if sizes else None


def _first(items: list[str]) -> str:
    rest = len(items) - _SHOWN
    return ", ".join(items[:_SHOWN]) + (f" and {rest} more" if rest > 0 else "")
