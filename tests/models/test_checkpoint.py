"""Checkpoint directories, sound and broken. Oracle: the safetensors package."""

from __future__ import annotations

import json
import random
import struct
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from moeserve.core import ModelError
from moeserve.models.checkpoint import Checkpoint, read_generation_config, read_json
from moeserve.models.checkpoint import read_model_config as read_config
from moeserve.models.safetensors_file import DTYPES, SafetensorsFile

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


def random_tensors(seed: int, count: int = 12) -> dict[str, Tensor]:
    rng = random.Random(seed)
    torch.manual_seed(seed)
    tensors = {}
    for number in range(count):
        dtype = rng.choice(list(DTYPES.values()))
        shape = [rng.randint(0 if rng.random() < 0.1 else 1, 7) for _ in range(rng.randint(0, 3))]
        num_bytes = torch.empty(shape, dtype=dtype, device="meta").nbytes
        limit = 2 if dtype is torch.bool else 256
        raw = torch.randint(0, limit, (num_bytes,), dtype=torch.uint8)
        tensors[f"layers.{number}.weight"] = raw.view(dtype).reshape(shape)
    return tensors


def same_bits(left: Tensor, right: Tensor) -> bool:
    def bits(tensor: Tensor) -> Tensor:
        return tensor.reshape(-1).view(torch.uint8)

    described = (left.shape, left.dtype) == (right.shape, right.dtype)
    return described and torch.equal(bits(left), bits(right))


def save_sharded(path: Path, tensors: dict[str, Tensor], shards: int = 3) -> dict[str, str]:
    """What transformers writes: shards and the index that says where each tensor is."""
    location = {}
    for number in range(shards):
        name = f"model-{number + 1:05}-of-{shards:05}.safetensors"
        part = {key: tensors[key] for key in list(tensors)[number::shards]}
        save_file(part, path / name)
        location.update(dict.fromkeys(part, name))
    write_index(path, location)
    return location


