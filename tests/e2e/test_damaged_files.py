"""A server whose model's files are damaged and mended while it runs: said, survived, over."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
from server_process import Server, running_server

from moeserve.client import Client, ServerError
from moeserve.core import ErrorCode

SETTINGS: dict[str, Any] = {"max_tokens": 8, "temperature": 0, "ignore_eos": True}
PROMPT = "Once upon a time"


def health(server: Server) -> tuple[int, dict[str, str]]:
    answer = httpx.get(f"{server.http}/health", trust_env=False, timeout=120)
    return answer.status_code, json.loads(answer.content)


def wait_for_health(server: Server, status: str) -> dict[str, str]:
    """Nobody sends requests meanwhile."""
    end_s = time.monotonic() + 120
    while (found := health(server)[1])["status"] != status:
        assert time.monotonic() < end_s, found
        time.sleep(0.05)
    return found


@pytest.mark.parametrize("again", ["in place", "another file"])
def test_health_says_that_experts_cannot_be_read_until_they_can(
    again: str, packed: Path, tmp_path: Path
) -> None:
    copy, kept = tmp_path / "model", tmp_path / "kept"
    shutil.copytree(packed, copy)
    [shard] = copy.glob("packed-*.safetensors")
    shutil.copy(shard, kept)
    flags = ("--host-slots", "4", "--num-blocks", "64", "--num-threads", "1")
    with running_server(*flags, model=copy) as server, Client(server.zmq) as client:
        expected = client.generate(PROMPT, **SETTINGS).token_ids
        assert health(server)[0] == 200
        os.truncate(shard, 0)
        with pytest.raises(ServerError, match="ends before byte") as failed:
            client.generate(PROMPT, **SETTINGS)
        assert failed.value.code == ErrorCode.UNAVAILABLE
        said = wait_for_health(server, "degraded")
        assert health(server)[0] == 503
        assert str(shard) in said["detail"]
        assert "moeserve pack" in said["detail"]
        if again == "another file":
            kept.replace(shard)
        else:
            shutil.copy(kept, shard)
        wait_for_health(server, "ready")
        assert health(server)[0] == 200
        assert client.generate(PROMPT, **SETTINGS).token_ids == expected
