"""Layers over the disk as the timeline of a step shows them: what each part took.

A step is an average of layers that read nothing and layers that wait for several experts, and what
the two cost has little in common. So layers are sorted by what they had to read.

    layer           all of it but attention
    experts         computing them, in runs
    stall           waiting for reads
    begin           from the reads' order to the first run or the first stall; without reads a part
                    of books
    books           what is left of the layer: router, counting, deciding, leasing, taking
    to read         from the reads' order to the first read
    reading         from the first read's start to the last one's end
    alone           how long these reads take where nothing is computed beside them
    beside          of the runs, while anything was being read
    late            from the last read's end to the stall's
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from moeserve.experts.schedule.profile import TierPoint
from moeserve.planner.repeats import summarise
from moeserve.timeline import Span

#: layers of a kind that say nothing of it yet are fewer
FEW = 4
#: of a layer over tiers (models/transformer.py, experts/layer.py)
LAPS = ("router", "place", "acquire", "predict and prefetch", "feed forward")
#: parts that computing does not decide
OF_READS = ("stall", "to read", "reading", "alone", "late")


@dataclass(frozen=True)
class TierLayer:
    """One layer of one step. us: by part; without reads there is no "begin" and none of what they
    take, without a stall no "late"."""

    num_rows: int
    num_active: float
    num_missing: int
    num_groups: int
    us: dict[str, float]

    def faster(self, factor: float) -> TierLayer:
        """On a machine that computes so much faster, and reads as this one."""
        us = {part: us if part in OF_READS else us / factor for part, us in self.us.items()}
        us["layer"] += self.us["stall"] * (1 - 1 / factor)
        return replace(self, us=us)

    def beside_disk(self, alone_us: Callable[[int], float]) -> TierLayer:
        """alone_us: of reading so many of the experts when nothing else goes on."""
        if not self.num_missing:
            return self
        return replace(self, us=self.us | {"alone": alone_us(self.num_missing)})


def tier_layers(spans: Iterable[Span], num_rows: int, usual_active: float) -> list[TierLayer]:
    """Of one step. usual_active: experts of a layer; one that reads nothing does not say."""
    by_layer: dict[int, dict[str, list[Span]]] = defaultdict(lambda: defaultdict(list))
    for span in spans:
        if "layer" in span.details:
            by_layer[span.details["layer"]][span.name].append(span)
    return [_layer(parts, num_rows, usual_active) for _, parts in sorted(by_layer.items())]


def _layer(parts: dict[str, list[Span]], num_rows: int, usual_active: float) -> TierLayer:
    runs, stalls, reads = (_in_order(parts[name]) for name in ("experts", "stall", "read"))
    ordered_s = parts["acquire"][-1].end_s
    us = {
        "layer": sum(_us(parts[lap]) for lap in LAPS),
        "experts": _us(runs),
        "stall": _us(stalls),
    }
    if reads:
        us["begin"] = (min(span.start_s for span in runs + stalls) - ordered_s) * 1e6
        us["to read"] = (reads[0].start_s - ordered_s) * 1e6
        us["reading"] = (max(span.end_s for span in reads) - reads[0].start_s) * 1e6
        us["beside"] = sum(_shared_us(run, reads) for run in runs)
    us["books"] = us["layer"] - us["experts"] - us["stall"] - us.get("begin", 0.0)
    late = [found for stall in stalls if (found := _late_us(stall, reads)) is not None]
    if late:
        us["late"] = sum(late) / len(late)
    computed = [expert for run in runs for expert in run.details["experts"] or ()]
    return TierLayer(
        num_rows=num_rows,
        num_active=len(computed) or usual_active,
        num_missing=len({span.details["expert"] for span in reads}),
        num_groups=len(runs),
        us=us,
    )


def _in_order(spans: Sequence[Span]) -> list[Span]:
    return sorted(spans, key=lambda span: span.start_s)


def _us(spans: Sequence[Span]) -> float:
    return sum(span.end_s - span.start_s for span in spans) * 1e6


def _shared_us(run: Span, reads: Sequence[Span]) -> float:
    """Of a run, for how long at least one of the reads was under way too."""
    shared_s, known_s = 0.0, run.start_s
    for read in reads:
        begin_s, end_s = max(read.start_s, known_s), min(read.end_s, run.end_s)
        if end_s > begin_s:
            shared_s += end_s - begin_s
            known_s = end_s
    return shared_s * 1e6


def _late_us(stall: Span, reads: Sequence[Span]) -> float | None:
    """None where no read ended in the stall: it had ended before, and was only to be taken."""
    ends = [read.end_s for read in reads if stall.start_s < read.end_s <= stall.end_s]
    return (stall.end_s - max(ends)) * 1e6 if ends else None


def tier_points(layers: Iterable[TierLayer]) -> list[TierPoint]:
    """Layers that are alike together, where there are a few of them: medians, since what varies is
    the engine's own."""
    alike: dict[tuple[int, int], list[TierLayer]] = defaultdict(list)
    for layer in layers:
        alike[layer.num_rows, layer.num_missing].append(layer)
    return [_point(found) for _, found in sorted(alike.items()) if len(found) >= FEW]


def _point(layers: Sequence[TierLayer]) -> TierPoint:
    names = sorted({name for layer in layers for name in layer.us})
    return TierPoint(
        num_rows=layers[0].num_rows,
        num_missing=layers[0].num_missing,
        num_layers=len(layers),
        num_active=sum(layer.num_active for layer in layers) / len(layers),
        num_groups=sum(layer.num_groups for layer in layers) / len(layers),
        us={
            name: summarise([layer.us[name] for layer in layers if name in layer.us])
            for name in names
        },
    )
