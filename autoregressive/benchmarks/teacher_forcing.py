"""Steps of a runner along given codes, so that logits of every position can be compared whatever
would have been drawn.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from autoregressive.serve.engine.batch import Batch
from autoregressive.serve.engine.model_runner import ModelRunner


class TeacherForced:
    """Guided images along given codes; each has a conditional row and an unconditional one. Nothing
    is drawn.

    Args:
        runner: without graphs, with at least two rows an image and the pages of all their tokens.
        codes: int32 [images, tokens]
        labels: of the images.
    """

    def __init__(self, runner: ModelRunner, codes: Tensor, labels: Sequence[int]) -> None:
        self.runner, self.rows = runner, 2 * len(labels)
        # no image in use: the draw leaves all alone
        self.batch = batch = Batch(runner.shape, runner.device)
        batch.codes[: len(labels)] = codes.to(runner.device)
        of_rows = [
            label for image_label in labels for label in (image_label, runner.model.num_classes)
        ]
        batch.labels[: self.rows] = torch.tensor(of_rows, dtype=torch.int32)
        batch.row_slots[: self.rows] = torch.arange(self.rows) // 2
        batch.limits[: self.rows] = runner.shape.tokens
        batch.page_table[: self.rows] = torch.arange(self.rows * runner.shape.pages_per_row).view(
            self.rows, -1
        )

    @torch.no_grad()
    def logits(self, position: int | Tensor) -> Tensor:
        """Float32 [images, 2, vocab_size], conditional and unconditional; the positions before must
        have been run.

        Args:
            position: of all images, or [images], each one's own.
        """
        self.batch.positions[: self.rows].view(-1, 2).T[:] = position
        self.runner.run(self.batch, self.rows, self.rows, passes=1, window=1)
        return self.runner.layers_for(self.rows).logits.view(self.rows // 2, 2, -1).clone()

    def guided_logits(self, position: int | Tensor, scale: float) -> Tensor:
        """What the engine would draw each image's token from, before temperature
        and filters.

        Args:
            position: as of `logits`.
            scale: of the guidance; 1: the conditional logits.

        Returns:
            float32 [images, vocab_size]
        """
        conditional, unconditional = self.logits(position).unbind(1)
        return unconditional + (conditional - unconditional) * scale
