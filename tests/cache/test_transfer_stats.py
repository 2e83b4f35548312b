"""What transfers count by layer adds up to what they count in all."""

from __future__ import annotations

import json
import random
from dataclasses import fields
from pathlib import Path

import pytest
from support.expert_files import write_records
from support.randomness import fresh_seed

from moeserve.cache.expert_cache import Load
from moeserve.cache.record_copy import Urgency, equal_chunk
from moeserve.cache.tiers.disk_store import DiskStore
from moeserve.cache.tiers.host_slots import HostSlots
from moeserve.cache.transfer import Transfers
from moeserve.cache.transfer_stats import LayerTransfers
from moeserve.timeline import Timeline

EXPERTS = 6


def test_layers_add_up_to_the_whole(tmp_path: Path) -> None:
    rng = random.Random(fresh_seed())
    written = write_records(tmp_path, rng, num_layers=3, num_experts=EXPERTS)
    store, timeline = DiskStore(written.records), Timeline()
    slots = HostSlots(written.record_bytes, 3 * EXPERTS)
    transfers = Transfers(store, slots.__getitem__, rng.randint(1, 4), 8192, timeline)
    keys = rng.sample(sorted(written.records), 3 * EXPERTS)
    urgency = {key: rng.choice(list(Urgency)) for key in keys}
    timeline.start()
    try:
        for slot, key in enumerate(keys):
            transfers.start([Load(key, slot)], urgency[key])
        num_arrived = 0
        while num_arrived < len(keys):
            num_arrived += len(transfers.wait(rng.choice((0, 1, 2))))
        stats = transfers.snapshot()
    finally:
        transfers.close()
        store.close()
    for layer in range(3):
        of_layer = stats.layers[layer]
        for kind, found in (
            (Urgency.DEMAND, of_layer.demand_bytes),
            (Urgency.PREFETCH, of_layer.prefetch_bytes),
        ):
            count = sum(urgency[key] is kind for key in keys if key.layer == layer)
            assert found == count * written.record_bytes
        assert of_layer.busy_s > 0
    for field in fields(LayerTransfers):
        total = sum(getattr(of_layer, field.name) for of_layer in stats.layers.values())
        assert total == pytest.approx(getattr(stats, field.name)), field.name
    recorded = json.loads(timeline.stop().to_json())["traceEvents"]
    read = [event["args"] for event in recorded if event["name"] == "read"]
    chunks = -(-written.record_bytes // equal_chunk(written.record_bytes, 8192))
    assert len(read) == chunks * len(keys)
    for about in read:
        assert urgency[about["layer"], about["expert"]].name.lower() == about["urgency"]


def test_a_snapshot_does_not_change(tmp_path: Path) -> None:
    rng = random.Random(fresh_seed())
    written = write_records(tmp_path, rng, num_layers=1, num_experts=2)
    store = DiskStore(written.records)
    slots = HostSlots(written.record_bytes, 2)
    transfers = Transfers(store, slots.__getitem__, 1, 1 << 20)
    try:
        before = transfers.snapshot()
        transfers.start([Load(key, n) for n, key in enumerate(written.records)], Urgency.DEMAND)
        while transfers.num_active:
            transfers.wait(0)
        assert before.demand_bytes == 0
        assert not before.layers
        assert transfers.snapshot().layers[0].demand_bytes == 2 * written.record_bytes
    finally:
        transfers.close()
        store.close()
