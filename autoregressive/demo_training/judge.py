"""The judge of the demo model's images: a ResNet-18 that is trained on emoji renderings, never on
output of the model.

It has one class more than there are emoji, for pictures blurred to about a quarter of their size,
so that a blurred picture does not count as recognised.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autoregressive.demo_training.emoji_data import IMAGE_SIZE, render_batch

QUARTER = IMAGE_SIZE // 4
BLURRED = 8  # one in so many of the judge's pictures


def blurred(pixels: Tensor, size: int = QUARTER) -> Tensor:
    """The pictures averaged down to `size` and smoothly enlarged again."""
    small = F.interpolate(pixels, size=(size, size), mode="area")
    return F.interpolate(small, size=pixels.shape[-2:], mode="bilinear")


def new_classifier(emoji: int) -> nn.Module:
    """A ResNet-18 for so many emoji and, as its last class, blur."""
    import torchvision  # brings a compiler, which looks for a folder of the user's

    return torchvision.models.resnet18(num_classes=emoji + 1)


def train_classifier(sprites: Tensor, steps: int, batch: int, seed: int) -> nn.Module:
    """A classifier that knows the emoji and blur, in eval mode."""
    device, blur_class = sprites.device, len(sprites)
    torch.manual_seed(seed)
    classifier = new_classifier(len(sprites)).to(device)
    optimizer = torch.optim.AdamW(classifier.parameters(), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=steps)
    classifier.train()
    for step in range(steps):
        pixels, labels = render_batch(sprites, batch, seed, "classifier training", step)
        share = batch // BLURRED
        pixels[:share] = blurred(pixels[:share], QUARTER - 6 + step % 13)
        labels[:share] = blur_class
        # Most CPUs multiply in bf16 slowly.
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = F.cross_entropy(classifier(pixels).float(), labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        if (step + 1) % 200 == 0:
            print(f"classifier: step {step + 1} of {steps}, loss {loss.item():.4f}", flush=True)
    return classifier.eval()


@torch.no_grad()
def in_batches(function: Callable[[Tensor], Tensor], inputs: Tensor, batch: int = 256) -> Tensor:
    """The function's outputs for all inputs, a batch at a time."""
    return torch.cat([function(part) for part in inputs.split(batch)])


def recognised(classifier: nn.Module, pixels: Tensor, labels: Tensor) -> Tensor:
    """Float [n]: 1 for each picture in which the classifier sees its label, 0 for the others."""
    return (in_batches(lambda part: classifier(part).argmax(dim=-1), pixels) == labels).float()
