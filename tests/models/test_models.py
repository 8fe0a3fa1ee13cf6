"""The transformer, the tokenizer and the plain loop, beyond what the reference outputs cover."""

import pytest
import torch
from conftest import reference_weights

from autoregressive.models.config import GPT_SHAPES, GPTConfig
from autoregressive.models.generate import NonFiniteLogitsError, generate, sample
from autoregressive.models.gpt import GPT_models, KVCache, Transformer
from autoregressive.models.rope import apply_rotary, rotary_table_2d
from tokenizer.tokenizer_image.vq_model import VQ_CONFIGS, VQ_models

TINY = GPTConfig(dim=128, n_layer=2, n_head=2, vocab_size=64, block_size=16, num_classes=10)


def tiny_model(seed: int = 0) -> Transformer:
    model = Transformer(TINY)
    reference_weights(model, seed)
    return model.eval()


def caches(model: Transformer) -> list[KVCache]:
    return [module for module in model.modules() if isinstance(module, KVCache)]


def test_a_step_by_step_run_gives_the_logits_of_a_whole_sequence() -> None:
    """A cache written at the wrong position, or a mask off by one, makes the two differ."""
    model, labels = tiny_model(), torch.tensor([1, 7])
    steps: list[torch.Tensor] = []
    codes = generate(model, labels, 16, on_logits=lambda _, logits: steps.append(logits))
    with torch.no_grad():
        whole = model(idx=codes[:, :-1].long(), cond_idx=labels)
    torch.testing.assert_close(torch.stack(steps, dim=1), whole, atol=1e-4, rtol=1e-4)


def test_the_cache_may_hold_garbage_beyond_the_position() -> None:
    """Positions not written yet must not reach the output."""
    model, labels = tiny_model(), torch.tensor([1, 7])
    torch.manual_seed(0)
    clean = generate(model, labels, 16)
    for cache in caches(model):
        cache.k_cache.fill_(1e4)
        cache.v_cache.fill_(1e4)
    torch.manual_seed(0)
    assert torch.equal(generate(model, labels, 16), clean)


def test_no_cache_slot_is_wasted() -> None:
    """The last token is never fed back: 16 tokens need 16 slots."""
    model = tiny_model()
    generate(model, torch.tensor([1]), 16, cfg_scale=2.0)
    assert [cache.k_cache.shape for cache in caches(model)] == [(2, 2, 16, 64)] * 2


def test_guidance_at_one_and_below_has_no_unconditional_rows() -> None:
    """LlamaGen computes none then, and its logits are the conditional ones."""
    model, labels = tiny_model(), torch.tensor([3])
    recorded: list[torch.Tensor] = []
    for scale in (0.5, 1.0):
        generate(
            model, labels, 1, cfg_scale=scale, on_logits=lambda _, logits: recorded.append(logits)
        )
        assert [cache.k_cache.shape[0] for cache in caches(model)] == [1, 1]
    assert torch.equal(recorded[0], recorded[1])


@pytest.mark.parametrize(("interval", "guided_tokens"), [(-1, 16), (0, 2), (5, 7), (100, 16)])
def test_the_guidance_interval_guides_two_tokens_more_than_its_number(
    interval: int, guided_tokens: int
) -> None:
    """LlamaGen counts decode steps from 0 and always guides the first token."""
    model, labels = tiny_model(), torch.tensor([3, 4])
    guided: list[torch.Tensor] = []
    codes = generate(
        model,
        labels,
        16,
        cfg_scale=3.0,
        cfg_interval=interval,
        top_k=1,
        on_logits=lambda _, logits: guided.append(logits),
    )
    with torch.no_grad():
        conditional = model(idx=codes[:, :-1].long(), cond_idx=labels)
    equal = [
        torch.allclose(logits, conditional[:, step], atol=1e-4)
        for step, logits in enumerate(guided)
    ]
    assert equal == [step >= guided_tokens for step in range(16)]


def test_the_same_seed_draws_the_same_tokens_and_another_does_not() -> None:
    """Sampling must use the global generator and nothing else."""
    model, labels = tiny_model(), torch.tensor([1, 2, 3])
    drawn = []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        drawn.append(generate(model, labels, 16, cfg_scale=2.0))
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_draws_follow_the_probabilities() -> None:
    """A draw that ignored the probabilities, or their order, would miss these frequencies."""
    torch.manual_seed(0)
    logits = torch.tensor([[0.5, 0.25, 0.125, 0.125]]).log().repeat(20_000, 1)
    tokens, probabilities = sample(logits)
    torch.testing.assert_close(probabilities[0], torch.tensor([0.5, 0.25, 0.125, 0.125]))
    frequencies = tokens.flatten().bincount(minlength=4) / len(tokens)
    assert (frequencies - probabilities[0]).abs().max() < 0.015
    likeliest, _ = sample(logits, sample_logits=False)
    assert likeliest.unique().tolist() == [0]


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_non_finite_logits_are_an_error(poison: float) -> None:
    """NaN must neither be drawn from in silence nor take the process down."""
    model = tiny_model()
    with torch.no_grad():
        model.output.weight[3, 5] = poison
    with pytest.raises(NonFiniteLogitsError, match="NaN or infinite"):
        generate(model, torch.tensor([1]), 16)


@pytest.mark.parametrize("tokens", [0, -1, 17])
def test_a_token_count_outside_the_model_is_refused(tokens: int) -> None:
    """More tokens than positions would index past the rotary table."""
    with pytest.raises(ValueError, match="1 to 16"):
        generate(tiny_model(), torch.tensor([1]), tokens)


