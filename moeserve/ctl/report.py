"""The answer of `moeserve ctl stats` as text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Stats = Mapping[str, Any]


def size(num_bytes: float) -> str:
    """In the unit that gives one to four digits before the point."""
    for unit in ("bytes", "KiB", "MiB"):
        if num_bytes < 10_000:
            return f"{num_bytes:,.0f} {unit}" if unit == "bytes" else f"{num_bytes:,.1f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:,.1f} GiB"


def describe(stats: Stats) -> str:
    """stats: as `Control.stats` returns them."""
    engine = stats["engine"]
    lines = [
        f"{stats['model']}, up {stats['uptime_s']:.0f} s",
        f"requests: {engine['num_running']} running, {engine['num_waiting']} waiting,"
        f" {engine['requests_finished']} finished",
        f"tokens: {engine['prompt_tokens']} of prompts ({engine['cached_prompt_tokens']} reused),"
        f" {engine['generated_tokens']} generated",
        f"steps: {engine['num_steps']} in {engine['step_s']:.1f} s",
        f"kv: {engine['kv_blocks_used']} of {engine['kv_blocks_total']} blocks held,"
        f" {engine['prefix_cached_blocks']} kept for reuse, memory {size(engine['kv_bytes'])}",
    ]
    if (memory := engine["memory"]) is not None:
        lines.append(
            f"memory: of {size(memory['budget_bytes'])}: weights of every token"
            f" {size(memory['weights_bytes'])}, kv {size(memory['kv_bytes'])} of"
            f" {size(memory['kv_limit_bytes'])} at most, experts {size(memory['experts_bytes'])};"
            f" kv took from experts {memory['num_kv_grown']} times and gave back"
            f" {memory['num_kv_shrunk']} times"
        )
    if (pages := engine["pages"]) is not None:
        lines.append(_pages(pages))
    experts = engine["experts"]
    if experts is not None:
        lines += _totals(experts)
        if experts["pool"] is not None:
            lines += ["", *_workers(experts["pool"])]
        if experts["caches"]:
            lines += ["", *_by_layer(experts)]
    return "\n".join(lines)


def _pages(pages: Stats) -> str:
    text = (
        f"weights: {size(pages['mapped_bytes'])} mapped; in huge pages"
        f" {size(pages['cached_huge_bytes'])} of the page cache and"
        f" {size(pages['moved_bytes'])} moved in {pages['seconds']:.1f} s"
    )
    if pages["moving"]:
        return f"{text} so far"
    return text + (f"; the rest stays: {pages['problem']}" if pages["problem"] else "")


def _totals(experts: Stats) -> list[str]:
    lines = [f"experts: computed for {sum(experts['cpu_busy_s']):.1f} s on the CPU"]
    if experts["device_busy_s"] is not None:
        lines[0] += f", {sum(experts['device_busy_s']):.1f} s on the device"
    for cache in experts["caches"]:
        uses = sum(sum(cache[name]) for name in ("hits", "late", "misses"))
        rate = f", {sum(cache['hits']) / uses:.1%} of uses found" if uses else ""
        lines.append(
            f"{cache['tier']}: {cache['num_used']} of {cache['num_slots']} slots used,"
            f" {size(cache['slot_bytes'])} each{rate}"
        )
    return lines + [
        f"into {link['tier']}: {size(sum(link['demand_bytes']))} on demand,"
        f" {size(sum(link['prefetch_bytes']))} ahead, busy {sum(link['busy_s']):.1f} s,"
        f" steps waited {sum(link['stall_s']):.1f} s,"
        f" {link['num_retries']} retries, {link['num_failed']} failed"
        for link in experts["links"]
    ]


def _workers(pool: Stats) -> list[str]:
    lines = [
        f"workers: {pool['rows']} rows, {pool['taken_over_rows']} of them computed by somebody"
        f" else; steps waited {pool['wait_s']:.1f} s"
    ]
    workers = pool["workers"]
    columns: dict[str, Sequence[object]] = {
        "worker": [each["endpoint"] for each in workers],
        "shard": [each["shard"] or "?" for each in workers],
        "state": [each["problem"] or _manner(each) for each in workers],
        "MiB": [
            f"{(each['sent_bytes'] + each['received_bytes']) * 2**-20:.1f}" for each in workers
        ],
        "busy s": [f"{each['busy_s']:.1f}" for each in workers],
    }
    for field in ("jobs", "rows", "connects", "losses", "refusals"):
        columns[field] = [each[field] for each in workers]
    return lines + _table(columns)


def _manner(worker: Stats) -> str:
    how = "rows in shared memory" if worker["shared_memory"] else "rows in frames"
    return f"standing by, {how}" if worker["standby"] else how


#: heading and field; of links, also the factor
CACHE_COLUMNS = (
    ("hits", "hits"),
    ("late", "late"),
    ("misses", "misses"),
    ("evicted", "evictions"),
    ("ahead", "prefetches_begun"),
    ("useful", "prefetches_useful"),
    ("wasted", "prefetches_wasted"),
)
LINK_COLUMNS = (
    ("MiB demand", "demand_bytes", 2**-20),
    ("MiB ahead", "prefetch_bytes", 2**-20),
    ("link ms", "busy_s", 1e3),
    ("stall ms", "stall_s", 1e3),
)


def _by_layer(experts: Stats) -> list[str]:
    """One table per tier."""
    lines: list[str] = []
    links = {link["tier"]: link for link in experts["links"]}
    for cache in experts["caches"]:
        columns: dict[str, Sequence[object]] = {"layer": experts["layers"]}
        columns |= {heading: cache[field] for heading, field in CACHE_COLUMNS}
        if (link := links.get(cache["tier"])) is not None:
            for heading, field, scale in LINK_COLUMNS:
                columns[heading] = [f"{value * scale:.1f}" for value in link[field]]
        columns["CPU ms"] = [f"{seconds * 1e3:.1f}" for seconds in experts["cpu_busy_s"]]
        lines += [cache["tier"], *_table(columns)]
    return lines


def _table(columns: Mapping[str, Sequence[object]]) -> list[str]:
    texts = [[heading, *map(str, values)] for heading, values in columns.items()]
    widths = [max(map(len, column)) for column in texts]
    rows = zip(*texts, strict=True)
    return [
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        for row in rows
    ]
