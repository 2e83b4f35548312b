"""Recorded routing, read from npz files, and how requests of it are put together into steps.

Arrays: `ids` [T, L, K] of tokens, MoE layers and chosen experts; `probs` of the same shape, their
router weights; `lens`, the tokens of each request: as `moeserve trace` writes them. Two other
forms are read: several traces in one file, told apart by a prefix (`NAME_ids`, `NAME_w`,
`NAME_lens`), and requests listed in a .json beside the npz (`offset`, `length`, `category`).
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from moeserve.core import MoeserveError

#: of a layer, where nobody said how many there are: an id beyond is no expert but a broken file
MOST_EXPERTS = 1 << 16

#: the tokens that one step takes, as places in the trace
Step = NDArray[np.int64]


@dataclass(frozen=True)
class Request:
    """One request's tokens in a trace, and what kind of request it is."""

    start: int
    length: int
    group: str


@dataclass(frozen=True)
class RoutingTrace:
    """ids [T, L, K] int64 below num_experts. weights [T, L, K] float32, 0 or more. layers: the
    indices of the MoE layers in the model."""

    name: str
    ids: NDArray[np.int64]
    weights: NDArray[np.float32]
    requests: tuple[Request, ...]
    num_experts: int
    layers: tuple[int, ...]

    @property
    def experts_per_layer(self) -> dict[int, int]:
        return dict.fromkeys(self.layers, self.num_experts)


def load_trace(path: Path, num_experts: int | None = None) -> RoutingTrace:
    """num_experts: of every layer; without it, one more than the highest id.

    Raises MoeserveError for a file that is not a trace, arrays that do not fit each other, ids out
    of range and a token that takes an expert twice.
    """
    arrays = _arrays(path)
    pairs = [("ids", "probs", "lens")] if "ids" in arrays else _prefixed(arrays)
    if not pairs:
        raise _bad(path, "ids", f"missing; the file has {', '.join(sorted(arrays)) or 'nothing'}")
    ids, weights, requests = [], [], []
    offset = 0
    for ids_name, weights_name, lens_name in pairs:
        part_ids, part_weights = _checked(path, arrays, ids_name, weights_name)
        group = ids_name.removesuffix("ids").strip("_")
        found = _requests(path, arrays, lens_name, group, len(part_ids))
        requests += [replace(r, start=r.start + offset) for r in found]
        offset += len(part_ids)
        ids.append(part_ids)
        weights.append(part_weights)
    if len({part.shape[1:] for part in ids}) != 1:
        raise _bad(path, pairs[0][0], "the traces in the file have different layers or experts")
    together = np.concatenate(ids)
    highest = int(np.clip(together.max(), 0, MOST_EXPERTS - 1))
    limit = highest + 1 if num_experts is None else num_experts
    _check_ids(path, together, limit)
    layers = arrays.get("layers", np.arange(together.shape[1]))
    if layers.shape != (together.shape[1],) or layers.dtype.kind not in "ui":
        kind = f"{layers.dtype} {layers.shape}"
        raise _bad(path, "layers", f"{kind} for {together.shape[1]} layers of ids")
    return RoutingTrace(
        path.stem,
        together,
        np.concatenate(weights),
        tuple(requests),
        limit,
        tuple(int(layer) for layer in layers),
    )


def check_for_model(trace: RoutingTrace, num_experts: Mapping[int, int], top_k: int) -> None:
    """Raises MoeserveError where the trace is of another model. num_experts: by MoE layer."""
    found = (len(trace.layers), trace.num_experts, trace.ids.shape[2])
    wide = max(num_experts.values(), default=0)
    if found[0] != len(num_experts) or found[1] > wide or found[2] != top_k:
        raise MoeserveError(
            f"trace: {trace.name} has {found[0]} MoE layers of {found[1]} experts, {found[2]} per"
            f" token; the model has {len(num_experts)} of {wide}, {top_k} per token",
            field="trace",
            hint="record one of this model with `moeserve trace`",
        )


def one_by_one(requests: Iterable[Request]) -> list[Step]:
    """Decoding alone: requests after each other, a token per step."""
    return chunks(requests, 1)


def chunks(requests: Iterable[Request], size: int) -> list[Step]:
    """Prefill: requests after each other, `size` tokens of one per step."""
    return [
        np.arange(start, min(start + size, r.start + r.length))
        for r in requests
        for start in range(r.start, r.start + r.length, size)
    ]


