"""Files of experts' records with random content, for tests of the tiers."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

from moeserve.cache.tiers.disk_store import DiskRecord, checksum
from moeserve.core import ExpertKey


@dataclass(frozen=True)
class Written:
    path: Path
    record_bytes: int
    records: dict[ExpertKey, DiskRecord]
    contents: dict[ExpertKey, bytes]


def write_records(
    directory: Path,
    rng: random.Random,
    num_layers: int,
    num_experts: int,
    record_bytes: int | None = None,
) -> Written:
    """One file with all records, behind a page of something else."""
    record_bytes = record_bytes or 4096 * rng.randint(8, 40)
    path = directory / "experts.bin"
    records: dict[ExpertKey, DiskRecord] = {}
    contents: dict[ExpertKey, bytes] = {}
    with path.open("wb") as file:
        file.write(rng.randbytes(4096))
        for layer in range(num_layers):
            for expert in range(num_experts):
                key, content = ExpertKey(layer, expert), rng.randbytes(record_bytes)
                start = file.tell()
                file.write(content)
                digest = checksum(memoryview(content))
                records[key] = DiskRecord(path, start, record_bytes, digest)
                contents[key] = content
    return Written(path, record_bytes, records, contents)
