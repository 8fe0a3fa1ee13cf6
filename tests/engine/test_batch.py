"""The batch's tensors: what a load puts where, what it leaves alone, and how codes come back."""

import time

import torch

from autoregressive.models.sampling_params import SamplingParams
from autoregressive.serve.engine.batch import Batch, BatchShape
from autoregressive.serve.engine.request import ImageState, RowState

CPU = torch.device("cpu")
SHAPE = BatchShape.of(max_rows=5, tokens=10, page_size=4)
PARAMS = SamplingParams(2.5, cfg_interval=5, temperature=0.5, top_k=7, top_p=0.75, seed=2**62 + 1)


def guided_image(slot: int, position: int = 0, limit: int = 8) -> ImageState:
    rows = [RowState(3, slot, end=10, pages=[8, 1]), RowState(10, slot, end=7, pages=[2, 5, 7])]
    return ImageState(PARAMS, 4, slot, rows, position, limit)


def plain_image(slot: int, position: int = 0, limit: int = 4) -> ImageState:
    rows = [RowState(6, slot, end=10, pages=[4])]
    return ImageState(SamplingParams(cfg_scale=1.0, top_k=0), 0, slot, rows, position, limit)


def loaded(*images: ImageState) -> Batch:
    batch = Batch(SHAPE, CPU)
    for image in images:
        batch.lengths[image.slot] = image.position
    batch.load([row for image in images for row in image.rows], images)
    return batch


def tensors_of(batch: Batch) -> dict[str, torch.Tensor]:
    return {name: value for name, value in vars(batch).items() if isinstance(value, torch.Tensor)}


def test_the_shape_follows_from_three_sizes() -> None:
    """Fails if the last, partly filled page of a row is forgotten, or codes on their way to the
    host hold up new images.
    """
    assert (SHAPE.pages_per_row, SHAPE.num_slots) == (3, 10)


def test_rows_and_images_are_where_the_kernels_look() -> None:
    """Fails if a row gets another one's label, slot, position or pages, or an image another one's
    rows or parameters.
    """
    batch = loaded(plain_image(slot=7, position=3), guided_image(slot=2, position=6))
    assert batch.labels[:3].tolist() == [6, 3, 10]
    assert batch.row_slots[:3].tolist() == [7, 2, 2]
    assert batch.positions[:3].tolist() == [3, 6, 6]
    assert batch.limits[:3].tolist() == [4, 8, 7]
    assert batch.page_table[0, 0] == 4
    assert batch.page_table[1, :2].tolist() == [8, 1]
    assert batch.page_table[2].tolist() == [2, 5, 7]  # to the end of an odd number of entries
    assert batch.conditional_rows[:2].tolist() == [0, 1]
    assert batch.unconditional_rows[:2].tolist() == [-1, 2]
    assert batch.image_slots[:2].tolist() == [7, 2]
    assert batch.image_indices[:2].tolist() == [0, 4]
    assert batch.guidance_scales[:2].tolist() == [1.0, 2.5]
    assert batch.temperatures[:2].tolist() == [1.0, 0.5]
    assert batch.top_ks[:2].tolist() == [0, 7]
    assert batch.top_ps[:2].tolist() == [1.0, 0.75]
    assert batch.seeds[:2].tolist() == [0, 2**62 + 1]
    assert batch.guided_steps[:2].tolist() == [0, 7]


def test_types_are_those_of_the_contract() -> None:
    """Fails if a tensor that kernels read by pointer changes its type or size."""
    batch = loaded()
    assert (batch.seeds.dtype, batch.seeds.shape) == (torch.int64, (5,))
    for name in ("guidance_scales", "temperatures", "top_ps"):
        assert (getattr(batch, name).dtype, getattr(batch, name).shape) == (torch.float32, (5,))
    of_rows, of_images = (
        ("labels", "row_slots", "positions", "limits"),
        ("conditional_rows", "unconditional_rows", "image_slots", "guided_steps"),
    )
    for name in (*of_rows, *of_images, "image_indices", "top_ks"):
        assert (getattr(batch, name).dtype, getattr(batch, name).shape) == (torch.int32, (5,))
    assert (batch.page_table.dtype, batch.page_table.shape) == (torch.int32, (5, 3))
    assert (batch.codes.dtype, batch.codes.shape) == (torch.int32, (11, 10))
    assert (batch.slot_state.dtype, batch.slot_state.shape) == (torch.int32, (4, 11))
    views = (batch.lengths, batch.failed, batch.drafted, batch.accepted)
    assert all(
        torch.equal(view, line) and view.data_ptr() == line.data_ptr()
        for view, line in zip(views, batch.slot_state, strict=True)
    )


