"""A job's folder, and the file of samples beside it. In the folder are the job's settings, the
labels, the parts while the job is under way, and afterwards the codes.
"""

import contextlib
import fcntl
import io
import json
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from autoregressive.errors import SettingError, SettingName, UserError
from autoregressive.files import write_whole
from autoregressive.progress import Bar
from autoregressive.serve.bulk.array_files import (
    read_samples,
    write_array,
    write_parts,
    write_samples,
)
from autoregressive.serve.bulk.job import (
    BulkJob,
    DifferentJobError,
    check_same,
)
from autoregressive.serve.bulk.parts import Parts

_PNG_THREADS, _PNGS_AT_ONCE = 8, 64


class JobFolder:
    """The files of a job.

    Attributes:
        samples: the npz file.
        parts: the images that are done while the job is under way.
    """

    def __init__(self, job: BulkJob, sample_dir: Path) -> None:
        self.job, self.folder = job, sample_dir / job.name
        self.samples = sample_dir / f"{job.name}.npz"
        self.parts = Parts(self.folder / "parts", job.model.tokens_per_image, job.image_size_eval)
        self._lock: int | None = None

    @property
    def finished(self) -> bool:
        """Whether the job's npz file is there, which comes after the codes."""
        return self.samples.exists() and self._codes_file.exists()

    def open(self) -> NDArray[np.int64]:
        """Takes the folder for this process and its other ranks; makes it if need be.

        Returns:
            The indices of the images that are missing.

        Raises:
            UserError: another process works there, it holds another job, or it cannot be written.
        """
        if self.samples.exists() and not (self.finished and self._settings_file.exists()):
            told = f"{self.samples} is there, and nothing says how it was made; move it away"
            raise self._refused(told)
        if os.path.lexists(self.folder) and not self.folder.is_dir():
            raise self._refused(f"{self.folder} is a file or a broken link; move it away")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._take()
        except OSError as error:
            raise self._refused(f"cannot write {self.folder}: {error.strerror}") from error
        self._check_settings()
        if self.finished:
            self._check_size()
            self.parts.remove()
            return np.zeros(0, dtype=np.int64)
        write_array(self.folder / "labels.npy", self.job.labels)
        self.parts.clean()
        return self.parts.index(self.job.images).missing

    def share(self) -> None:
        """Has this rank hold the folder as well, so that no other job takes it if rank 0 is killed.
        Rank 0 lets the others in.
        """
        if self._lock is None:
            self._lock = self._opened_lock()
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(self._lock, fcntl.LOCK_SH)

    def finish(self, bar: Bar) -> None:
        """Makes the files of all images, the npz file last, and removes the parts.

        Raises:
            UserError: a part is missing, or the disk does not take a file.
        """
        job, parts, size = self.job, self.parts, self.job.image_size_eval
        index = parts.index(job.images)
        if len(index.missing):
            told = f"{len(index.missing)} images are missing: run the command again to draw them"
            raise UserError(told)
        shape = (job.images, job.model.tokens_per_image)
        write_parts(self._codes_file, shape, np.dtype(np.int32), parts.codes(index))

        def pictures() -> Iterator[NDArray[np.uint8]]:
            for some in parts.pictures(index):
                bar.update(len(some))
                yield some

        write_samples(self.samples, (job.images, size, size, 3), pictures())
        parts.remove()

    def save_pngs(self, bar: Bar) -> None:
        """Saves each image of the npz file as a PNG file, as LlamaGen does, but for those that are
        there.

        Raises:
            UserError: the npz file is damaged, or the disk does not take a file.
        """
        begin = 0
        with ThreadPoolExecutor(_PNG_THREADS) as pool:
            for some in read_samples(self.samples, _PNGS_AT_ONCE):
                try:
                    list(pool.map(self._save_png, range(begin, begin + len(some)), some))
                except OSError as error:
                    told = f"cannot write a PNG file in {self.folder}: {error.strerror}"
                    raise UserError(told) from error
                begin += len(some)
                bar.update(len(some))

    def close(self) -> None:
        """Lets other processes take the folder."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    @property
    def _settings_file(self) -> Path:
        return self.folder / "job.json"

    @property
    def _codes_file(self) -> Path:
        return self.folder / "codes.npy"

    def _refused(self, told: str | Sequence[str | SettingName]) -> SettingError:
        return SettingError("sample_dir", self.samples.parent, told)

    def _take(self) -> None:
        """Locks the folder until `close`, or the process's end."""
        self._lock = self._opened_lock()
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            told = f"another process works on {self.folder}; wait for it, or end it"
            raise self._refused(told) from error
        except OSError:  # a file system without locks
            pass

    def _opened_lock(self) -> int:
        """A file of its own, open for writing: network file systems lock no folder."""
        return os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT, 0o666)

    def _check_settings(self) -> None:
        settings = self.job.settings
        if not self._settings_file.exists():
            if self.parts.count() > 0:
                told = f"{self.parts.folder} has images, and nothing says of which job; remove it"
                raise self._refused(told)
            content = json.dumps(settings, indent=1).encode()
            write_whole(self._settings_file, lambda file: file.write_bytes(content))
            return
        try:
            there = dict(json.loads(self._settings_file.read_bytes()))
        except (ValueError, TypeError) as error:
            told = f"{self._settings_file} is damaged; move the folder and its npz file away"
            raise self._refused(told) from error
        try:
            check_same(there, settings)
        except DifferentJobError as error:
            end = "; choose another folder, or move it and its npz file away"
            name = self.folder.name
            raise self._refused([f"{name} is of another job, ", *error.parts, end]) from error

    def _check_size(self) -> None:
        """Raises `UserError` if the file of samples was cut off after the job had ended."""
        pictures = self.job.images * self.job.image_size_eval**2 * 3  # bytes
        if self.samples.stat().st_size < pictures:
            told = f"{self.samples} is damaged; remove it, and the job is drawn again"
            raise self._refused(told)

    def _save_png(self, index: int, picture: NDArray[np.uint8]) -> None:
        """Not by `write_whole`, which looks through the folder each time."""
        path = self.folder / f"{index:06d}.png"
        if path.exists():
            return
        unfinished = path.with_suffix(".part")
        content = io.BytesIO()
        Image.fromarray(picture).save(content, format="PNG")
        unfinished.write_bytes(content.getbuffer())
        os.replace(unfinished, path)
