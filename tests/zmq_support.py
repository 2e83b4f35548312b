"""The real front, service, link, channel and scheduler around an engine that echoes the prompt.

Only the model is missing: token i of an answer is token i of the prompt, over and over. So every
answer says whose it is. The engine steps only while its gate is open.
"""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgpack
import tokenizers
import zmq
import zmq.asyncio

from moeserve.config import SchedulerConfig, ZmqConfig
from moeserve.core import EngineDelta, EngineRequest, EngineStats, FinishReason, ModelInfo
from moeserve.engine.batch import SampledToken, ScheduledBatch, StepResult
from moeserve.engine.channel import EngineChannel
from moeserve.engine.controls import Controls
from moeserve.engine.kv_blocks import BlockManager
from moeserve.engine.process import serve
from moeserve.engine.request_scheduler import RequestScheduler
from moeserve.framing import CLIENT_VERSION
from moeserve.gateway.service import GenerationService
from moeserve.gateway.zmq_front import ZmqFront
from moeserve.gateway.zmq_link import ZmqEngineLink
from moeserve.messages import EngineShutdown
from moeserve.text.assets import TextAssets
from moeserve.text.request import RequestLimits
from moeserve.text.tokenizer import Tokenizer

CONTEXT_TOKENS = 100_000

#: What `serve` imports when it is called. It takes torch along, for ten seconds on a busy machine,
#: in which the engine thread of the first test would answer nothing.
PRELOADED = Controls
#: RawClient answers no ping: a machine that takes long over a test must not end its session.
PATIENT = ZmqConfig(peer_timeout_s=1000)

INFO = ModelInfo(
    name="echo",
    model_type="echo",
    path="/nowhere",
    vocab_size=256,
    context_tokens=CONTEXT_TOKENS,
    eos_token_ids=(),
    num_parameters=0,
    num_layers=0,
    num_moe_layers=0,
    num_experts=0,
    dtype="float32",
    device="cpu",
    kv_blocks=20_000,
    block_tokens=16,
)


