"""Packed model directories: the same bits as packing while loading, and refusal of broken ones."""

from __future__ import annotations

import json
import mmap
import random
from pathlib import Path

import pytest
import torch
from parity_cases import VOCAB, draw_config, make_reference, save
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.model_runner import Runner, load_native
from torch import Tensor

from moeserve import LLM
from moeserve.config import BUNDLED_MODEL, ExpertConfig, ModelConfig
from moeserve.core import ConfigError, ModelError
from moeserve.models import pack
from moeserve.models.pack import layout_file, pack_model
from moeserve.models.packed_model import MANIFEST
from moeserve.models.registry import LoadedModel, load_model
from moeserve.models.stores import Store

pytestmark = pytest.mark.usefixtures("quiet")

TINY = str(BUNDLED_MODEL)


def packed(path: Path | str, out: Path, **settings: object) -> Path:
    return pack_model(ModelConfig(model=str(path), **settings), out).path  # type: ignore[arg-type]


def logits(loaded: LoadedModel, seed: int) -> Tensor:
    rng = random.Random(seed)
    return Runner(loaded).logits([rng.randrange(VOCAB) for _ in range(40)])


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return packed(TINY, tmp_path_factory.mktemp("packed") / "tiny", quantize="int4")


FAMILIES = ["qwen2_moe", "deepseek_v3", "gpt_oss", "mixtral", "llama"]


