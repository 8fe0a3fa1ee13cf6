"""A job's folder, and the file of samples beside it. In the folder are the job's settings, the
labels, the parts while the job is under way, and afterwards the codes.
"""

import fcntl
import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from autoregressive.errors import SettingError, UserError
from autoregressive.files import write_whole
from autoregressive.progress import Bar
from autoregressive.serve.bulk.array_files import write_array, write_samples
from autoregressive.serve.bulk.job import BulkJob
from autoregressive.serve.bulk.parts import Images, Parts

_PNG_THREADS = 8


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
        """Whether the npz file is there, which comes last."""
        return self.samples.exists()

    def open(self) -> NDArray[np.int64]:
        """Takes the folder for this process and its other ranks; makes it if need be.

        Returns:
            The indices of the images that are missing.

        Raises:
            UserError: another process works there, it holds another job, or it cannot be written.
        """
        if self.samples.exists() and not self._settings_file.exists():
            told = f"{self.samples} is there, and nothing says how it was made; move it away"
            raise SettingError("sample_dir", self.samples.parent, told)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._take()
        except OSError as error:
            told = f"cannot write {self.folder}: {error.strerror}"
            raise SettingError("sample_dir", self.samples.parent, told) from error
        self._check_settings()
        if self.finished:
            self.parts.remove()
            return np.zeros(0, dtype=np.int64)
        write_array(self.folder / "labels.npy", self.job.labels)
        self.parts.clean()
        return np.flatnonzero(self.parts.places(self.job.images)[:, 0] < 0)

    def finish(self, bar: Bar, *, save_png: bool) -> None:
        """Makes the files of all images, the npz file last, and removes the parts.

        Raises:
            UserError: a part is missing, or the disk does not take a file.
        """
        job, parts = self.job, self.parts
        places = parts.places(job.images)
        missing = int((places[:, 0] < 0).sum())
        if missing:
            raise UserError(f"{missing} images are missing: run the command again to draw them")
        codes = np.empty((job.images, job.model.tokens_per_image), dtype=np.int32)
        size = job.image_size_eval

        def pictures(pool: ThreadPoolExecutor) -> Iterator[NDArray[np.uint8]]:
            for images in parts.read(places):
                codes[images.indices] = images.codes
                if save_png:
                    self._save_png(images, pool)
                bar.update(len(images.indices))
                yield images.pictures
            write_array(self.folder / "codes.npy", codes)  # before the npz file is in its place

        with ThreadPoolExecutor(_PNG_THREADS) as pool:
            write_samples(self.samples, (job.images, size, size, 3), pictures(pool))
        parts.remove()

    def close(self) -> None:
        """Lets other processes take the folder."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    @property
    def _settings_file(self) -> Path:
        return self.folder / "job.json"

    def _take(self) -> None:
        """Locks the folder until `close`, or the process's end."""
        self._lock = os.open(self.folder, os.O_RDONLY)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            told = f"another process works on {self.folder}; wait for it, or end it"
            raise SettingError("sample_dir", self.samples.parent, told) from error

    def _check_settings(self) -> None:
        settings = self.job.settings()
        if not self._settings_file.exists():
            content = json.dumps(settings, indent=1).encode()
            write_whole(self._settings_file, lambda file: file.write_bytes(content))
            return
        try:
            there: Any = json.loads(self._settings_file.read_bytes())
            different = [name for name in settings if there.get(name) != settings[name]]
        except (ValueError, AttributeError) as error:
            raise UserError(
                f"{self._settings_file} is damaged: remove it, or choose another folder"
            ) from error
        if different:
            name = different[0]
            told = (
                f"{self.folder.name} is of another job, whose {name} is {there.get(name)} and not "
                f"{settings[name]}; choose another folder, or remove it"
            )
            raise SettingError("sample_dir", self.samples.parent, told)

    def _save_png(self, images: Images, pool: ThreadPoolExecutor) -> None:
        def save(one: tuple[int, NDArray[np.uint8]]) -> None:
            index, picture = one
            write_whole(
                self.folder / f"{index:06d}.png",
                lambda file: Image.fromarray(picture).save(file, format="PNG"),
            )

        list(pool.map(save, zip(images.indices, images.pictures, strict=True)))
