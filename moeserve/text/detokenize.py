"""Token ids to text while they arrive: only whole characters, in time linear in the tokens."""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from moeserve.text.tokenizer import Tokenizer

# The longest UTF-8 character, so the most bytes that can wait for their rest.
MAX_CHARACTER_BYTES = 4


class Detokenizer:
    """Text of one growing token sequence.

    The pieces together with `finish()` are what `Tokenizer.decode` gives for prompt and output,
    minus what it gives for the prompt: an output that begins with a word keeps the space before
    that word, and a character cut in two by the end of the prompt comes out whole.
    """

    def __init__(
        self, tokenizer: Tokenizer, prompt_ids: Sequence[int] = (), skip_special_tokens: bool = True
    ) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special_tokens
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        tail = self._prompt_tail(prompt_ids)
        self._first = not tail
        self._decoder.decode(tail)  # keeps what is left of an unfinished character
        self.num_chars = 0  # given out so far

    def _prompt_tail(self, prompt_ids: Sequence[int]) -> bytes:
        """The last bytes of the prompt, enough to hold any unfinished character."""
        tail = b""
        for token_id in reversed(prompt_ids):
            if len(tail) >= MAX_CHARACTER_BYTES:
                break
            if not (self._skip_special and self._tokenizer.is_special(token_id)):
                tail = self._tokenizer.token_bytes(token_id) + tail
        return tail

    def feed(self, token_id: int) -> str:
        """The whole characters that this token completes; "" if there are none yet."""
        if self._skip_special and self._tokenizer.is_special(token_id):
            return ""
        raw = self._tokenizer.token_bytes(token_id, first=self._first)
        if self._first and self._tokenizer.token_bytes(token_id):
            self._first = False
        text = self._decoder.decode(raw)
        self.num_chars += len(text)
        return text

    def finish(self) -> str:
        """U+FFFD for a character that never got its last bytes, else ""."""
        text = self._decoder.decode(b"", final=True)
        self.num_chars += len(text)
        return text
