"""The stages of the demo model's training, tokenizer and transformer: steps that depend on (seed,
step) and their state alone.
"""

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from typing_extensions import override

from autoregressive.demo_training.emoji_data import (
    IMAGE_SIZE,
    LARGEST_SEED,
    render_batch,
    step_generator,
)
from autoregressive.errors import SettingError
from autoregressive.models.demo_classes import DEMO_EMOJI
from autoregressive.models.gpt import GPT_models, Transformer
from autoregressive.weights.checkpoint import load_weights
from tokenizer.tokenizer_image.vq_model import VQ_models, VQModel


def _told(default: Any, meaning: str) -> Any:
    """A field that says what it means, which train_demo.py's --help repeats."""
    return field(default=default, metadata={"help": meaning})


@dataclass(frozen=True)
class Plan:
    """The hyperparameters of both stages. Defaults are those of the shipped weights."""

    seed: int = _told(0, "of the first weights, the renderings and the dropout")
    ema_decay: float = _told(
        0.999, "what the averaged weights, which are shipped, keep of themselves at each step"
    )
    tokenizer_steps: int = _told(12_000, "of the tokenizer's training")
    tokenizer_batch: int = _told(64, "renderings of a step")
    tokenizer_rate: float = _told(6e-4, "peak learning rate")
    edge_weight: float = _told(1.0, "weight of the loss on image gradients, at full and half size")
    revive_every: int = _told(
        100, "steps between replacements of codebook entries that nothing used"
    )
    gpt_steps: int = _told(14_000, "of the transformer's training")
    gpt_batch: int = _told(192, "renderings of a step")
    gpt_rate: float = _told(1e-3, "peak learning rate")
    gpt_weight_decay: float = _told(0.05, "AdamW's")
    class_dropout: float = _told(0.1, 'share of labels replaced by "no class"')

    def __post_init__(self) -> None:
        """Refuses a number that a stage would stumble over only once it runs.

        Raises:
            SettingError: there is one.
        """
        allowed = {
            "seed": (0 <= self.seed <= LARGEST_SEED, f"0 to {LARGEST_SEED}"),
            "ema_decay": (0 <= self.ema_decay < 1, "0 or more and below 1"),
            "class_dropout": (0 <= self.class_dropout <= 1, "0 to 1"),
        }
        for name, value in asdict(self).items():
            whole = (value >= 1, "1 or more")
            finite = (0 <= value < math.inf, "a finite number, 0 or more")
            holds, what = allowed.get(name, whole if isinstance(value, int) else finite)
            if not holds:
                raise SettingError(name, value, f"must be {what}")


def learning_rate(peak: float, step: int, steps: int, warmup: int = 300) -> float:
    """Linear warm-up, then half a cosine down to 1 % of the peak."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return peak * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress)))


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Sets the learning rate of every group."""
    for group in optimizer.param_groups:
        group["lr"].fill_(rate)


def edge_loss(made: Tensor, wanted: Tensor) -> Tensor:
    """Mean absolute difference of horizontal and vertical image gradients, at full and at half
    size.
    """
    total = made.new_zeros(())
    for _ in range(2):
        difference = made - wanted
        total = total + difference.diff(dim=-1).abs().mean() + difference.diff(dim=-2).abs().mean()
        made, wanted = F.avg_pool2d(made, 2), F.avg_pool2d(wanted, 2)
    return total


def mixed_precision(device: torch.device) -> torch.autocast:
    """Products in bf16 on a GPU; in float32 on a CPU, where torch's bf16 convolutions can be
    fifteen times slower (no AVX-512).
    """
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


class Captured:
    """An optimisation step as a function of tensors, captured as a CUDA graph: the host's launches
    take longer.

    The first calls run as they are, then one is captured (which does not execute it), and from then
    on the graph is replayed on copies of the inputs. The function must not wait for the device.
    """

    def __init__(self, function: Callable[..., dict[str, Tensor]], warm_up: int = 3) -> None:
        self.function, self.remaining = function, warm_up
        self.stream = torch.cuda.Stream()
        self.graph: torch.cuda.CUDAGraph | None = None
        self.inputs: tuple[Tensor, ...] = ()
        self.outputs: dict[str, Tensor] = {}

    def __call__(self, *inputs: Tensor) -> dict[str, Tensor]:
        """What the function returns; valid until the next call."""
        if self.remaining > 0:
            self.remaining -= 1
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                outputs = self.function(*inputs)
            torch.cuda.current_stream().wait_stream(self.stream)
            return outputs
        if self.graph is None:
            self.inputs = tuple(value.clone() for value in inputs)
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph, stream=self.stream):
                self.outputs = self.function(*self.inputs)
        for mine, given in zip(self.inputs, inputs, strict=True):
            mine.copy_(given)
        self.graph.replay()
        return self.outputs