def byte_tokenizer() -> Tokenizer:
    """One token per byte of UTF-8."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocab = {letter: number for number, letter in enumerate(alphabet)}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    return Tokenizer(backend, {})


class EchoEngine:
    """The interface of moeserve.engine.engine.Engine over the real request scheduler."""

    info = INFO
    trouble = None

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.steps_allowed = math.inf  # the gate closes by itself after so many steps
        self.integrity_checks = 0
        blocks = BlockManager(INFO.kv_blocks, INFO.block_tokens, prefix_reuse=True)
        self.scheduler = RequestScheduler(SchedulerConfig(), blocks, (), CONTEXT_TOKENS)

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work

    def add(self, request: EngineRequest) -> None:
        self.scheduler.add(request, time.time())

    def abort(
        self, request_id: str, reason: FinishReason = FinishReason.CANCELLED
    ) -> list[EngineDelta]:
        return self.scheduler.abort(request_id, reason, time.time())

    def step(self) -> list[EngineDelta]:
        # A closed gate makes short empty steps, so that commands are still taken.
        if not self.gate.wait(0.01):
            return self.scheduler.drain_events()
        if self.steps_allowed <= 0:
            time.sleep(0.001)
            return self.scheduler.drain_events()
        self.steps_allowed -= 1
        batch = self.scheduler.schedule(time.time())
        if batch is None:
            return self.scheduler.drain_events()
        return self.scheduler.commit(batch, self._echo(batch), time.time())

    def stats(self, fresh: bool = False) -> EngineStats:
        return self.scheduler.stats()

    def check_integrity(self) -> None:
        self.integrity_checks += 1
        self.scheduler.check_integrity()

    @staticmethod
    def _echo(batch: ScheduledBatch) -> StepResult:
        tokens = {}
        for chunk in batch.chunks:
            sequence = chunk.sequence
            if chunk.samples:
                position = (len(sequence.token_ids) - sequence.num_prompt_tokens) % (
                    sequence.num_prompt_tokens
                )
                token = SampledToken(sequence.token_ids[position])
                tokens[sequence.request.request_id] = token
        return StepResult(tokens)


class EngineThread:
    """process.serve in a thread, connected like the engine process is."""

    def __init__(self, endpoint: str) -> None:
        self.engine = EchoEngine()
        self.channel = EngineChannel(endpoint, heartbeat_s=0.2, max_silence_beats=10_000)
        self._thread = threading.Thread(target=self._run)

    def start(self) -> None:
        self.channel.start()
        self.channel.set_stage("ready", info=INFO)
        self._thread.start()

    def _run(self) -> None:
        serve(self.engine, self.channel)  # type: ignore[arg-type]

    def stop(self) -> None:
        self.channel.commands.put(EngineShutdown())
        self._thread.join()
        self.channel.close()


@dataclass
class Stack:
    link: ZmqEngineLink
    service: GenerationService
    front: ZmqFront
    thread: EngineThread

    @property
    def engine(self) -> EchoEngine:
        return self.thread.engine

    @property
    def endpoint(self) -> str:
        return self.front.endpoint


def private_directory(path: Path) -> Path:
    path.mkdir(mode=0o700, exist_ok=True)
    return path


@asynccontextmanager
async def running_stack(
    directory: Path, config: ZmqConfig | None = None, endpoint: str | None = None
) -> AsyncIterator[Stack]:
    """A front at `endpoint` (default: ipc in `directory`) with everything behind it."""
    sockets = private_directory(directory / "sockets")
    async with AsyncExitStack() as cleanup:
        link = ZmqEngineLink(f"ipc://{sockets / 'engine.sock'}", heartbeat_s=0.2)
        await link.start()
        cleanup.push_async_callback(link.stop)
        thread = EngineThread(link.endpoint)
        thread.start()
        cleanup.callback(thread.stop)
        await link.wait_for(lambda status: status.stage == "ready")
        assets = TextAssets(byte_tokenizer(), None, {})
        service = GenerationService(link, RequestLimits(default_max_tokens=64), assets=assets)
        endpoint = endpoint or f"ipc://{sockets / 'client.sock'}"
        front = ZmqFront(config or PATIENT, endpoint, lambda: service)
        await front.start()
        cleanup.push_async_callback(front.stop)
        yield Stack(link, service, front, thread)


class RawClient:
    """A client that sends what it is told to, right or wrong, and answers nothing by itself."""

    def __init__(self, endpoint: str, **options: int) -> None:
        self.context = zmq.asyncio.Context()
        self.socket: zmq.asyncio.Socket = self.context.socket(zmq.DEALER)
        self.socket.linger = 0
        for name, value in options.items():
            setattr(self.socket, name, value)
        self.socket.connect(endpoint)

    async def __aenter__(self) -> RawClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self.socket.close()
        self.context.term()

    async def send(self, kind: str, *raw: bytes, **fields: Any) -> None:
        header = msgpack.packb({"type": kind, **fields})
        await self.socket.send_multipart([CLIENT_VERSION, header, *raw])

    async def receive(self) -> dict[str, Any]:
        """The next message that is no ping."""
        while True:
            frames = await asyncio.wait_for(self.socket.recv_multipart(), 120)
            assert frames[0] == CLIENT_VERSION
            message = msgpack.unpackb(frames[1], strict_map_key=False)
            if message["type"] != "ping":
                return dict(message)

    async def hello(self) -> dict[str, Any]:
        await self.send("hello", client="raw")
        welcome = await self.receive()
        assert welcome["type"] == "welcome", welcome
        return welcome

    async def submit(self, request_id: str, prompt: str, credit: int = 1000, **params: Any) -> None:
        await self.send(
            "submit", request_id=request_id, prompt=prompt, credit=credit, params=params
        )

    async def until_end(self, request_id: str) -> list[dict[str, Any]]:
        """The messages of one request to its last one; other requests' are skipped."""
        messages = []
        while True:
            message = await self.receive()
            if message.get("request_id") == request_id:
                messages.append(message)
                if message["type"] in ("done", "error"):
                    return messages

    async def received_before_pong(self) -> list[dict[str, Any]]:
        """Everything the server had sent when it answered a ping."""
        await self.send("ping", number=77)
        messages = []
        while (message := await self.receive())["type"] != "pong":
            messages.append(message)
        return messages


def text_of(messages: list[dict[str, Any]]) -> str:
    return "".join(message["text"] for message in messages if message["type"] == "chunk")


def echoed(prompt: str, num_tokens: int) -> str:
    """What the echoing engine answers to an ASCII prompt."""
    return (prompt * (num_tokens // len(prompt) + 1))[:num_tokens]


def pass_time(seconds: float) -> None:
    """Puts the running loop's clock forward: what waits for a time within them is due."""
    loop = asyncio.get_running_loop()
    now_s = loop.time
    loop.time = lambda: now_s() + seconds  # type: ignore[method-assign]


async def until(condition: Callable[[], bool], timeout_s: float = 120.0) -> None:
    """Waits for something that other tasks or threads bring about."""
    end_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end_s, "it never came about"
        await asyncio.sleep(0.005)
