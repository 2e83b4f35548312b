"""From the rounds' results to medians, ratios and shares of the machine's limits."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from peers.traffic import StoredBits, Traffic

Results = Mapping[str, Sequence[Mapping[str, Any]]]
METRICS = {
    "decode_1": "decode, 1 stream",
    "decode_streams": "decode, 16 streams",
    "prefill": "prefill 512",
}
LLAMA_INT4 = ("llama.cpp Q4_0", "llama.cpp Q4_K")
#: issue 3's table: (ours, metric, peers of which the better counts, least ratio)
TARGETS = (
    ("moeserve bf16", "decode_1", ("llama.cpp BF16",), 1.35),
    ("moeserve int8", "decode_1", ("llama.cpp Q8_0",), 1.6),
    ("moeserve int4", "decode_1", LLAMA_INT4, 1.5),
    ("moeserve bf16", "decode_streams", ("llama.cpp BF16",), 1.5),
    ("moeserve int4", "decode_streams", LLAMA_INT4, 1.8),
    ("moeserve bf16", "prefill", ("llama.cpp BF16",), 1.4),
    ("moeserve int8", "prefill", ("llama.cpp Q8_0",), 2.5),
    ("moeserve int4", "prefill", LLAMA_INT4, 1.7),
    ("moeserve bf16", "decode_1", ("transformers bf16",), 2.0),
    ("moeserve bf16", "prefill", ("transformers bf16",), 1.5),
)
LIMIT_TARGETS = {"decode_1": 0.85, "decode_streams": 0.80, "prefill": 0.75}
#: the type whose dot products a width computes with
DOT_TYPES = {"bf16": "bf16", "int8": "int8", "int4": "int8"}
LAYER_TARGET = 3.0
START_TARGET = 5.0


@dataclass(frozen=True)
class Ratio:
    """One row of the reach table. found is None where `reason` says why there is no figure."""

    name: str
    against: str
    least: float
    found: float | None
    reason: str = ""

    @property
    def reached(self) -> bool:
        return self.found is not None and self.found >= self.least


class Figures:
    """Medians over the rounds. Whatever was not measured is None and has a reason."""

    def __init__(self, results: Results, traffic: Traffic, contexts: Mapping[str, float]) -> None:
        """contexts: mean tokens in kv while a metric's decoding is timed."""
        self.results = results
        self.traffic = traffic
        self.contexts = contexts

    def bits(self, name: str) -> StoredBits:
        """How moeserve said that it stores a width; 16 bits where nothing is known."""
        found = [result["stored_bits"] for result in self.rounds(name) if "stored_bits" in result]
        return StoredBits(**found[0]) if found else StoredBits()

    def rounds(self, name: str) -> list[Mapping[str, Any]]:
        """Results that hold figures."""
        return [
            result
            for result in self.results.get(name, ())
            if "skipped" not in result and "failed" not in result
        ]

    def reason(self, name: str) -> str:
        """Why a run gave no figures, in one line."""
        for result in self.results.get(name, ()):
            for outcome in ("skipped", "failed"):
                if outcome in result:
                    return f"{outcome}: {' '.join(str(result[outcome]).split())[-300:]}"
        return "did not run"

    def median(self, name: str, *path: str) -> float | None:
        """Of the value at `path` in a run's results."""
        values = []
        for result in self.rounds(name):
            value: Any = result
            for key in path:
                value = value[key]
            values.append(value)
        return statistics.median(values) if values else None

    def spread(self, name: str, metric: str) -> tuple[float, float]:
        """Slowest and fastest round."""
        rates = [result["rates"][metric] for result in self.rounds(name)]
        return min(rates), max(rates)

    def rate(self, name: str, metric: str) -> float | None:
        return self.median(name, "rates", metric)

    def peer_ratios(self) -> list[Ratio]:
        return [self._peer_ratio(*target) for target in TARGETS]

    def _peer_ratio(self, ours: str, metric: str, peers: tuple[str, ...], least: float) -> Ratio:
        title = f"{METRICS[metric]}, {ours.removeprefix('moeserve ')}"
        own = self.rate(ours, metric)
        rates = {peer: self.rate(peer, metric) for peer in peers}
        for name, rate in {ours: own, **rates}.items():
            if rate is None:
                return Ratio(title, " or ".join(peers), least, None, f"{name}: {self.reason(name)}")
        best, rate = max(rates.items(), key=lambda item: item[1] or 0.0)
        return Ratio(title, best, least, own / rate)  # type: ignore[operator]

    def limit_ratios(self) -> list[Ratio]:
        """moeserve against the read bandwidth (decode) and the dot-product peak (prefill), each
        round against what the machine gave just before and after it."""
        ratios = []
        for width in DOT_TYPES:
            for metric, least in LIMIT_TARGETS.items():
                name = f"moeserve {width}"
                title, unit = f"{METRICS[metric]}, {width}", self.limit_name(width, metric)
                shares = [
                    result["rates"][metric] / bound
                    for result in self.rounds(name)
                    if (bound := self._bound(result, width, metric)) is not None
                ]
                found = statistics.median(shares) if shares else None
                why = "no limits beside its rates" if self.rounds(name) else self.reason(name)
                ratios.append(Ratio(title, unit, least, found, "" if shares else why))
        return ratios

    def missed_parts(self) -> Iterator[tuple[str, dict[str, tuple[float, float | None]]]]:
        """Of every share of a limit that is missed: part -> (ms of a step, share of the limit).

        The limits: the read bandwidth, or the peak of the type that a part computes with, which
        for routers and attention is float32. None for parts that neither read nor multiply much.
        """
        shares = {ratio.name: ratio for ratio in self.limit_ratios()}
        for width in DOT_TYPES:
            for metric in LIMIT_TARGETS:
                name, share = f"moeserve {width}", shares[f"{METRICS[metric]}, {width}"]
                if share.found is None or share.reached:
                    continue
                ideal_s = self._ideal_s(width, metric)
                parts = self.rounds(name)[0].get("parts", {}).get(metric, {})
                found: dict[str, tuple[float, float | None]] = {}
                for part in parts:
                    seconds = self.median(name, "parts", metric, part) or 0.0
                    ideal = ideal_s.get(part)
                    share = ideal / seconds if ideal is not None and seconds > 0 else None
                    found[part] = (seconds * 1e3, share)
                yield f"{METRICS[metric]}, {width}", found

    def _ideal_s(self, width: str, metric: str) -> dict[str, float]:
        """Seconds of each part at its limit."""
        name = f"moeserve {width}"
        if metric == "prefill":
            floats = ("attention", "router")
            ops = self.traffic.part_ops(round(self.contexts[metric]))
            f32 = self.median(name, "limits", metric, "f32")
            own = self.median(name, "limits", metric, DOT_TYPES[width])
            if f32 is None or own is None:
                return {}
            return {part: n / (f32 if part in floats else own) for part, n in ops.items()}
        bandwidth = self.median(name, "limits", metric, "read")
        num_bytes = self._part_bytes(width, metric)
        return {part: count / bandwidth for part, count in num_bytes.items()} if bandwidth else {}

    def bound(self, width: str, metric: str) -> float | None:
        """Tokens/s that the machine's limit allows, median of the rounds."""
        rounds = self.rounds(f"moeserve {width}")
        bounds = [self._bound(result, width, metric) for result in rounds]
        known = [bound for bound in bounds if bound is not None]
        return statistics.median(known) if known else None

    def limit_name(self, width: str, metric: str) -> str:
        return f"{DOT_TYPES[width]} dot-product peak" if metric == "prefill" else "read bandwidth"

    def _bound(self, result: Mapping[str, Any], width: str, metric: str) -> float | None:
        """None where a round measured no limits: others' kernels."""
        limits = result.get("limits", {}).get(metric)
        if not limits:
            return None
        if metric == "prefill":
            num_tokens = round(self.contexts[metric])
            peak: float = limits[DOT_TYPES[width]]
            return peak * num_tokens / self.traffic.prefill_ops(num_tokens)
        bandwidth: float = limits["read"]
        return bandwidth * self._tokens_per_byte(width, metric)

    def _tokens_per_byte(self, width: str, metric: str) -> float:
        return self.num_streams(metric) / sum(self._part_bytes(width, metric).values())

    def _part_bytes(self, width: str, metric: str) -> dict[str, float]:
        num_streams = self.num_streams(metric)
        return self.traffic.part_bytes(
            self.bits(f"moeserve {width}"),
            self.num_experts(num_streams)[0],
            num_streams,
            self.contexts[metric],
        )

    def num_streams(self, metric: str) -> int:
        return 1 if metric == "decode_1" else 16

    def num_experts(self, num_streams: int) -> tuple[float, str]:
        """Distinct experts per layer and decode step, and how that is known."""
        for result in self.rounds("transformers bf16"):
            counted = result.get("experts_per_step", {})
            if str(num_streams) in counted:
                return counted[str(num_streams)], "counted in the router's output"
        return self.traffic.uniform_experts(num_streams), "computed for uniform routing"

    def start_ratio(self, packed: str | None) -> list[Ratio]:
        """Load and first token. packed: None, or why moeserve's model is not packed."""
        peer = self._start_s("transformers bf16")
        ratios = []
        for width in DOT_TYPES:
            own = self._start_s(f"moeserve {width}")
            reason = packed or ("" if own and peer else self.reason(f"moeserve {width}"))
            found = peer / own if peer and own and not packed else None
            ratios.append(
                Ratio(f"start, packed {width}", "transformers bf16", START_TARGET, found, reason)
            )
        return ratios

    def _start_s(self, name: str) -> float | None:
        load_s, first_s = self.median(name, "load_s"), self.median(name, "first_token_s")
        return None if load_s is None or first_s is None else load_s + first_s

    def layer_ms(self) -> dict[str, dict[str, float | None]]:
        """Name -> rows -> milliseconds of one MoE layer."""
        table: dict[str, dict[str, float | None]] = {}
        for width in DOT_TYPES:
            table[f"moeserve {width}"] = {
                rows: self.median(f"moeserve {width}", "layer", rows) for rows in ("1", "16")
            }
        for run in ("layer", "layer ipex", "layer kt-kernel"):
            found = self.rounds(run)
            for name in found[0]["layer"] if found else ():
                table[name] = {rows: self.median(run, "layer", name, rows) for rows in ("1", "16")}
            if not found:
                table[run] = {"1": None, "16": None}
        return table

    def layer_ratios(self) -> list[Ratio]:
        """One token in bf16 against each other way."""
        table = self.layer_ms()
        own = table["moeserve bf16"]["1"]
        ratios = []
        for name, times in table.items():
            if name.startswith("moeserve"):
                continue
            peer = times["1"]
            found = peer / own if peer and own else None
            reason = "" if found else self.reason(name if peer is None else "moeserve bf16")
            ratios.append(Ratio("one MoE layer, 1 row, bf16", name, LAYER_TARGET, found, reason))
        return ratios

    def agreement(self, name: str) -> dict[str, float] | None:
        """Greedy tokens against transformers': share of equal first tokens, and of all tokens up to
        the first that differs (after it the two continue different texts). distinct: the share of
        tokens that are new in their stream; text that repeats itself decodes out of caches."""
        own, peer = self.rounds(name), self.rounds("transformers bf16")
        if not own or not peer:
            return None
        pairs = list(zip(own[0]["token_ids"], peer[0]["token_ids"], strict=True))
        equal = sum(_equal_prefix(a, b) for a, b in pairs)
        return {
            "first": sum(a[0] == b[0] for a, b in pairs) / len(pairs),
            "prefix": equal / sum(len(a) for a, _ in pairs),
            "distinct": sum(len(set(a)) for a, _ in pairs) / sum(len(a) for a, _ in pairs),
        }

    def other_load(self) -> float:
        """Largest share of the CPU that other processes had during any timed part."""
        shares = [
            result["other_load"]
            for results in self.results.values()
            for result in results
            if "other_load" in result
        ]
        return max(shares, default=0.0)


def _equal_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    for number, (a, b) in enumerate(zip(first, second, strict=True)):
        if a != b:
            return number
    return len(first)
