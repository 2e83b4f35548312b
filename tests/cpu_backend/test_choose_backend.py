"""The choice of a backend: what is asked for, what is refused, what it says about itself."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from moeserve.config import ExpertConfig
from moeserve.core import ConfigError, ExpertSpec
from moeserve.cpu_backend import _native, isa_speed
from moeserve.cpu_backend.backend import Demands
from moeserve.cpu_backend.choice import BackendChoice, choose_backend
from moeserve.cpu_backend.ipex_backend import why_not_usable
from moeserve.cpu_backend.isa_speed import PAIRS_LEVEL
from moeserve.cpu_backend.machine import allowed_cores, node_first, numa_nodes
from moeserve.cpu_backend.native_runtime import NativeRuntime
from moeserve.cpu_backend.threads import affinity_cores

#: levels from the plainest to the fastest: those that run here, and what each other one lacks
USABLE = [level.name for level in _native.isa_levels() if level.usable]
LACKING = {
    level.name: ", ".join(level.missing) if level.built else "a build that has it"
    for level in _native.isa_levels()
    if not level.usable
}
BF16 = Demands(torch.bfloat16)
SILU = ExpertSpec(num_experts=4, hidden_size=32, intermediate_size=32)


def choose(name: str, demands: Demands = BF16, **settings: object) -> BackendChoice:
    config = ExpertConfig(cpu_backend=name, **{"num_threads": 1, **settings})  # type: ignore[arg-type]
    return choose_backend(config, demands)


def native_runtime(choice: BackendChoice) -> NativeRuntime:
    assert choice.backend.name == "native"
    assert choice.native is not None
    return choice.native


def test_torch_when_asked_for(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    choice = choose("torch")
    assert (choice.backend.name, choice.native) == ("torch", None)
    assert choice.reason == "torch (asked for)"
    assert choice.reason in caplog.text
    choice.backend.close()


def test_native_when_asked_for(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    choice = choose("native")
    runtime = native_runtime(choice)
    assert choice.reason == f"native (asked for); {runtime.reason}"
    assert f"{runtime.isa} (" in choice.reason
    assert "1 threads" in choice.reason
    assert choice.reason in caplog.text
    choice.backend.close()


def test_another_name_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"cpu_backend: 'openvino' is not one of auto, native"):
        choose("openvino")


@pytest.mark.parametrize("isa", USABLE)
def test_any_usable_level_may_be_asked_for(isa: str) -> None:
    runtime = native_runtime(choose("native", isa=isa))
    assert runtime.isa == runtime.handle.isa == isa
    assert f"{isa} (asked for)" in runtime.reason


@pytest.mark.parametrize("gain", [0.5, 1.0])
def test_auto_takes_the_fastest_level_and_says_why_not_the_next_one(
    gain: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(isa_speed, "pair_gain", lambda name: gain)
    runtime = native_runtime(choose("native"))
    if USABLE[-1] == PAIRS_LEVEL and gain < 1:
        assert runtime.isa == USABLE[-2]
        assert f"{PAIRS_LEVEL} makes 50 % as many products of bf16 as of float32" in runtime.reason
        return
    assert runtime.isa == USABLE[-1]
    for name, lacks in list(LACKING.items())[:1]:
        assert "a build" in lacks or f"{name} needs {lacks}" in runtime.reason


@pytest.mark.parametrize("isa", LACKING)
@pytest.mark.parametrize("backend", ["native", "auto"])
def test_a_level_that_cannot_run_is_refused_with_what_is_lacking(backend: str, isa: str) -> None:
    with pytest.raises(ConfigError, match=f"isa: '{isa}' cannot run") as caught:
        choose(backend, isa=isa)
    assert LACKING[isa] in str(caught.value)
    assert caught.value.field == "isa"
    assert ", ".join(USABLE) in str(caught.value)


def test_an_unknown_level_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"isa: 'sse9' is not one of auto, scalar"):
        choose("native", isa="sse9")


@pytest.mark.parametrize("num_threads", [0, -1])
def test_no_threads_are_refused(num_threads: int) -> None:
    with pytest.raises(ConfigError, match=f"num_threads: {num_threads} is below the minimum 1"):
        choose("native", num_threads=num_threads)
    with pytest.raises(ConfigError, match=f"num_threads: {num_threads} is below the minimum 1"):
        NativeRuntime(num_threads)


def test_more_threads_than_cores_run_and_are_named() -> None:
    wanted = affinity_cores() + 3
    runtime = native_runtime(choose("native", num_threads=wanted))
    assert runtime.num_threads == runtime.handle.num_threads == wanted
    assert "more than the" in runtime.reason


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="no affinity on this platform")
def test_pinned_threads_take_the_first_cores() -> None:
    """Affinity belongs to the thread, so one that ends with the test is pinned."""
    first = node_first(allowed_cores(), numa_nodes())[0]
    before = os.sched_getaffinity(0)

    def pinned() -> tuple[set[int], str]:
        choice = choose("native", pin_threads=True)
        return os.sched_getaffinity(0), choice.reason

    with ThreadPoolExecutor(1) as pool:
        cores, reason = pool.submit(pinned).result()
    assert cores == {first}
    assert f"1 threads on cores {first} (" in reason
    assert os.sched_getaffinity(0) == before


def test_more_threads_than_cores_are_not_pinned_and_it_says_so() -> None:
    def unpinned() -> tuple[int, str]:
        choice = choose("native", num_threads=affinity_cores() + 1, pin_threads=True)
        return affinity_cores(), choice.reason

    with ThreadPoolExecutor(1) as pool:
        cores, reason = pool.submit(unpinned).result()
    assert cores == affinity_cores()
    assert "not pinned because only" in reason


@pytest.mark.parametrize(
    ("name", "demands", "lack"),
    [
        ("native", Demands(torch.float16), "no float16 ones"),
        ("torch", Demands(torch.bfloat16, quantized=True), "packed or quantised weights"),
        ("ipex", Demands(torch.bfloat16, quantized=True), "packed or quantised weights"),
    ],
)
def test_a_model_that_a_backend_cannot_run_is_refused(
    name: str, demands: Demands, lack: str
) -> None:
    with pytest.raises(ConfigError, match=f"cpu_backend: '{name}' cannot run this model") as caught:
        choose(name, demands)
    assert lack in str(caught.value)
    assert "--cpu-backend auto" in str(caught.value)
    assert caught.value.field == "cpu_backend"


@pytest.mark.parametrize(
    "spec",
    [
        ExpertSpec(num_experts=4, hidden_size=32, intermediate_size=32, activation="gelu"),
        ExpertSpec(num_experts=4, hidden_size=32, intermediate_size=32, bias=True),
    ],
    ids=["gelu", "bias"],
)
def test_ipex_refuses_experts_that_its_module_does_not_compute(spec: ExpertSpec) -> None:
    with pytest.raises(ConfigError, match="its experts are SiLU without biases, the model's"):
        choose("ipex", Demands(torch.bfloat16, (SILU, spec)))


@pytest.mark.skipif(why_not_usable() is None, reason="ipex is here")
def test_ipex_where_it_is_not_installed_names_the_fix() -> None:
    with pytest.raises(ConfigError, match=r"pip install 'moeserve\[ipex\]'") as caught:
        choose("ipex", Demands(torch.bfloat16, (SILU,)))
    assert "intel-extension-for-pytorch" in str(caught.value)


def test_native_takes_float16_activations_of_a_quantised_model() -> None:
    native_runtime(choose("native", Demands(torch.float16, quantized=True)))