def compiled(function: Callable[..., Tensor], device: torch.device) -> Callable[..., Tensor]:
    """The function compiled for a GPU, as it is elsewhere."""
    return torch.compile(function, dynamic=False) if device.type == "cuda" else function


def demo_transformer(tokenizer: VQModel) -> Transformer:
    """The transformer of a tokenizer's codes, on torch's current device."""
    config = tokenizer.config
    return GPT_models["GPT-demo"](
        vocab_size=config.codebook_size,
        block_size=(IMAGE_SIZE // config.downsample_size) ** 2,
        num_classes=len(DEMO_EMOJI),
    )


def load_tokenizer(path: Path, device: torch.device) -> VQModel:
    """The exported tokenizer, in float32."""
    with torch.device("meta"):
        tokenizer = VQ_models["VQ-demo"]()
    load_weights(tokenizer, path, device=device, dtype=torch.float32)
    tokenizer.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return tokenizer.eval().requires_grad_(False)


class TrainingStage(ABC):
    """One thing to train: a model, its optimizer, and the averaged weights that are shipped.

    Args:
        model: on the sprites' device.
        groups: the model's parameters, as the optimizer takes them.
        update: an optimisation step; `self.update` carries it out.

    Attributes:
        steps: how many the training has.
        made_with: what a saved state must have been made with to be resumed.
        average: the exponential moving average of the model's parameters, by name.
        others: further tensors of a saved state, by name.
    """

    def __init__(
        self,
        plan: Plan,
        sprites: Tensor,
        steps: int,
        model: nn.Module,
        groups: Any,
        update: Callable[..., dict[str, Tensor]],
    ) -> None:
        self.plan, self.sprites, self.device, self.steps = plan, sprites, sprites.device, steps
        self.made_with: dict[str, Any] = asdict(plan)
        self.others: dict[str, Tensor] = {}
        self.model, on_gpu = model, self.device.type == "cuda"
        # The rate is a tensor on the device, so that a captured step sees it change.
        rate = torch.zeros((), device=self.device)
        self.optimizer = torch.optim.AdamW(
            groups, lr=rate, betas=(0.9, 0.95), weight_decay=1e-4, fused=True, capturable=on_gpu
        )
        self.average = {name: value.detach().clone() for name, value in model.named_parameters()}
        self.update = Captured(update) if on_gpu else update

    @abstractmethod
    def step(self, step: int) -> dict[str, Tensor]:
        """Runs one optimisation step, which changes the state in place. Returns figures to log."""

    def descend(self, loss: Tensor) -> Tensor:
        """Moves the parameters down the loss, and the averages towards them; returns the norm of
        the gradient.
        """
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(
                list(self.average.values()), list(self.model.parameters()), 1 - self.plan.ema_decay
            )
        return norm

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "average": self.average,
            **self.others,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Copies a state that `state_dict` gave into the tensors that are in use."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        for kept, saved in ((self.average, state["average"]), (self.others, state)):
            for name, value in kept.items():
                value.copy_(saved[name])


class TokenizerStage(TrainingStage):
    """Reconstruction (absolute error and edges) and codebook loss."""

    model: VQModel

    def __init__(self, plan: Plan, sprites: Tensor) -> None:
        torch.manual_seed(plan.seed)
        model = VQ_models["VQ-demo"]().to(sprites.device)
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        super().__init__(
            plan, sprites, plan.tokenizer_steps, model, model.parameters(), self._update
        )
        self.used = torch.zeros(model.config.codebook_size, dtype=torch.bool, device=self.device)
        self.others["used"] = self.used
        self.encode = compiled(lambda pixels: model.quant_conv(model.encoder(pixels)), self.device)
        self.decode = compiled(model.decode, self.device)

    @override
    def step(self, step: int) -> dict[str, Tensor]:
        plan = self.plan
        set_rate(self.optimizer, learning_rate(plan.tokenizer_rate, step, self.steps))
        pixels, _ = render_batch(self.sprites, plan.tokenizer_batch, plan.seed, "tokenizer", step)
        figures = dict(self.update(pixels.contiguous(memory_format=torch.channels_last)))
        vectors, codes = figures.pop("vectors"), figures.pop("codes")
        self.used[codes] = True
        figures["codes used"] = self.used.sum()
        if (step + 1) % plan.revive_every == 0:
            if step < self.steps / 2:
                self._revive_unused(step, vectors)
            self.used.zero_()
        return figures

    def _update(self, pixels: Tensor) -> dict[str, Tensor]:
        with mixed_precision(self.device):
            features = self.encode(pixels)
        quantized = self.model.quantize(features.float())
        with mixed_precision(self.device):
            made = self.decode(quantized.vectors).float()
        absolute, edges = (made - pixels).abs().mean(), edge_loss(made, pixels)
        self.descend(absolute + self.plan.edge_weight * edges + quantized.codebook_loss)
        figures = {
            "absolute": absolute,
            "edges": edges,
            "codebook": quantized.codebook_loss,
            "vectors": features.permute(0, 2, 3, 1).flatten(0, 2).float(),  # [cells, dim]
            "codes": quantized.codes.flatten(),
        }
        return {name: value.detach() for name, value in figures.items()}

    @torch.no_grad()
    def _revive_unused(self, step: int, vectors: Tensor) -> None:
        """Moves entries that nothing chose since the last time onto features of this batch."""
        generator = step_generator(self.plan.seed, "revive", step, self.device)
        chosen = torch.randint(
            len(vectors), (len(self.used),), generator=generator, device=self.device
        )
        embedding = self.model.quantize.embedding.weight
        embedding.copy_(
            torch.where(self.used[:, None], embedding, F.normalize(vectors[chosen], dim=-1))
        )


class GPTStage(TrainingStage):
    """Next-code prediction on the tokenizer's codes; some labels are dropped, so that guidance
    works.
    """

    model: Transformer

    def __init__(self, plan: Plan, sprites: Tensor, tokenizer_path: Path) -> None:
        device = sprites.device
        tokenizer = load_tokenizer(tokenizer_path, device)
        # In eval mode the model's own dropout is off: images never repeat, so there is nothing to
        # overfit.
        model = demo_transformer(tokenizer).to(device).eval()
        model.init_weights(step_generator(plan.seed, "gpt weights", 0, device))
        parameters = list(model.parameters())
        groups = [
            {
                "params": [p for p in parameters if p.dim() > 1],
                "weight_decay": plan.gpt_weight_decay,
            },
            {"params": [p for p in parameters if p.dim() == 1], "weight_decay": 0.0},
        ]
        super().__init__(plan, sprites, plan.gpt_steps, model, groups, self._update)
        self.made_with["tokenizer"] = hashlib.sha256(tokenizer_path.read_bytes()).hexdigest()
        self.encode = compiled(lambda pixels: tokenizer.encode(pixels).codes.flatten(1), device)
        self.loss = compiled(self._loss, device)

    @override
    def step(self, step: int) -> dict[str, Tensor]:
        plan = self.plan
        set_rate(self.optimizer, learning_rate(plan.gpt_rate, step, self.steps))
        pixels, labels = render_batch(self.sprites, plan.gpt_batch, plan.seed, "gpt", step)
        generator = step_generator(plan.seed, "class dropout", step, self.device)
        dropped = (
            torch.rand(labels.shape, generator=generator, device=self.device) < plan.class_dropout
        )
        labels = torch.where(dropped, len(self.sprites), labels)
        return self.update(pixels.contiguous(memory_format=torch.channels_last), labels)

    def _update(self, pixels: Tensor, labels: Tensor) -> dict[str, Tensor]:
        with (
            mixed_precision(self.device),
            sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]),
        ):
            with torch.no_grad():
                codes = self.encode(pixels)
            loss = self.loss(codes, labels)
            norm = self.descend(loss)
        return {"loss": loss.detach(), "gradient norm": norm.detach()}

    def _loss(self, codes: Tensor, labels: Tensor) -> Tensor:
        logits = self.model(idx=codes[:, :-1], cond_idx=labels)  # [batch, tokens, vocab_size]
        return F.cross_entropy(logits.flatten(0, 1), codes.flatten())