@pytest.mark.parametrize("quantize", ["none", "int8", "int4"])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_same_bits_as_packing_while_loading(
    model_type: str, quantize: str, seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shared experts, biases, tied heads, latent attention; in one file and in many."""
    monkeypatch.setattr(pack, "MAX_SHARD_BYTES", random.Random(seed).choice([20_000, 4 << 30]))
    settings = {
        "quantize": quantize,
        "dtype": random.Random(seed).choice(["float32", "bfloat16"]),
        "quantize_zero_points": quantize == "int4" and seed % 2 == 0,
        "quantize_head": random.Random(seed).choice(["int8", quantize]).replace("none", "int8"),
    }
    reference = make_reference(draw_config(model_type, seed), model_type, seed)
    save(reference, tmp_path / "model", packed=False, old_style=seed % 2 == 0)
    out = packed(tmp_path / "model", tmp_path / "out", **settings)
    direct, mapped = load_native(tmp_path / "model", **settings), load_native(out)
    assert torch.equal(logits(mapped, seed), logits(direct, seed))
    assert mapped.num_parameters == direct.num_parameters
    assert mapped.dtype == direct.dtype
    assert mapped.eos_token_ids == direct.eos_token_ids
    forms = direct.notes["weights"].removeprefix("packed; ")
    assert mapped.notes["weights"] == f"mapped; {forms}"


def test_same_tokens_from_the_shipped_files(tiny: Path) -> None:
    prompts = ["Once upon a time", [{"role": "user", "content": "Tell me about a dog."}]]
    asked = {"max_tokens": 24, "temperature": 0}
    with LLM(TINY, quantize="int4", cpu_backend="native") as llm:
        expected = [result.text for result in llm.generate(prompts, **asked)]
    with LLM(str(tiny)) as llm:  # cpu_backend auto is the native one here
        assert [result.text for result in llm.generate(prompts, **asked)] == expected


def test_inputs_may_stay_floats_at_load(tiny: Path, seed: int) -> None:
    direct = load_native(TINY, quantize="int4", quantize_activations=False)
    mapped = load_native(tiny, quantize_activations=False)
    assert torch.equal(logits(mapped, seed), logits(direct, seed))
    assert not torch.equal(logits(load_native(tiny), seed), logits(direct, seed))


def test_files_are_safetensors_with_packed_tensors_on_whole_pages(tiny: Path) -> None:
    manifest = json.loads((tiny / MANIFEST).read_text())
    for name, num_bytes in manifest["files"].items():
        assert (tiny / name).stat().st_size == num_bytes
        content = (tiny / name).read_bytes()
        with safe_open(tiny / name, "pt") as file:
            assert set(file.keys()) == set(manifest["weights"])
        start = 8 + int.from_bytes(content[:8], "little")
        header = json.loads(content[8:start])
        for weight, entry in manifest["weights"].items():
            if entry["forms"]:
                assert (start + header[weight]["data_offsets"][0]) % mmap.PAGESIZE == 0


def test_layout_of_a_file_has_no_gap(seed: int, tmp_path: Path) -> None:
    rng = random.Random(seed)
    stores = [
        Store(f"t{i}", (rng.randint(1, 9),), rng.choice([torch.float32, torch.bfloat16]))
        for i in range(rng.randint(1, 20))
    ]
    header, starts, num_bytes = layout_file(stores)
    content = bytearray(header.ljust(num_bytes, b"\0"))
    expected = {}
    for store in stores:
        values = torch.randn(store.shape).to(store.dtype)
        raw = bytes(values.view(torch.uint8).tolist())
        content[starts[store.name] : starts[store.name] + len(raw)] = raw
        expected[store.name] = values
    (tmp_path / "f.safetensors").write_bytes(content)
    found = load_file(tmp_path / "f.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)


def refusal(path: Path, error: type[Exception] = ModelError, **settings: object) -> str:
    with pytest.raises(error) as caught:
        load_native(path, **settings)
    return str(caught.value)


def test_what_a_packed_directory_cannot_do_is_refused(tiny: Path) -> None:
    assert "is packed already" in refusal(tiny, ConfigError, quantize="int8")
    assert "packed to compute in float32" in refusal(tiny, ConfigError, dtype="bfloat16")
    assert "check_weights" in refusal(tiny, ConfigError, check_weights=True)
    with pytest.raises(ConfigError, match="quantised weights"):
        load_model(ModelConfig(model=str(tiny)), ExpertConfig(cpu_backend="torch"))
    with pytest.raises(ModelError, match="packed already"):
        packed(tiny, tiny.parent / "again")


@pytest.fixture
def copy(tiny: Path, tmp_path: Path) -> Path:
    target = tmp_path / "copy"
    target.mkdir()
    for file in tiny.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


def edit(path: Path, **fields: object) -> None:
    file = path / MANIFEST
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def test_an_older_layout_is_read_where_its_formats_are_the_same(tmp_path: Path) -> None:
    for quantize, zero_points in (("none", False), ("int4", True)):
        out = packed(TINY, tmp_path / quantize, quantize=quantize, quantize_zero_points=zero_points)
        expected = logits(load_native(out), 3)
        edit(out, layout=1)
        assert torch.equal(logits(load_native(out), 3), expected)


def test_int4_of_an_older_layout_is_refused(copy: Path) -> None:
    edit(copy, layout=1)
    assert "int4 as of layout 1; that of layout 2 is another" in refusal(copy)


def test_other_versions_and_broken_files_are_refused(copy: Path) -> None:
    manifest = json.loads((copy / MANIFEST).read_text())
    (name,) = manifest["files"]
    for field in ("version", "layout"):
        edit(copy, **{field: manifest[field] + 1})
        assert f"{field} {manifest[field] + 1}" in refusal(copy)
    edit(copy, **manifest | {"format": "another"})
    assert "found 'another'" in refusal(copy)
    edit(copy, **manifest | {"files": {"../x.safetensors": 1}})
    assert "no plain name" in refusal(copy)
    weights = manifest["weights"]
    edit(copy, **manifest | {"weights": {k: v for k, v in weights.items() if k != "norm"}})
    assert "not those of config.json: norm" in refusal(copy)
    other = {"forms": [{"name": "int8"}, {"name": "int8"}]}
    spoilt = weights | {"layers.2.experts": weights["layers.2.experts"] | other}
    edit(copy, **manifest | {"weights": spoilt})
    assert "layers.2.experts: expected torch.uint8" in refusal(copy)
    spoilt = weights | {"head": weights["head"] | {"forms": []}}
    edit(copy, **manifest | {"weights": spoilt})
    assert "head: 0 forms" in refusal(copy)
    spoilt = weights | {"head": weights["head"] | {"forms": [{"name": "int3"}]}}
    edit(copy, **manifest | {"weights": spoilt})
    assert "int3" in refusal(copy)
    (copy / MANIFEST).write_text("{")
    assert MANIFEST in refusal(copy)
    edit_file = copy / name
    (copy / MANIFEST).write_text(json.dumps(manifest))
    content = edit_file.read_bytes()
    edit_file.write_bytes(content[:-4096])
    assert f"expected {len(content)} bytes, found {len(content) - 4096}" in refusal(copy)
    edit_file.unlink()
    assert f"{name} is not there" in refusal(copy)


def test_a_changed_config_is_refused(copy: Path) -> None:
    config = copy / "config.json"
    config.write_text(config.read_text().replace('"rope_theta": 10000.0', '"rope_theta": 9000.0'))
    assert "config.json: not the one" in refusal(copy)


def test_nothing_is_overwritten_and_nothing_is_left(tmp_path: Path, seed: int) -> None:
    used = tmp_path / "used"
    used.mkdir()
    (used / "file").write_text("mine")
    with pytest.raises(ModelError, match="not empty"):
        packed(TINY, used)
    with pytest.raises(ModelError, match="no such directory"):
        packed(TINY, tmp_path / "a" / "b")
    with pytest.raises(ModelError, match="/proc/none: cannot be written"):
        packed(TINY, Path("/proc/none"))
    reference = make_reference(draw_config("mixtral", seed), "mixtral", seed)
    save(reference, tmp_path / "model", packed=False, old_style=False)
    stored = load_file(tmp_path / "model" / "model.safetensors")
    name = next(name for name in stored if "layers.1" in name and "experts.2.w1" in name)
    stored[name][3, 1] = torch.nan
    save_file(stored, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=f"{name}: .*NaN or Inf cannot be stored as int8"):
        packed(tmp_path / "model", tmp_path / "out", quantize="int8")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "used"]
    empty = tmp_path / "empty"
    empty.mkdir()
    assert (packed(TINY, empty, quantize="int8") / MANIFEST).exists()
