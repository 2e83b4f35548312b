"""Stop strings in a stream of text."""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """A set of stop strings, prepared for matching; shared by the answers of a request.

    failure[i][k]: the length of the longest proper suffix of the first k characters of string i
    that is also its beginning (Knuth, Morris, Pratt 1977).
    """

    def __init__(self, strings: Sequence[str]) -> None:
        """strings: none is empty."""
        self.strings = tuple(strings)
        self.failure = tuple(_failure_table(string) for string in self.strings)
        self.first_chars = frozenset(string[0] for string in self.strings)


def _failure_table(string: str) -> list[int]:
    table = [0] * (len(string) + 1)
    length = 0
    for end in range(1, len(string)):
        while length and string[end] != string[length]:
            length = table[length]
        if string[end] == string[length]:
            length += 1
        table[end + 1] = length
    return table


class StopMatcher:
    """Finds the stop string that is complete first; of several ending there, the longest.

    Holds text back only while it is the beginning of a stop string.
    """

    def __init__(self, stops: StopStrings, include_stop: bool = False) -> None:
        """include_stop: the matched string is part of the text instead of being cut off."""
        self._stops = stops
        self._include_stop = include_stop
        self._matched = [0] * len(stops.strings)  # characters of each that the text ends with
        self._held = ""

    def feed(self, piece: str) -> tuple[str, str | None]:
        """Text that is safe to give out, and the stop string once it is complete.

        After a match nothing more may be fed; text behind the match is dropped.
        """
        if not self._held and self._stops.first_chars.isdisjoint(piece):
            return piece, None
        text = self._held + piece
        for position, char in enumerate(piece, start=len(self._held) + 1):
            stop = self._advance(char)
            if stop is not None:
                self._held = ""
                return text[: position if self._include_stop else position - len(stop)], stop
        num_held = max(self._matched)
        safe = len(text) - num_held
        self._held = text[safe:]
        return text[:safe], None

    def _advance(self, char: str) -> str | None:
        """Takes one character; the longest stop string that it completes."""
        complete: str | None = None
        for index, string in enumerate(self._stops.strings):
            length = self._matched[index]
            while length and string[length] != char:
                length = self._stops.failure[index][length]
            if string[length] == char:
                length += 1
            self._matched[index] = length
            if length == len(string) and (complete is None or length > len(complete)):
                complete = string
        return complete

    def finish(self) -> str:
        """What was held back; no stop string came of it."""
        held, self._held = self._held, ""
        return held
