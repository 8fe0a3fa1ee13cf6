"""What of a bulk job draws nothing: names, parts, the npz file, and a run whose source of images
costs nothing.
"""

import json
import os
import resource
import signal
import subprocess
import sys
import tracemalloc
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from autoregressive.errors import UserError
from autoregressive.models.sampling_params import SamplingParams
from autoregressive.serve.bulk.array_files import write_samples
from autoregressive.serve.bulk.job import BulkJob
from autoregressive.serve.bulk.job_run import BulkReport, run_job
from autoregressive.serve.bulk.labels import make_labels
from autoregressive.serve.bulk.parts import Images, Parts
from autoregressive.serve.bulk.ranks import Ranks
from autoregressive.serve.bulk.sources import evaluation_pictures, shares
from autoregressive.weights.finding import FoundWeights, resolve_model
from autoregressive.weights.options import ModelOptions

SIZE, TOKENS = 8, 256


def bulk_job(images: int = 40, labels: str = "random", seed: int = 0) -> BulkJob:
    model = resolve_model(ModelOptions("GPT-demo", device="cpu"))
    return BulkJob(
        model,
        FoundWeights(None, None),
        SamplingParams(cfg_scale=1.5, top_k=0, seed=seed),
        SIZE,
        make_labels(labels, images, model.num_classes, seed),
        labels,
    )


def expected(job: BulkJob) -> tuple[NDArray[np.int32], NDArray[np.uint8]]:
    """Codes and pictures that are easy to tell apart."""
    index = np.arange(job.images)
    codes = index[:, None] * 1000 + np.arange(TOKENS)
    pictures = index[:, None, None, None] * 7 + np.arange(SIZE * SIZE * 3).reshape(SIZE, SIZE, 3)
    return codes.astype(np.int32), (pictures % 256).astype(np.uint8)


class FakeSource:
    """Gives what `expected` says, a few at a time, last ones first; fails before the given one."""

    partial_since: float | None = None

    def __init__(self, job: BulkJob, fails_after: int | None = None) -> None:
        self.codes, self.pictures = expected(job)
        self.fails_after, self.drawn = fails_after, list[int]()

    def draw(self, indices: Sequence[int]) -> Iterator[Images]:
        for begin in reversed(range(0, len(indices), 3)):
            some = list(indices[begin : begin + 3])
            if self.fails_after is not None and len(self.drawn) >= self.fails_after:
                raise KeyboardInterrupt
            self.drawn += some
            yield Images(some, self.codes[some], self.pictures[some])


def run(job: BulkJob, folder: Path, source: FakeSource, **options: bool) -> BulkReport:
    return run_job(job, folder, Ranks(), lambda: source, progress=False, **options)


def test_a_job_makes_its_files(tmp_path: Path) -> None:
    """Fails if an image is at another place, a file of the job is missing, or parts stay."""
    job = bulk_job()
    codes, pictures = expected(job)
    report = run(job, tmp_path, FakeSource(job), save_png=True)
    assert report.drawn == 40
    with np.load(report.samples) as samples:
        assert samples.files == ["arr_0"]
        assert np.array_equal(samples["arr_0"], pictures)
    folder = tmp_path / job.name
    assert report.samples == tmp_path / f"{job.name}.npz"
    assert np.array_equal(np.load(folder / "codes.npy"), codes)
    assert np.array_equal(np.load(folder / "labels.npy"), job.labels)
    for index in (0, 39):
        assert np.array_equal(np.asarray(Image.open(folder / f"{index:06d}.png")), pictures[index])
    assert len(list(folder.glob("*.png"))) == 40
    assert not (folder / "parts").exists()


