"""Weights from checkpoint to target tensors. Oracle: safetensors' own loader and plain torch."""

from __future__ import annotations

import json
import math
import random
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from moeserve.core import ModelError
from moeserve.models import loader
from moeserve.models.checkpoint import Checkpoint
from moeserve.models.loader import load_weights
from moeserve.models.weight_map import Part, WeightRule, transpose, whole

CPU = torch.device("cpu")
FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
ROOT = Path(__file__).resolve().parents[2]


def checkpoint_of(path: Path, tensors: dict[str, Tensor]) -> Checkpoint:
    save_file(tensors, path / "model.safetensors")
    return Checkpoint.open(path)


def load(
    path: Path, tensors: dict[str, Tensor], rules: Sequence[WeightRule], **options: object
) -> dict[str, Tensor]:
    defaults = {"dtype": torch.float32, "device": CPU}
    return load_weights(checkpoint_of(path, tensors), rules, **{**defaults, **options})  # type: ignore[arg-type]


def refusal(
    path: Path, tensors: dict[str, Tensor], rules: Sequence[WeightRule], **options: object
) -> str:
    with pytest.raises(ModelError) as caught:
        load(path, tensors, rules, **options)
    return str(caught.value)


@pytest.mark.parametrize("piece_bytes", [1, 100, 64 * 1024 * 1024])
@pytest.mark.parametrize("seed", range(5))
def test_plain_copies_equal_safetensors(
    tmp_path: Path, seed: int, piece_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loader, "PIECE_BYTES", piece_bytes)
    rng = random.Random(seed)
    torch.manual_seed(seed)
    tensors = {
        f"t{number}": torch.randn([rng.randint(1, 9) for _ in range(rng.randint(0, 3))]).to(
            rng.choice(FLOATS)
        )
        for number in range(20)
    }
    tensors["empty"] = torch.empty(0, 3)
    own = {name: rng.choice([None, *FLOATS]) for name in tensors}
    rules = [whole(f"my.{name}", name, tuple(t.shape), own[name]) for name, t in tensors.items()]
    rng.shuffle(rules)
    dtype = rng.choice(FLOATS)
    loaded = load(tmp_path, tensors, rules, dtype=dtype)
    for name, expected in load_file(tmp_path / "model.safetensors").items():
        assert torch.equal(loaded[f"my.{name}"], expected.to(own[name] or dtype)), (seed, name)
        assert loaded[f"my.{name}"].dtype == (own[name] or dtype)


@pytest.mark.parametrize("packed", [False, True])
def test_experts_of_both_layouts_fill_one_target(tmp_path: Path, packed: bool) -> None:
    num_experts, hidden, inner = 5, 6, 4
    gate_up = torch.randn(num_experts, 2 * inner, hidden)  # [E, 2I, H], gate rows first
    if packed:  # [E, H, 2I]: one tensor for all, the other way round
        tensors = {"gate_up": gate_up.transpose(1, 2).contiguous()}
        shape = (num_experts, hidden, 2 * inner)
        parts = tuple(
            Part(("gate_up",), (shape,), index=(e,), select=(e,), convert=transpose)
            for e in range(num_experts)
        )
    else:
        rows = {"gate": slice(0, inner), "up": slice(inner, 2 * inner)}
        tensors = {
            f"{e}.{kind}": gate_up[e, where].clone()
            for e in range(num_experts)
            for kind, where in rows.items()
        }
        parts = tuple(
            Part((f"{e}.{kind}",), ((inner, hidden),), index=(e, where))
            for e in range(num_experts)
            for kind, where in rows.items()
        )
    rules = [WeightRule("experts", (num_experts, 2 * inner, hidden), parts)]
    loaded = load(tmp_path, tensors, rules, dtype=torch.bfloat16)
    assert torch.equal(loaded["experts"], gate_up.bfloat16())


