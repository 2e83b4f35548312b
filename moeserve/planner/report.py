"""A profile as tables on a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from moeserve.experts.schedule.profile import Figure, Processor, Profile, all_figures

GIGA = 1e9
#: above, a figure is marked: the machine was not quiet, or the part is not steady
WIDE_INTERVAL = 0.05


def show_profile(console: Console, profile: Profile) -> None:
    """All figures, with half of the 95 % confidence interval as a percentage."""
    console.print(f"[bold]{profile.source}[/bold], {profile.date}, moeserve {profile.moeserve}")
    _show_processor(console, profile.cpu)
    if profile.device is not None:
        _show_processor(console, profile.device)
    if profile.link:
        table = _table("link", ("MiB", "us", "GB/s"))
        for point in profile.link:
            rate = point.num_bytes / point.us.value / 1e3 if point.us.value else 0.0
            mib = f"{point.num_bytes / 2**20:g}"
            table.add_row(mib, _text(point.us, 1), f"{rate:.1f}")
        console.print(table)
    if profile.disk:
        depths = sorted({point.queue_depth for point in profile.disk})
        table = _table("disk, GB/s by reads in flight", ("block", *map(str, depths)))
        for block in sorted({point.block_bytes for point in profile.disk}):
            rates = {p.queue_depth: p.bytes_per_s for p in profile.disk if p.block_bytes == block}
            cells = [_text(rates[d], GIGA) if d in rates else "" for d in depths]
            table.add_row(f"{block >> 10} KiB", *cells)
        console.print(table)
    figures = list(all_figures(profile))
    if profile.process_bytes is not None:
        process = _text(profile.process_bytes, 2**20)
        console.print(f"process without a model: {process} MiB")
    wide = sum(figure.interval > WIDE_INTERVAL for figure in figures)
    if wide:
        console.print(
            f"[yellow]{wide} of {len(figures)} figures are known to {WIDE_INTERVAL:.0%} or worse"
            " (marked !; 95 % confidence): measure again when nothing else runs[/yellow]"
        )
    for source in profile.sources:
        console.print(f"source: {source}", soft_wrap=True)


def _show_processor(console: Console, processor: Processor) -> None:
    console.print(f"\n[bold]{processor.name}[/bold], {processor.memory_bytes / 2**30:.1f} GiB")
    console.print(f"start of a job: {_text(processor.start_us, 1)} us")
    peaks = [f"{name} {_text(figure, GIGA)}" for name, figure in processor.ops_per_s.items()]
    console.print(f"peak, Gop/s: {', '.join(peaks)}")
    threads = sorted({rate.num_threads for rate in processor.read})
    table = _table("reads, GB/s by threads", ("kernel", *map(str, threads)))
    for kernel in dict.fromkeys(rate.kernel for rate in processor.read):
        rates = {r.num_threads: r.bytes_per_s for r in processor.read if r.kernel == kernel}
        cells = [_text(rates[n], GIGA) if n in rates else "" for n in threads]
        table.add_row(kernel, *cells)
    console.print(table)
    if not processor.expert_curves:
        return
    rows = sorted({count for curve in processor.expert_curves for count in curve.rows})
    table = _table("one more expert, us by rows", ("experts", *map(str, rows)))
    for curve in processor.expert_curves:
        us = dict(zip(curve.rows, curve.us, strict=True))
        cells = [_text(us[count], 1) if count in us else "" for count in rows]
        size = f"{curve.hidden_size} x {curve.intermediate_size}"
        table.add_row(f"{curve.weights}, {size}", *cells)
    console.print(table)
    if not processor.product_curves:
        return
    table = _table("linear layers, ps per weight by rows", ("matrices", *map(str, rows)))
    for product in processor.product_curves:
        ps = dict(zip(product.rows, product.ps, strict=True))
        cells = [_text(ps[count], 1) if count in ps else "" for count in rows]
        size = f"{product.outputs} x {product.inputs}"
        table.add_row(f"{product.weights}, {size}", *cells)
    console.print(table)


def _table(title: str, columns: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left", box=None, padding=(0, 1, 0, 0))
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left", no_wrap=True)
    return table


def _text(figure: Figure, unit: float) -> str:
    value = figure.value / unit
    digits = 0 if value >= 100 else 1 if value >= 10 else 2
    wide = "!" if figure.interval > WIDE_INTERVAL else ""
    interval = f" ±{figure.interval:.0%}{wide}" if figure.interval else ""
    return f"{value:.{digits}f}{interval}"