def test_memory_does_not_grow_with_the_job(tmp_path: Path) -> None:
    """Fails if a run holds all pictures at once: those of 50,000 images would be 9.8 GB."""

    class Stream(FakeSource):
        def __init__(self) -> None:  # makes each picture when it is asked for
            self.drawn = []

        def draw(self, indices: Sequence[int]) -> Iterator[Images]:
            for begin in range(0, len(indices), 64):
                some = list(indices[begin : begin + 64])
                codes = np.zeros((len(some), TOKENS), np.int32)
                yield Images(some, codes, np.zeros((len(some), 32, 32, 3), np.uint8))

    def peak_bytes(images: int) -> int:
        job = replace(bulk_job(images), image_size_eval=32)
        tracemalloc.start()
        try:
            run(job, tmp_path / str(images), Stream())
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    few, many = peak_bytes(4_000), peak_bytes(16_000)  # the pictures are 12 and 49 MB
    assert many < few + 4e6


def test_an_interrupted_job_goes_on(tmp_path: Path) -> None:
    """Fails if what was drawn before an interruption is lost or drawn again, or the file differs
    from that of an unbroken run.
    """
    job = bulk_job()
    whole = run(job, tmp_path / "whole", FakeSource(job))
    source = FakeSource(job, fails_after=10)
    with pytest.raises(KeyboardInterrupt):
        run(job, tmp_path / "broken", source)
    rest = FakeSource(job)
    report = run(job, tmp_path / "broken", rest)
    assert sorted(source.drawn + rest.drawn) == list(range(40))
    assert report.drawn == 40 - len(source.drawn) < 40
    assert report.samples.read_bytes() == whole.samples.read_bytes()
    again = FakeSource(job)
    assert run(job, tmp_path / "broken", again).drawn == 0
    assert again.drawn == []


def test_another_job_is_refused_by_what_differs(tmp_path: Path) -> None:
    """Fails if images of two jobs are mixed, or the line does not name the difference."""
    job = bulk_job()
    with pytest.raises(KeyboardInterrupt):
        run(job, tmp_path, FakeSource(job, fails_after=10))
    for other, told in (
        (
            bulk_job(images=41),
            "of another job, which has images 40 and not 41; choose",
        ),
        (bulk_job(labels="balanced"), "which has other labels; choose"),
        (
            replace(job, sampling=replace(job.sampling, cfg_interval=5)),
            "has cfg_interval -1 and not 5;",
        ),
        (replace(job, deterministic=True), "which has deterministic False and not True"),
        (replace(job, naive_batch=4), "which has naive False and not True"),
    ):
        assert other.name == job.name
        with pytest.raises(UserError, match=told):
            run(other, tmp_path, FakeSource(other))
    assert run(job, tmp_path, FakeSource(job)).drawn < 40


def test_a_file_of_unknown_origin_is_not_overwritten(tmp_path: Path) -> None:
    """Fails if a file of that name that another program has made is taken for the job's, or
    replaced.
    """
    job = bulk_job()
    (tmp_path / f"{job.name}.npz").write_bytes(b"precious")
    with pytest.raises(UserError, match="nothing says how it was made; move it away"):
        run(job, tmp_path, FakeSource(job))
    assert (tmp_path / f"{job.name}.npz").read_bytes() == b"precious"


def test_a_file_beside_an_unfinished_job_is_not_taken_for_its_result(tmp_path: Path) -> None:
    """Fails if a file that another program has made ends a job that was interrupted, and its
    images are removed.
    """
    job = bulk_job()
    with pytest.raises(KeyboardInterrupt):
        run(job, tmp_path, FakeSource(job, fails_after=10))
    samples = tmp_path / f"{job.name}.npz"
    samples.write_bytes(b"precious")
    with pytest.raises(UserError, match="nothing says how it was made; move it away"):
        run(job, tmp_path, FakeSource(job))
    assert samples.read_bytes() == b"precious"
    samples.unlink()
    assert run(job, tmp_path, FakeSource(job)).drawn < 40


def test_a_link_to_a_checkpoint_counts_by_its_own_name(tmp_path: Path) -> None:
    """Fails if the file is named after a checksum, as the files of a hub's cache are."""
    (tmp_path / "0abcdef").write_bytes(b"weights")
    link = tmp_path / "c2i_XL_384.pt"
    link.symlink_to("0abcdef")
    assert "-c2i_XL_384-size-" in replace(bulk_job(), found=FoundWeights(link, None)).name


