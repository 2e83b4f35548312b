"""Recorded traffic: when requests came, and how long their prompts and outputs were.

Three column layouts are read as they are published, told apart by what the file begins with:

- Azure (AzureLLMInferenceTrace_*.csv): TIMESTAMP, ContextTokens, GeneratedTokens.
- BurstGPT (BurstGPT_*.csv): Timestamp (seconds), Model, Request tokens, Response tokens, Total
  tokens, Log Type; further columns are passed over, and so are requests whose response failed.
- Mooncake (*.jsonl): timestamp (ms), input_length, output_length, hash_ids of 512-token blocks.
"""

from __future__ import annotations

import argparse
import csv
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from moeserve.core import ConfigError

Row = TypeVar("Row")
Value = TypeVar("Value")
Number = TypeVar("Number", int, float)
#: tokens of one of Mooncake's blocks
MOONCAKE_BLOCK = 512
#: of one request, prompt or answer: no model takes more, and a replay makes prompts of them
MOST_TOKENS = 10_000_000
#: characters of a file that an error shows
SHOWN = 200
#: requests that are planned for and replayed unless others are asked for
DEFAULT_REQUESTS = 200
AZURE = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
BURST_GPT = ("Timestamp", "Request tokens", "Response tokens")
MOONCAKE = ("timestamp", "input_length", "output_length")
HINT = (
    "the layouts are those of Azure (TIMESTAMP,ContextTokens,GeneratedTokens), BurstGPT"
    " (Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type) and Mooncake (JSON"
    " lines with timestamp, input_length, output_length)"
)


@dataclass(frozen=True)
class WorkloadRequest:
    """at_s: from the trace's own zero. hash_ids: of the prompt's blocks, equal where prefixes are
    equal; empty where the trace does not say."""

    at_s: float
    num_prompt: int
    num_output: int
    hash_ids: tuple[int, ...] = ()

    def tokens(self, number: int) -> list[int]:
        """Prompt ids: equal exactly where the trace says that prefixes are equal. number: of the
        request, for a prompt like no other's."""
        if not self.hash_ids:
            return [number] * self.num_prompt
        tokens: list[int] = []
        for hash_id in self.hash_ids:
            tokens += [hash_id] * min(MOONCAKE_BLOCK, self.num_prompt - len(tokens))
        return tokens


