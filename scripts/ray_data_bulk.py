"""An example of Ray Data: any number of images on the workers of a Ray cluster. They become Parquet
files with the columns `id`, `label` and `png`.

    .venv/bin/pip install "ray[data]==2.60.0"
    python scripts/ray_data_bulk.py images --gpt-model GPT-XL --images 50000 --workers 8 --gpus 1

Image k is a function of (seed, k) alone: its class is k modulo the number of classes, and its draws
are keyed by both. So it depends neither on the number of workers nor on the batch that it is in. If
a worker is lost, Ray has another one draw its batches again.
"""

import argparse
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from autoregressive.cli.command import OneLineParser, run_command, slow_imports

with slow_imports(__name__):
    import numpy as np
    from PIL import Image

    from autoregressive.benchmarks.script import whole_number
    from autoregressive.output.images import picture_grid
    from autoregressive.serve.engine.engine_config import EngineConfig
    from autoregressive.serve.pipeline import Pipeline


class Sampler:
    """An engine in a process of its own, which draws batch after batch."""

    def __init__(self, gpt_model: str, seed: int) -> None:
        self._pipe = Pipeline.from_pretrained(gpt_model, engine=EngineConfig(deterministic=True))
        self._params = self._pipe.defaults.updated(seed=seed)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Draws the images of these ids. The next call waits until all are drawn."""
        engine, labels = self._pipe.engine, batch["id"] % len(self._pipe.classes)
        requests = [
            engine.submit(int(label), self._params, first_image=int(index))
            for label, index in zip(labels, batch["id"], strict=True)
        ]
        while not all(request.ended for request in requests):
            engine.step()
        files = []
        for request in requests:
            if request.codes is None:
                raise RuntimeError(request.error)
            # Alone: beside other images the last bits of its pixels would depend on their number.
            picture = picture_grid(self._pipe.decode(request.codes)).permute(1, 2, 0).contiguous()
            file = io.BytesIO()
            Image.fromarray(picture.numpy()).save(file, "PNG")
            files.append(file.getvalue())
        return {"id": batch["id"], "label": labels, "png": np.array(files, dtype=object)}


def main(argv: Sequence[str] | None = None) -> None:
    """Reads the flags, and draws."""
    form = argparse.RawDescriptionHelpFormatter
    parser = OneLineParser(description=__doc__, formatter_class=form)
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="for the Parquet files")
    parser.add_argument(
        "--gpt-model", default="GPT-demo", metavar="NAME", help="the model (default: %(default)s)"
    )
    for flag, least, default, told in (
        ("--images", 1, 64, "how many images"),
        ("--seed", 0, 0, "chooses the images"),
        ("--workers", 1, 2, "workers, each with an engine"),
        ("--gpus", 0, 0, "GPUs of a worker"),
        ("--batch-size", 1, 256, "images of a call"),
    ):
        parser.add_argument(
            flag,
            type=whole_number(least),
            default=default,
            metavar="N",
            help=f"{told} (default: %(default)s)",
        )
    said = parser.parse_args(argv)
    with slow_imports("__main__" if argv is None else __name__):
        import ray
    ray.data.range(said.images).map_batches(
        Sampler,
        fn_constructor_kwargs={"gpt_model": said.gpt_model, "seed": said.seed},
        compute=ray.data.ActorPoolStrategy(size=said.workers),
        batch_size=said.batch_size,
        num_cpus=0.5,  # with 1 each, as many workers as CPUs would leave none to read and write
        num_gpus=said.gpus,
    ).write_parquet(str(said.folder.resolve()))


if __name__ == "__main__":
    run_command(main)
