"""Where a slower tier keeps the records of experts, as a transfer reads them."""

from __future__ import annotations

from abc import ABC, abstractmethod

from moeserve.core import ErrorCode, ExpertKey, MoeserveError


class StoreError(MoeserveError):
    """The record of an expert cannot be read, or is not what was stored."""

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message, code=ErrorCode.UNAVAILABLE, hint=hint)


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
    def check(self, key: ExpertKey, record: memoryview) -> None:
        """StoreError unless these are the bytes that were stored."""

    @abstractmethod
    def close(self) -> None:
        """Lets go of files; nothing is read afterwards."""
