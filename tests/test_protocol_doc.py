"""docs/protocol.md says what the code does: every field, every code, the example's bytes."""

from __future__ import annotations

import json
import re

import msgspec
import protocol_example
import pytest

from moeserve import control_messages, framing, messages
from moeserve.core import EngineStats, ErrorCode, FinishReason, SamplingParams
from moeserve.stats import CacheStats, ExpertStats, LinkStats

TEXT = protocol_example.DOCUMENT.read_text("utf-8")

FROM_CLIENT = (
    *(messages.Hello, messages.Submit, messages.Cancel, messages.Credit),
    *(control_messages.GetStats, control_messages.ResizeCache),
    *(control_messages.RecordExpertUse, control_messages.RecordTimeline),
)
FROM_SERVER = (
    *(messages.Welcome, messages.Accepted, messages.Chunk, messages.Done, messages.Error),
    *(control_messages.Stats, control_messages.CacheResized),
    *(control_messages.ExpertUse, control_messages.TimelineRecorded),
)


def section(name: str) -> str:
    found = re.search(rf"^### {name}\n(.*?)(?=^##)", TEXT, re.MULTILINE | re.DOTALL)
    assert found is not None, f"no section {name}"
    return found[1]


def first_table(text: str) -> dict[str, list[str]]:
    """Rows of the first table by their first cell, which may name several things."""
    lines = text[text.index("| --- |") :].split("\n")[1:]
    rows: dict[str, list[str]] = {}
    for line in lines:
        if not line.startswith("|"):
            break
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        for name in re.findall(r"`(\w+)`", cells[0]):
            rows[name] = cells[1:]
    return rows


def default_of(field: msgspec.structs.FieldInfo) -> str:
    if field.required:
        return "required"
    default = field.default_factory() if field.default is msgspec.NODEFAULT else field.default
    text = json.dumps(default)
    return {"null": "nil", '""': '`""`'}.get(text, text)


@pytest.mark.parametrize("message", [*FROM_CLIENT, *FROM_SERVER], ids=lambda m: m.__name__)
def test_every_field_is_described_and_no_other(message: type[messages.Message]) -> None:
    fields = msgspec.structs.fields(message)
    rows = first_table(section(str(message.__struct_config__.tag)))
    assert list(rows) == [field.name for field in fields]
    if message in FROM_CLIENT:
        for field in fields:
            assert rows[field.name][1] == default_of(field), field.name


def test_every_parameter_is_described() -> None:
    submit = section("submit")
    rows = first_table(submit[submit.index("`params`, all optional") :])
    own = {"n", "stop", "include_stop", "skip_special_tokens"}
    assert set(rows) - own == {f.name for f in msgspec.structs.fields(SamplingParams)}
    assert own <= set(rows)


def test_every_error_code_and_finish_reason_is_described() -> None:
    codes = first_table(TEXT[TEXT.index("## 5. Error codes") :])
    assert list(codes) == [code.value for code in ErrorCode]
    described = set(re.findall(r"`(\w+)`", first_table(section("chunk"))["finish_reason"][-1]))
    # An engine's failure comes as an error message, never as a finish_reason.
    assert described == {reason.value for reason in FinishReason} - {"error"}


def test_every_number_of_the_engine_is_described() -> None:
    text = section("stats")
    numbers = text[text.index("`engine` has") :]
    kinds = (EngineStats, ExpertStats, CacheStats, LinkStats)
    for kind in kinds:
        for field in msgspec.structs.fields(kind):
            assert f"`{field.name}`" in numbers, f"{kind.__name__}.{field.name}"


def test_limits_are_the_codes() -> None:
    for number in (
        *(framing.MAX_ITEMS, framing.MAX_DEPTH, framing.MAX_FRAMES, messages.MAX_CREDIT),
        *(control_messages.MAX_TIMELINE_STEPS, control_messages.MAX_USE_STEPS),
    ):
        assert re.search(rf"\b{number}\b", TEXT), number
    assert f"1 to {messages.MAX_REQUEST_ID_CHARS} characters" in TEXT
    assert f"`{framing.CLIENT_VERSION.decode()}`" in TEXT


def test_the_example_is_what_the_code_sends() -> None:
    assert protocol_example.with_example(TEXT) == TEXT, "run scripts/protocol_example.py --write"
    # The bytes in the document, read back without the code that wrote them.
    wire = protocol_example.SERVER_WIRE
    blocks = re.findall(r"client → server: (\w+)\*\*\n\n```text\n(.*?)```", TEXT, re.DOTALL)
    assert [name for name, _ in blocks] == ["hello", "submit", "credit"]
    for name, block in blocks:
        frames = [
            bytes.fromhex("".join(re.findall(r"\b[0-9a-f]{2,64}\b(?!\))", part)))
            for part in re.split(r"^frame \d", block, flags=re.MULTILINE)[1:]
        ]
        message, raw = wire.decode(frames)
        assert message.__struct_config__.tag == name
        if name == "submit":
            assert raw == [b"\xd0\x01\0\0\xda\x0c\0\0"]
