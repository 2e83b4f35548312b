"""The whole engine against transformers: same tokens whatever the batch, chunks, kv and reuse."""

from __future__ import annotations

import random
import secrets
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.settled import is_settled, reference_logits
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from moeserve.config import (
    EngineConfig,
    ExpertConfig,
    KvConfig,
    ModelConfig,
    SchedulerConfig,
)
from moeserve.core import EngineDelta, EngineRequest, FinishReason, RequestError, SamplingParams
from moeserve.engine.engine import Engine

VOCAB = 96
EOS = 3


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random qwen3_moe with spread-out logits, so that ties do not decide."""
    seed = secrets.randbits(31)
    print(f"model seed {seed}")
    torch.manual_seed(seed)
    model = Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            vocab_size=VOCAB, hidden_size=48, intermediate_size=64, moe_intermediate_size=32,
            num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
            num_experts=8, num_experts_per_tok=2, max_position_embeddings=512,
            eos_token_id=EOS, bos_token_id=None, pad_token_id=None, initializer_range=0.3,
            tie_word_embeddings=False,
        )
    )  # fmt: skip
    directory = tmp_path_factory.mktemp("model")
    model.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def oracle(checkpoint: Path) -> Any:
    return Qwen3MoeForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()


def make_engine(checkpoint: Path, kv: KvConfig | None = None, **scheduler: Any) -> Engine:
    config = EngineConfig(
        model=ModelConfig(model=str(checkpoint), dtype="float32"),
        kv=kv or KvConfig(block_tokens=4, num_blocks=256),
        scheduler=SchedulerConfig(**scheduler),
        experts=ExpertConfig(num_threads=1),
    )
    return Engine.from_config(config)


def greedy(name: str, prompt: list[int], max_tokens: int, **params: Any) -> EngineRequest:
    params = {"temperature": 0.0, "ignore_eos": True, **params}
    sampling = SamplingParams(max_tokens=max_tokens, **params)
    return EngineRequest(request_id=name, token_ids=prompt, params=sampling)


def finish(engine: Engine, requests: Iterable[EngineRequest] = ()) -> dict[str, list[EngineDelta]]:
    """Runs until idle; the deltas of each request."""
    deltas: dict[str, list[EngineDelta]] = {}
    for request in requests:
        engine.add(request)
    while engine.has_work:
        for delta in engine.step():
            deltas.setdefault(delta.request_id, []).append(delta)
        engine.check_integrity()
    assert engine.stats().kv_blocks_used == 0
    return deltas


def tokens(deltas: list[EngineDelta]) -> list[int]:
    return [token for delta in deltas for token in delta.token_ids]


def transformers_greedy(oracle: Any, prompt: list[int], count: int) -> list[int]:
    ids = torch.tensor([prompt])
    output = oracle.generate(
        ids,
        attention_mask=torch.ones_like(ids),  # else token 0 counts as padding
        max_new_tokens=count,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    return output[0, len(prompt) :].tolist()


def random_prompts(count: int, longest: int = 90) -> list[list[int]]:
    seed = secrets.randbits(31)
    print(f"prompt seed {seed}")
    rng = random.Random(seed)
    return [[rng.randrange(VOCAB) for _ in range(rng.randint(1, longest))] for _ in range(count)]


def settled_prompts(oracle: Any, count: int) -> tuple[list[list[int]], list[list[int]]]:
    """Prompts and their 64 greedy tokens, none of which hangs on a rounding."""
    found: list[tuple[list[int], list[int]]] = []
    while len(found) < count:
        (prompt,) = random_prompts(1)
        greedy_tokens = transformers_greedy(oracle, prompt, 64)
        whole = prompt + greedy_tokens
        if is_settled(oracle, whole, reference_logits(oracle, whole)):
            found.append((prompt, greedy_tokens))
    return [prompt for prompt, _ in found], [greedy_tokens for _, greedy_tokens in found]


@pytest.mark.parametrize(
    "setting",
    [
        {},
        {"max_batch_tokens": 7},  # prompts in chunks, decodes beside them
        {"max_running": 1},
        {"kv": KvConfig(block_tokens=4, num_blocks=44), "admission": "aggressive"},  # preempts
        {"kv": KvConfig(block_tokens=1, num_blocks=600)},
        {"kv": KvConfig(block_tokens=16, num_blocks=64, prefix_reuse=False)},
    ],
    ids=["plain", "chunks", "one at a time", "preemption", "tiny blocks", "no reuse"],
)
def test_greedy_tokens_equal_transformers(
    checkpoint: Path, oracle: Any, setting: dict[str, Any]
) -> None:
    prompts, expected = settled_prompts(oracle, 6)
    engine = make_engine(checkpoint, **setting)
    for _ in range(2):  # the second time, prefixes are found
        requests = [greedy(str(i), prompt, 64) for i, prompt in enumerate(prompts)]
        deltas = finish(engine, requests)
        assert [tokens(deltas[str(i)]) for i in range(6)] == expected
        assert {d[-1].finish_reason for d in deltas.values()} == {FinishReason.LENGTH}
    stats = engine.stats()
    if "admission" in setting:
        assert stats.num_preemptions > 0
    elif setting.get("kv", KvConfig()).prefix_reuse:
        assert stats.cached_prompt_tokens > 0
    else:
        assert stats.cached_prompt_tokens == 0


def test_next_turn_reuses_prompt_and_answer(checkpoint: Path, oracle: Any) -> None:
    engine = make_engine(checkpoint)
    (prompt,) = random_prompts(1)
    answer = tokens(finish(engine, [greedy("a", prompt, 21)])["a"])
    turn = [*prompt, *answer, 5, 6, 7]
    deltas = finish(engine, [greedy("b", turn, 16)])["b"]
    assert tokens(deltas) == transformers_greedy(oracle, turn, 16)
    # All of the first turn but its last token (never fed back), in whole blocks of four.
    assert deltas[-1].num_cached_tokens == (len(prompt) + 20) // 4 * 4


def test_seeded_sampling_ignores_neighbours(checkpoint: Path) -> None:
    prompts = random_prompts(5)
    params = SamplingParams(max_tokens=40, temperature=0.9, top_p=0.95, seed=11, ignore_eos=True)
    requests = [
        EngineRequest(request_id=str(i), token_ids=prompt, params=params)
        for i, prompt in enumerate(prompts)
    ]
    together = finish(make_engine(checkpoint, max_batch_tokens=32), requests)
    for request in requests:
        alone = finish(make_engine(checkpoint), [request])
        assert tokens(alone[request.request_id]) == tokens(together[request.request_id])


def test_unseeded_requests_differ(checkpoint: Path) -> None:
    params = SamplingParams(max_tokens=40, temperature=5.0, ignore_eos=True)
    engine = make_engine(checkpoint)
    deltas = finish(
        engine, [EngineRequest(request_id=n, token_ids=[1], params=params) for n in "ab"]
    )
    assert tokens(deltas["a"]) != tokens(deltas["b"])


@pytest.mark.parametrize("budget", [512, 5])
def test_prompt_and_output_logprobs(checkpoint: Path, oracle: Any, budget: int) -> None:
    prompt = random_prompts(1, longest=40)[0] + [1, 2]
    engine = make_engine(checkpoint, max_batch_tokens=budget)
    finish(engine, [greedy("warm", prompt, 4)])  # reuse must not swallow the scores
    request = greedy("a", prompt, 8, logprobs=3, prompt_logprobs=2)
    deltas = finish(engine, [request])["a"]
    chosen = tokens(deltas)
    with torch.no_grad():
        logits = oracle(torch.tensor([prompt + chosen])).logits[0]
    own = logits.double().log_softmax(-1)
    (scores,) = [d.prompt_logprobs for d in deltas if d.prompt_logprobs is not None]
    assert scores[0] is None
    assert [s.token_id for s in scores[1:] if s] == prompt[1:]
    for position, entry in enumerate(scores[1:], start=1):
        assert entry is not None
        row = own[position - 1]
        assert entry.logprob == pytest.approx(float(row[prompt[position]]), abs=1e-3)
        assert entry.top[0][1] == pytest.approx(float(row.max()), abs=1e-3)
        assert len(entry.top) == 2
    output = [entry for d in deltas for entry in d.logprobs or []]
    assert [entry.token_id for entry in output] == chosen
    for position, entry in enumerate(output, start=len(prompt)):
        expected = float(own[position - 1][entry.token_id])
        assert entry.logprob == pytest.approx(expected, abs=1e-3)
        assert entry.rank == 1


def test_scoring_without_generation(checkpoint: Path) -> None:
    engine = make_engine(checkpoint, max_batch_tokens=4)
    (delta,) = finish(engine, [greedy("a", [5, 6, 7, 8, 9, 10], 0, prompt_logprobs=0)])["a"]
    assert delta.finish_reason is FinishReason.LENGTH
    assert delta.token_ids == []
    assert delta.prompt_logprobs is not None
    assert len(delta.prompt_logprobs) == 6


def test_end_of_sequence_and_stop_ids(checkpoint: Path) -> None:
    engine = make_engine(checkpoint)
    free = tokens(finish(engine, [greedy("a", [1, 2], 30)])["a"])
    stop = free[9]
    first = free.index(stop)
    deltas = finish(engine, [greedy("b", [1, 2], 30, stop_token_ids=(stop,))])["b"]
    assert tokens(deltas) == free[: first + 1]
    assert deltas[-1].finish_reason is FinishReason.STOP
    assert deltas[-1].stop_token_id == stop
    forced = greedy("c", [1, 2], 30, ignore_eos=False, logit_bias={EOS: 100.0}, min_tokens=5)
    ended = finish(engine, [forced])["c"]
    assert len(tokens(ended)) == 6
    assert tokens(ended)[-1] == EOS
    assert ended[-1].finish_reason is FinishReason.STOP


def test_refusals_name_the_field(checkpoint: Path) -> None:
    engine = make_engine(checkpoint, KvConfig(block_tokens=4, num_blocks=8))
    for request, message in (
        (greedy("a", [VOCAB], 1), "token_ids: token id 96 is outside the vocabulary"),
        (greedy("a", [1], 1, stop_token_ids=(VOCAB,)), "stop_token_ids: token id 96"),
        (greedy("a", [1], 1, logit_bias={VOCAB: 1.0}), "logit_bias: token id 96"),
        (greedy("a", [], 1), "prompt|token_ids"),
        (greedy("a", [1] * 40, 1), "40"),
    ):
        with pytest.raises(RequestError, match=message):
            engine.add(request)
    assert not engine.has_work


def test_nan_ends_one_request_and_not_the_engine(checkpoint: Path, tmp_path: Path) -> None:
    expected = tokens(finish(make_engine(checkpoint), [greedy("a", [1, 2, 3], 5)])["a"])
    shutil.copy(checkpoint / "config.json", tmp_path)
    weights = load_file(checkpoint / "model.safetensors")
    broken = next(token for token in range(4, VOCAB) if token not in expected)
    weights["model.embed_tokens.weight"][broken] = torch.nan
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    engine = make_engine(tmp_path)
    deltas = finish(engine, [greedy("good", [1, 2, 3], 5), greedy("bad", [broken, 2], 5)])
    assert deltas["bad"][-1].finish_reason is FinishReason.ERROR
    assert "NaN" in (deltas["bad"][-1].error or "")
    assert tokens(deltas["good"]) == expected
    again = finish(engine, [greedy("after", [1, 2, 3], 5)])  # in blocks that held NaN
    assert tokens(again["after"]) == expected


def test_random_operations_leak_nothing(checkpoint: Path) -> None:
    seed = secrets.randbits(31)
    print(f"operation seed {seed}")
    rng = random.Random(seed)
    engine = make_engine(
        checkpoint, KvConfig(block_tokens=4, num_blocks=40), max_batch_tokens=24, max_running=6
    )
    open_requests: set[str] = set()
    for number in range(300):
        action = rng.random()
        if action < 0.2:
            prompt = [rng.randrange(5) for _ in range(rng.randint(1, 40))]
            engine.add(greedy(str(number), prompt, rng.randint(0, 30)))
            open_requests.add(str(number))
        elif action < 0.3 and open_requests:
            name = rng.choice(sorted(open_requests))
            (delta,) = engine.abort(name)
            assert delta.finish_reason is FinishReason.CANCELLED
            open_requests.discard(name)
        else:
            for delta in engine.step():
                if delta.finish_reason is not None:
                    open_requests.remove(delta.request_id)
        engine.check_integrity()
    assert {name for name, d in finish(engine).items() if d[-1].finish_reason} == open_requests
