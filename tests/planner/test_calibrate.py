"""Calibration on small sizes, through the real kernels and a real file."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from moeserve.cli import main
from moeserve.config import BUNDLED_MODEL, ModelConfig
from moeserve.core import ConfigError, ExpertSpec, ModelError
from moeserve.cpu_backend.packing import FORMATS, PackFormat
from moeserve.experts.schedule.cost_model import CostModel
from moeserve.experts.schedule.emulation import with_emulated_device
from moeserve.experts.schedule.profile import Profile, all_figures
from moeserve.experts.schedule.profile_file import (
    PROFILE_VERSION,
    check_profile,
    decode_profile,
    encode_profile,
    profile_names,
    read_profile,
    shipped_profile,
)
from moeserve.planner.calibrate import FORMATS as FORMATS_MEASURED
from moeserve.planner.calibrate import Wishes, _cpu_plan, model_shapes, read_formats
from moeserve.planner.command import _write
from moeserve.planner.cpu_figures import (
    SMALL_EXPERT,
    CpuPlan,
    ExpertShape,
    measure_cpu,
    thread_counts,
)
from moeserve.planner.device_figures import DevicePlan, measure_device, measure_link
from moeserve.planner.disk_figures import DiskPlan, RecordReader, measure_disk
from moeserve.planner.hardware import last_level_cache_bytes, this_hardware
from moeserve.planner.product_figures import SIZE, SMALL_SIZE
from moeserve.planner.repeats import Repeats

SHORT = Repeats(at_least=3, at_most=3, limit_s=0.01)
SHAPE = (256, 128)


def say_nothing(what: str) -> None:
    assert what


def has_direct_reads(directory: Path) -> Path:
    """The directory; skips where its file system has no O_DIRECT (tmpfs before Linux 6.6)."""
    path = directory / "probe"
    path.write_bytes(bytes(4096))
    try:
        os.close(os.open(path, os.O_RDONLY | os.O_DIRECT))
    except OSError:
        pytest.skip(f"the file system of {directory} has no O_DIRECT")
    return directory


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Profile:
    forms = [PackFormat(name, 32 if name == "int4" else 0) for name in FORMATS]
    cpu = measure_cpu(
        CpuPlan(
            shapes=tuple(ExpertShape(*SHAPE, form) for form in forms),
            rows=(1, 64),
            small_rows=(1, 64),
            threads=(1,),
            repeats=SHORT,
            pool_bytes=1 << 20,
        ),
        say_nothing,
    )
    disk = measure_disk(
        DiskPlan(
            directory=has_direct_reads(tmp_path_factory.mktemp("disk")),
            file_bytes=8 << 20,
            block_bytes=(64 << 10, 1 << 20),
            queue_depths=(1, 2),
            sample_bytes=1 << 20,
            repeats=SHORT,
        ),
        say_nothing,
    )
    return Profile(
        version=PROFILE_VERSION,
        source="measured",
        date="2026-11-21",
        moeserve="0.1",
        hardware=this_hardware(),
        cpu=cpu,
        disk=disk,
    )


def test_every_format_and_every_block_is_measured(measured: Profile) -> None:
    forms = ["float32", "bfloat16", "int8", "int4/32", "mxfp4", "fp8"]
    experts = [(c.weights, c.hidden_size, c.intermediate_size) for c in measured.cpu.expert_curves]
    assert experts == [(form, *size) for size in (SHAPE, SMALL_EXPERT) for form in forms]
    products = {(c.weights, c.outputs, c.inputs) for c in measured.cpu.product_curves}
    assert products >= {(form, *size) for size in (SIZE, SMALL_SIZE) for form in forms[:4]}
    assert {rate.kernel for rate in measured.cpu.read} == {
        "read", *(curve.weights for curve in measured.cpu.expert_curves)
    }  # fmt: skip
    assert len(measured.disk) == 4
    assert all(figure.value > 0 for figure in all_figures(measured))


def test_a_measured_profile_survives_its_file_and_gives_costs(measured: Profile) -> None:
    again = decode_profile(encode_profile(measured), "here")
    assert again == measured
    check_profile(again, this_hardware(), "0.1", "here")
    spec = ExpertSpec(num_experts=8, hidden_size=256, intermediate_size=128)
    costs = CostModel.of(again, spec, "int8", 100_000)
    curve = next(c for c in measured.cpu.expert_curves if c.weights == "int8")
    assert (curve.hidden_size, curve.intermediate_size) == SHAPE
    assert [costs.cpu_us(rows) for rows in (1, 64)] == pytest.approx(
        [figure.value for figure in curve.us]
    )
    assert costs.disk_us(1 << 20) > 0


def test_device_figures_are_taken_wherever_torch_computes() -> None:
    """Here the device is the CPU: the figures are its own, the way to them is that of a GPU."""
    plan = DevicePlan(
        device=torch.device("cpu"),
        shapes=(SHAPE,),
        rows=(1, 16),
        transfer_bytes=(1 << 16, 1 << 20),
        copy_bytes=1 << 20,
        matrix=256,
        pool_experts=16,
        repeats=Repeats(at_least=7, at_most=7, limit_s=0.01),
    )
    device = measure_device(plan, "torch on the CPU", 1 << 30, say_nothing)
    assert [curve.rows for curve in device.expert_curves] == [[1, 16]]
    assert device.expert_curves[0].record_bytes == 3 * 256 * 128 * 2
    link = measure_link(plan, say_nothing)
    assert [point.num_bytes for point in link] == [1 << 16, 1 << 20]
    assert all(figure.value > 0 for figure in all_figures([device, link]))


def test_emulated_device_keeps_the_ratios_of_the_sheet(measured: Profile) -> None:
    sheet = shipped_profile("rtx4090-pcie4")
    made = with_emulated_device(measured, sheet)
    assert made.cpu == measured.cpu
    spec = ExpertSpec(num_experts=8, hidden_size=2048, intermediate_size=768)
    slow = CostModel.of(made, spec, "bfloat16", 9_437_184)
    fast = CostModel.of(sheet, spec, "bfloat16", 9_437_184)
    ours, theirs = made.cpu.best_read(), sheet.cpu.best_read()
    assert ours is not None
    assert theirs is not None
    ratio = theirs.bytes_per_s.value / ours.bytes_per_s.value
    for rows in (1, 500):
        assert slow.device_us(rows) == pytest.approx(fast.device_us(rows) * ratio)
    assert slow.transfer_us(10**7) == pytest.approx(fast.transfer_us(10**7) * ratio)
    with pytest.raises(ConfigError, match="takes a profile with a device"):
        with_emulated_device(measured, measured)


def test_shipped_profiles_are_data_sheets_with_their_sources() -> None:
    assert "rtx4090-pcie4" in profile_names()
    for name in profile_names():
        profile = shipped_profile(name)
        assert profile.source == "datasheet"
        assert profile.sources
        assert all(figure.spread == 0 for figure in all_figures(profile))
        with pytest.raises(ConfigError, match="data sheets"):
            check_profile(profile, this_hardware(), "0.1", name)
    with pytest.raises(ConfigError, match=r"'rtx9' is not one of .*rtx4090"):
        shipped_profile("rtx9")


def test_shapes_of_a_model() -> None:
    shapes = model_shapes(ModelConfig(model=str(BUNDLED_MODEL), quantize="int4"))
    assert {shape.form.describe() for shape in shapes} == {"int4/32"}
    auto = ModelConfig(model=str(BUNDLED_MODEL), quantize="int4", quantize_group="auto")
    assert {shape.form.group for shape in model_shapes(auto)} == {32, 64, 128}
    with pytest.raises(ModelError):
        model_shapes(ModelConfig(model="/nowhere/at/all"))


def test_a_directory_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    plan = DiskPlan(tmp_path / "none", 1 << 20, (1 << 16,), (1,), 1 << 16, SHORT)
    with pytest.raises(ConfigError, match="no directory that can be written"):
        measure_disk(plan, say_nothing)


@contextmanager
def files_of_at_most(num_bytes: int) -> Iterator[None]:
    """As on a disk that is full: what is written beyond fails. Python ignores the signal."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_disk_without_room_is_refused_and_left_as_it_was(
    tmp_path: Path, measured: Profile
) -> None:
    plan = DiskPlan(tmp_path, 4 << 20, (1 << 16,), (1,), 1 << 16, SHORT)
    old = tmp_path / "p.json"
    old.write_text("as it was")
    with files_of_at_most(4096):
        with pytest.raises(ConfigError, match=r"disk_dir: 4 MiB in .*: File too large"):
            measure_disk(plan, say_nothing)
        with pytest.raises(ConfigError, match=r"out: .* cannot be written: File too large"):
            _write(old, measured)
    assert [each.name for each in tmp_path.iterdir()] == ["p.json"]
    assert old.read_text() == "as it was"