def write_index(path: Path, location: dict[str, str]) -> None:
    (path / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": location}))


def raw_file(header: dict[str, Any] | bytes, data: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(dtype: str, shape: Any, *offsets: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": list(offsets)}


def oracle(path: Path) -> dict[str, Tensor] | None:
    """What the safetensors package reads, None where it refuses."""
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError:
        return None


def refusal(path: Path) -> str:
    with pytest.raises(ModelError) as caught:
        Checkpoint.open(path)
    return str(caught.value)


# --- sound checkpoints ---


@pytest.mark.parametrize("shards", [1, 2, 5])
@pytest.mark.parametrize("seed", range(8))
def test_reads_what_safetensors_reads(tmp_path: Path, seed: int, shards: int) -> None:
    tensors = random_tensors(seed)
    if shards == 1:
        save_file(tensors, tmp_path / SINGLE, metadata={"format": "pt"})
    else:
        save_sharded(tmp_path, tensors, shards)
    with closing(Checkpoint.open(tmp_path)) as checkpoint:
        assert checkpoint.names() == sorted(tensors)
        for name in tensors:
            with safe_open(checkpoint.file(name), "pt") as file:
                expected = file.get_tensor(name)
            assert same_bits(checkpoint.read(name), expected), f"seed {seed}: {name}"
            assert checkpoint.shape(name) == tuple(expected.shape)
            assert checkpoint.dtype(name) == expected.dtype
            assert checkpoint.num_bytes(name) == expected.nbytes
            checkpoint.release(name)
            assert same_bits(checkpoint.read(name), expected), f"seed {seed}: {name} after release"


def test_reads_tensors_that_are_not_aligned(tmp_path: Path) -> None:
    header = {"a": entry("U8", [1], 0, 1), "b": entry("F32", [2], 1, 9)}
    (tmp_path / SINGLE).write_bytes(raw_file(header, b"\x07" + struct.pack("<2f", 1.5, -2.0)))
    checkpoint = Checkpoint.open(tmp_path)
    assert checkpoint.read("a").tolist() == [7]
    assert checkpoint.read("b").tolist() == [1.5, -2.0]


def test_writing_into_a_tensor_never_reaches_the_file(tmp_path: Path) -> None:
    save_file({"a": torch.ones(8)}, tmp_path / SINGLE)
    before = (tmp_path / SINGLE).read_bytes()
    Checkpoint.open(tmp_path).read("a").zero_()
    assert (tmp_path / SINGLE).read_bytes() == before


def test_tensors_outlive_the_checkpoint(tmp_path: Path) -> None:
    save_file({"a": torch.arange(8)}, tmp_path / SINGLE)
    with closing(Checkpoint.open(tmp_path)) as checkpoint:
        kept = checkpoint.read("a")
    assert kept.tolist() == list(range(8))


# --- damaged files: a refusal that names the file, never a crash ---


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_truncated_anywhere_is_refused(tmp_path: Path, seed: int, sharded: bool) -> None:
    tensors = random_tensors(seed)
    if sharded:
        victim = tmp_path / max(save_sharded(tmp_path, tensors).values())
    else:
        victim = tmp_path / SINGLE
        save_file(tensors, victim)
    whole = victim.read_bytes()
    rng = random.Random(seed)
    cuts = {0, 7, 8, 9, len(whole) - 1, *(rng.randrange(len(whole)) for _ in range(60))}
    for cut in cuts:
        victim.write_bytes(whole[:cut])
        assert victim.name in refusal(tmp_path), f"seed {seed}, cut at {cut}"
    victim.write_bytes(whole + b"\0")
    assert f"the file has {len(whole) + 1} bytes" in refusal(tmp_path)


@pytest.mark.parametrize("seed", range(6))
def test_flipped_bytes_are_refused_or_read_as_safetensors_does(tmp_path: Path, seed: int) -> None:
    file = tmp_path / SINGLE
    save_file(random_tensors(seed, count=4), file)
    whole = file.read_bytes()
    header_end = 8 + struct.unpack("<Q", whole[:8])[0]
    rng = random.Random(seed)
    for _ in range(150):
        broken = bytearray(whole)
        for _ in range(rng.randint(1, 3)):
            broken[rng.randrange(header_end)] = rng.randrange(256)
        file.write_bytes(broken)
        compare_with_oracle(file, f"seed {seed}: {bytes(broken[:header_end])!r}")


HOSTILE = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.text(max_size=4),
    st.sampled_from([*DTYPES, "F4", "f32"]),
    st.lists(st.integers(-2, 2**65), max_size=4),
    st.lists(st.sampled_from([0, 1, 2, 4, 8, 2**31, 2**62, 2**63]), max_size=5),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
)


@given(
    field=st.sampled_from(["dtype", "shape", "data_offsets", "extra", None]),
    value=HOSTILE,
    data=st.binary(max_size=24),
    metadata=st.one_of(st.just({"format": "pt"}), HOSTILE),
)
@settings(max_examples=400)
def test_hostile_headers(
    tmp_path_factory: pytest.TempPathFactory,
    field: str | None,
    value: Any,
    data: bytes,
    metadata: Any,
) -> None:
    file = tmp_path_factory.mktemp("hostile") / SINGLE
    header: dict[str, Any] = {"a": entry("F32", [2], 0, 8), "b": entry("U8", [3], 8, 11)}
    if field is None:
        header["a"] = value
    else:
        header["a"][field] = value
    header["__metadata__"] = metadata
    file.write_bytes(raw_file(header, data or bytes(11)))
    compare_with_oracle(file, repr(header))


def compare_with_oracle(file: Path, context: str) -> None:
    """Read alike where both accept; never accept what safetensors refuses."""
    expected = oracle(file)
    try:
        ours = SafetensorsFile(file)
    except ModelError as error:
        said = str(error)
    else:
        said = ""
    if said:
        assert str(file) in said, context
        stricter = ("twice", "is not one of", "larger than any memory")  # on purpose
        assert expected is None or any(word in said for word in stricter), (context, said)
        return
    assert expected is not None, context
    assert set(ours.entries) == set(expected), context
    for name, tensor in expected.items():
        assert same_bits(ours.read(name), tensor), context


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "0 bytes; a safetensors file starts with 8 bytes"),
        (struct.pack("<Q", 2**63) + b"{}", "expected at most 100000000 bytes, found 92233"),
        (struct.pack("<Q", 99_999_999) + b"{}", "header of 99999999 bytes expected, found 2 bytes"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS pointer"),
        (raw_file(b"[1]", b""), "expected a JSON object, found list"),
        (raw_file(b"{" * 50_000, b""), "header is not JSON"),
        (raw_file(b'{"a":' * 100_000 + b"1" + b"}" * 100_000, b""), "header is not JSON"),
        (raw_file(b'{"\xff": 1}', b""), "header is not JSON"),
        (raw_file(b'{"a": NaN}', b""), "NaN is not a JSON number"),
        (raw_file(b'{"a": {"b": 1e999}}', b""), "1e999 is not a JSON number"),
        (raw_file({"a": entry("F32", [2], 0, 4)}, bytes(4)), "'a': F32 [2] takes 8 bytes"),
        (raw_file({"a": entry("F32", [2], 0, 8)}, bytes(4)), "'a': ends at byte"),
        (raw_file({"a": entry("F32", [-1], 0, 4)}, bytes(4)), "'a': shape: expected sizes"),
        (raw_file({"a": entry("F32", [1], 4, 0)}, bytes(4)), "'a': data_offsets"),
        (raw_file({"a": entry("F32", [1], 4, 8)}, bytes(8)), "'a': leaves a gap"),
        (raw_file({"a": entry("F4", [2], 0, 1)}, bytes(1)), "'a': dtype 'F4' is not one of"),
        (raw_file({"a": entry("U8", [0, 2**62, 4], 0, 0)}, b""), "'a': shape"),
        (
            raw_file({"a": entry("U8", [2], 0, 2), "b": entry("U8", [2], 1, 3)}, bytes(3)),
            "'b': overlaps",
        ),
        (
            raw_file(b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"a":1}', b"\0"),
            "names 'a' twice",
        ),
    ],
)
def test_refusals_name_tensor_expected_and_found(tmp_path: Path, content: bytes, said: str) -> None:
    (tmp_path / SINGLE).write_bytes(content)
    message = refusal(tmp_path)
    assert said in message
    assert str(tmp_path / SINGLE) in message


