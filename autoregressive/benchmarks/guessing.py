"""Lookahead with guesses of a chosen quality, for benchmarks and tests: random weights keep too few
guesses to tell what a trained model's would be worth.

The guesses are the tokens that the same requests have drawn before, a share of them wrong. Which
ones are wrong follows from a seed, so the number of passes is reproducible. Tokens do not depend on
guesses, so they are those of any other run.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from typing_extensions import override

from autoregressive.devices import ieee_float32
from autoregressive.models.generate import NonFiniteLogitsError
from autoregressive.models.gpt import Transformer
from autoregressive.models.sampling_params import SamplingParams
from autoregressive.serve.engine.batch import Batch, BatchShape, uploaded
from autoregressive.serve.engine.engine import Engine
from autoregressive.serve.engine.engine_config import EngineConfig
from autoregressive.serve.engine.model_runner import ModelRunner
from autoregressive.serve.engine.request import Request

_SEEDS = 32  # that are tried, for a number of passes


class GuessingRunner(ModelRunner):
    """Replaces all guesses, at the end of each pass, by those that `offer` was given.

    It is part of the captured pass, to which it adds two small kernels: `guess`. A few more come
    before each span.
    """

    def __init__(
        self, gpt: Transformer, shape: BatchShape, num_pages: int, config: EngineConfig
    ) -> None:
        super().__init__(gpt, shape, num_pages, config)
        lines = (shape.num_slots + 1, shape.tokens)
        self.offered = torch.zeros(lines, dtype=torch.int32, device=self.device)  # by slot
        self._places = torch.arange(shape.tokens, dtype=torch.int32, device=self.device)
        # Line 0 is for images that nothing was recorded of.
        self._seeds = torch.full((1,), -1, dtype=torch.int64, device=self.device)  # [recorded]
        self._image_indices = torch.full((1,), -1, dtype=torch.int32, device=self.device)
        self._guesses = torch.zeros((1, shape.tokens), dtype=torch.int32, device=self.device)

    def offer(self, finished: Sequence[Request], right_share: float, seed: int = 0) -> None:
        """Takes the codes of finished requests for the guesses of the next ones with the same seeds
        and image indices. Forgets those of earlier calls.

        Args:
            finished: no two of their images have the same seed and index.
            right_share: the probability that a guess is right.
            seed: chooses the wrong guesses.
        """
        keys = [(-1, -1)]
        for each in finished:
            keys += [(each.params.seed, each.first_image + image) for image in range(each.params.n)]
        assert len(set(keys)) == len(keys), "two images have the same seed and index"
        codes = torch.cat([each.codes for each in finished if each.codes is not None])
        guesses = spoiled(codes, right_share, self.model.vocab_size, seed)
        seeds, image_indices = zip(*keys, strict=True)
        self._seeds = torch.tensor(seeds, dtype=torch.int64, device=self.device)
        self._image_indices = torch.tensor(image_indices, dtype=torch.int32, device=self.device)
        self._guesses = uploaded(torch.cat([torch.zeros_like(guesses[:1]), guesses]), self.device)

    @torch.no_grad()
    def guess(self, batch: Batch) -> None:
        """Writes the guesses of all slots."""
        unknown = self._places >= batch.lengths[:, None]  # [slots + 1, tokens]
        torch.where(unknown, self.offered, batch.codes, out=batch.codes)

    @override
    @torch.no_grad()
    @ieee_float32()
    def run(self, batch: Batch, rows: int, images: int, passes: int, window: int) -> None:
        # Requests start between spans, and only the device knows what the batch holds by now.
        same = (self._seeds == batch.seeds[:images, None]) & (
            self._image_indices == batch.image_indices[:images, None]
        )  # [images, recorded]
        lines = (same * torch.arange(len(self._seeds), device=self.device)).sum(dim=1)
        self.offered.index_copy_(0, batch.image_slots[:images].long(), self._guesses[lines])
        self.guess(batch)
        super().run(batch, rows, images, passes, window)

    @override
    def _pass(self, batch: Batch, sequences: int, window: int) -> None:
        super()._pass(batch, sequences, window)
        self.guess(batch)


def spoiled(codes: Tensor, right_share: float, vocab_size: int, seed: int) -> Tensor:
    """The codes [images, tokens], of which a share stays and the others become wrong."""
    right = right_guesses(codes.shape, right_share, seed)
    generator = torch.Generator().manual_seed(seed)
    shift = torch.randint(1, vocab_size, codes.shape, generator=generator, dtype=codes.dtype)
    return torch.where(right, codes, (codes + shift) % vocab_size)


def right_guesses(shape: Sequence[int], right_share: float, seed: int) -> Tensor:
    """Which guesses are right: bool [images, tokens]."""
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) < right_share


def fewest_passes(right: Tensor, window: int) -> int:
    """The passes that images take whose guesses are right where it is said, all together.

    Args:
        right: bool [images, tokens].
    """
    images, tokens = right.shape
    wrong = torch.where(right, tokens, torch.arange(tokens))
    # [images, tokens]: the first wrong guess from here on
    next_wrong = wrong.flip(1).cummin(dim=1).values.flip(1)
    positions, passes = torch.zeros(images, dtype=torch.int64), 0
    while len(positions) > 0:
        passes += len(positions)
        positions = torch.minimum(
            next_wrong.gather(1, positions[:, None])[:, 0] + 1, positions + window
        )
        running = positions < tokens
        positions, next_wrong = positions[running], next_wrong[running]
    return passes


def seed_for(shape: Sequence[int], tokens: float, window: int) -> int:
    """Of some seeds, that with which passes keep most nearly so many tokens.

    Args:
        shape: images and their tokens.
        tokens: as `share_for` was given.
    """
    wanted = shape[0] * shape[1] / tokens
    share = share_for(tokens, window)
    return min(
        range(_SEEDS),
        key=lambda seed: abs(fewest_passes(right_guesses(shape, share, seed), window) - wanted),
    )


def tokens_a_pass(right_share: float, window: int) -> float:
    """The tokens that a pass keeps on average, where each guess is right with that probability."""
    return sum(right_share**held for held in range(window))


def share_for(tokens: float, window: int) -> float:
    """The share of right guesses with which a pass keeps so many tokens on average: the inverse of
    `tokens_a_pass`.

    Raises:
        ValueError: a pass of that window keeps fewer, or always more.
    """
    if not 1 <= tokens <= window:
        raise ValueError(f"a pass of {window} positions keeps 1 to {window} tokens, not {tokens}")
    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if tokens_a_pass(middle, window) < tokens else (low, middle)
    return high


def draw_all(
    engine: Engine, labels: Sequence[int], params: Sequence[SamplingParams]
) -> list[Request]:
    """Draws a request for each label and waits for all of them. They have finished. Where all have
    one `n`, their images are numbered through, as those of `Engine.generate`.

    Raises:
        NonFiniteLogitsError: the model gave NaN or infinite logits.
    """
    pairs = enumerate(zip(labels, params, strict=True))
    requests = [engine.submit(label, each, index * each.n) for index, (label, each) in pairs]
    while not all(request.ended for request in requests):
        engine.step()
    failure = next((request.error for request in requests if request.error is not None), None)
    if failure is not None:
        raise NonFiniteLogitsError(failure)
    return requests


def kept_a_pass(requests: Sequence[Request]) -> float:
    """The tokens that a pass of an image kept on average, of finished requests."""
    tokens = sum(request.tokens for request in requests)
    return tokens / (tokens - sum(request.accepted for request in requests))
