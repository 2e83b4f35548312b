"""Policies by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from moeserve.cache.numbering import ExpertNumbers
from moeserve.cache.policies.base import Policy
from moeserve.cache.policies.least_stale import LeastStalePolicy
from moeserve.cache.policies.lfu import LfuPolicy
from moeserve.cache.policies.lru import LruPolicy
from moeserve.cache.policies.mrs import MrsPolicy
from moeserve.cache.policies.resident import ResidentPolicy
from moeserve.cache.policies.score import ScorePolicy
from moeserve.core import ConfigError

POLICIES: Mapping[str, Callable[[ExpertNumbers], Policy]] = {
    "resident": lambda numbers: ResidentPolicy(),
    "lru": LruPolicy,
    "lfu": LfuPolicy,
    "mrs": MrsPolicy,
    "least_stale": LeastStalePolicy,
    "score": ScorePolicy,
}


def build_policy(name: str, num_experts: Mapping[int, int]) -> Policy:
    """The policy of that name for experts per MoE layer. ConfigError for an unknown name."""
    if name not in POLICIES:
        raise ConfigError(
            f"policy: {name!r} is unknown; there are {', '.join(POLICIES)}", field="policy"
        )
    return POLICIES[name](ExpertNumbers(num_experts))
