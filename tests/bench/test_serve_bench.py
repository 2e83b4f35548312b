"""`moeserve bench serve` against a real front over ZeroMQ and a real HTTP application."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest
from support.http_servers import BigramServer
from zmq_support import running_stack

from moeserve.bench.serve_replay import prompt_of, replay
from moeserve.bench.serve_targets import HttpTarget, ZmqTarget
from moeserve.cli import main
from moeserve.core import ConfigError
from moeserve.planner.workload import Workload, WorkloadRequest
from moeserve.planner.workload_files import read_workload
from moeserve.planner.workload_outcome import Answer, Outcome, SloTargets

REQUESTS = tuple(WorkloadRequest(0.01 * rank, 3 + rank, 2 + rank % 4) for rank in range(10))
WORKLOAD = Workload("made", REQUESTS)


def check(answers: list[Answer]) -> None:
    assert [answer.error for answer in answers] == [None] * len(REQUESTS)
    for answer, request in zip(answers, REQUESTS, strict=True):
        assert (answer.num_prompt, answer.num_output) == (request.num_prompt, request.num_output)
        assert answer.arrived_s == request.at_s
        assert 0 < answer.ttft_s <= answer.ended_s - answer.arrived_s
        assert answer.tpot_s >= 0


def test_replay_over_zmq_gives_every_request_its_lengths(tmp_path: Path) -> None:
    async def run() -> list[Answer]:
        async with running_stack(tmp_path) as stack, ZmqTarget(stack.endpoint) as target:
            await target.check()
            stack.engine.gate.set()
            return await replay(target, WORKLOAD, 256)

    check(asyncio.run(run()))


def test_replay_over_http(tmp_path: Path) -> None:
    async def run(url: str) -> list[Answer]:
        async with HttpTarget(url, None, None) as target:
            await target.check()
            return await replay(target, WORKLOAD, 256)

    with BigramServer(tmp_path) as server:
        check(asyncio.run(run(server.url)))


def test_a_refused_request_fails_alone(tmp_path: Path) -> None:
    too_long = Workload("long", (*REQUESTS[:2], WorkloadRequest(0.0, 200_000, 5)))

    async def run() -> list[Answer]:
        async with running_stack(tmp_path) as stack, ZmqTarget(stack.endpoint) as target:
            stack.engine.gate.set()
            return await replay(target, too_long, 256)

    answers = asyncio.run(run())
    assert [answer.error is None for answer in answers] == [True, True, False]
    assert Outcome.of(answers, SloTargets()).failed == 1


def test_prompts_share_what_the_trace_says() -> None:
    first = prompt_of(WorkloadRequest(0.0, 700, 1, (4, 5)), 0, 256)
    second = prompt_of(WorkloadRequest(0.0, 600, 1, (4, 6)), 1, 256)
    assert (len(first), len(second)) == (700, 600)
    assert first[:512] == second[:512]
    assert first[512:600] != second[512:]
    assert all(0 <= token < 256 for token in first)
    assert prompt_of(REQUESTS[5], 0, 256) != prompt_of(REQUESTS[5], 1, 256)


def test_goodput_counts_what_met_both_targets() -> None:
    def answer(at_s: float, ttft_s: float, tpot_s: float, error: str | None = None) -> Answer:
        return Answer(at_s, at_s + 1.0, ttft_s, tpot_s, 5, 3, error)

    answers = [
        answer(0.0, 0.1, 0.05),
        answer(1.0, 0.9, 0.05),
        answer(2.0, 0.1, 0.5),
        answer(3.0, 0.1, 0.05, "gone"),
    ]
    outcome = Outcome.of(answers, SloTargets(ttft_s=0.5, tpot_s=0.1))
    assert (outcome.attained, outcome.goodput_per_s) == (0.25, 0.25)
    assert outcome.output_tokens_per_s == pytest.approx(9 / 4)
    assert outcome.ttft_s[50] == 0.1
    with pytest.raises(ConfigError, match="slo_ttft: 0"):
        SloTargets(ttft_s=0.0)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ([], "workload: none given"),
        (["--workload", "{w}", "--vocab-size", "1"], "vocab_size: 1"),
        (["--workload", "{w}", "--requests", "0"], "requests: 0"),
        (["--workload", "{w}", "--speed", "0"], "speed: 0"),
        (["--workload", "{w}", "--clip", "1"], "clip: 1"),
        (["--workload", "{w}", "--slo-tpot", "-1"], "slo_tpot: -1"),
        (["--workload", "{w}", "--plan", "{w}"], "holds no plan for a workload (write it by"),
        (["--workload", "{w}", "--plan", "{deep}"], "holds no plan for a workload (write it by"),
        (["--workload", "{w}", "--url", "http://127.0.0.1:9"], "url: http://127.0.0.1:9"),
    ],
)
def test_bad_input_is_named(
    flags: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text('{"timestamp": 0, "input_length": 4, "output_length": 2}\n')
    deep = tmp_path / "deep.json"
    deep.write_text('{"workload": ' * 100_000)
    filled = [flag.replace("{w}", str(path)).replace("{deep}", str(deep)) for flag in flags]
    assert main(["bench", "serve", *filled]) == 2
    assert said in capsys.readouterr().err


def test_a_plan_stands_beside_what_is_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trace = tmp_path / "trace.jsonl"
    lines = [f'{{"timestamp": {at}, "input_length": 4, "output_length": 2}}' for at in (0, 5)]
    trace.write_text("\n".join(lines))
    outcome = Outcome.of([Answer(0.0, 1.0, 0.25, 0.5, 4, 2)] * 2, SloTargets()).as_json()
    slo = {"ttft_s": None, "tpot_s": None}
    plan = tmp_path / "plan.json"
    found = {**read_workload(trace).as_json(), "slo": slo, "mid": outcome}
    plan.write_text(json.dumps({"workload": found}))
    with BigramServer(tmp_path) as server:
        flags = ["--workload", str(trace), "--url", server.url, "--plan", str(plan)]
        assert main(["bench", "serve", *flags]) == 0
        shown = capsys.readouterr().out
        for other in (("--slo-ttft", "1"), ("--speed", "2"), ("--clip", "5")):
            assert main(["bench", "serve", *flags, *other]) == 2
            assert "not for these" in capsys.readouterr().err
    assert "predicted" in shown
    report = json.loads(shown.splitlines()[-1])
    assert report["predicted"] == outcome
    assert report["measured"]["requests"] == 2
