"""The report for people: tables in Markdown, with the reason wherever a figure is missing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from peers.figures import DOT_TYPES, METRICS, Figures, Ratio
from peers.plan import LLAMA_CPP, WIDTHS

ENGINES = (
    *(f"moeserve {label}" for label in WIDTHS.values()),
    *(f"llama.cpp {label}" for label in LLAMA_CPP.values()),
    "transformers bf16",
)
BUSY_SHARE = 0.05


def report(figures: Figures, facts: dict[str, Any], packed: str | None, plot: str | None) -> str:
    parts = [
        "# moeserve beside llama.cpp and transformers",
        "\n".join(_facts(facts, figures)),
        "## Reach",
        _ratio_table(figures.peer_ratios(), "against"),
        _ratio_table(figures.limit_ratios(), "of the limit"),
        _ratio_table([*figures.layer_ratios(), *figures.start_ratio(packed)], "against"),
        "## Engines",
        "Medians (slowest and fastest round), tokens/s; start is loading plus the first token, "
        "with the files in page cache.",
        _engine_table(figures),
        "## Where the time goes",
        "Of every share of a limit that is missed: milliseconds of a step by part, and each part's "
        "own share of its limit (reading, or dot products of its type; float32 for routers and "
        "attention). The rest: head, sampler, Python.",
        _part_table(figures),
        "## Limits of the machine",
        "\n".join(_limits(figures)),
        "## One MoE layer",
        "Milliseconds; a row has 8 experts of 128; weights come from memory, not from cache.",
        _layer_table(figures),
        "## Same tokens",
        "Greedy tokens against transformers', over 17 prompts of random ids: how many first tokens "
        "are equal, and how far the continuations are. Quantised weights are other weights.",
        _agreement_table(figures),
    ]
    if plot:
        parts += ["## Scaling", f"![rows and threads]({plot})"]
    return "\n\n".join(parts) + "\n"


def _facts(facts: dict[str, Any], figures: Figures) -> Iterator[str]:
    for name, value in facts.items():
        yield f"- {name}: {value}"
    share = figures.other_load()
    warning = ": **not alone, do not keep these figures**" if share > BUSY_SHARE else ""
    yield f"- other processes' share of the CPU, at most: {share:.1%}{warning}"
    for name in ("llama.cpp BF16", "transformers bf16", "moeserve bf16"):
        for result in figures.rounds(name)[:1]:
            for note, text in result["notes"].items():
                yield f"- {name.split()[0]}, {note}: {text}"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def number(value: float | None, digits: int = 1) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _ratio_table(ratios: list[Ratio], kind: str) -> str:
    rows = []
    for ratio in ratios:
        if kind == "against":
            found, least = f"{number(ratio.found, 2)}×", f"{ratio.least}×"
        else:
            found = "–" if ratio.found is None else f"{ratio.found:.0%}"
            least = f"{ratio.least:.0%}"
        verdict = "yes" if ratio.reached else "no"
        if ratio.found is None:
            found, verdict = "–", _cell(ratio.reason)
        rows.append([ratio.name, ratio.against, found, f"≥ {least}", verdict])
    return table(["", kind, "found", "wanted", "reached"], rows)


def _engine_table(figures: Figures) -> str:
    rows = []
    for name in ENGINES:
        if not figures.rounds(name):
            rows.append([name, *["–"] * len(METRICS), "–", _cell(figures.reason(name))])
            continue
        rates = [_rate(figures, name, metric) for metric in METRICS]
        load_s = figures.median(name, "load_s") or 0.0
        start_s = load_s + (figures.median(name, "first_token_s") or 0.0)
        broken = len(figures.results[name]) - len(figures.rounds(name))
        note = f"a round is missing: {_cell(figures.reason(name))}" if broken else ""
        rows.append([name, *rates, number(start_s, 2), note])
    return table(["", *METRICS.values(), "start, s", ""], rows)


def _rate(figures: Figures, name: str, metric: str) -> str:
    low, high = figures.spread(name, metric)
    return f"{number(figures.rate(name, metric))} ({low:.1f} to {high:.1f})"


def _part_table(figures: Figures) -> str:
    missed = dict(figures.missed_parts())
    if not missed:
        return "None is missed."
    names = sorted({part for parts in missed.values() for part in parts})
    rows = []
    for title, parts in missed.items():
        cells = []
        for part in names:
            milliseconds, share = parts.get(part, (None, None))
            cells.append(number(milliseconds, 2) + ("" if share is None else f" ({share:.0%})"))
        rows.append([title, *cells])
    return table(["", *names], rows)


def _limits(figures: Figures) -> Iterator[str]:
    for width in DOT_TYPES:
        for metric in METRICS:
            bound, unit = figures.bound(width, metric), figures.limit_name(width, metric)
            if bound is not None:
                yield f"- {METRICS[metric]}, {width}: at most {bound:.1f} tok/s by the {unit}"
    yield "- those: median of the rounds, each measured just before and after; below: by itself"
    for result in figures.rounds("limits")[:1]:
        for threads in result["read_bytes_per_s"]:
            rate = figures.median("limits", "read_bytes_per_s", threads) or 0.0
            yield f"- read bandwidth, {threads} threads: {rate / 1e9:.1f} GB/s"
        for name in result["dot_ops_per_s"]:
            rate = figures.median("limits", "dot_ops_per_s", name) or 0.0
            yield f"- dot products of {name}: {rate / 1e9:.0f} G operations/s"
    if not figures.rounds("limits"):
        yield f"- not measured: {_cell(figures.reason('limits'))}"
    for streams in (1, 16):
        count, how = figures.num_experts(streams)
        yield f"- experts per layer and step of {streams} streams: {count:.1f}, {how}"


def _layer_table(figures: Figures) -> str:
    bf16_bytes = {
        rows: figures.traffic.layer_bytes(16, figures.traffic.uniform_experts(int(rows)))
        for rows in ("1", "16")
    }
    rows = []
    for name, times in figures.layer_ms().items():
        bits = figures.bits(name).experts
        cells = []
        for count, milliseconds in times.items():
            cells.append(number(milliseconds, 2))
            rate = milliseconds and bf16_bytes[count] * bits / 16 / milliseconds / 1e6
            cells.append(number(rate))
        note = _cell(figures.reason(name)) if times["1"] is None else ""
        rows.append([name, *cells, note])
    return table(["", "1 row, ms", "GB/s", "16 rows, ms", "GB/s", ""], rows)


def _agreement_table(figures: Figures) -> str:
    rows = []
    for name in ENGINES:
        found = figures.agreement(name)
        if found is not None:
            rows.append([name, *(f"{found[key]:.0%}" for key in ("first", "prefix", "distinct"))])
    header = ["", "first tokens equal", "equal before the first difference", "distinct tokens"]
    return table(header, rows)


def _cell(text: str) -> str:
    return text.replace("|", "/")
