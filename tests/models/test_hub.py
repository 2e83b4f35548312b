"""From a name to a directory: local paths, a hub cache built by hand, and a hub on loopback."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from moeserve.config import ModelConfig
from moeserve.core import ConfigError, ModelError
from moeserve.environment import Environment
from moeserve.models.hub import resolve_model

COMMIT = "0123456789abcdef0123456789abcdef01234567"
OLDER = "fedcba9876543210fedcba9876543210fedcba98"
NOWHERE = "http://127.0.0.1:9"  # the discard port: nothing listens
MODEL = "org/tiny"


@pytest.fixture
def environment(tmp_path: Path) -> Environment:
    return Environment(
        api_key=None,
        hf_token="hf_made_up",
        log_level="info",
        data_home=tmp_path,
        cache_home=tmp_path,
        runtime_home=tmp_path,
    )


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """A cache as huggingface_hub lays it out: blobs, snapshots of links to them, refs."""
    root = tmp_path / "hub"
    folder = root / "models--org--tiny"
    (folder / "blobs").mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(COMMIT)
    for commit, content in ((COMMIT, '{"a": 1}'), (OLDER, '{"a": 0}')):
        snapshot = folder / "snapshots" / commit
        snapshot.mkdir(parents=True)
        blob = hashlib.sha256(content.encode()).hexdigest()
        (folder / "blobs" / blob).write_text(content)
        (snapshot / "config.json").symlink_to(f"../../blobs/{blob}")
    return root


def refusal(config: ModelConfig, environment: Environment, cache: Path, endpoint: str) -> str:
    with pytest.raises(ModelError) as caught:
        resolve_model(config, environment, cache_dir=cache, endpoint=endpoint)
    assert caught.value.field == "model"
    return str(caught.value)


# --- local ---


def test_a_directory_is_itself(
    tmp_path: Path, environment: Environment, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "model").mkdir()
    assert resolve_model(ModelConfig(model=str(tmp_path / "model")), environment).is_dir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("model", "./model", "~/model"):
        found = resolve_model(ModelConfig(model=name, offline=True), environment)
        assert found.resolve() == (tmp_path / "model").resolve()
    with pytest.raises(ConfigError, match="revision: 'main' cannot be chosen for the local path"):
        resolve_model(ModelConfig(model="model", revision="main"), environment)


def test_a_file_is_refused(tmp_path: Path, environment: Environment) -> None:
    file = tmp_path / "model.safetensors"
    file.touch()
    with pytest.raises(ModelError, match="name the directory that holds it"):
        resolve_model(ModelConfig(model=str(file)), environment)


@pytest.mark.parametrize(
    "name", ["./gone", "/gone", "~/gone", "../gone", "a/b/c", "a b", "x\0y", "a" * 300, "a--b"]
)
@pytest.mark.parametrize("offline", [False, True])
def test_neither_a_directory_nor_a_hub_id(
    name: str, offline: bool, environment: Environment, cache: Path
) -> None:
    config = ModelConfig(model=name, offline=offline)
    assert "no such file or directory" in refusal(config, environment, cache, NOWHERE)


@pytest.mark.parametrize("revision", ["", "../../x", "/etc/passwd"])
def test_a_revision_is_no_path(revision: str, environment: Environment, cache: Path) -> None:
    config = ModelConfig(model=MODEL, revision=revision, offline=True)
    with pytest.raises(ConfigError, match=r"revision: .* is not a branch, tag or commit"):
        resolve_model(config, environment, cache_dir=cache, endpoint=NOWHERE)


# --- offline ---


@pytest.mark.parametrize(
    ("revision", "commit"), [(None, COMMIT), ("main", COMMIT), (COMMIT, COMMIT), (OLDER, OLDER)]
)
def test_offline_from_the_cache(
    revision: str | None, commit: str, environment: Environment, cache: Path
) -> None:
    config = ModelConfig(model=MODEL, revision=revision, offline=True)
    found = resolve_model(config, environment, cache_dir=cache, endpoint=NOWHERE)
    assert found.resolve() == (cache / "models--org--tiny" / "snapshots" / commit).resolve()
    assert json.loads((found / "config.json").read_text())["a"] == int(commit == COMMIT)


@pytest.mark.parametrize(
    ("model", "revision"), [("org/other", None), (MODEL, "v2"), (MODEL, "f" * 40)]
)
def test_offline_and_not_in_the_cache(
    model: str, revision: str | None, environment: Environment, cache: Path
) -> None:
    config = ModelConfig(model=model, revision=revision, offline=True)
    said = refusal(config, environment, cache, NOWHERE)
    assert "not (completely) in the hub's cache" in said
    fetch = f"hf download {model}" + (f" --revision {revision}" if revision else "")
    assert fetch in said


def test_no_network_is_no_silent_answer_from_the_cache(
    environment: Environment, cache: Path
) -> None:
    said = refusal(ModelConfig(model=MODEL), environment, cache, NOWHERE)
    assert "the hub fails: ConnectError" in said or "ConnectionError" in said
    assert "add --offline to serve what is in the cache" in said


# --- a hub on loopback ---

FILES = {
    "config.json": b'{"model_type": "mixtral"}',
    "model.safetensors": b"weights",
    "chat_template.jinja": b"{{ messages }}",
    "merges.txt": b"a b",
    "pytorch_model.bin": b"pickle",
    "modeling_tiny.py": b"import os",
    "consolidated.safetensors": b"the same weights once more",
    "original/model.safetensors": b"the same weights once more",
}
ERRORS = {
    "org/gone": (404, "RepoNotFound"),
    "org/gated": (403, "GatedRepo"),
    "org/broken": (500, ""),
}


class HubHandler(BaseHTTPRequestHandler):
    """As much of the hub's API as a download of one small repository needs."""

    server: HubServer

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def answer(self) -> None:
        path = self.path.split("?")[0].strip("/")
        self.server.seen.append((path, self.headers.get("Authorization")))
        for model, (status, code) in ERRORS.items():
            if f"/{model}" in f"/{path}":
                return self.reply(status, b"{}", {"X-Error-Code": code})
        if path.startswith(f"{MODEL}/resolve/{COMMIT}/"):
            content = FILES[path.removeprefix(f"{MODEL}/resolve/{COMMIT}/")]
            digest = hashlib.sha256(content).hexdigest()
            return self.reply(200, content, {"ETag": f'"{digest}"', "X-Repo-Commit": COMMIT})
        if path.startswith(f"api/models/{MODEL}/tree/"):
            tree = [
                {
                    "type": "file",
                    "path": name,
                    "size": len(data),
                    "oid": hashlib.sha1(data).hexdigest(),
                }
                for name, data in FILES.items()
            ]
            return self.reply(200, json.dumps(tree).encode(), {})
        if path in (
            f"api/models/{MODEL}",
            *(f"api/models/{MODEL}/revision/{r}" for r in ("main", COMMIT)),
        ):
            info = {"id": MODEL, "sha": COMMIT, "siblings": [{"rfilename": name} for name in FILES]}
            return self.reply(200, json.dumps(info).encode(), {})
        code = "RevisionNotFound" if "/revision/" in path else "RepoNotFound"
        return self.reply(404, b"{}", {"X-Error-Code": code})

    def reply(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        """Quiet."""


class HubServer(ThreadingHTTPServer):
    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), HubHandler)
        self.seen: list[tuple[str, str | None]] = []
        self.url = f"http://127.0.0.1:{self.server_port}"


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with HubServer() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def test_download_takes_weights_and_texts_only(
    tmp_path: Path, environment: Environment, hub: HubServer
) -> None:
    config = ModelConfig(model=MODEL)
    found = resolve_model(config, environment, cache_dir=tmp_path / "hub", endpoint=hub.url)
    assert found.name == COMMIT
    names = sorted(str(file.relative_to(found)) for file in found.rglob("*") if file.is_file())
    assert names == ["chat_template.jinja", "config.json", "merges.txt", "model.safetensors"]
    assert (found / "config.json").read_bytes() == FILES["config.json"]
    assert all(token == "Bearer hf_made_up" for path, token in hub.seen if path.startswith("api"))
    again = resolve_model(
        ModelConfig(model=MODEL, offline=True), environment, cache_dir=tmp_path / "hub"
    )
    assert again == found


def test_a_pinned_commit_is_what_arrives(
    tmp_path: Path, environment: Environment, hub: HubServer
) -> None:
    config = ModelConfig(model=MODEL, revision=COMMIT)
    found = resolve_model(config, environment, cache_dir=tmp_path / "hub", endpoint=hub.url)
    assert found.name == COMMIT


@pytest.mark.parametrize(
    ("model", "revision", "said"),
    [
        ("org/gone", None, "check the spelling; a private model needs HF_TOKEN"),
        ("org/gated", None, "accept them at https://huggingface.co/org/gated and set HF_TOKEN"),
        (MODEL, "v9", "the hub has the model, but not this revision"),
        ("org/broken", None, "the hub fails: HfHubHTTPError"),
    ],
)
def test_what_the_hub_refuses(
    model: str, revision: str | None, said: str,
    tmp_path: Path, environment: Environment, hub: HubServer,
) -> None:  # fmt: skip
    config = ModelConfig(model=model, revision=revision)
    message = refusal(config, environment, tmp_path / "hub", hub.url)
    assert said in message
    assert message.startswith(model)
