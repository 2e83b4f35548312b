"""What the command says to words that it does not know."""

from __future__ import annotations

import pytest

from moeserve.cli import main


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["sevre"], "did you mean serve?"),
        (["serve", "--threads", "2"], " or --num-threads"),
        (["request", "hi", "--max_tokens=3"], "did you mean --max-tokens?"),
        (["generate", "--zzzzzzzz"], "moeserve generate --help"),
        (["keygen", "a", "b", "c"], "moeserve keygen --help"),
    ],
)
def test_unknown_words_get_a_hint(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 2
    assert said in capsys.readouterr().err


def test_a_repeated_flag_keeps_all_its_values(capsys: pytest.CaptureFixture[str]) -> None:
    """Through the whole command line, which is read a second time for what was given."""
    assert main(["serve", "--worker", "ipc:///a", "--worker", "nonsense"]) == 2
    assert "workers: 'nonsense' is neither" in capsys.readouterr().err