def test_mxfp4_through_convert(tmp_path: Path) -> None:
    """Two packed tensors, blocks and scales, become one; oracle: the OCP MX table in float64."""
    rows, groups = 3, 2
    table = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]  # OCP Microscaling v1.0, E2M1
    blocks = torch.randint(0, 256, (2, rows, groups, 16), dtype=torch.uint8)
    scales = torch.randint(100, 140, (2, rows, groups), dtype=torch.uint8)

    def dequantise(sources: Sequence[Tensor]) -> Tensor:
        packed, exponents = sources
        values = torch.tensor([*table, *(-value for value in table)])
        nibbles = torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)  # [R, G, 32]
        scaled = torch.ldexp(values[nibbles.int()], (exponents.int() - 127)[..., None])
        return scaled.flatten(-2)

    names, shapes = ("b", "s"), (tuple(blocks.shape), tuple(scales.shape))
    parts = tuple(
        Part(names, shapes, index=(e,), select=(e,), convert=dequantise) for e in range(2)
    )
    rules = [WeightRule("w", (2, rows, 32 * groups), parts)]
    loaded = load(tmp_path, {"b": blocks, "s": scales}, rules, dtype=torch.bfloat16)["w"]
    for e in range(2):
        for row in range(rows):
            for column in range(32 * groups):
                group, place = divmod(column, 32)
                byte = int(blocks[e, row, group, place // 2])
                code = byte >> 4 if place % 2 else byte & 15
                value = math.copysign(table[code & 7], -1.0 if code & 8 else 1.0)
                value *= 2.0 ** (int(scales[e, row, group]) - 127)
                assert loaded[e, row, column].item() == value


def test_everything_that_does_not_fit_is_named_in_one_error(tmp_path: Path) -> None:
    tensors = {f"extra{number:02}": torch.ones(1) for number in range(13)}
    tensors |= {"shape": torch.ones(2, 3), "codes": torch.ones(4, dtype=torch.uint8)}
    tensors |= {"fp8": torch.ones(4).to(torch.float8_e4m3fn), "rope.inv_freq": torch.ones(2)}
    rules = [whole("a", "shape", (3, 2)), whole("b", "codes", (4,)), whole("c", "fp8", (4,))]
    rules += [whole(f"m{number}", f"absent{number:02}", (1,)) for number in range(11)]
    said = refusal(tmp_path, tensors, rules, ignore=[r".*\.inv_freq"])
    assert "missing tensors: 11 (absent00, " in said
    assert "absent09, and 1 more)" in said
    assert "extra tensors: 13 (extra00, " in said
    assert "and 3 more" in said
    assert "misshapen tensors: 1 (shape expected [3, 2], found [2, 3])" in said
    assert "codes expected a float type, found torch.uint8" in said
    assert "fp8 expected a float type, found torch.float8_e4m3fn" in said
    assert "inv_freq" not in said
    assert str(tmp_path) in said


def test_ignored_names_match_whole_names(tmp_path: Path) -> None:
    tensors = {"a": torch.ones(1), "a.b": torch.ones(1)}
    assert "extra tensors: 1 (a.b)" in refusal(tmp_path, tensors, [], ignore=["a", "b"])


def test_a_rule_may_keep_a_type_that_is_not_float(tmp_path: Path) -> None:
    codes = torch.randint(0, 256, (5, 3), dtype=torch.uint8)
    loaded = load(tmp_path, {"c": codes}, [whole("c", "c", (5, 3), torch.uint8)])
    assert torch.equal(loaded["c"], codes)


def test_rules_that_leave_a_hole_are_our_mistake(tmp_path: Path) -> None:
    rule = WeightRule("w", (4, 2), (Part(("a",), ((2, 2),), index=(slice(0, 2),)),))
    with pytest.raises(AssertionError, match="parts fill 4 of 8"):
        load(tmp_path, {"a": torch.ones(2, 2)}, [rule])


@pytest.mark.parametrize("dtype", FLOATS)
def test_check_weights_names_and_counts(
    tmp_path: Path, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loader, "PIECE_BYTES", 64)
    sick = torch.randn(40, 8)
    sick[3, 1] = sick[20, 2] = sick[39, 7] = math.nan
    sick[7, 0] = -math.inf
    tensors = {"sick": sick.to(dtype), "well": torch.ones(4, dtype=dtype)}
    rules = [whole("s", "sick", (40, 8)), whole("w", "well", (4,))]
    said = refusal(tmp_path, tensors, rules, check_weights=True)
    assert "not finite: 1 (sick: 3 NaN, 1 Inf)" in said
    unchecked = load(tmp_path, tensors, rules)
    assert int(torch.isnan(unchecked["s"]).sum()) == 3


def test_check_weights_sees_an_overflow_of_the_chosen_dtype(tmp_path: Path) -> None:
    tensors = {"big": torch.tensor([1.0, 1e6])}
    rules = [whole("b", "big", (2,))]
    said = refusal(tmp_path, tensors, rules, check_weights=True, dtype=torch.float16)
    assert "big: 0 NaN, 1 Inf" in said
    load(tmp_path, tensors, rules, check_weights=True, dtype=torch.bfloat16)


def test_tied_weights_may_be_absent_or_equal_but_not_differ(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loader, "PIECE_BYTES", 16)
    embed = torch.randn(6, 4)
    rules = [whole("embed", "embed", (6, 4))]
    tied = {"lm_head": "embed"}
    for tensors in ({"embed": embed}, {"embed": embed, "lm_head": embed.clone()}):
        loaded = load(tmp_path, tensors, rules, tied=tied)
        assert torch.equal(loaded["embed"], embed)
    other = embed.clone()
    other[5, 3] += 1
    for wrong in (other, embed[:5].clone(), embed.half()):
        said = refusal(tmp_path, {"embed": embed, "lm_head": wrong}, rules, tied=tied)
        assert "lm_head and embed differ" in said
        assert "tie_word_embeddings" in said
    said = refusal(tmp_path, {"lm_head": embed}, rules, tied=tied)
    assert "missing tensors: 1 (embed)" in said


def test_progress_goes_up_to_one_by_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "PIECE_BYTES", 400)
    tensors = {"a": torch.ones(300), "b": torch.ones(10, 10)}  # 1200 and 400 bytes
    rules = [whole("a", "a", (300,)), whole("b", "b", (10, 10))]
    seen: list[tuple[str, float]] = []
    load(tmp_path, tensors, rules, progress=lambda *said: seen.append(said))
    assert {stage for stage, _ in seen} == {"loading weights"}
    assert [fraction for _, fraction in seen] == [0.0, 0.25, 0.5, 0.75, 1.0]


def test_progress_of_many_parts_is_told_a_thousand_times(tmp_path: Path) -> None:
    count = 4000
    parts = tuple(Part(("a",), ((count,),), (i,), (i,), lambda s: s[0]) for i in range(count))
    seen: list[float] = []
    rules = [WeightRule("a", (count,), parts)]
    tensors = {"a": torch.randn(count)}
    loaded = load(tmp_path, tensors, rules, progress=lambda _, fraction: seen.append(fraction))
    assert torch.equal(loaded["a"], tensors["a"])
    assert seen == sorted(set(seen))
    assert seen[0] == 0
    assert seen[-1] == 1
    assert 900 <= len(seen) <= 1001


def test_no_memory_names_the_tensor_and_the_device(tmp_path: Path) -> None:
    huge = (2**40, 2**20)  # an exbibyte per byte of dtype
    rule = WeightRule("w", huge, (Part(("a",), ((1,),), convert=lambda s: s[0].expand(huge)),))
    said = refusal(tmp_path, {"a": torch.ones(1)}, [rule])
    assert "w: no memory on cpu for [1099511627776, 1048576]" in said


MEASURE = """
import json, sys, torch
from pathlib import Path
from moeserve.models.checkpoint import Checkpoint
from moeserve.models.loader import load_weights
from moeserve.models.weight_map import Part, WeightRule, transpose, whole

def memory(field):
    status = Path("/proc/self/status").read_text()
    return int(status.split(field + ":")[1].split()[0]) * 1024

checkpoint = Checkpoint.open(Path(sys.argv[1]))
rules = []
for name in checkpoint.names():
    shape = checkpoint.shape(name)
    if len(shape) == 3:  # packed experts, transposed one by one
        parts = tuple(
            Part((name,), (shape,), select=(e,), index=(e,), convert=transpose)
            for e in range(shape[0])
        )
        rules.append(WeightRule(name, (shape[0], shape[2], shape[1]), parts))
    else:
        rules.append(whole(name, name, shape))
before = memory("VmRSS")
weights = load_weights(
    checkpoint, rules, dtype=torch.bfloat16, device=torch.device("cpu"), check_weights=True
)
model = sum(tensor.nbytes for tensor in weights.values())
print(json.dumps({"model": model, "peak": memory("VmHWM") - before}))
"""


def test_peak_memory_is_the_model_and_little_more(tmp_path: Path) -> None:
    """The rule is: at most the model plus 1 GiB, whatever its size.

    A float32 checkpoint of 512 MiB becomes a bfloat16 model of 256 MiB. Were mapped pages kept,
    the peak would be 512 MiB above the model; the bound here is 300 MiB.
    """
    mebi = 1024 * 1024
    location = {}
    torch.manual_seed(0)
    for shard, shape in enumerate([(16, 2048, 2048), (16384, 2048), (8, 2048, 2048)]):
        file = f"model-{shard + 1:05}-of-00003.safetensors"
        name = f"layer{shard}"
        block = torch.randn(1024, 2048)
        repeats = math.prod(shape) // block.numel()
        save_file({name: block.repeat(repeats, 1).view(shape)}, tmp_path / file)
        location[name] = file
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": location}))
    run = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path)],
        cwd=ROOT, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    measured = json.loads(run.stdout)
    assert measured["model"] == 256 * mebi
    assert measured["peak"] <= measured["model"] + 300 * mebi, measured
    for file in set(location.values()):
        (tmp_path / file).unlink()  # pytest keeps the directories of its last runs
