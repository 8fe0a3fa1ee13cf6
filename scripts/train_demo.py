"""Trains the demo model: first the tokenizer, then the transformer, on emoji drawn on the fly. Minutes on one GPU.

    python scripts/train_demo.py                  # both stages; resumes what it finds in --run-dir
    python scripts/train_demo.py --minutes 9      # stops in time, to be resumed by the same command

Every step depends on nothing but the state it starts from and (seed, step), so that an interrupted run ends with the very weights
of an unbroken one on the same machine and versions.
"""

import argparse
import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch._inductor.config
import torch.nn.functional as F
from emoji_data import DEFAULT_FONT, IMAGE_SIZE, load_sprites, render_batch, step_generator
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from autoregressive.common.errors import OneLineParser, UserError, run_command
from autoregressive.models.gpt import GPT_models
from tokenizer.tokenizer_image.vq_model import VQ_CONFIGS, VQ_models, VQModel

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Plan:
    """The hyperparameters of both stages. Defaults are those of the shipped weights."""

    seed: int = 0
    ema_decay: float = 0.999
    tokenizer_steps: int = 12_000
    tokenizer_batch: int = 64
    tokenizer_rate: float = 4e-4
    edge_weight: float = 1.0  # weight of the loss on image gradients, at full and half size
    adversarial_weight: float = 0.0  # share of the reconstruction's gradient, at the pixels; 0 trains no discriminator
    adversarial_start: float = 0.5  # share of the steps after which the discriminator takes part
    revive_every: int = 100  # steps between replacements of codebook entries that nothing used
    gpt_steps: int = 16_000
    gpt_batch: int = 256
    gpt_rate: float = 1e-3
    gpt_weight_decay: float = 0.05


class Stage(Protocol):
    """One thing to train. `step` changes the state in place and returns figures to log."""

    steps: int

    def step(self, step: int) -> dict[str, Tensor]:
        """Runs one optimisation step."""

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The reverse."""

    def weights(self) -> dict[str, Tensor]:
        """What is shipped: the averaged weights."""


def learning_rate(peak: float, step: int, steps: int, warmup: int = 300) -> float:
    """Linear warm-up, then half a cosine down to 1 % of the peak."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return peak * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress)))


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Sets the learning rate of every group."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def edge_loss(made: Tensor, wanted: Tensor) -> Tensor:
    """Mean absolute difference of horizontal and vertical image gradients, at full and at half size."""
    total = made.new_zeros(())
    for _ in range(2):
        difference = made - wanted
        total = total + difference.diff(dim=-1).abs().mean() + difference.diff(dim=-2).abs().mean()
        made, wanted = F.avg_pool2d(made, 2), F.avg_pool2d(wanted, 2)
    return total


