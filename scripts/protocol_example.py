"""Prints the worked example of docs/protocol.md: one whole exchange, byte for byte.

    python scripts/protocol_example.py            # print it
    python scripts/protocol_example.py --write    # put it into docs/protocol.md

Client frames come from the client package, server frames from the gateway's encoder, and each is
decoded by the other side before it is printed. tests/test_protocol_doc.py compares the document.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from moeserve.client import wire as client_wire
from moeserve.core import FinishReason
from moeserve.framing import client_server_wire
from moeserve.messages import Accepted, Chunk, Done, Message, Timing, Usage, Welcome

DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "protocol.md"
BEGIN, END = "<!-- example: begin -->", "<!-- example: end -->"

SERVER_WIRE = client_server_wire(1 << 20)

FROM_CLIENT: dict[str, dict[str, Any]] = {
    "hello": {"client": "example"},
    "submit": {
        "request_id": "r1",
        "token_frame": True,
        "credit": 1,
        "params": {"max_tokens": 2, "temperature": 0},
    },
    "credit": {"request_id": "r1", "chunks": 1},
}
PROMPT_IDS = (464, 3290)

FROM_SERVER: dict[str, Message] = {
    "welcome": Welcome(
        server="moeserve 0.1.0",
        models=["tiny-moe"],
        heartbeat_ms=2000,
        timeout_ms=10000,
        max_message_bytes=16777216,
        max_in_flight=256,
    ),
    "accepted": Accepted(request_id="r1", prompt_tokens=2),
    "chunk 1": Chunk(request_id="r1", index=0, text=" ran", token_ids=[4966]),
    "chunk 2": Chunk(
        request_id="r1", index=0, text=".", token_ids=[13], finish_reason=FinishReason.LENGTH
    ),
    "done": Done(
        request_id="r1",
        usage=Usage(prompt_tokens=2, completion_tokens=2),
        timing=Timing(queued_ms=0.5, ttft_ms=20.0, total_ms=30.0),
    ),
}
ORDER = ("hello", "welcome", "submit", "accepted", "chunk 1", "credit", "chunk 2", "done")


def frames_of(step: str) -> tuple[str, list[bytes], dict[str, Any]]:
    """Direction, frames and header of one message, checked by the side that receives it."""
    if step in FROM_CLIENT:
        raw = (client_wire.pack_token_ids(PROMPT_IDS),) if step == "submit" else ()
        frames = client_wire.encode(step, *raw, **FROM_CLIENT[step])
        SERVER_WIRE.decode(frames)  # raises when the gateway would refuse it
        return "client → server", frames, {"type": step, **FROM_CLIENT[step]}
    frames = SERVER_WIRE.encode(FROM_SERVER[step])
    return "server → client", frames, client_wire.decode(frames)


def render() -> str:
    """The example as Markdown."""
    parts = []
    for number, step in enumerate(ORDER, start=1):
        direction, frames, header = frames_of(step)
        lines = [f"**{number}. {direction}: {step.split()[0]}**", "", "```text"]
        lines.append(f"frame 0  {frames[0].hex()}  ({frames[0].decode()})")
        for index, frame in enumerate(frames[1:], start=1):
            pieces = [frame[at : at + 32].hex() for at in range(0, len(frame), 32)]
            lines.append(f"frame {index}  {pieces[0]}")
            lines += [f"         {piece}" for piece in pieces[1:]]
        lines += ["```", "", f"`{json.dumps(header)}`", ""]
        parts.append("\n".join(lines))
    return "\n".join(parts)


def with_example(document: str) -> str:
    """The document with the example between its two marks renewed."""
    before, rest = document.split(BEGIN)
    after = rest.split(END)[1]
    return f"{before}{BEGIN}\n\n{render()}\n{END}{after}"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--write", action="store_true")
    if parser.parse_args().write:
        DOCUMENT.write_text(with_example(DOCUMENT.read_text("utf-8")), "utf-8")
    else:
        print(render())
    return 0


if __name__ == "__main__":
    sys.exit(main())
