"""`moeserve trace --timeline`: a timeline of an answer, without a server."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moeserve import cli
from moeserve.config import BUNDLED_MODEL, ModelConfig
from moeserve.models.pack import pack_model

PROMPT = ("--prompt", "Once upon a time")
NUM_TOKENS = 5


def run(*words: object) -> int:
    flags = ("--cpu-backend", "native", "--num-threads", "1", "--max-tokens", NUM_TOKENS)
    return cli.main(["trace", *map(str, (*words, *flags))])


def named_spans(path: Path) -> dict[str, int]:
    events = json.loads(path.read_text())["traceEvents"]
    names = [event["name"] for event in events if event["ph"] == "X"]
    return {name: names.count(name) for name in set(names)}


def test_experts_on_disk(tmp_path: Path) -> None:
    packed = pack_model(ModelConfig(model=str(BUNDLED_MODEL), quantize="int4"), tmp_path / "m").path
    out = tmp_path / "steps.json"
    assert run(packed, *PROMPT, "--timeline", out, "--host-slots", 20) == 0
    spans = named_spans(out)
    assert spans["step"] == spans["head and sampler"] == NUM_TOKENS
    for part in ("attention", "router", "acquire", "predict and prefetch", "feed forward"):
        assert spans[part] == NUM_TOKENS * 6, part
    assert spans["stall"] > 0
    assert spans["read"] > 20


def test_all_resident(tmp_path: Path) -> None:
    out = tmp_path / "steps.json"
    assert run(*PROMPT, "--timeline", out) == 0
    spans = named_spans(out)
    assert spans["step"] == NUM_TOKENS
    assert spans["experts"] == spans["attention"] == NUM_TOKENS * 6
    assert not {"stall", "read"} & set(spans)


def test_one_prompt_is_a_trace_too(tmp_path: Path) -> None:
    one, listed, prompts = tmp_path / "1.npz", tmp_path / "2.npz", tmp_path / "p.txt"
    prompts.write_text(PROMPT[1] + "\n")
    assert run(*PROMPT, "-o", one) == 0
    assert run("--prompts", prompts, "-o", listed) == 0
    assert one.read_bytes() == listed.read_bytes()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (PROMPT, "give -o FILE.npz or --timeline"),
        ((*PROMPT, "-o", "{tmp}/a.npz", "--timeline", "{tmp}/b.json"), "one of them"),
        (("--text", "README.md", "--timeline", "{tmp}/b.json"), "it is of answers"),
        ((*PROMPT, "--timeline", "{tmp}/none/b.json"), "there is no directory"),
        ((*PROMPT, "--timeline", "{tmp}"), "is a directory"),
        ((*PROMPT, "-o", "{tmp}"), "is a directory"),
        ((*PROMPT, "--timeline", "/dev/full"), "cannot be written: No space left"),
    ],
)
def test_what_is_refused(
    words: tuple[str, ...], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*(word.format(tmp=tmp_path) for word in words)) == 2
    assert said in capsys.readouterr().err