def patch_discriminator(width: int = 64) -> nn.Module:
    """A PatchGAN: pixels [n, 3, 128, 128] -> scores [n, 1, 15, 15] of overlapping patches."""
    layers: list[nn.Module] = [nn.Conv2d(3, width, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
    for i in (1, 2):
        layers += [
            nn.Conv2d(width * i, width * i * 2, 4, stride=2, padding=1),
            nn.GroupNorm(8, width * i * 2),
            nn.LeakyReLU(0.2),
        ]
    return nn.Sequential(*layers, nn.Conv2d(width * 4, 1, 4, padding=1))


def gradient_ratio(reconstruction: Tensor, adversarial: Tensor, pixels: Tensor) -> Tensor:
    """What brings the adversarial gradient at the pixels to the length of the reconstruction's (after VQGAN's adaptive weight)."""
    wanted = torch.autograd.grad(reconstruction, pixels, retain_graph=True)[0].norm()
    given = torch.autograd.grad(adversarial, pixels, retain_graph=True)[0].norm()
    return wanted / (given + 1e-8)


class TokenizerStage:
    """Reconstruction (absolute error, edges), codebook and, when weighted, adversarial loss."""

    def __init__(self, plan: Plan, sprites: Tensor) -> None:
        self.plan, self.sprites, self.device = plan, sprites, sprites.device
        self.steps = plan.tokenizer_steps
        torch.manual_seed(plan.seed)
        self.model = VQ_models["VQ-demo"]().to(self.device, memory_format=torch.channels_last)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), betas=(0.9, 0.95), weight_decay=1e-4)
        self.average = AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(plan.ema_decay))
        self.discriminator = patch_discriminator().to(self.device, memory_format=torch.channels_last)
        self.discriminator_optimizer = torch.optim.AdamW(self.discriminator.parameters(), betas=(0.5, 0.9), weight_decay=0.0)
        self.used = torch.zeros(self.model.config.codebook_size, dtype=torch.int64, device=self.device)
        on_gpu = self.device.type == "cuda"
        self.encode: Callable[[Tensor], Tensor] = torch.compile(self._encode) if on_gpu else self._encode
        self.decode: Callable[[Tensor], Tensor] = torch.compile(self.model.decode) if on_gpu else self.model.decode

    def _encode(self, pixels: Tensor) -> Tensor:
        return self.model.quant_conv(self.model.encoder(pixels))

    def step(self, step: int) -> dict[str, Tensor]:
        """See `Stage`."""
        plan, model = self.plan, self.model
        rate = learning_rate(plan.tokenizer_rate, step, self.steps)
        set_rate(self.optimizer, rate)
        set_rate(self.discriminator_optimizer, rate)
        pixels, _ = render_batch(self.sprites, plan.tokenizer_batch, plan.seed, "tokenizer", step)
        pixels = pixels.contiguous(memory_format=torch.channels_last)
        with torch.autocast(self.device.type, torch.bfloat16):
            features = self.encode(pixels)
        quantized = model.quantize(features.float())
        with torch.autocast(self.device.type, torch.bfloat16):
            made = self.decode(quantized.vectors).float()
        absolute = (made - pixels).abs().mean()
        edges = edge_loss(made, pixels)
        loss = absolute + plan.edge_weight * edges + quantized.codebook_loss
        figures = {"absolute": absolute.detach(), "edges": edges.detach(), "codebook": quantized.codebook_loss.detach()}
        adversarial = plan.adversarial_weight > 0 and step >= plan.adversarial_start * self.steps
        if adversarial:
            with torch.autocast(self.device.type, torch.bfloat16):
                fooled = -self.discriminator(made).float().mean()
            balance = gradient_ratio(absolute + plan.edge_weight * edges, fooled, made)
            loss = loss + plan.adversarial_weight * balance * fooled
            figures["fooled"] = fooled.detach()
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        self.optimizer.step()
        if adversarial:
            figures["discriminator"] = self._train_discriminator(pixels, made.detach()).detach()
        self._revive_unused(step, quantized.codes, features)
        self.average.update_parameters(model)
        figures["codes used"] = (self.used > 0).sum()
        return figures

    def _train_discriminator(self, real: Tensor, made: Tensor) -> Tensor:
        with torch.autocast(self.device.type, torch.bfloat16):
            scores_real, scores_made = self.discriminator(real).float(), self.discriminator(made).float()
        loss = F.relu(1 - scores_real).mean() + F.relu(1 + scores_made).mean()
        self.discriminator_optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.discriminator_optimizer.step()
        return loss

    @torch.no_grad()
    def _revive_unused(self, step: int, codes: Tensor, features: Tensor) -> None:
        """Moves entries that no feature chose for a while onto features of this batch; stops at half of the steps."""
        self.used += torch.bincount(codes.flatten(), minlength=len(self.used))
        if (step + 1) % self.plan.revive_every or step > self.steps / 2:
            return
        vectors = F.normalize(features.float(), dim=1).permute(0, 2, 3, 1).flatten(0, 2)
        generator = step_generator(self.plan.seed, "revive", step, self.device)
        chosen = torch.randint(len(vectors), (len(self.used),), generator=generator, device=self.device)
        embedding = self.model.quantize.embedding.weight
        embedding.copy_(torch.where((self.used == 0)[:, None], vectors[chosen], embedding))
        self.used.zero_()

    def _parts(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "average": self.average,
            "optimizer": self.optimizer,
            "discriminator": self.discriminator,
            "discriminator_optimizer": self.discriminator_optimizer,
        }

    def state_dict(self) -> dict[str, Any]:
        """See `Stage`."""
        return {name: part.state_dict() for name, part in self._parts().items()} | {"used": self.used}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `Stage`."""
        for name, part in self._parts().items():
            part.load_state_dict(state[name])
        self.used.copy_(state["used"])

    def weights(self) -> dict[str, Tensor]:
        """See `Stage`."""
        return {key: value for key, value in self.average.module.state_dict().items() if key != "quantize.codebook_used"}


class GPTStage:
    """Next-code prediction on the tokenizer's codes; one label in ten is dropped, so that guidance works."""

    def __init__(self, plan: Plan, sprites: Tensor, tokenizer: VQModel) -> None:
        self.plan, self.sprites, self.device = plan, sprites, sprites.device
        self.steps = plan.gpt_steps
        grid = IMAGE_SIZE // tokenizer.config.downsample_size
        torch.manual_seed(plan.seed)
        self.model = GPT_models["GPT-demo"](
            vocab_size=tokenizer.config.codebook_size, block_size=grid**2, num_classes=len(sprites),
            token_dropout_p=0.0, resid_dropout_p=0.0, ffn_dropout_p=0.0,  # pictures never repeat: nothing to overfit
        ).to(self.device)  # fmt: skip
        self.model.init_weights(step_generator(plan.seed, "gpt weights", 0, self.device))
        matrices = [p for p in self.model.parameters() if p.dim() > 1]
        gains = [p for p in self.model.parameters() if p.dim() == 1]
        groups = [{"params": matrices, "weight_decay": plan.gpt_weight_decay}, {"params": gains, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))
        self.average = AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(plan.ema_decay))
        self.encode: Callable[[Tensor], Tensor] = lambda pixels: tokenizer.encode(pixels).codes.flatten(1)
        self.loss: Callable[[Tensor, Tensor], Tensor] = self._loss
        if self.device.type == "cuda":
            self.encode, self.loss = torch.compile(self.encode), torch.compile(self._loss)

    def _loss(self, codes: Tensor, labels: Tensor) -> Tensor:
        logits = self.model(idx=codes[:, :-1], cond_idx=labels)  # [batch, tokens, vocab_size]
        return F.cross_entropy(logits.flatten(0, 1), codes.flatten())

    def step(self, step: int) -> dict[str, Tensor]:
        """See `Stage`."""
        set_rate(self.optimizer, learning_rate(self.plan.gpt_rate, step, self.steps))
        pixels, labels = render_batch(self.sprites, self.plan.gpt_batch, self.plan.seed, "gpt", step)
        torch.manual_seed(self.plan.seed * 2**32 + step)  # the dropped labels
        with torch.autocast(self.device.type, torch.bfloat16):
            with torch.no_grad():
                codes = self.encode(pixels.contiguous(memory_format=torch.channels_last))
            loss = self.loss(codes, labels)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.average.update_parameters(self.model)
        return {"loss": loss.detach(), "gradient norm": norm}

    def state_dict(self) -> dict[str, Any]:
        """See `Stage`."""
        return {name: getattr(self, name).state_dict() for name in ("model", "average", "optimizer")}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `Stage`."""
        for name in ("model", "average", "optimizer"):
            getattr(self, name).load_state_dict(state[name])

    def weights(self) -> dict[str, Tensor]:
        """See `Stage`."""
        return dict(self.average.module.state_dict())


def save_whole(path: Path, save: Callable[[Path], object]) -> None:
    """Writes through a temporary name, so that an interruption leaves the old file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".part")
    save(temporary)
    os.replace(temporary, path)