def test_the_class_token_is_not_turned_but_erased() -> None:
    """Its rotary entry is all zeros, cosine included: LlamaGen's query and key of the class token
    are zero.
    """
    table = rotary_table_2d(grid=4, head_size=64)
    assert table.shape == (17, 32, 2)
    assert table[0].abs().max() == 0
    turned = apply_rotary(torch.randn(1, 1, 2, 64), table[:1])
    assert turned.abs().max() == 0


def test_rotary_turns_with_row_then_column_and_keeps_lengths() -> None:
    """Swapped halves would still keep lengths, so both are checked."""
    table = rotary_table_2d(grid=4, head_size=100)
    assert table.shape == (17, 50, 2)
    first_row, second_row = table[1:5], table[5:9]
    # the row's half does not change within a row
    assert torch.equal(first_row[0, :25], first_row[3, :25])
    # the column's half does not change within a column
    assert torch.equal(first_row[2, 25:], second_row[2, 25:])
    assert not torch.equal(first_row[0, 25:], first_row[3, 25:])
    x = torch.randn(2, 16, 3, 100)
    torch.testing.assert_close(apply_rotary(x, table[1:]).norm(dim=-1), x.norm(dim=-1))


def test_the_rotary_table_stays_float32_in_a_bf16_model() -> None:
    """In bf16 its angles would be off by more than a token's distance."""
    model = GPT_models["GPT-demo"](vocab_size=64, block_size=16, num_classes=3).to(torch.bfloat16)
    assert model.tok_embeddings.weight.dtype == torch.bfloat16
    assert model.freqs_cis.dtype == torch.float32


def test_class_dropout_works_in_training_only() -> None:
    """Guidance needs the "no class" row trained; sampling must never drop a label."""
    model = Transformer(
        GPTConfig(
            dim=128,
            n_layer=1,
            n_head=2,
            vocab_size=8,
            block_size=4,
            num_classes=2,
            class_dropout_prob=0.5,
        )
    )
    labels = torch.zeros(2000, dtype=torch.int64)
    no_class = model.cls_embedding.embedding_table.weight[2]
    torch.manual_seed(0)
    dropped = (
        (model.train().cls_embedding(labels)[:, 0] == no_class).all(dim=-1).float().mean().item()
    )
    assert 0.45 < dropped < 0.55
    assert not (model.eval().cls_embedding(labels)[:, 0] == no_class).all(dim=-1).any()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"dim": 130}, "does not split"),
        ({"block_size": 15}, "square"),
        ({"model_type": "t2i"}, "class-conditional"),
        ({"cls_token_num": 120}, "class-conditional"),
    ],
)
def test_impossible_shapes_are_refused(fields: dict[str, object], message: str) -> None:
    """A wrong shape must not surface as a failing matrix product later."""
    arguments: dict[str, object] = {"dim": 128, "n_layer": 1, "n_head": 2} | fields
    with pytest.raises(ValueError, match=message):
        GPTConfig(**arguments)  # type: ignore[arg-type]


def test_the_registry_has_the_published_sizes() -> None:
    """Parameter counts as the paper states them, in millions (to 3 %, embeddings included)."""
    expected = {"GPT-B": 111, "GPT-L": 343, "GPT-XL": 775, "GPT-XXL": 1411, "GPT-3B": 3098}
    for name, millions in expected.items():
        with torch.device("meta"):
            count = sum(parameter.numel() for parameter in GPT_models[name]().parameters()) / 1e6
        assert abs(count / millions - 1) < 0.03, (name, count)
    assert GPT_SHAPES["GPT-3B"].dim // GPT_SHAPES["GPT-3B"].n_head == 100


@pytest.mark.parametrize("name", list(VQ_CONFIGS))
def test_encode_and_decode_round_trip_shapes_and_codes(name: str) -> None:
    """Codes must come out row by row in the order that decode_code reads them."""
    torch.manual_seed(0)
    model = VQ_models[name]().eval()
    side = 4 * model.config.downsample_size
    pixels = torch.rand(1, 3, side, side) * 2 - 1
    with torch.no_grad():
        quantized = model.encode(pixels)
        assert quantized.codes.shape == (1, 4, 4)
        whole = model.decode(quantized.vectors)
        from_codes = model.decode_code(
            quantized.codes.flatten(1), [1, model.config.codebook_embed_dim, 4, 4]
        )
    assert whole.shape == pixels.shape
    # The straight-through sum rounds the entries, by how much depends on the CPU; another order
    # would differ by some 0.1.
    torch.testing.assert_close(from_codes, whole, atol=2e-4, rtol=0)


def test_quantising_takes_the_nearest_entry() -> None:
    """The dot product of unit vectors must order entries as their distance does."""
    model = VQ_models["VQ-demo"](codebook_size=50, codebook_embed_dim=8)
    torch.manual_seed(0)
    torch.nn.init.normal_(model.quantize.embedding.weight)
    features = torch.randn(2, 8, 3, 3)
    codes = model.quantize(features).codes
    vectors = torch.nn.functional.normalize(features.permute(0, 2, 3, 1).reshape(-1, 8), dim=-1)
    entries = torch.nn.functional.normalize(model.quantize.embedding.weight, dim=-1)
    assert torch.equal(codes.flatten(), torch.cdist(vectors, entries).argmin(dim=-1))


def test_the_codebooks_gradient_reaches_the_encoder() -> None:
    """Without the straight-through step the encoder would never learn from the pixels."""
    torch.manual_seed(0)
    model = VQ_models["VQ-demo"]()
    made, _ = model(torch.rand(1, 3, 16, 16))
    made.square().mean().backward()
    gradient = model.encoder.conv_in.weight.grad
    assert gradient is not None
    assert gradient.abs().max() > 0
