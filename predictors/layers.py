"""The MoE layers of a model as a predictor counts them: in a ring, for tokens follow tokens."""

from __future__ import annotations

from collections.abc import Mapping

from moeserve.core import ConfigError


class LayerRing:
    """Places of the MoE layers in the order in which a token meets them.

    After the last layer comes the first one, of the next token.
    """

    def __init__(self, num_experts: Mapping[int, int], depth: int) -> None:
        """num_experts: experts per MoE layer, by the layer's index in the model. depth: how many
        layers ahead to look. Raises ConfigError for a depth below 1."""
        if depth < 1:
            raise ConfigError(
                f"predictor depth: {depth}; allowed: 1 or more layers", field="prefetch_depth"
            )
        self.num_experts = dict(sorted(num_experts.items()))
        self.layers = tuple(self.num_experts)
        self.place_of = {layer: place for place, layer in enumerate(self.layers)}
        self.depth = min(depth, len(self.layers))

    def ahead(self, layer: int) -> tuple[int, ...]:
        """The next `depth` layers of the same token; fewer near the end."""
        place = self.place_of[layer]
        return self.layers[place + 1 : place + 1 + self.depth]

    def ahead_around(self, layer: int) -> tuple[int, ...]:
        """The next `depth` layers, into the next token; `layer` itself can be the last of them."""
        place = self.place_of[layer]
        count = len(self.layers)
        return tuple(self.layers[(place + j) % count] for j in range(1, self.depth + 1))
