"""The plain sampling loop: one step a token, dense cache, `torch.multinomial`. The honest baseline,
as LlamaGen runs it.

Guided pairs are tied by batch halves here: rows [0, n) carry the classes, rows [n, 2n) carry "no
class".
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from autoregressive.errors import SettingName, UserError
from autoregressive.models.gpt import Transformer

# What LlamaGen's `sdp_kernel(enable_flash=False, enable_mem_efficient=False, enable_math=True)`
# leaves enabled: torch added cuDNN's attention later, and that call does not turn it off. On a
# recent GPU, in 16 bits, torch prefers it.
ATTENTION_BACKENDS = [SDPBackend.MATH, SDPBackend.CUDNN_ATTENTION]


class NonFiniteLogitsError(UserError):
    """The model gave NaN or infinite logits, so that no token could be drawn from them."""

    def __init__(self, told: str) -> None:
        super().__init__(f"{told}; try ", SettingName("precision"), " none, or other weights")


def filter_logits(logits: Tensor, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """Sets to -inf what top-k, then top-p rule out.

    Every logit equal to the k-th largest is kept; top-p keeps the first token that crosses the
    threshold.

    Args:
        logits: [rows, vocab_size]
        top_k: how many to keep; 0 keeps all.
        top_p: probability mass to keep; 1 keeps all.
    """
    if top_k > 0:
        smallest_kept = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < smallest_kept, -torch.inf)
    if top_p < 1.0:
        ordered, order = logits.sort(dim=-1, descending=True)
        mass = ordered.softmax(dim=-1).cumsum(dim=-1)
        crossed_before = F.pad(mass[:, :-1] > top_p, (1, 0), value=False)
        logits = logits.masked_fill(crossed_before.scatter(-1, order, crossed_before), -torch.inf)
    return logits


def sample(
    logits: Tensor,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    sample_logits: bool = True,
) -> tuple[Tensor, Tensor]:
    """Draws one token a row.

    Args:
        logits: [rows, vocab_size] float32
        sample_logits: draw at random with torch's global generator; False takes the likeliest.

    Returns:
        Tokens [rows, 1] and the probabilities they were drawn from [rows, vocab_size].
    """
    probabilities = filter_logits(logits / max(temperature, 1e-5), top_k, top_p).softmax(dim=-1)
    if not sample_logits:
        return probabilities.argmax(dim=-1, keepdim=True), probabilities
    # NaN would trip an assertion on the device and lose the process; generate() reports it after
    # the loop.
    return torch.multinomial(probabilities.nan_to_num(nan=1.0), num_samples=1), probabilities


@torch.no_grad()
def generate(
    model: Transformer,
    class_labels: Tensor,
    max_new_tokens: int,
    *,
    cfg_scale: float = 1.0,
    cfg_interval: int = -1,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    sample_logits: bool = True,
    on_token: Callable[[int], object] | None = None,
    on_logits: Callable[[int, Tensor], object] | None = None,
) -> Tensor:
    """Draws `max_new_tokens` tokens for each class.

    Args:
        model: a `Transformer` in eval mode, or the same compiled.
        class_labels: int64 [images] on the model's device.
        cfg_scale: guidance: unconditional + (conditional - unconditional) * scale; at 1 and below
            there is none, and no unconditional rows.
        cfg_interval: k >= 0 guides the first k + 2 tokens only; -1 guides all.
        temperature: the logits are divided by it, or by 1e-5 if it is less, before the filter.
        top_k: keep the k likeliest tokens, ties included; 0 keeps all.
        top_p: keep the smallest set with this much probability; 1 keeps all.
        sample_logits: draw with torch's global generator; False takes the likeliest token.
        on_token: called with the number of tokens drawn so far, for a progress bar.
        on_logits: called with the step and its guided logits [images, vocab_size], for tests.

    Returns:
        int32 [images, max_new_tokens]

    Raises:
        NonFiniteLogitsError: some logits were NaN or infinite. Found once, after the loop, so that
            no step waits for the host.
    """
    if not 1 <= max_new_tokens <= model.config.block_size:
        raise ValueError(
            f"max_new_tokens is {max_new_tokens}; this model makes 1 to {model.config.block_size}"
        )
    images, device = class_labels.shape[0], class_labels.device
    guided = cfg_scale > 1.0
    labels = class_labels
    if guided:
        labels = torch.cat([class_labels, torch.full_like(class_labels, model.config.num_classes)])
    # The last token is never fed back: one class token and max_new_tokens - 1 others fill the cache
    # exactly.
    model.setup_caches(labels.shape[0], max_new_tokens, model.tok_embeddings.weight.dtype)

    codes = torch.empty(images, max_new_tokens, dtype=torch.int32, device=device)
    all_finite = torch.ones((), dtype=torch.bool, device=device)
    input_pos = torch.zeros(1, dtype=torch.int64, device=device)
    with sdpa_kernel(ATTENTION_BACKENDS):
        for step in range(max_new_tokens):
            if step == 0:
                logits = model(cond_idx=labels, input_pos=input_pos)[:, -1]  # [rows, vocab_size]
            else:
                newest = codes[:, step - 1 : step].long()
                logits = model(
                    idx=torch.cat([newest, newest]) if guided else newest, input_pos=input_pos
                )[:, -1]
            if guided:
                conditional, unconditional = logits.chunk(2)
                in_interval = cfg_interval < 0 or step <= cfg_interval + 1
                logits = (
                    unconditional + (conditional - unconditional) * cfg_scale
                    if in_interval
                    else conditional
                )
            all_finite &= logits.isfinite().all()
            if on_logits is not None:
                on_logits(step, logits)
            token, _ = sample(logits, temperature, top_k, top_p, sample_logits)
            codes[:, step : step + 1] = token
            input_pos += 1
            if on_token is not None:
                on_token(step + 1)
    if not all_finite.item():
        raise NonFiniteLogitsError(
            "the model's logits are NaN or infinite: its weights are damaged or overflow this "
            "precision"
        )
    return codes
