"""The batch's tensors: what a load puts where, what it leaves alone, and how codes come back."""

import time

import torch

from autoregressive.models.sampling_params import SamplingParams
from autoregressive.serve.engine.batch import Batch, BatchShape
from autoregressive.serve.engine.request import ImageState, RowState

CPU = torch.device("cpu")
SHAPE = BatchShape.of(max_rows=5, tokens=10, page_size=4)
PARAMS = SamplingParams(cfg_scale=2.5, temperature=0.5, top_k=7, top_p=0.75, seed=2**62 + 1)


def guided_image(slot: int, position: int = 0) -> ImageState:
    conditional = RowState(3, slot, position, pages=[8, 1])
    unconditional = RowState(10, slot, position, pages=[2, 5, 7])
    return ImageState(
        PARAMS, image_index=4, slot=slot, conditional=conditional, unconditional=unconditional
    )


def plain_image(slot: int, position: int = 0) -> ImageState:
    return ImageState(
        SamplingParams(cfg_scale=1.0, top_k=0),
        0,
        slot,
        RowState(6, slot, position, pages=[4]),
        None,
    )


def loaded(*images: ImageState) -> Batch:
    batch = Batch(SHAPE, CPU)
    batch.load([row for image in images for row in image.rows], images)
    return batch


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


def test_types_are_those_of_the_contract() -> None:
    """Fails if a tensor that kernels read by pointer changes its type or size."""
    batch = loaded()
    assert (batch.seeds.dtype, batch.seeds.shape) == (torch.int64, (5,))
    for name in ("guidance_scales", "temperatures", "top_ps"):
        assert (getattr(batch, name).dtype, getattr(batch, name).shape) == (torch.float32, (5,))
    of_rows, of_images = (
        ("labels", "row_slots", "positions"),
        ("conditional_rows", "unconditional_rows", "image_slots"),
    )
    for name in (*of_rows, *of_images, "image_indices", "top_ks"):
        assert (getattr(batch, name).dtype, getattr(batch, name).shape) == (torch.int32, (5,))
    assert (batch.page_table.dtype, batch.page_table.shape) == (torch.int32, (5, 3))
    assert (batch.codes.dtype, batch.codes.shape) == (torch.int32, (10, 10))
    assert (batch.failed.dtype, batch.failed.shape) == (torch.int32, (10,))


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
    assert all(0 <= slot < SHAPE.num_slots for slot in batch.row_slots.tolist())


def test_a_load_is_no_work_for_other_threads() -> None:
    """Fails if torch's CPU threads are woken to copy a large batch, and spin after it while others
    want the cores.
    """
    batch = Batch(BatchShape.of(max_rows=512, tokens=576, page_size=16), CPU)
    pages = list(range(batch.shape.pages_per_row))
    images = [
        ImageState(PARAMS, 0, slot, RowState(3, slot, 0, pages), RowState(10, slot, 0, pages))
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
    names = [
        name
        for name in vars(batch)
        if isinstance(getattr(batch, name), torch.Tensor) and not name.startswith("_")
    ]
    assert {"seeds", "page_table", "codes", "failed"} <= set(names)
    before = {name: getattr(batch, name).data_ptr() for name in names}
    image = guided_image(slot=1)
    batch.load(image.rows, [image])
    assert before == {name: getattr(batch, name).data_ptr() for name in names}
    assert all(address % 16 == 0 for address in before.values())


def test_a_load_leaves_codes_alone_and_clears_failures_of_newcomers_only() -> None:
    """Fails if an image inherits the failure of the one before it in its slot, or a failure is
    forgotten when others join.
    """
    batch = Batch(SHAPE, CPU)
    batch.codes.fill_(9)
    batch.failed.fill_(1)
    images = [guided_image(slot=2, position=5), plain_image(slot=0, position=0)]
    batch.load([row for image in images for row in image.rows], images)
    assert batch.failed.tolist() == [0] + [1] * 9
    assert (batch.codes == 9).all()


def test_fetched_codes_are_those_of_the_slots() -> None:
    """Fails if codes come back in another order, or change when the slot's next image begins."""
    batch = Batch(SHAPE, CPU)
    batch.codes.copy_(torch.arange(100).view(10, 10))
    batch.failed[3] = 1
    fetched = batch.fetch([7, 3])
    batch.codes.zero_()
    assert fetched.ready()
    codes, failed = fetched.result()
    assert codes.tolist() == [list(range(70, 80)), list(range(30, 40))]
    assert failed.tolist() == [0, 1]
