"""A rank that shares a model reads its part of every kind of checkpoint, and nothing else."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch import Tensor

from autoregressive.models.config import GPT_SHAPES, GPTConfig
from autoregressive.models.gpt import Transformer
from autoregressive.models.ranks import Rank
from autoregressive.weights.checkpoint import load_weights
from autoregressive.weights.finding import resolve_model
from autoregressive.weights.loading import load_gpt
from autoregressive.weights.options import ModelOptions
from autoregressive.weights.stored_tensor import Chunk, ChunkedTensor, StoredFile, StoredTensor

CPU = torch.device("cpu")
SHAPE = GPTConfig(dim=64, n_layer=2, n_head=4, vocab_size=48, block_size=16, num_classes=10)
Write = Callable[[dict[str, Tensor], Path], Path]


def pieces_of_heads(weights: dict[str, Tensor], rank: int, ranks: int) -> dict[str, Tensor]:
    """The parts by the heads that they belong to, told apart from the program's own rule."""
    heads, size = SHAPE.n_head // ranks, SHAPE.head_size
    own = slice(rank * heads * size, (rank + 1) * heads * size)
    ffn = slice(rank * SHAPE.ffn_dim // ranks, (rank + 1) * SHAPE.ffn_dim // ranks)
    tokens = slice(rank * SHAPE.vocab_size // ranks, (rank + 1) * SHAPE.vocab_size // ranks)
    parts = {}
    for name, weight in weights.items():
        if name.endswith("wqkv.weight"):
            weight = torch.cat([matrix[own] for matrix in weight.chunk(3)])
        elif name.endswith("wo.weight"):
            weight = weight[:, own]
        elif name.endswith(("w1.weight", "w3.weight")):
            weight = weight[ffn]
        elif name.endswith("w2.weight"):
            weight = weight[:, ffn]
        elif name == "output.weight":
            weight = weight[tokens]
        parts[name] = weight
    return parts


def seeded_weights() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    shapes = {name: tensor.shape for name, tensor in Transformer(SHAPE).state_dict().items()}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def write_pt(weights: dict[str, Tensor], folder: Path) -> Path:
    torch.save({"model": weights}, folder / "weights.pt")
    return folder / "weights.pt"


def write_transposed(weights: dict[str, Tensor], folder: Path) -> Path:
    """Matrices whose elements lie in another order in the file."""
    turned = {
        name: weight.t().contiguous().t() if weight.dim() == 2 else weight
        for name, weight in weights.items()
    }
    torch.save(turned, folder / "turned.pt")
    return folder / "turned.pt"


def write_safetensors(weights: dict[str, Tensor], folder: Path) -> Path:
    save_file(weights, folder / "weights.safetensors")
    return folder / "weights.safetensors"


def write_sharded(weights: dict[str, Tensor], folder: Path) -> Path:
    dcp.save(dict(weights), checkpoint_id=folder / "sharded", no_dist=True)
    return folder / "sharded"


KINDS = [write_pt, write_transposed, write_safetensors, write_sharded]


def load_part(path: Path, rank: Rank, dtype: torch.dtype = torch.float32) -> Transformer:
    with torch.device("meta"):
        model = Transformer(replace(SHAPE, ranks=rank.count))
    load_weights(model, path, device=CPU, dtype=dtype, rank=rank)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("write", KINDS)
def test_each_rank_gets_its_heads_of_every_kind_of_checkpoint(
    tmp_path: Path, write: Write, ranks: int, dtype: torch.dtype
) -> None:
    """Fails if a rank gets another one's heads, or another order of them."""
    weights = seeded_weights()
    path = write(weights, tmp_path)
    for rank in range(ranks):
        found = load_part(path, Rank(rank, ranks), dtype).state_dict()
        expected = pieces_of_heads(weights, rank, ranks)
        assert found.keys() == expected.keys()
        for name, part in expected.items():
            assert torch.equal(found[name], part.to(dtype)), name


def test_a_box_across_chunks_is_put_together(tmp_path: Path) -> None:
    """Fails if a part that lies in several chunks of a sharded folder gets a chunk's numbers in
    another's place.
    """
    whole = torch.arange(48.0).view(6, 8)
    chunks = []
    for top in (0, 4):
        for left in (0, 3):
            part = whole[top : top + 4, left : 3 if left == 0 else 8].contiguous()
            file = tmp_path / f"{top}.{left}"
            file.write_bytes(part.numpy().tobytes())
            stored = StoredTensor(StoredFile(file), 0, torch.float32, part.shape)
            chunks.append(Chunk((top, left), tuple(part.shape), partial(lambda one: one, stored)))
    tensor = ChunkedTensor("weight", torch.float32, whole.shape, chunks)
    target = torch.full((3, 4), -1.0)
    tensor.read_box_into((2, 1), target)
    assert torch.equal(target, whole[2:5, 1:5])


@pytest.mark.parametrize("write", [write_pt, write_safetensors])
def test_no_byte_of_another_ranks_part_is_read(
    tmp_path: Path, write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if a rank reads whole weights and throws most of them away."""
    weights = seeded_weights()
    path = write(weights, tmp_path)
    read: list[int] = []
    of_tensors = StoredFile.read_lines

    def counted(self: StoredFile, offset: int, step: int, size: int, buffer: memoryview) -> None:
        read.append(len(buffer))
        of_tensors(self, offset, step, size, buffer)

    monkeypatch.setattr(StoredFile, "read_lines", counted)
    load_part(path, Rank(1, 4))
    of_rank = sum(part.numel() * 4 for part in pieces_of_heads(weights, 1, 4).values())
    whole = sum(weight.numel() * 4 for weight in weights.values())
    rest = 32 + path.stat().st_size - whole  # names, shapes, alignment; the start is read twice
    assert of_rank <= sum(read) <= of_rank + rest
    assert sum(read) < whole / 2


def test_random_weights_are_those_of_one_rank() -> None:
    """Fails if --random-weights draws another model for each number of ranks."""
    model = replace(resolve_model(ModelOptions(gpt_model="GPT-demo", device="cpu")), seed=5)
    whole = load_gpt(model, None).state_dict()
    parts = [load_gpt(model, None, rank=Rank(rank, 2)).state_dict() for rank in range(2)]
    assert torch.equal(torch.cat([part["output.weight"] for part in parts]), whole["output.weight"])
    inwards = [part["layers.7.attention.wqkv.weight"].chunk(3) for part in parts]
    heads = torch.cat([torch.cat(pieces) for pieces in zip(*inwards, strict=True)])
    assert torch.equal(heads, whole["layers.7.attention.wqkv.weight"])
    outwards = [part["layers.7.feed_forward.w2.weight"] for part in parts]
    assert torch.equal(torch.cat(outwards, dim=1), whole["layers.7.feed_forward.w2.weight"])
    assert torch.equal(parts[1]["tok_embeddings.weight"], whole["tok_embeddings.weight"])


def test_a_part_alone_computes_nothing() -> None:
    """Fails if a rank's part can be taken for a whole model."""
    model = Transformer(replace(SHAPE, ranks=2))
    with pytest.raises(AssertionError):
        model(cond_idx=torch.tensor([0]))


@pytest.mark.parametrize("name", GPT_SHAPES)
def test_the_ranks_that_are_offered_divide_everything(name: str) -> None:
    """Fails if a number of ranks is offered that leaves a part of a head, or of a tile."""
    shape = GPT_SHAPES[name]
    assert {1, 2, 4} <= set(shape.rank_counts)
    for ranks in shape.rank_counts:
        part = replace(shape, ranks=ranks)
        assert part.heads_of_rank * ranks == shape.n_head
        assert part.ffn_of_rank * ranks == shape.ffn_dim
        assert part.vocabulary_of_rank * ranks == shape.vocab_size
        assert part.width_of_rank % 8 == 0
    with pytest.raises(ValueError, match="7 ranks cannot share the model"):
        replace(shape, ranks=7)
