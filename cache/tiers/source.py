"""Where a slower tier keeps the records of experts, as a transfer reads them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, Protocol

from moeserve.core import ErrorCode, ExpertKey, MoeserveError


class StoreError(MoeserveError):
    """The record of an expert cannot be read, or is not what was stored."""

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message, code=ErrorCode.UNAVAILABLE, hint=hint)


class RecordMemory(Protocol):
    """Where the bytes of a record are put: a memoryview, or what a device has in its place."""

    def __len__(self) -> int: ...

    def __getitem__(self, part: slice, /) -> Any: ...


class SlotMemory(Protocol):
    """The memory of a slot: an array of bytes, here or on a device."""

    @property
    def data(self) -> RecordMemory: ...


class RecordCheck(ABC):
    """Compares one record with what was stored, piece by piece."""

    @abstractmethod
    def update(self, piece: memoryview) -> None:
        """The record's next bytes, in their order."""

    @abstractmethod
    def finish(self) -> None:
        """StoreError unless these were the bytes that were stored."""


class RecordSource(Protocol):
    """What a transfer asks of where it reads. Called from several threads at once."""

    def num_bytes(self, key: ExpertKey) -> int:
        """Length of the expert's record."""

    def read(self, key: ExpertKey, start: int, into: Any) -> None:
        """As of an ExpertSource. into: a part of the slot's memory."""

    def begin_check(self, key: ExpertKey) -> RecordCheck:
        """To be told the record's bytes as they arrive."""


class ExpertSource(ABC):
    """Records of experts, one contiguous run of bytes each. Called from several threads at once."""

    @abstractmethod
    def num_bytes(self, key: ExpertKey) -> int:
        """Length of the expert's record."""

    @abstractmethod
    def read(self, key: ExpertKey, start: int, into: memoryview) -> None:
        """Fills `into` with the record's bytes from `start` on.

        OSError: worth another attempt. StoreError: the record is not there as it was stored.
        """

    @abstractmethod
    def begin_check(self, key: ExpertKey) -> RecordCheck:
        """To be told the record's bytes as they arrive."""

    def check(self, key: ExpertKey, record: memoryview) -> None:
        """StoreError unless these are the bytes that were stored."""
        check = self.begin_check(key)
        check.update(record)
        check.finish()

    @abstractmethod
    def close(self) -> None:
        """Lets go of files; nothing is read afterwards."""