def test_padding_is_marked_and_departed_rows_become_padding() -> None:
    """Fails if a row that left still runs, as part of a larger bucket, and writes to pages that are
    another's by now.
    """
    first, second = guided_image(slot=2), plain_image(slot=0)
    batch = loaded(first, second)
    batch.load(second.rows, [second])
    assert batch.positions.tolist() == [0, -1, -1, -1, -1]
    assert batch.conditional_rows.tolist() == [0, -1, -1, -1, -1]
    assert batch.unconditional_rows.tolist() == [-1] * 5
    assert batch.page_table[0, 0] == 4
    assert batch.row_slots.tolist() == [0] + [SHAPE.num_slots] * 4
    assert batch.limits.tolist() == [4, 0, 0, 0, 0]


def test_positions_are_the_devices_own() -> None:
    """Fails if a load sets a row back to what the host believes, or padding gets a position."""
    first, second = guided_image(slot=2, position=3), plain_image(slot=0, position=1)
    batch = loaded(first, second)
    batch.lengths[2] = 5  # the device has kept more than the host knows
    batch.load([*second.rows, *first.rows], [second, first])
    assert batch.positions.tolist() == [1, 5, 5, -1, -1]
    batch.load([], [])
    assert batch.positions.tolist() == [-1] * 5


def test_new_limits_change_nothing_else() -> None:
    """Fails if an upload of limits reaches another tensor, or leaves an old limit."""
    images = [guided_image(slot=2, position=3), plain_image(slot=0, position=1)]
    batch, rows = loaded(*images), [row for image in images for row in image.rows]
    before = {name: value.clone() for name, value in tensors_of(batch).items()}
    images[0].limit, images[1].limit = 5, 3
    batch.upload_limits(rows, images)
    assert batch.limits.tolist() == [5, 5, 3, 0, 0]
    for name, value in tensors_of(batch).items():
        assert name in ("limits", "_buffer", "_mirror") or torch.equal(value, before[name]), name


def test_a_load_is_no_work_for_other_threads() -> None:
    """Fails if torch's CPU threads are woken to copy a large batch, and spin after it while others
    want the cores.
    """
    batch = Batch(BatchShape.of(max_rows=512, tokens=576, page_size=16), CPU)
    pages = list(range(batch.shape.pages_per_row))
    # In the middle: to clear the slots of images that start is the device's work.
    images = [
        ImageState(PARAMS, 0, slot, [RowState(label, slot, 576, pages) for label in (3, 10)], 1, 2)
        for slot in range(256)
    ]
    rows = [row for image in images for row in image.rows]
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        batch.load(rows, images)
        time.sleep(0.5)  # until those rest again that were woken to build the batch
        others, own = time.process_time() - time.thread_time(), time.thread_time()
        for _ in range(50):
            batch.load(rows, images)
        time.sleep(0.5)  # what spins after the last load counts too
        others, own = time.process_time() - time.thread_time() - others, time.thread_time() - own
    finally:
        torch.set_num_threads(threads)
    assert others < own / 4  # as bytes: all of it


def test_addresses_stay_and_are_aligned() -> None:
    """Fails if a load moves a tensor that a captured graph has the address of, or a tensor starts
    off a 16-byte boundary.
    """
    batch = Batch(SHAPE, CPU)
    before = {name: value.data_ptr() for name, value in tensors_of(batch).items()}
    assert {"seeds", "page_table", "positions", "codes", "failed", "accepted"} <= set(before)
    image = guided_image(slot=1)
    batch.load(image.rows, [image])
    assert before == {name: value.data_ptr() for name, value in tensors_of(batch).items()}
    assert all(address % 16 == 0 for address in before.values())


def test_an_image_that_starts_inherits_nothing_and_others_lose_nothing() -> None:
    """Fails if an image inherits the failure, the length or the guesses of the one before it in its
    slot, or those of an image that runs are forgotten when others join.
    """
    batch = Batch(SHAPE, CPU)
    batch.codes.fill_(9)
    batch.slot_state[:, :-1] = 3
    images = [guided_image(slot=2, position=3), plain_image(slot=0, position=0)]
    batch.load([row for image in images for row in image.rows], images)
    for values in batch.slot_state[:, :-1].tolist():
        assert values == [0] + [3] * 9
    assert batch.lengths[-1] == -1
    assert (batch.codes[0] == 0).all()
    assert (batch.codes[1:] == 9).all()


def test_fetched_codes_are_those_of_the_slots() -> None:
    """Fails if codes come back in another order, or change when the slot's next image begins."""
    batch = Batch(SHAPE, CPU)
    batch.codes[:10].copy_(torch.arange(100).view(10, 10))
    batch.lengths[7], batch.failed[3], batch.drafted[7], batch.accepted[3] = 5, 1, 8, 2
    fetched, lengths = batch.fetch([7, 3]), batch.fetch_lengths()
    batch.codes.zero_()
    batch.slot_state.zero_()
    assert fetched.ready()
    codes, slot_state = fetched.result()
    assert codes.tolist() == [list(range(70, 80)), list(range(30, 40))]
    assert slot_state.tolist() == [[5, 0], [0, 1], [8, 0], [0, 2]]
    assert lengths.ready()
    assert lengths.result().tolist() == [0] * 7 + [5, 0, 0, -1]