def test_a_file_system_without_directories_of_ours_is_refused() -> None:
    """Whoever asks may write there, root at least, and yet cannot."""
    plan = DiskPlan(Path("/proc"), 1 << 20, (1 << 16,), (1,), 1 << 16, SHORT)
    with pytest.raises(ConfigError, match=r"disk_dir: .*/proc"):
        measure_disk(plan, say_nothing)


def test_reads_go_past_the_page_cache(tmp_path: Path) -> None:
    """O_DIRECT is on the descriptor: else reads would come from memory."""
    path = has_direct_reads(tmp_path) / "blocks"
    path.write_bytes(bytes(1 << 20))
    with RecordReader(path, 1 << 16, 2) as reader:
        assert reader.bytes_per_s(8) > 0
        (number,) = [fd.name for fd in Path("/proc/self/fd").iterdir() if is_link_to(fd, path)]
        flags = Path(f"/proc/self/fdinfo/{number}").read_text()
    octal = flags.split("flags:")[1].split()[0]
    assert int(octal, 8) & 0o40000


def is_link_to(link: Path, path: Path) -> bool:
    try:
        return link.readlink() == path
    except FileNotFoundError:  # the descriptor of the listing itself
        return False


def test_caches_and_threads() -> None:
    assert last_level_cache_bytes(Path("/nowhere")) == 0
    assert [thread_counts(n) for n in (1, 2, 6, 8)] == [
        (1,), (1, 2), (1, 2, 4, 6), (1, 2, 4, 8),
    ]  # fmt: skip


