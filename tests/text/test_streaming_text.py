"""Incremental detokenisation and stop strings, against whole-text oracles."""

from __future__ import annotations

from pathlib import Path

from hypothesis import example, given, settings
from hypothesis import strategies as st

from moeserve.text.detokenize import Detokenizer
from moeserve.text.stop import StopMatcher, StopStrings
from moeserve.text.tokenizer import Tokenizer


def stream(tokenizer: Tokenizer, prompt: list[int], ids: list[int], skip: bool) -> list[str]:
    detokenizer = Detokenizer(tokenizer, prompt, skip)
    pieces = [detokenizer.feed(token) for token in ids] + [detokenizer.finish()]
    assert detokenizer.num_chars == len("".join(pieces))
    return pieces


@settings(max_examples=300)
@given(data=st.data())
def test_pieces_are_the_whole_decoded(model_path: Path, data: st.DataObject) -> None:
    """For any tokens, any split into prompt and output."""
    tokenizer = Tokenizer.load(model_path)
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size + 3), max_size=30))
    skip = data.draw(st.booleans())
    cut = data.draw(st.integers(0, len(ids)))
    before = Detokenizer(tokenizer, (), skip)
    prompt_text = "".join(before.feed(token) for token in ids[:cut])  # its whole characters
    text = "".join(stream(tokenizer, ids[:cut], ids[cut:], skip))
    assert prompt_text + text == tokenizer.decode(ids, skip)


@settings(max_examples=200)
@given(text=st.text(min_size=1, max_size=40))
@example("👩‍👩‍👧 family")
@example("你好")
def test_no_piece_is_a_broken_character(model_path: Path, text: str) -> None:
    tokenizer = Tokenizer.load(model_path)
    ids = tokenizer.encode(text, add_special_tokens=False)
    pieces = stream(tokenizer, [], ids, skip=False)
    whole = tokenizer.decode(ids, skip_special_tokens=False)
    assert "".join(pieces) == whole
    assert sum(piece.count("\ufffd") for piece in pieces) == whole.count("\ufffd")
    for count in range(len(pieces)):  # a prefix of the pieces is a prefix of the text
        assert whole.startswith("".join(pieces[:count]))


def test_an_answer_keeps_the_space_before_its_first_word(byte_fallback_path: Path) -> None:
    tokenizer = Tokenizer.load(byte_fallback_path)
    ids = tokenizer.encode("Once upon a time")
    starts = [i for i, token in enumerate(ids) if tokenizer.token_bytes(token).startswith(b" ")]
    for cut in starts[1:]:
        answer = "".join(stream(tokenizer, ids[:cut], ids[cut:], True))
        assert answer.startswith(" ")
        assert "Once upon a time".endswith(answer)
    assert "".join(stream(tokenizer, ids[:1], ids[1:], True)) == "Once upon a time"  # after <s>


def test_cost_is_linear(byte_fallback_path: Path) -> None:
    """Counts byte look-ups, which is all the work there is per token."""

    class Counting(Tokenizer):
        calls = 0

        def token_bytes(self, token_id: int, *, first: bool = False) -> bytes:
            self.calls += 1
            return super().token_bytes(token_id, first=first)

    tokenizer = Counting.load(byte_fallback_path)
    assert isinstance(tokenizer, Counting)
    ids = tokenizer.encode("你好世界" * 2000, add_special_tokens=False)
    stream(tokenizer, ids, ids, True)
    assert tokenizer.calls <= len(ids) + 10


# -- stop strings -------------------------------------------------------------------------------


def brute_force(text: str, stops: list[str]) -> tuple[int, str] | None:
    """(end, stop) of the match that is complete first; the longest of those ending there."""
    for end in range(1, len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            return end, max(ending, key=len)
    return None


SMALL = st.text("ab", max_size=40)  # few letters, so that partial matches abound


@settings(max_examples=500)
@given(
    pieces=st.lists(st.text("ab", max_size=5), max_size=15),
    stops=st.lists(st.text("ab", min_size=1, max_size=6), max_size=4),
    include=st.booleans(),
)
@example(pieces=["aab", "aaab"], stops=["aaab"], include=False)
@example(pieces=["ab", "ab"], stops=["bab", "ab"], include=True)
def test_stop_matching_equals_brute_force(
    pieces: list[str], stops: list[str], include: bool
) -> None:
    matcher = StopMatcher(StopStrings(stops), include)
    text = "".join(pieces)
    expected = brute_force(text, stops)
    out, found = "", None
    for number, piece in enumerate(pieces):
        safe, found = matcher.feed(piece)
        out += safe
        if found is not None:
            break
        # Held back is only what may become a match: the longest such end of the text so far.
        so_far = "".join(pieces[: number + 1])
        held = max(
            (k for stop in stops for k in range(len(stop)) if so_far.endswith(stop[:k])), default=0
        )
        assert out == so_far[: len(so_far) - held]
    if expected is None:
        assert found is None
        assert out + matcher.finish() == text
        return
    end, stop = expected
    assert found == stop
    assert out == text[: end if include else end - len(stop)]
    if not include:
        assert not any(stop in out for stop in stops)