@dataclass(frozen=True)
class Workload:
    """Requests in the order of their arrival; the first comes at 0 s.

    num_dropped: requests of the file without a prompt or an answer.
    """

    name: str
    requests: tuple[WorkloadRequest, ...]
    num_dropped: int = 0

    @property
    def span_s(self) -> float:
        """Between the first and the last arrival."""
        return self.requests[-1].at_s

    @property
    def longest(self) -> int:
        """Prompt and output of the longest request, in tokens."""
        return max(request.num_prompt + request.num_output for request in self.requests)

    @property
    def prompt_tokens(self) -> int:
        return sum(request.num_prompt for request in self.requests)

    @property
    def output_tokens(self) -> int:
        return sum(request.num_output for request in self.requests)

    def as_json(self) -> dict[str, Any]:
        """What tells it from the same file with other flags."""
        return {
            "name": self.name,
            "span_s": self.span_s,
            "prompt_tokens": self.prompt_tokens,
            "output_tokens": self.output_tokens,
            "dropped": self.num_dropped,
        }

    @property
    def in_words(self) -> str:
        """How many requests there are, and how many were left out."""
        dropped = f" ({self.num_dropped} without a prompt or an answer left out)"
        return f"{len(self.requests)} requests{dropped if self.num_dropped else ''}"

    def first(self, count: int) -> Workload:
        return replace(self, requests=self.requests[:count])

    def clipped(self, most_tokens: int) -> Workload:
        """Every request within so many tokens: outputs at most half of them, prompts what is left,
        cut at the end."""
        if most_tokens < 2:
            raise ConfigError(f"clip: {most_tokens}; allowed: 2 or more", field="clip")
        clipped = []
        for request in self.requests:
            num_output = min(request.num_output, most_tokens // 2)
            num_prompt = min(request.num_prompt, most_tokens - num_output)
            blocks = request.hash_ids[: -(-num_prompt // MOONCAKE_BLOCK)]
            clipped.append(
                replace(request, num_prompt=num_prompt, num_output=num_output, hash_ids=blocks)
            )
        return replace(self, requests=tuple(clipped))

    def faster(self, speed: float) -> Workload:
        """With all times divided by speed, so that bursts stay."""
        if not speed > 0:
            raise ConfigError(f"speed: {speed}; allowed: above 0", field="speed")
        if self.span_s / speed == float("inf"):
            raise ConfigError(f"speed: {speed}: at it the trace never ends", field="speed")
        return replace(self, requests=tuple(replace(r, at_s=r.at_s / speed) for r in self.requests))


def read_workload(path: Path, limit: int | None = None) -> Workload:
    """limit: requests that are read, from the first; None: all.

    Raises ConfigError, naming the file, the line and the columns, for what is no such trace, and
    for one without requests.
    """
    if limit is not None and limit < 1:
        raise ConfigError(f"requests: {limit}; allowed: 1 or more", field="requests")
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            first = file.read(SHOWN)
            file.seek(0)
            rows = _json_lines(path, file) if first.lstrip().startswith("{") else _csv(path, file)
            found = list(islice(rows, limit))
    except OSError as error:
        raise _bad(path, f"cannot be read: {error.strerror}") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise _bad(path, f"is no text with columns: {error}") from error
    kept = sorted((r for r in found if r.num_prompt > 0 and r.num_output > 0), key=lambda r: r.at_s)
    if not kept:
        raise _bad(path, "has no requests" + (" with a prompt and an answer" if found else ""))
    start_s = kept[0].at_s
    return Workload(
        path.stem,
        tuple(replace(request, at_s=request.at_s - start_s) for request in kept),
        len(found) - len(kept),
    )


def _csv(path: Path, lines: Iterator[str]) -> Iterator[WorkloadRequest]:
    reader = csv.DictReader(lines)
    names = tuple(name.strip() for name in reader.fieldnames or ())
    reader.fieldnames = names
    for columns, read in ((AZURE, _azure), (BURST_GPT, _burst_gpt)):
        if set(columns) <= set(names):
            yield from _rows(path, enumerate(reader, start=2), read)
            return
    raise _bad(path, f"has the columns {_shown(', '.join(names)) or 'none'}")


def _json_lines(path: Path, lines: Iterator[str]) -> Iterator[WorkloadRequest]:
    numbered = ((number, line) for number, line in enumerate(lines, start=1) if line.strip())
    yield from _rows(path, numbered, _mooncake)


def _rows(
    path: Path, rows: Iterator[tuple[int, Row]], read: Callable[[Row], WorkloadRequest]
) -> Iterator[WorkloadRequest]:
    """rows: with their line numbers."""
    for number, row in rows:
        try:
            request = read(row)
        except ValueError as error:
            raise _bad(path, f"line {number}: {error}") from error
        yield request


def _azure(row: Mapping[str, Any]) -> WorkloadRequest:
    at_s = _value(row, "TIMESTAMP", _time_s, "a time like 2023-11-16 18:17:03.9799600")
    counts = _count(row, "ContextTokens"), _count(row, "GeneratedTokens")
    return WorkloadRequest(at_s, *_whole_line(row, counts))


def _time_s(text: str) -> float:
    """Without a zone it is of UTC: no hour comes twice or is left out."""
    digits = re.sub(r"(\.\d{6})\d+", r"\1", text)  # Python 3.10: at most six of a second
    time = datetime.fromisoformat(digits)
    return (time if time.tzinfo else time.replace(tzinfo=timezone.utc)).timestamp()


def _whole_line(row: Mapping[Any, Any], counts: tuple[int, int]) -> tuple[int, int]:
    """The counts. ValueError where a line has more cells than there are columns: then nobody knows
    which is which."""
    more = row.get(None)  # what csv.DictReader has no column for
    if more and any(cell.strip() for cell in more):
        raise ValueError(f"{len(more)} cells more than columns")
    return counts


def _burst_gpt(row: Mapping[str, Any]) -> WorkloadRequest:
    counts = _count(row, "Request tokens"), _count(row, "Response tokens")
    return WorkloadRequest(_seconds(row, "Timestamp"), *_whole_line(row, counts))


def _mooncake(line: str) -> WorkloadRequest:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"no JSON: {error}") from error
    except RecursionError as error:
        raise ValueError("brackets in brackets without an end") from error
    if not isinstance(row, dict):
        raise ValueError("no JSON object")
    counts = _count(row, "input_length"), _count(row, "output_length")
    hash_ids: tuple[int, ...] = ()
    if "hash_ids" in row:
        blocks = -(-counts[0] // MOONCAKE_BLOCK)
        wanted = f"a list of {blocks} whole numbers, one for {MOONCAKE_BLOCK} tokens of the prompt"
        hash_ids = _value(row, "hash_ids", lambda ids: _block_ids(ids, blocks), wanted)
    return WorkloadRequest(_seconds(row, "timestamp") / 1000, *counts, hash_ids)


def _block_ids(ids: Any, blocks: int) -> tuple[int, ...]:
    if not isinstance(ids, list) or len(ids) != blocks:
        raise ValueError("not as many as blocks")
    return tuple(_not_negative(_whole(each)) for each in ids)


def _count(row: Mapping[str, Any], name: str) -> int:
    def read(value: Any) -> int:
        count = _not_negative(_whole(value))
        if count > MOST_TOKENS:
            raise ValueError("more than any model takes")
        return count

    return _value(row, name, read, f"a whole number, 0 to {MOST_TOKENS}")


def _whole(value: Any) -> int:
    """Of text, or of a JSON number that has no fraction and is no truth value."""
    if not isinstance(value, str) and type(value) is not int:
        raise TypeError("no whole number")
    return int(_plain(value))


def _plain(value: Any) -> Any:
    """The value. ValueError for text that is a number to Python alone, as 1_000, TypeError for a
    truth value."""
    if isinstance(value, bool):
        raise TypeError("no number")
    if isinstance(value, str) and ("_" in value or not value.isascii()):
        raise ValueError("not written with digits alone")
    return value


def _seconds(row: Mapping[str, Any], name: str) -> float:
    """In whatever unit the column has."""
    return _value(
        row, name, lambda value: _not_negative(float(_plain(value))), "a number, 0 or more"
    )


def _not_negative(number: Number) -> Number:
    if not 0 <= number < float("inf"):
        raise ValueError(f"{number} is negative or endless")
    return number


def _value(row: Mapping[str, Any], name: str, read: Callable[[Any], Value], wanted: str) -> Value:
    """ValueError, naming the column, where it is not there or no such value."""
    value = row.get(name)
    if value is None:
        raise ValueError(f"{name} is missing")
    try:
        return read(value)
    except (ValueError, TypeError, OverflowError) as error:
        raise ValueError(f"{name}: {_shown(repr(value))} is not {wanted}") from error


def _shown(text: str) -> str:
    """On a terminal: no line of an endless file, and nothing that it would act on."""
    plain = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text[:SHOWN])
    return plain if len(text) <= SHOWN else f"{plain}…"


def _bad(path: Path, what: str) -> ConfigError:
    return ConfigError(f"workload: {path} {what}", field="workload", hint=HINT)


def add_workload_flags(group: argparse._ArgumentGroup) -> None:
    """What `plan` and `bench serve` have in common."""
    group.add_argument(
        "--workload",
        type=Path,
        metavar="FILE",
        help="arrivals and lengths: a trace of Azure, BurstGPT (.csv) or Mooncake (.jsonl)",
    )
    group.add_argument(
        "--requests",
        type=int,
        metavar="N",
        help=f"of the workload, from its first (default: {DEFAULT_REQUESTS})",
    )
    group.add_argument(
        "--speed",
        type=float,
        metavar="X",
        help="arrivals come so many times as fast (default: 1)",
    )
    group.add_argument(
        "--clip",
        type=int,
        metavar="TOKENS",
        help="shorten requests to so many tokens, prompt and output together",
    )
    for name, text in (("ttft", "to the first token"), ("tpot", "for each further token")):
        group.add_argument(
            f"--slo-{name}", type=float, metavar="S", help=f"a good request takes at most S {text}"
        )


def workload_of(args: argparse.Namespace) -> Workload:
    """As the flags have it. Raises ConfigError."""
    count = DEFAULT_REQUESTS if args.requests is None else args.requests
    workload = read_workload(args.workload, count)
    if args.speed is not None:
        workload = workload.faster(args.speed)
    return workload if args.clip is None else workload.clipped(args.clip)


def workload_if_any(args: argparse.Namespace) -> Workload | None:
    """None without --workload. ConfigError for flags that are for it, or instead of it."""
    of_it = ("requests", "speed", "clip", "slo_ttft", "slo_tpot")
    instead = ("concurrency", "prompt_tokens", "output_tokens")
    for name in of_it if args.workload is None else instead:
        if getattr(args, name) is not None:
            what = "it is for --workload" if name in of_it else "contradicts --workload"
            raise ConfigError(
                f"{name}: {what}", field=name, hint="leave out one, or give the other"
            )
    return None if args.workload is None else workload_of(args)
