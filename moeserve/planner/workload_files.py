"""Files of recorded traffic.

Three column layouts are read as they are published, told apart by what the file begins with:

- Azure (AzureLLMInferenceTrace_*.csv): TIMESTAMP, ContextTokens, GeneratedTokens.
- BurstGPT (BurstGPT_*.csv): Timestamp (seconds), Model, Request tokens, Response tokens, Total
  tokens, Log Type; further columns are passed over, and so are requests whose response failed.
- Mooncake (*.jsonl): timestamp (ms), input_length, output_length, hash_ids of 512-token blocks.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from datetime import datetime, timezone
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from moeserve.core import ConfigError
from moeserve.planner.workload import MOONCAKE_BLOCK, Workload, WorkloadRequest

Row = TypeVar("Row")
Value = TypeVar("Value")
Number = TypeVar("Number", int, float)
#: of one request, prompt or answer: no model takes more, and a replay makes prompts of them
MOST_TOKENS = 10_000_000
#: characters of a file that an error shows
SHOWN = 200
AZURE = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
BURST_GPT = ("Timestamp", "Request tokens", "Response tokens")
MOONCAKE = ("timestamp", "input_length", "output_length")
HINT = (
    "the layouts are those of Azure (TIMESTAMP,ContextTokens,GeneratedTokens), BurstGPT"
    " (Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type) and Mooncake (JSON"
    " lines with timestamp, input_length, output_length)"
)


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