def test_formats_are_read_as_they_are_shown() -> None:
    assert read_formats("int4/64, mxfp4 weight-only") == (
        PackFormat("int4", 64),
        PackFormat("mxfp4", weight_only=True),
    )
    for form in FORMATS_MEASURED:
        assert read_formats(form.describe()) == (form,)
    plan = _cpu_plan(Wishes(formats=(PackFormat("int8"), PackFormat("fp8"))), 2)
    assert [shape.form.name for shape in plan.shapes] == ["int8", "fp8", "float32"]


def test_command_shows_a_profile_and_refuses_contradictions(
    tmp_path: Path, measured: Profile, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "p.json"
    path.write_bytes(encode_profile(measured))
    assert main(["calibrate", "--show", "-o", str(path)]) == 0
    shown = capsys.readouterr().out
    assert "one more expert, us by rows" in shown
    assert "disk, GB/s" in shown
    assert main(["calibrate", "--show", "--json", "-o", str(path)]) == 0
    assert capsys.readouterr().out.encode() == path.read_bytes()
    assert read_profile(path) == measured
    assert main(["calibrate", "--show", "-o", str(tmp_path / "none.json")]) == 2
    assert main(["calibrate", "--no-disk", "--disk-dir", "/tmp", "-o", str(path)]) == 2
    assert main(["calibrate", "/nowhere/at/all", "--quick", "-o", str(path)]) == 2
    assert main(["calibrate", "-o", "/proc/nowhere/p.json"]) == 2
    assert main(["calibrate", "--formats", "int8,int5", "-o", str(path)]) == 2
    assert "'int5' is not one of bfloat16, int8, int4/32" in capsys.readouterr().err
    assert read_profile(path) == measured


@pytest.mark.parametrize(
    ("out", "said"),
    [
        ("", "is no file"),
        ("none/p.json", "none is no directory"),
        ("file/p.json", "file is no directory"),
        ("/dev/null", "/dev/null is no file"),
        ("/proc/p.json", "/proc/p.json cannot be written"),
        (f"{'x' * 255}", "cannot be written: File name too long"),
    ],
)
def test_where_a_profile_cannot_be_written_nothing_is_measured(
    out: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    # The model is looked for when measuring begins.
    arguments = ["calibrate", "/nowhere/at/all", "--quick", "--no-disk", "-o", str(tmp_path / out)]
    assert main(arguments) == 2
    assert said in capsys.readouterr().err
    assert [each.name for each in tmp_path.iterdir()] == ["file"]