# --- an index that lies ---


def test_index_names_a_shard_that_is_not_there(tmp_path: Path) -> None:
    location = save_sharded(tmp_path, random_tensors(0))
    gone = sorted(set(location.values()))[1]
    (tmp_path / gone).unlink()
    message = refusal(tmp_path)
    assert INDEX in message
    assert f"shards that are not there: 1 ({gone})" in message


def test_index_names_a_tensor_that_no_shard_has(tmp_path: Path) -> None:
    location = save_sharded(tmp_path, random_tensors(0))
    shard = location["layers.0.weight"]
    write_index(tmp_path, {**location, "ghost": shard})
    assert f"ghost expected in {shard}, found in none" in refusal(tmp_path)


def test_index_names_the_wrong_shard(tmp_path: Path) -> None:
    location = save_sharded(tmp_path, random_tensors(0))
    right, wrong = location["layers.0.weight"], location["layers.1.weight"]
    write_index(tmp_path, {**location, "layers.0.weight": wrong})
    assert f"layers.0.weight expected in {wrong}, found in {right}" in refusal(tmp_path)


def test_index_leaves_a_tensor_out(tmp_path: Path) -> None:
    location = save_sharded(tmp_path, random_tensors(0))
    shard = location.pop("layers.3.weight")
    write_index(tmp_path, location)
    message = refusal(tmp_path)
    assert f"does not name: 1 (layers.3.weight in {shard})" in message


def test_two_shards_hold_the_same_tensor(tmp_path: Path) -> None:
    tensors = random_tensors(0)
    location = save_sharded(tmp_path, tensors, shards=2)
    first, second = sorted(set(location.values()))
    both = {name: tensors[name] for name in tensors if location[name] == second}
    save_file({**both, "layers.0.weight": tensors["layers.0.weight"]}, tmp_path / second)
    assert f"layers.0.weight in {first} and {second}" in refusal(tmp_path)


@pytest.mark.parametrize(
    "name",
    ["../model.safetensors", "/etc/x.safetensors", "a/b.safetensors", "a\\b.safetensors", "x.bin",
     "..", "", 3, None, ["model.safetensors"], "a\0.safetensors"],
)  # fmt: skip
def test_index_may_name_plain_safetensors_files_only(tmp_path: Path, name: Any) -> None:
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": name}}))
    assert "tensor 'a': expected the plain name of a .safetensors file" in refusal(tmp_path)


