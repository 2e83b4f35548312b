"""Costs out of profiles: exact where measured, refused where not of this machine."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from moeserve.core import ConfigError, ExpertSpec
from moeserve.experts.schedule.cost_model import CostModel, expert_curve
from moeserve.experts.schedule.profile import (
    DiskPoint,
    ExpertCurve,
    Figure,
    Hardware,
    Processor,
    Profile,
    ReadRate,
    TransferPoint,
)
from moeserve.experts.schedule.profile_file import (
    PROFILE_VERSION,
    check_profile,
    decode_profile,
    encode_profile,
    read_profile,
)

SPEC = ExpertSpec(num_experts=8, hidden_size=64, intermediate_size=32)
HERE = Hardware(cpu="Some CPU", num_cores=2, isa="avx2", memory_bytes=8 << 30)


def processor(curves: list[ExpertCurve]) -> Processor:
    return Processor(
        name="two threads",
        memory_bytes=8 << 30,
        read=[
            ReadRate(kernel="read", num_threads=1, bytes_per_s=Figure(value=1e9, spread=0.1)),
            ReadRate(kernel="read", num_threads=2, bytes_per_s=Figure(value=2e9, spread=0.1)),
        ],
        ops_per_s={"bf16": Figure(value=1e12)},
        start_us=Figure(value=7.0),
        expert_curves=curves,
    )


def curve(weights: str, hidden_size: int, us: list[float]) -> ExpertCurve:
    return ExpertCurve(
        weights=weights,
        hidden_size=hidden_size,
        intermediate_size=32,
        record_bytes=4096,
        rows=[1, 4, 16],
        us=[Figure(value=value) for value in us],
    )


def profile(**changes: object) -> Profile:
    made = Profile(
        version=PROFILE_VERSION,
        source="measured",
        date="2026-11-21",
        moeserve="0.1",
        hardware=HERE,
        cpu=processor([curve("int4/32", 64, [10.0, 20.0, 50.0])]),
        disk=[
            DiskPoint(block_bytes=1 << 20, queue_depth=1, bytes_per_s=Figure(value=1e9)),
            DiskPoint(block_bytes=1 << 20, queue_depth=4, bytes_per_s=Figure(value=2e9)),
            DiskPoint(block_bytes=4 << 20, queue_depth=1, bytes_per_s=Figure(value=3e9)),
        ],
    )
    return msgspec.structs.replace(made, **changes)


def test_costs_of_the_measured_expert_are_those_of_the_profile() -> None:
    costs = CostModel.of(profile(), SPEC, "int4/32", 4096)
    assert [costs.cpu_us(rows) for rows in (1, 4, 16)] == [10.0, 20.0, 50.0]
    assert costs.cpu_us(2) == pytest.approx(10 + 10 / 3)
    assert costs.cpu_start_us == 7.0
    # The best of the depths that were measured.
    assert costs.disk_us(1 << 20) == pytest.approx((1 << 20) / 2e9 * 1e6)
    with pytest.raises(ConfigError, match="nothing of a link"):
        costs.transfer_us(10)


def test_link_is_interpolated() -> None:
    link = [
        TransferPoint(num_bytes=10**6, us=Figure(value=60.0)),
        TransferPoint(num_bytes=0, us=Figure(value=10.0)),
    ]
    costs = CostModel.of(profile(link=link, device=processor([])), SPEC, "int4/32", 4096)
    assert costs.transfer_us(500_000) == pytest.approx(35.0)
    assert costs.transfer_us(3 * 10**6) == pytest.approx(160.0)


def test_rates_give_a_roofline() -> None:
    """2 GB/s for 4096 bytes is 2.048 us; a row's 12288 operations at 1 Tera/s take 0.0123 us."""
    made = expert_curve(processor([]), SPEC, "bf16", 4096)
    row_us = 6 * 64 * 32 / 1e12 * 1e6
    for rows in (1, 2, 50, 166, 167, 168, 1000, 5000):
        assert made[rows] == pytest.approx(max(2.048, rows * row_us), rel=1e-9)


def test_a_format_without_figures_or_rates_is_refused_by_name() -> None:
    bare = msgspec.structs.replace(processor([curve("int8", 64, [1, 2, 3])]), ops_per_s={})
    with pytest.raises(ConfigError, match=r"no figures for mxfp4.*it has int8"):
        expert_curve(bare, SPEC, "mxfp4", 4096)


def test_a_profile_comes_back_as_written(tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    path.write_bytes(encode_profile(profile()))
    assert read_profile(path) == profile()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is no profile"),
        (b"[]", "is no profile"),
        (b'{"version": %d}' % PROFILE_VERSION, "missing required field"),
        (b'{"version": 99, "new_field": 1}', "has version 99, this moeserve reads"),
        (b"\xff\xfe", "is no profile"),
    ],
)
def test_what_is_no_profile_is_refused(content: bytes, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        decode_profile(content, "here.json")


def test_wrong_values_are_refused() -> None:
    text = encode_profile(profile()).decode()
    for wrong in (
        text.replace('"value": 7.0', '"value": -7.0'),
        text.replace('"rows": [', '"rows": [64,'),
        text.replace('"num_cores": 2', '"num_cores": 2, "colour": 3'),
        text.replace('"num_cores": 2', '"num_cores": 0'),
    ):
        assert wrong != text
        with pytest.raises(ConfigError, match="is no profile"):
            decode_profile(wrong.encode(), "here.json")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_profile(Path("/nowhere/profile.json"))


def test_foreign_and_stale_profiles_are_refused_by_name() -> None:
    check_profile(profile(), HERE, "0.1", "p.json")
    booted = msgspec.structs.replace(HERE, memory_bytes=(8 << 30) - (20 << 20))
    check_profile(profile(), booted, "0.1", "p.json")
    other = msgspec.structs.replace(HERE, num_cores=64, gpu="A GPU")
    with pytest.raises(ConfigError, match=r"num_cores 2, here 64; gpu None, here 'A GPU'"):
        check_profile(profile(), other, "0.1", "p.json")
    smaller = msgspec.structs.replace(HERE, memory_bytes=4 << 30)
    with pytest.raises(ConfigError, match="memory_bytes"):
        check_profile(profile(), smaller, "0.1", "p.json")
    with pytest.raises(ConfigError, match=r"stale: .* moeserve 0\.1"):
        check_profile(profile(), HERE, "0.2", "p.json")
    with pytest.raises(ConfigError, match="data sheets"):
        check_profile(profile(source="datasheet"), HERE, "0.1", "p.json")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"outputs": 0}, "outputs 0 must be 1 or more"),
        ({"inputs": -1}, "inputs -1 must be 1 or more"),
        ({"rows": [4, 1]}, "ascending from 1"),
        ({"rows": [1]}, "with a time each"),
    ],
)
def test_matrices_that_costs_cannot_be_divided_by_are_refused(
    changes: dict[str, object], message: str
) -> None:
    matrix = {"weights": "int8", "outputs": 8, "inputs": 8, "rows": [1, 4]}
    figures = [{"value": 1.0}, {"value": 2.0}]
    content = msgspec.json.decode(encode_profile(profile()))
    content["cpu"]["product_curves"] = [matrix | {"ps": figures} | changes]
    with pytest.raises(ConfigError, match=message):
        decode_profile(msgspec.json.encode(content), "here")
