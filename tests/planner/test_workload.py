"""Traffic files in the three published layouts, and what is wrong with others."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from moeserve.core import ConfigError
from moeserve.planner.workload import WorkloadRequest
from moeserve.planner.workload_files import read_workload

AZURE = (
    "TIMESTAMP,ContextTokens,GeneratedTokens\r\n"
    "2023-11-16 18:17:03.9799600,4808,10\r\n"
    "2023-11-16 18:17:05.4799600,3180,8"
)
BURST_GPT = (
    "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
    "5,ChatGPT,472,18,490,Conversation log\n"
    "45,ChatGPT,1087,0,1087,Conversation log\n"
    "118,GPT-4,417,276,693,API log\n"
)
MOONCAKE = (
    '{"timestamp": 1000, "input_length": 700, "output_length": 5, "hash_ids": [0, 1]}\n'
    '{"timestamp": 250, "input_length": 520, "output_length": 4, "hash_ids": [0, 2]}\n\n'
)
AZURE_NAMES, NOON = "TIMESTAMP,ContextTokens,GeneratedTokens", "2023-11-16 12:00:00"
BURST_NAMES = BURST_GPT.splitlines()[0]
MOONCAKE_LINE = '{"timestamp": 1, "input_length": 7, "output_length": 1}'


def write(tmp_path: Path, text: str, name: str = "trace.csv") -> Path:
    path = tmp_path / name
    path.write_bytes(text.encode())
    return path


def test_azure(tmp_path: Path) -> None:
    workload = read_workload(write(tmp_path, AZURE))
    assert workload.requests[0] == WorkloadRequest(0.0, 4808, 10)
    assert workload.requests[1].at_s == pytest.approx(1.5)
    assert workload.longest == 4818


def test_burst_gpt_without_the_answers_that_failed(tmp_path: Path) -> None:
    workload = read_workload(write(tmp_path, BURST_GPT))
    assert workload.requests == (WorkloadRequest(0.0, 472, 18), WorkloadRequest(113.0, 417, 276))
    assert workload.num_dropped == 1
    assert workload.in_words == "2 requests (1 without a prompt or an answer left out)"
    assert workload.faster(2).span_s == 56.5


def test_mooncake_in_order_of_arrival_with_its_prefixes(tmp_path: Path) -> None:
    first, second = read_workload(write(tmp_path, MOONCAKE, "trace.jsonl")).requests
    assert (first.at_s, second.at_s) == (0.0, 0.75)
    a, b = first.tokens(0), second.tokens(1)
    assert (len(a), len(b)) == (520, 700)
    assert a[:512] == b[:512]
    assert a[512:] != b[512:520]


def test_prompts_of_the_others_share_nothing(tmp_path: Path) -> None:
    first, second = read_workload(write(tmp_path, AZURE)).requests
    assert not set(first.tokens(0)) & set(second.tokens(1))


def test_no_more_than_asked_for(tmp_path: Path) -> None:
    path = write(tmp_path, BURST_GPT)
    assert len(read_workload(path, 1).requests) == 1
    with pytest.raises(ConfigError, match="requests: 0"):
        read_workload(path, 0)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "columns none"),
        ("a,b\n1,2\n", "columns a, b"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n", "no requests"),
        (f"{AZURE_NAMES}\nyesterday,1,1\n", "line 2: TIMESTAMP: 'yesterday' is not a time like"),
        (f"{AZURE_NAMES}\n{NOON},-1,1\n", "line 2: ContextTokens: '-1' is not a whole number"),
        (f"{AZURE_NAMES}\n{NOON},7,x\n", "line 2: GeneratedTokens: 'x' is not a whole number"),
        (f"{AZURE_NAMES}\n{NOON},7\n", "line 2: GeneratedTokens is missing"),
        (f"{BURST_NAMES}\n1,x,5,0,5,y\n", "prompt and an answer"),
        (f"{BURST_NAMES}\n-1,x,5,1,6,y\n", "line 2: Timestamp: '-1' is not a number, 0 or more"),
        (f"{BURST_NAMES}\nnan,x,5,1,6,y\n", "line 2: Timestamp: 'nan' is not a number"),
        ('{"timestamp": 1, "input_length": 7}\n', "line 1: output_length is missing"),
        (MOONCAKE_LINE + '\n{"times', "line 2: no JSON"),
        (f"{MOONCAKE_LINE}\n7", "line 2: no JSON object"),
        ('{"timestamp": 1, "input_length": Infinity, "output_length": 1}', "line 1: input_length"),
        (MOONCAKE_LINE[:-1] + ', "hash_ids": 3}', "line 1: hash_ids: 3 is not a list of 1 whole"),
        ("\x00\xff,", "columns"),
        (f"{AZURE_NAMES}\n{NOON},7,1,1\n", "line 2: 1 cells more than columns"),
        (f"{AZURE_NAMES}\n{NOON},{10**12},1\n", "line 2: ContextTokens: '1000000000000' is not"),
        (MOONCAKE_LINE.replace("7", "7.5"), "line 1: input_length: 7.5 is not a whole number"),
        (
            f"{AZURE_NAMES}\n{NOON},1_000,1\n",
            "line 2: ContextTokens: '1_000' is not a whole number",
        ),
        (f"{BURST_NAMES}\n1_0,x,5,1,6,y\n", "line 2: Timestamp: '1_0' is not a number"),
        (MOONCAKE_LINE.replace(": 1,", ": true,"), "line 1: timestamp: True is not a number"),
        (MOONCAKE_LINE.replace("7", "true"), "line 1: input_length: True is not a whole number"),
        (
            MOONCAKE_LINE[:-1] + ', "hash_ids": [-1]}',
            r"line 1: hash_ids: \[-1\] is not a list of 1",
        ),
        (MOONCAKE_LINE[:-1] + ', "hash_ids": [1, 2]}', "line 1: hash_ids: .* is not a list of 1"),
        (MOONCAKE_LINE[:-1] + ', "hash_ids": "1"}', "line 1: hash_ids: '1' is not a list of 1"),
        (f"{MOONCAKE_LINE}\n" + '{"a":' * 100_000, "line 2: brackets in brackets"),
    ],
)
def test_what_is_no_trace_is_named(tmp_path: Path, text: str, said: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(ConfigError, match=f"workload: .*{path.name}.*{said}"):
        read_workload(path)


def test_little_is_said_of_a_file_that_is_anything(tmp_path: Path) -> None:
    for text in ("\x00\x1b[31m" * 5000, f"{AZURE_NAMES}\n{NOON},{'x' * 100_000},1\n"):
        with pytest.raises(ConfigError) as caught:
            read_workload(write(tmp_path, text))
        said = str(caught.value)
        assert said.isprintable()
        assert len(said) < 2000


def test_times_of_azure_with_a_zone_and_without_digits(tmp_path: Path) -> None:
    """As the traces of 2024 have them, in which a whole second has no digits."""
    rows = ("2024-05-10 00:00:00.500000+00:00,7,1", "2024-05-10 00:00:01+00:00,8,1")
    workload = read_workload(write(tmp_path, "\n".join((AZURE_NAMES, *rows))))
    assert [(r.at_s, r.num_prompt) for r in workload.requests] == [(0.0, 7), (0.5, 8)]


@pytest.mark.skipif(not hasattr(time, "tzset"), reason="time zones are set by name on POSIX")
def test_times_without_a_zone_do_not_depend_on_where_we_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = ("2023-03-26 01:59:59,7,1", "2023-03-26 03:00:00,7,1")  # no such hour in Berlin
    path = write(tmp_path, "\n".join((AZURE_NAMES, *rows)))
    with monkeypatch.context() as there:
        there.setenv("TZ", "Europe/Berlin")
        time.tzset()
        span_s = read_workload(path).span_s
    time.tzset()
    assert span_s == 3601


def test_a_trace_that_never_ends_is_refused(tmp_path: Path) -> None:
    workload = read_workload(write(tmp_path, AZURE))
    with pytest.raises(ConfigError, match="speed: 1e-320: at it the trace never ends"):
        workload.faster(1e-320)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        read_workload(tmp_path / "missing.csv")