@pytest.mark.parametrize("killed_at", ["codes", "pictures"])
def test_a_job_killed_while_it_writes_goes_on(tmp_path: Path, killed_at: str) -> None:
    """Fails if a SIGKILL in the middle of the last files loses images, leaves a file that passes
    for whole, or the file of samples differs from that of an unbroken run.
    """
    job = bulk_job(200)
    whole = run(job, tmp_path / "whole", FakeSource(job)).samples.read_bytes()
    read = getattr(Parts, killed_at)

    def broken(*arguments: Any) -> Iterator[NDArray[Any]]:
        yield next(iter(read(*arguments)))
        os.kill(os.getpid(), signal.SIGKILL)

    process = os.fork()
    if process == 0:
        with patch.object(Parts, killed_at, broken):
            run(job, tmp_path / "broken", FakeSource(job))
        os._exit(1)  # it was not killed
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == -signal.SIGKILL
    rest = FakeSource(job)
    report = run(job, tmp_path / "broken", rest)
    assert rest.drawn == []
    assert report.samples.read_bytes() == whole
    assert [line.split()[0] for line in report.lines(1)] == ["200", "start", "samples"]
    assert [path for path in report.samples.parent.rglob("*.part*") if path.is_file()] == []


def test_two_processes_do_not_share_a_folder(tmp_path: Path) -> None:
    """Fails if a second command draws the same images into a folder that is in use."""
    job = bulk_job()
    (tmp_path / job.name).mkdir()
    hold = (
        "import fcntl, os, sys; fd = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT); "
        "fcntl.flock(fd, fcntl.LOCK_EX); print(flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", hold, str(tmp_path / job.name / "lock")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        with pytest.raises(UserError, match="another process works on"):
            run(job, tmp_path, FakeSource(job))
        assert holder.stdin is not None
        holder.stdin.close()
    assert run(job, tmp_path, FakeSource(job)).drawn == 40


def test_other_weights_of_the_same_name_are_another_job(tmp_path: Path) -> None:
    """Fails if a checkpoint that was replaced is taken for the one that drew the images so far."""
    weights = tmp_path / "last.pt"
    weights.write_bytes(b"old weights")
    job = replace(bulk_job(), found=FoundWeights(weights, None))
    with pytest.raises(KeyboardInterrupt):
        run(job, tmp_path, FakeSource(job, fails_after=10))
    weights.write_bytes(b"new weights")
    with pytest.raises(UserError, match="which has other weights in gpt_ckpt"):
        run(replace(job), tmp_path, FakeSource(job))  # a new one, which reads the file anew


def test_images_of_an_unknown_job_are_refused(tmp_path: Path) -> None:
    """Fails if images that another job has left, without its settings, get into this one."""
    job = bulk_job()
    with pytest.raises(KeyboardInterrupt):
        run(job, tmp_path, FakeSource(job, fails_after=10))
    settings = tmp_path / job.name / "job.json"
    settings.write_text("{")
    with pytest.raises(UserError, match=r"job.json is damaged; move the folder"):
        run(job, tmp_path, FakeSource(job))
    settings.unlink()
    with pytest.raises(UserError, match="nothing says of which job; remove it"):
        run(job, tmp_path, FakeSource(job))


def test_pngs_of_a_finished_job_are_made(tmp_path: Path) -> None:
    """Fails if --save-png on a job that has ended draws again, leaves out images, or takes one
    that was cut off for whole.
    """
    job = bulk_job()
    run(job, tmp_path, FakeSource(job))
    folder, (_, pictures) = tmp_path / job.name, expected(job)
    save = Image.Image.save

    def broken(image: Image.Image, *arguments: Any, **options: Any) -> None:
        if np.array_equal(np.asarray(image), pictures[17]):
            raise KeyboardInterrupt
        save(image, *arguments, **options)

    with patch.object(Image.Image, "save", broken), pytest.raises(KeyboardInterrupt):
        run(job, tmp_path, FakeSource(job), save_png=True)
    assert 0 < len(list(folder.glob("*.png"))) < 40
    report = run(job, tmp_path, FakeSource(job), save_png=True)
    assert report.drawn == 0
    assert report.lines(1)[1].startswith("start 0.0 s")
    for index, picture in enumerate(pictures):
        assert np.array_equal(np.asarray(Image.open(folder / f"{index:06d}.png")), picture)
    assert list(folder.glob("*.part")) == []


def test_a_damaged_file_of_samples_is_named(tmp_path: Path) -> None:
    """Fails if a file that is cut off passes for whole, or PNG files are made of a damaged one."""
    job = bulk_job()
    samples = run(job, tmp_path, FakeSource(job)).samples
    whole = samples.read_bytes()
    samples.write_bytes(whole[:-500])
    for save_png in (False, True):
        with pytest.raises(
            UserError, match=r"npz is damaged; remove it, and the job is drawn again$"
        ):
            run(job, tmp_path, FakeSource(job), save_png=save_png)
    samples.write_bytes(bytes(len(whole)))
    with pytest.raises(UserError, match=r"npz is damaged; remove it, and .* drawn again$"):
        run(job, tmp_path, FakeSource(job), save_png=True)


@pytest.mark.parametrize("content", [b"", b"\x93NUMPY", b"no array"])
def test_a_damaged_part_is_named(tmp_path: Path, content: bytes) -> None:
    """Fails if a damaged part ends in a traceback, or its images pass for drawn."""
    job = bulk_job()
    with pytest.raises(KeyboardInterrupt):
        run(job, tmp_path, FakeSource(job, fails_after=10))
    part = next((tmp_path / job.name / "parts").glob("*.npy"))
    part.write_bytes(content)
    with pytest.raises(UserError, match=rf"{part.name} is damaged: remove it, and its images"):
        run(job, tmp_path, FakeSource(job))
    part.unlink()
    assert run(job, tmp_path, FakeSource(job)).drawn == 40


def test_a_full_disk_loses_nothing(tmp_path: Path) -> None:
    """Fails if a file that the disk does not take whole is left, or images kept before are lost."""
    job = bulk_job()
    with pytest.raises(KeyboardInterrupt):
        run(job, tmp_path, FakeSource(job, fails_after=10))
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limit[1]))  # EFBIG in the place of ENOSPC
    try:
        with pytest.raises(UserError, match=r"^cannot write .*: File too large$"):
            run(job, tmp_path, FakeSource(job))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert not (tmp_path / f"{job.name}.npz").exists()
    source = FakeSource(job)
    assert run(job, tmp_path, source).drawn == len(source.drawn) < 40


