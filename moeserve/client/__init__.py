"""The ZeroMQ client. Needs pyzmq and msgpack; imports no torch and nothing else of moeserve.

    from moeserve.client import Client

    with Client() as client:
        for chunk in client.stream("Once upon a time", max_tokens=64):
            print(chunk.text, end="", flush=True)

docs/protocol.md describes the wire for clients in other languages.
"""

from moeserve.client.aio import AsyncClient, AsyncStream
from moeserve.client.endpoint import CurveKeys, default_endpoint, load_keys
from moeserve.client.sync import Client, Stream
from moeserve.client.types import (
    Answer,
    Chunk,
    ClientError,
    ConnectionLost,
    Logprob,
    Result,
    ServerError,
    ServerInfo,
    TimedOut,
    Timing,
    Usage,
)

__all__ = [
    "Answer",
    "AsyncClient",
    "AsyncStream",
    "Chunk",
    "Client",
    "ClientError",
    "ConnectionLost",
    "CurveKeys",
    "Logprob",
    "Result",
    "ServerError",
    "ServerInfo",
    "Stream",
    "TimedOut",
    "Timing",
    "Usage",
    "default_endpoint",
    "load_keys",
]