def merged(requests: Sequence[Request], num_streams: int) -> list[Step]:
    """Batched decoding: `num_streams` at once, each takes the next request when one is done.

    Ends when a stream finds no request more, so that every step has all streams.
    """
    waiting = list(reversed(requests))
    streams: list[list[int]] = []  # [next token, end]
    steps: list[Step] = []
    while True:
        streams = [s for s in streams if s[0] < s[1]]
        while len(streams) < num_streams and waiting:
            request = waiting.pop()
            streams.append([request.start, request.start + request.length])
        if len(streams) < num_streams:
            return steps
        steps.append(np.array([s[0] for s in streams], np.int64))
        for stream in streams:
            stream[0] += 1


def _arrays(path: Path) -> dict[str, NDArray[np.generic]]:
    try:
        with zipfile.ZipFile(path):  # np.load takes other files, too, and answers otherwise
            pass
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise _bad(path, "trace", f"cannot be read: {error}") from error


def _prefixed(arrays: Mapping[str, object]) -> list[tuple[str, str, str]]:
    names = [name.removesuffix("_ids") for name in arrays if name.endswith("_ids")]
    return [(f"{n}_ids", f"{n}_w", f"{n}_lens") for n in sorted(names)]


def _checked(
    path: Path, arrays: Mapping[str, NDArray[np.generic]], ids_name: str, weights_name: str
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    ids = arrays[ids_name]
    if ids.ndim != 3 or ids.dtype.kind not in "ui" or 0 in ids.shape:
        raise _bad(path, ids_name, f"{ids.dtype} {ids.shape}; expected integers [T, L, K]")
    if weights_name not in arrays:
        raise _bad(path, weights_name, "missing; expected the router weights of the ids")
    weights = arrays[weights_name]
    if weights.shape != ids.shape or weights.dtype.kind != "f":
        raise _bad(path, weights_name, f"{weights.dtype} {weights.shape}; expected {ids.shape}")
    as_float = weights.astype(np.float32)
    if not (np.isfinite(as_float).all() and (as_float >= 0).all()):
        raise _bad(path, weights_name, "values that are negative or no numbers")
    return ids.astype(np.int64), as_float


def _check_ids(path: Path, ids: NDArray[np.int64], num_experts: int) -> None:
    if ids.min() < 0 or ids.max() >= num_experts:
        bad = ids[(ids < 0) | (ids >= num_experts)][0]
        raise _bad(path, "ids", f"{bad}; allowed: 0 to {num_experts - 1}")
    rising = np.sort(ids, axis=2)
    if (rising[..., 1:] == rising[..., :-1]).any():
        raise _bad(path, "ids", "a token takes the same expert twice")


def _requests(
    path: Path, arrays: Mapping[str, NDArray[np.generic]], lens: str, group: str, num_tokens: int
) -> list[Request]:
    if lens in arrays:
        given = arrays[lens]
        if given.ndim != 1 or given.dtype.kind not in "ui":
            raise _bad(path, lens, f"{given.dtype} {given.shape}; expected integers, one a request")
        lengths = [int(length) for length in given]
        if any(length < 1 for length in lengths):
            raise _bad(path, lens, f"{min(lengths)}; allowed: 1 or more")
        starts = np.cumsum([0, *lengths]).tolist()
        if starts[-1] != num_tokens:
            raise _bad(path, lens, f"sum to {starts[-1]}, the trace has {num_tokens} tokens")
        return [Request(s, n, group) for s, n in zip(starts, lengths, strict=False)]
    beside = path.with_suffix(".json")
    if not beside.exists():
        raise _bad(path, lens, f"missing, and there is no {beside.name} with the requests")
    try:
        listed = json.loads(beside.read_text())
        found = [Request(r["offset"], r["length"], str(r.get("category", ""))) for r in listed]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _bad(
            beside, "requests", f"expected a list of offset and length: {error!r}"
        ) from error
    if any(r.start < 0 or r.length < 1 or r.start + r.length > num_tokens for r in found):
        raise _bad(beside, "requests", f"one reaches beyond the {num_tokens} tokens of the trace")
    return found


def _bad(path: Path, field: str, problem: str) -> MoeserveError:
    return MoeserveError(
        f"{path.name}: {field}: {problem}",
        field=field,
        hint="record a trace with `moeserve trace`",
    )