def test_leftovers_of_killed_processes_are_removed(tmp_path: Path) -> None:
    """Fails if unfinished parts fill the disk as often as a job is killed."""
    job = bulk_job()
    parts = tmp_path / job.name / "parts"
    parts.mkdir(parents=True)
    (parts / ".0123456789abcdef.part.npy").write_bytes(b"half")
    source = FakeSource(job, fails_after=0)
    with pytest.raises(KeyboardInterrupt):
        run(job, tmp_path, source)
    assert os.listdir(parts) == []


def test_the_name_is_llamagens() -> None:
    """Fails if a program that looks for LlamaGen's file name does not find it."""
    job = bulk_job()
    model = replace(
        job.model, gpt_model="GPT-XL", vq_model="VQ-16", image_size=384, downsample_size=16
    )
    params = SamplingParams(cfg_scale=1.75, top_k=0)
    found = FoundWeights(Path("weights/c2i_XL_384.pt"), None)
    named = replace(job, model=model, found=found, sampling=params, image_size_eval=256)
    assert named.name == (
        "GPT-XL-c2i_XL_384-size-384-size-256-VQ-16-topk-0-topp-1.0-temperature-1.0-cfg-1.75-seed-0"
    )
    fsdp = FoundWeights(Path("runs/0200000/consolidated.pth"), None)
    from_fsdp = replace(named, found=fsdp, model=replace(model, from_fsdp=True))
    assert from_fsdp.name.startswith("GPT-XL-0200000-size-384")
    whole_numbers = replace(named, sampling=SamplingParams(cfg_scale=2, top_k=0, temperature=1))
    assert whole_numbers.name.endswith("temperature-1.0-cfg-2.0-seed-0")


