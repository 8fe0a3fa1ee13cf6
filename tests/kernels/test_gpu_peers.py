"""Two ranks that exchange numbers from within kernels, on two streams of one GPU."""

import pytest
import torch
from kernel_cases import Place, check_gather, check_project_of_ranks, relative_error
from own_process import in_its_own_process
from torch import Tensor

from kernels.hopper.peers import EMPTY, Inboxes, gather_parts
from kernels.hopper.products import SQUARES_BLOCK, FusedTiles, fused_project

pytestmark = pytest.mark.gpu
_ROUNDS, _WIDTH, _INPUTS, _COLUMNS = 300, 128, 64, 256
_ROWS = (2, 16, 34)
_TILES = FusedTiles(64, 64, 2, 1, 4)
_MOST_CYCLES = 40_000  # that a rank sleeps between two exchanges


class Stream:
    """One rank. All memory is taken before the first exchange: taking it may wait for the GPU."""

    def __init__(self, place: Place, rank: int, boxes: dict[str, Inboxes], most: int) -> None:
        self.stream, self.rank, self.boxes = torch.cuda.Stream(), rank, boxes
        self.weight = place.random(_WIDTH, _INPUTS, seed=10 + rank)
        self.norm = torch.ones(_WIDTH, device=place.device, dtype=place.dtype)
        self.residual = torch.zeros(most, _WIDTH, device=place.device)
        self.normed = torch.empty(most, _WIDTH, device=place.device, dtype=place.dtype)
        self.squares = torch.empty(_WIDTH // SQUARES_BLOCK * most, device=place.device)
        self.gathered = place.poisoned(_ROUNDS, most, 2 * _COLUMNS, dtype=torch.float32)

    def exchange(self, x: Tensor, name: str) -> None:
        """Adds both ranks' products to the residual stream."""
        rows = len(x)
        squares = self.squares[: _WIDTH // SQUARES_BLOCK * rows].view(-1, rows)
        tensors = self.weight, self.residual[:rows], self.norm, self.normed[:rows], squares
        fused_project(x, *tensors, self.boxes[name], tiles=_TILES)

    def gather(self, part: Tensor, number: int) -> None:
        """Gathers both ranks' parts."""
        gather_parts(part, self.boxes["logits"], self.gathered[number, : len(part)])


def exchange_on_two_streams(seed: int) -> tuple[float, bool, bool]:
    """Hundreds of passes of different rows, each rank delayed at random.

    Returns:
        the error of the residual stream; whether both ranks hold the same bits of it; whether all
        parts arrived.
    """
    place = Place(torch.device("cuda"), torch.bfloat16, launch_pdl=True)
    # which compiles what both ranks launch: no kernel may wait while another is loaded
    for rows in _ROWS:
        for own in (0, 1):
            check_project_of_ranks(place, rows, _WIDTH, _INPUTS, _TILES, 2, own)
            check_gather(place, rows, _COLUMNS, 2, own)
    most = max(_ROWS)
    sizes = {"attention": _WIDTH, "ffn": _WIDTH, "logits": _COLUMNS}
    places = {
        name: torch.full((2, 2 * most * size), EMPTY, dtype=torch.int32, device=place.device)
        for name, size in sizes.items()
    }
    ranks = []
    for own in (0, 1):
        boxes = {
            name: Inboxes(tuple(box.data_ptr() for box in both), own)
            for name, both in places.items()
        }
        ranks.append(Stream(place, own, boxes, most))
    x = place.random(_ROUNDS, 2, 2, most, _INPUTS, seed=seed) * _INPUTS**-0.5
    parts = place.random(_ROUNDS, 2, most, _COLUMNS, seed=seed + 1, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    rounds = torch.randint(len(_ROWS), (_ROUNDS,), generator=generator).tolist()
    delays = torch.randint(_MOST_CYCLES, (_ROUNDS, 2), generator=generator).tolist()
    expected = torch.zeros(most, _WIDTH, device=place.device)
    torch.cuda._sleep(1)
    torch.cuda.synchronize()
    for number in range(_ROUNDS):
        rows = _ROWS[rounds[number]]
        for rank in ranks:
            with torch.cuda.stream(rank.stream):
                torch.cuda._sleep(delays[number][rank.rank])
                rank.exchange(x[number, 0, rank.rank, :rows], "attention")
                rank.exchange(x[number, 1, rank.rank, :rows], "ffn")
                rank.gather(parts[number, rank.rank, :rows], number)
    torch.cuda.synchronize()
    arrived = True
    for number in range(_ROUNDS):
        rows = _ROWS[rounds[number]]
        for half in range(2):
            for rank in ranks:
                expected[:rows] += x[number, half, rank.rank, :rows].float() @ rank.weight.float().T
        whole = parts[number, :, :rows].transpose(0, 1).flatten(1)
        arrived &= all(torch.equal(rank.gathered[number, :rows], whole) for rank in ranks)
    first, second = (rank.residual for rank in ranks)
    arrived &= all(bool((both == EMPTY).all()) for both in places.values())
    return relative_error(first, expected), torch.equal(first, second), arrived


@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() != (9, 0),
    reason="needs compute capability 9.0",
)
@pytest.mark.parametrize("seed", [0, 1])
def test_no_number_is_stale_or_lost(seed: int) -> None:
    """Fails if a rank takes a number of an earlier sum, misses one, or waits for ever."""
    error, alike, arrived = in_its_own_process(exchange_on_two_streams, seed)
    assert error < 1e-4
    assert alike
    assert arrived
