"""Runs a job: every rank draws its share, and rank 0 puts the files together."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import numpy as np
from numpy.typing import NDArray

from autoregressive.devices import one_cpu_thread
from autoregressive.errors import UserError
from autoregressive.progress import Bar, progress_bar
from autoregressive.serve.bulk.folder import JobFolder
from autoregressive.serve.bulk.job import BulkJob, DifferentJobError, check_same
from autoregressive.serve.bulk.keeper import Keeper
from autoregressive.serve.bulk.ranks import Ranks
from autoregressive.serve.bulk.sources import Source, shares

_SECONDS_BETWEEN_LOOKS = 0.5  # at how many images all ranks have kept


@dataclass(frozen=True)
class BulkReport:
    """What a run has done, and how long it took, in seconds.

    Attributes:
        samples: the npz file.
        images: of the job.
        drawn: images that this run drew, on all ranks.
        start: from the beginning to the first draw: loading, compiling, capturing graphs.
        drawing: until this rank had drawn its share; `partial` of it with fewer images at once than
            could run, because no more waited.
        waiting: for the other ranks.
        writing: of the files of all images.
    """

    samples: Path
    images: int
    drawn: int
    start: float = 0.0
    drawing: float = 0.0
    partial: float = 0.0
    waiting: float = 0.0
    writing: float = 0.0

    def lines(self, ranks: int) -> list[str]:
        """What to tell the user."""
        lines = [f"{self.images} images were drawn already"]
        if self.drawn:
            seconds = self.drawing + self.waiting
            lines = [
                f"{self.drawn} images in {seconds:.1f} s, {self.drawn / seconds:.2f} images/s on "
                f"{ranks} rank{'s' if ranks > 1 else ''}"
            ]
        if self.drawn or self.writing:
            lines.append(
                f"start {self.start:.1f} s, drawing {self.drawing:.1f} s (the last partial batch "
                f"{self.partial:.1f} s), waiting for other ranks {self.waiting:.1f} s, writing "
                f"{self.writing:.1f} s"
            )
        return [*lines, f"samples are saved to {self.samples}"]


def run_job(
    job: BulkJob,
    sample_dir: Path,
    ranks: Ranks,
    make_source: Callable[[], Source],
    *,
    save_png: bool = False,
    progress: bool | None = None,
    began: float | None = None,
) -> BulkReport:
    """Draws what is missing of a job, and makes its files.

    Args:
        sample_dir: the npz file and the job's folder are in it.
        make_source: makes what draws; not called where nothing is missing.
        save_png: also save each image as a PNG file in the job's folder, as LlamaGen does.
        progress: whether rank 0 shows a bar; None: where stderr is a terminal.
        began: when the process began, as `time.perf_counter`; None: now.

    Raises:
        UserError: the folder is of another job, the disk does not take a file, or the model's
            numbers are not finite. What was kept stays, and another run goes on with it.
        OtherRankFailedError: on other ranks, if rank 0 has failed before the work.
    """
    began = time.perf_counter() if began is None else began
    with closing(JobFolder(job, sample_dir)) as folder, one_cpu_thread():
        return _run(folder, ranks, make_source, save_png=save_png, progress=progress, began=began)


def _run(
    folder: JobFolder,
    ranks: Ranks,
    make_source: Callable[[], Source],
    *,
    save_png: bool,
    progress: bool | None,
    began: float,
) -> BulkReport:
    job = folder.job
    missing = _open(folder, ranks)
    shown = progress if ranks.first else False
    finished = ranks.broadcast(folder.finished)
    report = BulkReport(folder.samples, job.images, len(missing))
    if not finished:
        report = _draw(folder, ranks, make_source, missing, report, shown, began)
    drawn = time.perf_counter()
    if ranks.first and not finished:
        with progress_bar("writing", " images", job.images, shown=shown, leave=False) as bar:
            folder.finish(bar)
    if ranks.first and save_png:
        with progress_bar("PNG files", " images", job.images, shown=shown, leave=False) as bar:
            folder.save_pngs(bar)
    has_written = ranks.first and (save_png or not finished)
    return replace(report, writing=time.perf_counter() - drawn if has_written else 0.0)


def _draw(
    folder: JobFolder,
    ranks: Ranks,
    make_source: Callable[[], Source],
    missing: NDArray[np.int64],
    report: BulkReport,
    shown: bool | None,
    began: float,
) -> BulkReport:
    """Draws this rank's share of the missing images, and waits for the other ranks. Returns the
    report with the times of that.
    """
    job = folder.job
    share = shares(missing, job.naive_batch, ranks.count)[ranks.rank]
    drawing_began = partial_since = time.perf_counter()
    with _counting_bar(folder, job.images - len(missing), shown):
        if len(share) > 0:
            source = make_source()
            drawing_began = time.perf_counter()
            with Keeper(folder.parts) as keeper:
                for images in source.draw(share.tolist()):
                    keeper.add(images)
            partial_since = source.partial_since or time.perf_counter()
        drawn = time.perf_counter()
        ranks.wait()
    return replace(
        report,
        start=drawing_began - began,
        drawing=drawn - drawing_began,
        partial=max(0.0, drawn - partial_since),
        waiting=time.perf_counter() - drawn,
    )


def _open(folder: JobFolder, ranks: Ranks) -> NDArray[np.int64]:
    """Has rank 0 open the folder, and the others join. Returns the missing images, on all ranks.

    Raises:
        UserError: as `JobFolder.open`; or this rank was started for another job.
    """
    missing = cast(NDArray[np.int64], ranks.broadcast(ranks.only_first(folder.open)))
    settings = ranks.broadcast(folder.job.settings)
    try:
        check_same(settings, folder.job.settings)
    except DifferentJobError as error:
        told = f"rank {ranks.rank} was started for another job than rank 0, "
        end = ": give all ranks the same flags and files"
        raise UserError(told, *error.parts, end) from error
    folder.share()
    return missing


@contextmanager
def _counting_bar(folder: JobFolder, kept: int, shown: bool | None) -> Iterator[None]:
    """A bar of the images that all ranks have kept, by a look at the folder now and then."""
    total = folder.job.images
    with progress_bar("drawing", " images", total, shown=shown, initial=kept) as bar:
        done = threading.Event()

        def follow(bar: Bar) -> None:
            while not done.wait(_SECONDS_BETWEEN_LOOKS):
                bar.update(max(0, folder.parts.count() - bar.n))

        watcher = threading.Thread(target=follow, args=(bar,), daemon=True)
        if shown is not False:
            watcher.start()
        try:
            yield
        finally:
            done.set()
            if watcher.ident is not None:
                watcher.join()
            bar.update(max(0, folder.parts.count() - bar.n))
