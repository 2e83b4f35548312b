"""How a dense model is cut, and whether it can be cut that way."""

from __future__ import annotations

import math
from dataclasses import dataclass

from moeserve.core import ConfigError

METHODS = ("activation", "weight", "contiguous", "random")
ROUTERS = ("least_squares", "mean_gate", "representative")
#: every layer's own random numbers still have a seed of 64 bits
MAX_SEED = 2**32 - 1


@dataclass(frozen=True, kw_only=True)
class ConvertSettings:
    """What `moeserve convert` may be told.

    experts: equal parts that every FFN is cut into. active: parts that work on a token, those that
    always do included. shared_share: of the parts, always on; None: by each layer's activations.
    refit: fit the second product to what is left. pregate: train a predictor of the experts.
    tune_minutes: of distillation from the dense model, by the clock; tune_steps: the same by a
    number of steps, which gives the same bits again.
    max_tokens: of the calibration text. window_tokens: run together.
    """

    method: str = "activation"
    router: str = "least_squares"
    experts: int = 16
    active: int = 12
    shared_share: float | None = 0.25
    refit: bool = True
    pregate: bool = False
    tune_minutes: float | None = None
    tune_steps: int | None = None
    max_tokens: int = 32_768
    window_tokens: int = 512
    seed: int = 0

    def __post_init__(self) -> None:
        """Raises ConfigError that names the field, its value and the limit."""
        _check("method", self.method, self.method in METHODS, f"one of {', '.join(METHODS)}")
        _check("router", self.router, self.router in ROUTERS, f"one of {', '.join(ROUTERS)}")
        # glm4_moe has a shared expert, and its choice looks at two routed ones
        _check("experts", self.experts, self.experts >= 3, "3 or more")
        limit = f"2 to experts ({self.experts})"
        _check("active", self.active, 2 <= self.active <= self.experts, limit)
        share = self.shared_share
        if share is not None:
            _check("shared_share", share, 0 < share < 1, "above 0, below 1, or auto")
            parts = self.num_shared
            good = parts < self.active and parts <= self.experts - 2
            limit = f"fewer parts than active ({self.active}) and than experts - 1"
            _check("shared_share", f"{share} ({parts} of {self.experts} parts)", good, limit)
        self._check_tuning()
        _check("tokens", self.max_tokens, self.max_tokens >= 1, "1 or more")
        _check("window", self.window_tokens, self.window_tokens >= 2, "2 or more")
        _check("seed", self.seed, 0 <= self.seed <= MAX_SEED, f"0 to {MAX_SEED}")

    def _check_tuning(self) -> None:
        minutes, steps = self.tune_minutes, self.tune_steps
        if minutes is not None:
            _check("tune_minutes", minutes, 0 < minutes < math.inf, "above 0, finite")
            _check("tune_steps", steps, steps is None, "only without tune_minutes")
        if steps is not None:
            _check("tune_steps", steps, steps >= 1, "1 or more")
        if self.tunes:
            limit = f"fewer than experts ({self.experts}): otherwise there is nothing to tune"
            _check("active", self.active, self.active < self.experts, limit)

    @property
    def tunes(self) -> bool:
        return self.tune_minutes is not None or self.tune_steps is not None

    @property
    def num_shared(self) -> int:
        """Parts of the shared expert, the same in every layer."""
        if self.shared_share is None:
            return 1
        return max(1, round(self.shared_share * self.experts))


@dataclass(frozen=True)
class MoeShape:
    """The sizes of every converted layer.

    part_size: neurons of a part. num_shared: parts in the shared expert. num_routed: experts.
    """

    part_size: int
    num_shared: int
    num_routed: int
    top_k: int

    @staticmethod
    def of(settings: ConvertSettings, intermediate_size: int) -> MoeShape:
        """Raises ConfigError where the FFN cannot be cut into that many equal parts."""
        parts = settings.experts
        if intermediate_size % parts:
            near = [n for n in range(3, intermediate_size + 1) if intermediate_size % n == 0]
            near.sort(key=lambda n: abs(n - parts))
            raise ConfigError(
                f"experts: {parts} does not divide the FFN's {intermediate_size} neurons",
                field="experts",
                hint=f"choose a divisor, such as {', '.join(map(str, sorted(near[:4])))}",
            )
        shared = settings.num_shared
        return MoeShape(
            intermediate_size // parts, shared, parts - shared, settings.active - shared
        )

    @property
    def all_active(self) -> bool:
        """Whether nothing is left to choose."""
        return self.top_k == self.num_routed


def _check(field: str, value: object, good: bool, limit: str) -> None:
    if not good:
        raise ConfigError(f"{field}: {value}; allowed: {limit}", field=field)
