"""The demo model's data: 64 emoji rendered from the font Noto Color Emoji, each picture varied at
random, on any device.

The font (SIL Open Font License 1.1) is not part of this repository; Debian and Ubuntu have it in
`fonts-noto-color-emoji`. Pictures are made on the fly from (seed, stream, step): nothing is stored,
and the streams and steps of the default plans share no picture (a step's generator is seeded with a
32-bit checksum; the default plans were checked for collisions).
"""

import argparse
import zlib
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from autoregressive.errors import UserError
from autoregressive.models.demo_classes import DEMO_EMOJI

DEFAULT_FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
IMAGE_SIZE = 128
SPRITE_SIZE = 136
LARGEST_SEED = 2**31 - 1  # with a checksum below it, a generator's seed still fits 63 bits

_FONT_PIXELS = 109  # the font's bitmaps come in this one size
_SUPERSAMPLING = 2  # pictures are drawn this much larger, then averaged: smooth edges
_RGB_TO_YIQ = ((0.299, 0.587, 0.114), (0.596, -0.274, -0.322), (0.211, -0.523, 0.312))


def add_font(parser: argparse.ArgumentParser) -> None:
    """Adds --font: its value goes to `load_sprites`."""
    parser.add_argument(
        "--font",
        type=Path,
        default=DEFAULT_FONT,
        metavar="FILE.ttf",
        help="NotoColorEmoji.ttf, of Debian's package fonts-noto-color-emoji (default: "
        "%(default)s)",
    )


def load_sprites(font_path: Path) -> Tensor:
    """The 64 emoji, colours multiplied by opacity.

    Returns:
        float32 [64, 4, SPRITE_SIZE, SPRITE_SIZE], red, green, blue, opacity in 0..1.

    Raises:
        UserError: the font is missing, is not a colour emoji font, or lacks an emoji.
    """
    try:
        font = ImageFont.truetype(str(font_path), _FONT_PIXELS)
    except OSError as error:
        raise UserError(
            f"cannot read the font {font_path} ({error}): install Debian's package "
            "fonts-noto-color-emoji or pass --font"
        ) from error
    sprites = []
    for name, emoji in DEMO_EMOJI:
        canvas = Image.new("RGBA", (SPRITE_SIZE, SPRITE_SIZE))
        left, top, right, bottom = font.getbbox(emoji)
        corner = ((SPRITE_SIZE - right - left) / 2, (SPRITE_SIZE - bottom - top) / 2)
        ImageDraw.Draw(canvas).text(corner, emoji, font=font, embedded_color=True)
        if canvas.getbbox() is None:
            raise UserError(
                f"the font {font_path} draws nothing for {name}: it is not Noto Color Emoji"
            )
        sprites.append(torch.from_numpy(np.asarray(canvas, dtype=np.float32) / 255))
    rgba = torch.stack(sprites).permute(0, 3, 1, 2)
    return torch.cat([rgba[:, :3] * rgba[:, 3:], rgba[:, 3:]], dim=1).contiguous()


def step_generator(seed: int, stream: str, step: int, device: torch.device) -> torch.Generator:
    """A generator that depends on nothing but (seed, stream, step), so that a resumed run draws
    what an unbroken one would.
    """
    key = zlib.crc32(f"{seed}/{stream}/{step}".encode())
    return torch.Generator(device=device).manual_seed(seed * 2**32 + key)


def _hsv_to_rgb(hue: Tensor, saturation: Tensor, value: Tensor) -> Tensor:
    """[n] each, hue in turns -> [n, 3] in 0..1."""
    offsets = torch.tensor([5.0, 3.0, 1.0], device=hue.device)
    k = (offsets + hue[:, None] * 6) % 6
    strength = torch.minimum(k, 4 - k).clamp(0, 1)
    return value[:, None] * (1 - saturation[:, None] * strength)