def test_pictures_are_llamagens() -> None:
    """Fails if pixels are rounded where LlamaGen cuts, or resized in another way."""
    pixels = torch.randn(2, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    pictures, finite = evaluation_pictures(pixels, 24)
    cut = np.clip(127.5 * pixels.numpy() + 128.0, 0, 255).astype(np.uint8)
    assert np.array_equal(pictures.numpy(), cut.transpose(0, 2, 3, 1))
    resized, _ = evaluation_pictures(pixels, 16)
    # a bicubic kernel (a = -0.75) without antialiasing, by hand, at one place
    at = (5 + 0.5) * 1.5 - 0.5
    first = int(np.floor(at)) - 1
    t = np.abs(at - np.arange(first, first + 4))
    a = -0.75
    weight = np.where(
        t <= 1, (a + 2) * t**3 - (a + 3) * t**2 + 1, a * (t**3 - 5 * t**2 + 8 * t - 4)
    )
    place = slice(first, first + 4)
    value = weight @ pixels[0, 1, place, place].double().numpy() @ weight
    assert abs(int(resized[0, 5, 5, 1]) - np.clip(127.5 * value + 128, 0, 255)) <= 1.01
    pixels[1, 0, 0, 0] = torch.nan
    assert evaluation_pictures(pixels, 16)[1].tolist() == [True, False]
    assert finite.all()


def test_ranks_share_all_images() -> None:
    """Fails if an image is drawn twice or by nobody, or a batch of the plain loop is torn apart."""
    missing = np.array([index for index in range(100) if index % 7])
    for batch in (None, 8):
        for count in (1, 3, 8):
            shared = shares(missing, batch, count)
            assert sorted(index for share in shared for index in share) == missing.tolist()
            if batch is not None:
                owners = [{index // batch for index in share} for share in shared]
                assert sum(map(len, owners)) == len({index // batch for index in missing})


def test_the_npz_file_is_numpys(tmp_path: Path) -> None:
    """Fails if NumPy cannot read the file, or it differs from run to run."""
    pictures = np.random.default_rng(0).integers(0, 256, (6, 4, 4, 3), dtype=np.uint8)
    for name in ("a.npz", "b.npz"):
        write_samples(tmp_path / name, pictures.shape, iter(np.split(pictures, 3)))
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    assert np.array_equal(np.load(tmp_path / "a.npz")["arr_0"], pictures)
    with zipfile.ZipFile(tmp_path / "a.npz") as archive:
        assert archive.testzip() is None


def test_settings_are_told_in_the_folder(tmp_path: Path) -> None:
    """Fails if labels, which change an FID, are not recorded."""
    job = bulk_job(labels="balanced")
    run(job, tmp_path, FakeSource(job))
    settings = json.loads((tmp_path / job.name / "job.json").read_text())
    assert settings["labels"] == "balanced"
    assert settings["images"] == 40
    assert settings["cfg_scale"] == 1.5


def test_parts_hold_many_files(tmp_path: Path) -> None:
    """Fails if reading in order opens more files than a process may have, or mixes up rows."""
    parts = Parts(tmp_path / "parts", 2, 1)
    parts.clean()
    order = np.random.default_rng(0).permutation(300)
    for index in order:
        codes = np.full((1, 2), index, dtype=np.int32)
        parts.write(Images([int(index)], codes, np.full((1, 1, 1, 3), index % 256, np.uint8)))
    assert parts.count() == 300
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (200, limit[1]))
    try:
        index = parts.index(300)
        assert len(index.missing) == 0
        read = np.concatenate(list(parts.codes(index)))
        pictures = np.concatenate(list(parts.pictures(index)))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limit)
    assert read[:, 0].tolist() == list(range(300))
    assert pictures[:, 0, 0, 0].tolist() == [index % 256 for index in range(300)]