@pytest.mark.parametrize("content", ["{}", '{"weight_map": {}}', '{"weight_map": [1]}'])
def test_index_without_weight_map(tmp_path: Path, content: str) -> None:
    (tmp_path / INDEX).write_text(content)
    assert "weight_map: expected an object" in refusal(tmp_path)


def test_single_file_and_an_index_that_does_not_name_it(tmp_path: Path) -> None:
    save_sharded(tmp_path, random_tensors(0))
    save_file(random_tensors(1), tmp_path / SINGLE)
    assert "delete the one that is out of date" in refusal(tmp_path)


def test_index_of_one_file_is_fine(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / SINGLE)
    write_index(tmp_path, {"a": SINGLE})
    assert Checkpoint.open(tmp_path).names() == ["a"]


# --- directories without safetensors ---


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "a.pt", "b.ckpt"])
def test_pickle_checkpoints_are_refused_unread(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"\x80\x04cos\nsystem\n")
    message = refusal(tmp_path)
    assert f"found pickle checkpoints: 1 ({name})" in message
    assert "save_pretrained" in message


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("model-Q4.gguf", "GGUF is not supported"),
        ("adapter_model.safetensors", "merge it into its model"),
        ("model-00001-of-00002.safetensors", "shards need their model.safetensors.index.json"),
        ("README.md", "found 1 (README.md)"),
    ],
)
def test_directories_with_something_else(tmp_path: Path, name: str, said: str) -> None:
    (tmp_path / name).touch()
    assert said in refusal(tmp_path)


def test_no_directory(tmp_path: Path) -> None:
    assert "found an empty directory" in refusal(tmp_path)
    assert "no such file or directory" in refusal(tmp_path / "nowhere")
    file = tmp_path / SINGLE
    file.touch()
    assert f"name the directory that holds it: {tmp_path}" in refusal(file)
    file.unlink()
    file.mkdir()
    assert f"{file}: no such file" in refusal(tmp_path)


# --- JSON files ---


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "not JSON: Expecting value: line 1 column 1"),
        (b'{"a": 1,\n "b": }', "line 2 column 7"),
        (b"[1]", "expected a JSON object, found list"),
        (b'{"a": "\xff"}', "not JSON: 'utf-8' codec"),
        (b'{"a":' * 200_000, "not JSON"),
    ],
)
def test_read_json_refuses(tmp_path: Path, content: bytes, said: str) -> None:
    file = tmp_path / "config.json"
    file.write_bytes(content)
    with pytest.raises(ModelError) as caught:
        read_json(file)
    assert said in str(caught.value)
    assert str(file) in str(caught.value)


def test_read_json_has_a_size_limit(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    with file.open("wb") as stream:
        stream.truncate(65 * 1024 * 1024)  # sparse: takes no room
    with pytest.raises(ModelError, match="expected at most 67108864 bytes, found 68157440"):
        read_json(file)


def test_remote_code_is_refused_or_not_needed(tmp_path: Path) -> None:
    code = {"AutoModelForCausalLM": "modeling_x.XForCausalLM"}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "x", "auto_map": code}))
    with pytest.raises(ModelError, match=r"'x' is not one of mixtral.*auto_map.*modeling_x"):
        read_config(tmp_path, ["mixtral"])
    config, notes = read_config(tmp_path, ["mixtral", "x"])
    assert config["auto_map"] == code
    assert notes["auto_map"].startswith("ignored")


def test_configs(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"config\.json: no such file"):
        read_config(tmp_path, ["mixtral"])
    (tmp_path / "config.json").write_text('{"model_type": "mixtral"}')
    assert read_config(tmp_path, ["mixtral"]) == ({"model_type": "mixtral"}, {})
    (tmp_path / "config.json").write_text('{"hidden_size": 3}')
    with pytest.raises(ModelError, match="model_type: None is not one of mixtral"):
        read_config(tmp_path, ["mixtral"])
    assert read_generation_config(tmp_path) == {}
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [1, 2]}')
    assert read_generation_config(tmp_path) == {"eos_token_id": [1, 2]}