def train(name: str, stage: Stage, run_dir: Path, deadline: float, save_every: int) -> bool:
    """Runs a stage to its end or the deadline (a `time.monotonic` value), from the last saved state. True when it is done."""
    state_path, log_path = run_dir / f"{name}.pt", run_dir / f"{name}.jsonl"
    step = 0
    if state_path.exists():
        state = torch.load(state_path, weights_only=True)
        stage.load_state_dict(state["stage"])
        step = state["step"]
        print(f"{name}: resuming at step {step}", flush=True)
    started, first = time.monotonic(), step

    def save(path: Path) -> None:
        torch.save({"stage": stage.state_dict(), "step": step}, path)

    while step < stage.steps and time.monotonic() < deadline:
        figures = stage.step(step)
        step += 1
        if step % 200 == 0 or step == stage.steps:
            line = {"step": step} | {key: round(value.item(), 5) for key, value in figures.items()}
            line["steps_per_s"] = round((step - first) / (time.monotonic() - started), 2)
            print(f"{name}: {json.dumps(line)}", flush=True)
            with log_path.open("a") as log:
                log.write(json.dumps(line) + "\n")
        if step % save_every == 0:
            save_whole(state_path, save)
    save_whole(state_path, save)
    return step >= stage.steps


def export(weights: dict[str, Tensor], path: Path, description: str) -> None:
    """Writes weights in float16 as safetensors, whole or not at all."""
    tensors = {key: value.detach().to("cpu", torch.float16).contiguous() for key, value in weights.items()}
    metadata = {"description": description, "data": "rendered from Noto Color Emoji (SIL Open Font License 1.1)"}
    save_whole(path, lambda temporary: save_file(tensors, temporary, metadata=metadata))
    print(f"{path}: {path.stat().st_size / 2**20:.2f} MiB")


