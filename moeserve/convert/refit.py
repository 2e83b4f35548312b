"""The second product, fitted anew to what is left when some experts do not work.

A dense layer gives D a: D [H, I] is `down`, a [I] a token's activations. With a choice of experts a
becomes m * a, m being 0 for the neurons that are left out, and D is no longer the best matrix: the
neurons that work can stand in for what goes with them. The best one in the mean square is
D + (D (a - m a) (m a)^T) (m a (m a)^T + ridge)^-1, a linear regression over the calibration text
that nothing has to be trained for. Layers are fitted by themselves, on the dense model's inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moeserve.convert.methods import LayerSample
from moeserve.convert.ridge import add_ridge

#: of the mean square of a working neuron's activation: pulls towards the dense model's columns
RIDGE = 1e-2
#: tokens whose working activations are held at once
REFIT_TOKENS = 1024
#: neurons up to which the normal equations are held in float64
EXACT_NEURONS = 4096


def refit_down(sample: LayerSample, weights: Tensor) -> Tensor:
    """weights: [T, I], with which each neuron works on the tokens of the sample. -> [H, I]."""
    down = sample.ffn.down
    num_neurons = down.shape[1]
    kind = torch.float64 if num_neurons <= EXACT_NEURONS else torch.float32
    gram = torch.zeros(num_neurons, num_neurons, dtype=kind)
    cross = torch.zeros(num_neurons, len(down), dtype=kind)
    for rows in torch.arange(len(weights)).split(REFIT_TOKENS):
        all_of_it = sample.activations[rows]
        working = all_of_it * weights[rows]
        missing = ((all_of_it - working) @ down.T).to(kind)  # [t, H]
        working = working.to(kind)
        gram.addmm_(working.T, working)
        cross.addmm_(working.T, missing)
    add_ridge(gram, RIDGE)
    # In place: for 8192 neurons every further copy of the matrix would be 256 MiB.
    torch.linalg.cholesky_ex(gram, check_errors=True, out=(gram, torch.empty(0, dtype=torch.int32)))
    torch.cholesky_solve(cross, gram, out=cross)
    return down + cross.T.float()
