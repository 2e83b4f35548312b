"""A row's logits are the same bits in every batch, chunk size and prefix: float32 and bfloat16."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from parity_cases import DRAW, VOCAB, draw_config, make_reference, save
from support.model_runner import BlockSequence, Runner
from support.native_matrices import LEVELS

from moeserve.config import ExpertConfig, ModelConfig
from moeserve.cpu_backend.linear import is_row_invariant
from moeserve.models.attention_plan import attend
from moeserve.models.inputs import Span
from moeserve.models.kv_pool import KvLayer
from moeserve.models.registry import load_model
from moeserve.models.step_context import AttentionLayout, attention_tiles

pytestmark = pytest.mark.usefixtures("quiet")

DTYPES = ["float32", "bfloat16"]
#: kv heads, query heads of each, key width, kv width, where the value starts, window, tokens
SHAPES = [
    (2, 3, 32, 64, 32, None, 300),
    (1, 8, 128, 256, 128, None, 700),
    (2, 1, 64, 128, 64, None, 1100),
    (1, 16, 96, 96, 0, None, 600),
    (2, 4, 64, 128, 64, 40, 300),
    (1, 1, 32, 64, 32, 300, 800),
]


#: of latent attention, through torch: whole eights, as in all models that there are. Others MKL
#: multiplies on AMD's processors in another order where rows are few
LATENT_WIDTHS = ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_attention_of_a_row(shape: tuple[int, ...], dtype: str) -> None:
    heads, group, key, width, value_start, window, num_tokens = shape
    seed = random.SystemRandom().randrange(10**6)
    print(f"seed {seed}")
    generator = torch.Generator().manual_seed(seed)
    kind = getattr(torch, dtype)
    slots = torch.zeros(num_tokens + 1, heads, width, dtype=kind)
    slots[:num_tokens] = torch.randn(num_tokens, heads, width, generator=generator)
    kv = KvLayer(slots)
    places = torch.randperm(num_tokens, generator=generator)
    queries = torch.randn(num_tokens, heads, group, key, generator=generator).to(kind)
    sinks = torch.randn(heads, group, generator=generator).to(kind)
    layout = AttentionLayout(heads, group, width, window)

    def rows(start: int, stop: int) -> torch.Tensor:
        span = Span(0, stop - start, stop, places[:stop], stop)
        tiles = attention_tiles([span], layout, num_tokens, kind)
        return attend(queries[start:stop], kv, tiles, value_start, key**-0.5, sinks)

    whole = rows(0, num_tokens)
    for chunk in (1, 3, 33, 100):
        pieces = [
            rows(start, min(start + chunk, num_tokens)) for start in range(0, num_tokens, chunk)
        ]
        assert torch.equal(torch.cat(pieces), whole), f"chunks of {chunk}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("model_type", list(DRAW))
def test_logits_of_a_row(model_type: str, dtype: str, tmp_path: Path) -> None:
    if not is_row_invariant(getattr(torch, dtype), torch.device("cpu")):
        pytest.skip(f"this torch's oneDNN rounds {dtype} products by the number of rows")
    seed = random.SystemRandom().randrange(10**6)
    print(f"seed {seed}")
    check_logits(model_type, dtype, ExpertConfig(), tmp_path, seed)


@pytest.mark.parametrize("isa", LEVELS)
@pytest.mark.parametrize("quantize", ["none", "int8", "int4"])
def test_logits_of_a_row_at_each_level(isa: str, quantize: str, tmp_path: Path) -> None:
    """`auto` takes one of them only, and not on every processor the one of bf16 pairs."""
    seed = random.SystemRandom().randrange(10**6)
    print(f"seed {seed}")
    experts = ExpertConfig(cpu_backend="native", isa=isa)
    check_logits("qwen3_moe", "bfloat16", experts, tmp_path, seed, quantize)


def check_logits(
    model_type: str,
    dtype: str,
    experts: ExpertConfig,
    path: Path,
    seed: int,
    quantize: str = "none",
) -> None:
    """A prompt at once, and in chunks of random sizes beside a sequence that decodes."""
    config = draw_config(model_type, seed)
    config |= {name: -(-config[name] // 8) * 8 for name in LATENT_WIDTHS if name in config}
    reference = make_reference(config, model_type, seed)
    save(reference, path, packed=True, old_style=False)
    model = ModelConfig(model=str(path), dtype=dtype, quantize=quantize)
    runner = Runner(load_model(model, experts))
    rng = random.Random(seed)
    token_ids = [rng.randrange(VOCAB) for _ in range(120)]
    whole = runner.logits(token_ids)
    for most in (1, 5, 40):
        sequence, neighbour = BlockSequence(token_ids), BlockSequence([rng.randrange(VOCAB)])
        pieces = []
        while sequence.num_computed < len(token_ids):
            left = len(token_ids) - sequence.num_computed
            logits, other = runner.step(
                [(sequence, rng.randint(1, min(most, left))), (neighbour, 1)]
            )
            pieces.append(logits)
            runner.extend(neighbour, other)
        assert torch.equal(torch.cat(pieces), whole), f"chunks of up to {most}"
        runner.free += sequence.block_ids + neighbour.block_ids