def load_tokenizer(path: Path, device: torch.device) -> VQModel:
    """The exported tokenizer, in float32."""
    tokenizer = VQ_models["VQ-demo"]()
    tensors = {key: value.float() for key, value in load_file(path).items()}
    missing, unexpected = tokenizer.load_state_dict(tensors, strict=False)
    assert missing == ["quantize.codebook_used"] and not unexpected, (missing, unexpected)
    return tokenizer.eval().requires_grad_(False).to(device, memory_format=torch.channels_last)


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", choices=["all", "tokenizer", "gpt"], default="all")
    parser.add_argument("--font", type=Path, default=DEFAULT_FONT, help="NotoColorEmoji.ttf (default: %(default)s)")
    parser.add_argument("--run-dir", type=Path, default=ROOT / "runs" / "demo", help="states to resume from, and logs")
    parser.add_argument("--output-dir", type=Path, default=ROOT / "pretrained_models", help="where the weights go")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop after so long; the same command resumes")
    parser.add_argument("--save-every", type=int, default=2000, metavar="STEPS")
    for field, default in Plan().__dict__.items():
        parser.add_argument(f"--{field.replace('_', '-')}", type=type(default), default=default, help="default: %(default)s")
    return parser.parse_args()


def main() -> None:
    """Trains what is not trained yet and exports it."""
    arguments = parse_arguments()
    plan = Plan(**{field: getattr(arguments, field) for field in Plan().__dict__})
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch._inductor.config.deterministic = True  # else reductions are tuned by timing, and the last bits vary
    torch.set_float32_matmul_precision("high")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: there is no GPU here; use --device cpu (hours)")
    deadline = time.monotonic() + 60 * arguments.minutes
    arguments.run_dir.mkdir(parents=True, exist_ok=True)
    device = torch.device(arguments.device)
    sprites = load_sprites(arguments.font).to(device)
    vq_path, gpt_path = arguments.output_dir / "demo_vq.safetensors", arguments.output_dir / "demo_gpt.safetensors"
    if arguments.stage in ("all", "tokenizer"):
        tokenizer_stage = TokenizerStage(plan, sprites)
        if not train("tokenizer", tokenizer_stage, arguments.run_dir, deadline, arguments.save_every):
            print("tokenizer: time is up; run the same command again to go on")
            return
        export(tokenizer_stage.weights(), vq_path, f"VQ-demo {VQ_CONFIGS['VQ-demo']}, {plan.tokenizer_steps} steps, seed {plan.seed}")
    if arguments.stage in ("all", "gpt"):
        if not vq_path.exists():
            raise UserError(f"{vq_path} is missing: train the tokenizer first (--stage tokenizer)")
        gpt_stage = GPTStage(plan, sprites, load_tokenizer(vq_path, device))
        if not train("gpt", gpt_stage, arguments.run_dir, deadline, arguments.save_every):
            print("gpt: time is up; run the same command again to go on")
            return
        export(gpt_stage.weights(), gpt_path, f"GPT-demo, {plan.gpt_steps} steps, seed {plan.seed}")


if __name__ == "__main__":
    run_command(main)