def _hue_matrices(turns: Tensor) -> Tensor:
    """Colour matrices [n, 3, 3] that turn the hue by `turns` [n] and leave the brightness."""
    to_yiq = torch.tensor(_RGB_TO_YIQ, device=turns.device)
    cosine, sine = (2 * torch.pi * turns).cos(), (2 * torch.pi * turns).sin()
    zero, one = torch.zeros_like(turns), torch.ones_like(turns)
    rotation = torch.stack([one, zero, zero, zero, cosine, -sine, zero, sine, cosine], dim=-1).view(
        -1, 3, 3
    )
    return torch.linalg.inv(to_yiq) @ rotation @ to_yiq


def render(sprites: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
    """Draws one varied picture for each label: background, hue, scale, rotation, flip and place all
    differ.

    Args:
        sprites: what `load_sprites` gives, on the device to draw on.
        labels: int64 [n]
        generator: of the same device.

    Returns:
        float32 [n, 3, IMAGE_SIZE, IMAGE_SIZE] in -1..1
    """
    count, device = labels.shape[0], sprites.device

    def uniform(low: float, high: float) -> Tensor:
        return torch.rand(count, generator=generator, device=device) * (high - low) + low

    size = IMAGE_SIZE * _SUPERSAMPLING
    scale = uniform(0.72, 0.96)  # of the picture's side
    angle = uniform(-0.3, 0.3)  # radians
    flip = torch.where(uniform(0, 1) < 0.5, -1.0, 1.0)
    shift_x, shift_y = uniform(-1, 1) * (1.04 - scale), uniform(-1, 1) * (1.04 - scale)
    cosine, sine = angle.cos() / scale, angle.sin() / scale
    # From picture to sprite coordinates, both -1..1: undo the shift, the rotation, the scale, then
    # the flip.
    first = torch.stack(
        [cosine * flip, sine * flip, -(cosine * shift_x + sine * shift_y) * flip], dim=-1
    )
    second = torch.stack([-sine, cosine, sine * shift_x - cosine * shift_y], dim=-1)
    grid = F.affine_grid(
        torch.stack([first, second], dim=1), [count, 4, size, size], align_corners=False
    )
    drawn = F.grid_sample(
        sprites[labels], grid, mode="bilinear", padding_mode="zeros", align_corners=False
    )
    colours, opacity = drawn[:, :3], drawn[:, 3:]
    matrices = _hue_matrices(uniform(-0.04, 0.04)) * uniform(0.9, 1.05)[:, None, None]
    colours = torch.einsum("nij,njhw->nihw", matrices, colours)

    hue, saturation, value = uniform(0, 1), uniform(0.1, 0.55), uniform(0.7, 1.0)
    from_colour = _hsv_to_rgb(hue, saturation, value)
    hue = (hue + uniform(-0.12, 0.12)) % 1
    to_colour = _hsv_to_rgb(
        hue, saturation * uniform(0.5, 1), (value * uniform(0.85, 1.15)).clamp(0, 1)
    )
    direction = uniform(0, 2 * torch.pi)
    axis = torch.linspace(-1, 1, size, device=device)
    along = (
        direction.cos()[:, None, None] * axis[None, None, :]
        + direction.sin()[:, None, None] * axis[None, :, None]
    )
    mix = ((along / 2**0.5 + 1) / 2)[:, None]  # [n, 1, size, size] in 0..1
    background = from_colour[:, :, None, None] * (1 - mix) + to_colour[:, :, None, None] * mix

    return F.avg_pool2d(colours + background * (1 - opacity), _SUPERSAMPLING).clamp(0, 1) * 2 - 1


def render_batch(
    sprites: Tensor, count: int, seed: int, stream: str, step: int
) -> tuple[Tensor, Tensor]:
    """`count` pictures of random classes: (pixels as `render` gives them, labels int64 [count])."""
    generator = step_generator(seed, stream, step, sprites.device)
    labels = torch.randint(len(sprites), (count,), generator=generator, device=sprites.device)
    return render(sprites, labels, generator), labels
