"""Compiled parts of the CPU backend: see csrc/.

Arrays are on the CPU: torch tensors or numpy arrays. Every call checks their types and shapes and
raises ValueError, naming the argument, where one does not fit. TypeError: not an array, or one
that must be written to and is read-only.
"""

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from torch import Tensor

_Array: TypeAlias = Tensor | npt.NDArray[Any]

def usable_isa_extensions() -> list[str]:
    """Instruction-set extensions that this process may execute, in /proc/cpuinfo spelling."""

class IsaLevel:
    """A set of kernels. `usable`: it may run in this process."""

    @property
    def name(self) -> str: ...
    @property
    def missing(self) -> list[str]: ...
    @property
    def built(self) -> bool: ...
    @property
    def usable(self) -> bool: ...

def isa_levels() -> list[IsaLevel]:
    """All levels, from the plainest to the fastest."""

def pin_this_thread(cpu: int) -> None:
    """Pins the calling thread to a core."""

def allocate(num_bytes: int) -> npt.NDArray[np.uint8]:
    """Zeroed bytes, in huge pages where the system allows: [num_bytes] uint8."""

def is_huge(pages: _Array) -> bool | None:
    """Maps what is not mapped yet, as reading it would, and says whether all of it lies in huge
    pages. pages: [num_bytes] uint8, whole pages. None: this system does not tell (Linux 6.7 does).
    """

def move_pages(source: _Array, target: _Array) -> None:
    """Puts the pages of one mapping in the place of another's, in one step for all threads: who
    reads the target sees its old pages or the new ones. The source, anonymous memory, is empty
    then. Huge pages stay huge where both begin on one.

    Both [num_bytes] uint8, whole pages. Raises ValueError for others, OSError where the system
    refuses.
    """

def drop_pages(pages: _Array) -> None:
    """Gives pages of anonymous memory back; they are zeros then. pages: [num_bytes] uint8, whole.

    Raises OSError where the system refuses.
    """

class Ticket:
    """The handle of submitted work."""

    def done(self) -> bool: ...
    def wait(self) -> None: ...

class CoreWaker:
    """Keeps cores from halting: `with waker:` around a wait.

    Threads of the idle policy, one on each core. most_us: of a wait, through which they spin.
    Raises ValueError for a core, RuntimeError where the system refuses them.
    """

    def __init__(self, cpus: list[int], most_us: int) -> None: ...
    def __enter__(self) -> CoreWaker: ...
    def __exit__(self, *args: object) -> None: ...

class RowPool:
    """Memory of tensors that live for moments, taken again by the next ones."""

    def __init__(self) -> None: ...
    @property
    def num_free(self) -> int:
        """Blocks that nobody uses."""
    def take(self, num_bytes: int) -> npt.NDArray[np.uint8]:
        """Bytes with whatever stands there, [num_bytes], aligned to pages; the pool's again when
        the last tensor on them is gone. ValueError for none."""

class Runtime:
    """Compute threads and the kernels that they run.

    isa: the name of a level. cpus: a core for every thread, or none.
    """

    def __init__(
        self, isa: str, num_threads: int, cpus: list[int] = ..., spin_us: int = 100
    ) -> None: ...
    @property
    def isa(self) -> str: ...
    @property
    def num_threads(self) -> int: ...
    def take_part_times(self) -> dict[str, float]:
        """Seconds by part of a decoder layer, since they were last taken."""
    def measure_read_bandwidth(self, num_bytes: int, repeats: int = 3) -> float:
        """Bytes per second that the threads read together, of so many that are allocated for it."""
    def measure_reading(self, memory: _Array) -> float:
        """Bytes per second that the threads read together, of [N] bytes, once."""
    def measure_dot_peak(self, type: str, repeats: int = 3, rounds: int = 400_000) -> float:
        """Operations per second (a multiply-add is two) on f32, bf16 or int8 in registers: the best
        of `repeats` times `rounds` times 24 vectors for each thread."""

class Layout:
    """Shape and format of a packed matrix [rows, cols]; see packed.h, also for `format`."""

    def __init__(
        self,
        format: int,
        rows: int,
        cols: int,
        group_cols: int = 0,
        asymmetric: bool = False,
        weight_only: bool = False,
    ) -> None: ...
    @property
    def format(self) -> int: ...
    @property
    def rows(self) -> int: ...
    @property
    def cols(self) -> int: ...
    @property
    def group_cols(self) -> int: ...
    @property
    def asymmetric(self) -> bool: ...
    @property
    def weight_only(self) -> bool: ...
    @property
    def num_panels(self) -> int: ...
    @property
    def num_groups(self) -> int: ...
    @property
    def panel_bytes(self) -> int: ...
    @property
    def padded_cols(self) -> int: ...
    @property
    def scale_offset(self) -> int:
        """In a panel, as the next two; see packed.h for what stands there."""
    @property
    def factor_offset(self) -> int: ...
    @property
    def zero_offset(self) -> int: ...
    @property
    def num_bytes(self) -> int: ...

def pack(runtime: Runtime, layout: Layout, data: _Array, row_ids: _Array, source: _Array) -> bool:
    """Packs rows of numbers [R, K] as rows `row_ids` [R] of `data`.

    False: one that has to be quantised is NaN or Inf.
    """

def pack_codes(
    runtime: Runtime,
    layout: Layout,
    data: _Array,
    row_ids: _Array,
    codes: _Array,
    scales: _Array,
) -> bool:
    """Packs rows that are quantised already.

    mxfp4: codes [R, K / 2] with scales [R, K / 32] uint8; fp8: e4m3 as uint8 [R, K] with scales
    [R, ceil(K / 128)] float32. False: a code or scale is NaN.
    """

def unpack(layout: Layout, data: _Array, out: _Array) -> None:
    """Fills out [N, K] float32 with the numbers that `data` stands for."""

class PackedMatrix:
    """A packed weight [N, K] with an optional bias [N] float32; keeps both alive."""

    def __init__(self, layout: Layout, data: _Array, bias: _Array | None = None) -> None: ...
    def run(self, runtime: Runtime, x: _Array, out: _Array) -> None:
        """out [T, N] = x [T, K] times the transposed matrix, plus bias."""

class PackedExperts:
    """The experts of one layer; see moe.h. activation: a number of `Activation` in kernels.h."""

    def __init__(
        self,
        gate_up: Layout,
        down: Layout,
        bias: bool,
        activation: int,
        alpha: float,
        limit: float,
        num_experts: int,
    ) -> None: ...
    @property
    def record_bytes(self) -> int: ...
    @property
    def down_offset(self) -> int: ...
    @property
    def gate_up_bias_offset(self) -> int: ...
    @property
    def down_bias_offset(self) -> int: ...
    def set_record(self, expert: int, record: _Array) -> None: ...
    def clear_record(self, expert: int) -> None:
        """Lets go of the expert's memory; jobs that want it are refused until `set_record`."""
    def run(
        self,
        runtime: Runtime,
        x: _Array,
        ids: _Array,
        weights: _Array,
        wanted: _Array | None,
        out: _Array,
    ) -> None:
        """out [T, H]: for x [T, H] the sum of ids [T, K] int64 with weights [T, K] float32.

        wanted: [num_experts] uint8, 0 for experts to leave out.
        """
    def submit(
        self,
        runtime: Runtime,
        x: _Array,
        ids: _Array,
        weights: _Array,
        wanted: _Array | None,
        out: _Array,
    ) -> Ticket:
        """As run, but returns at once. All arrays and self must live until it is done."""

class ExpertParts:
    """One job after another, in parts; see expert_parts.h."""

    def __init__(self) -> None: ...
    def begin(self, x: _Array, ids: _Array) -> None:
        """A job: x [T, H], ids [T, K], which must live and stay as they are until `total`."""

    def add(self, runtime: Runtime, packed: PackedExperts, experts: Sequence[int]) -> None:
        """Computes these experts, which no part had before."""

    def put(self, pairs: _Array, results: _Array) -> None:
        """What was computed elsewhere: results [P, H] of pairs [P], numbered t * K + k."""

    def total(self, runtime: Runtime, weights: _Array, out: _Array) -> None:
        """out [T, H] = the weighted sums; what no part gave adds nothing."""

    def rows(self) -> npt.NDArray[np.float32]:
        """[T * K, H], of which parts have written their rows; until the next `begin`."""

def rms_norm(runtime: Runtime, x: _Array, weight: _Array, eps: float, out: _Array) -> None:
    """out = x / sqrt(mean(x^2) + eps) * weight, row by row."""

class Router:
    """The gate of one MoE layer; see router.h. score: a number of `RouterScore` there."""

    def __init__(
        self,
        gate: PackedMatrix,
        top_k: int,
        score: int,
        float32_logits: bool,
        normalize: bool,
        normalize_eps: float,
        scale: float,
        num_groups: int,
        top_groups: int,
        group_top2: bool,
        correction: _Array | None,
        round_weights: bool,
    ) -> None: ...
    def run(self, runtime: Runtime, x: _Array, ids: _Array, weights: _Array) -> None:
        """Fills ids [T, K] int64 and weights [T, K] float32 for x [T, H]."""

class AttentionLayer:
    """Norm and grouped attention of one decoder layer; see decoder.h.

    head_norm: [kv_heads or 1, G + 1, D] float32, flattened. sinks: [kv_heads, G], flattened.
    """

    def __init__(
        self,
        norm_weight: _Array,
        norm_eps: float,
        qkv: PackedMatrix,
        output: PackedMatrix,
        num_kv_heads: int,
        group_heads: int,
        head_dim: int,
        head_norm: _Array | None,
        norm_together: bool,
        head_norm_eps: float,
        clip: float,
        scale: float,
        window: int,
        sinks: _Array | None,
    ) -> None: ...
    def run(
        self,
        runtime: Runtime,
        spans: AttentionSpans,
        x: _Array,
        cosine: _Array,
        sine: _Array,
        entries: _Array,
        write_slots: _Array,
    ) -> None:
        """x [T, H] += attention of its norm; writes kv. Arguments as of attend, prepare_grouped."""

class FfnLayer:
    """Norm and FFN of one decoder layer, all experts in memory; see decoder.h.

    parts: one or two of experts, with the router that chooses among them, or None: every row takes
    the first expert with weight 1. So a dense FFN is one part, a shared expert a second one.
    """

    def __init__(
        self,
        norm_weight: _Array,
        norm_eps: float,
        parts: list[tuple[Router | None, PackedExperts]],
    ) -> None: ...
    def count_into(self, rows: _Array) -> None:
        """Every run leaves in rows [E] int32 how many rows of x chose each expert of the first
        part."""

    def run(self, runtime: Runtime, x: _Array) -> None:
        """x [T, H] += the sum of all parts of its norm."""

class Head:
    """Final norm and head of a model; see decoder.h."""

    def __init__(self, norm_weight: _Array, norm_eps: float, matrix: PackedMatrix) -> None: ...
    def run(self, runtime: Runtime, x: _Array, logits: _Array) -> None:
        """logits [R, V] float32 of x [R, H]."""

def turn_positions(
    positions: Tensor, frequencies: Tensor, amplitude: float, cosine: Tensor, sine: Tensor
) -> None:
    """Fills cosine and signed sine [T, 1, 1, dim] float32 of positions [T] int64.

    frequencies: radians per position of the pairs, [1 or T, dim / 2] float32; see turns.h.
    """

class KvLayers:
    """The kv entries of all layers, [slots, kv_heads, width] each; keeps the arrays alive."""

    def __init__(self, entries: list[Tensor]) -> None: ...

class LayerStack:
    """Whole decoder layers, one after the other.

    layers: the halves of each, or None for one that must not run here. seconds: [layers] float64;
    every run leaves there how long the FFN of its layers took.
    """

    def __init__(
        self, layers: list[tuple[AttentionLayer, FfnLayer] | None], seconds: _Array
    ) -> None: ...
    def run(
        self,
        runtime: Runtime,
        first: int,
        stop: int,
        x: _Array,
        spans: AttentionSpans,
        cosine: _Array,
        sine: _Array,
        kv: KvLayers,
        write_slots: _Array,
    ) -> None:
        """Layers first to stop - 1 on x [T, H], in place; arguments as of AttentionLayer.run."""

class AttentionSpans:
    """The rows of a step, sequence by sequence; keeps the arrays of slots alive.

    spans: (first row, number of rows, context tokens with these rows, kv slots of the context
    [context] int64), in order and without gaps.
    """

    def __init__(self, spans: list[tuple[int, int, int, Tensor]]) -> None: ...
    @property
    def num_rows(self) -> int: ...

def attend(
    runtime: Runtime,
    spans: AttentionSpans,
    queries: _Array,
    entries: _Array,
    value_start: int,
    scale: float,
    window: int,
    sinks: _Array | None,
    out: _Array,
) -> None:
    """Causal softmax attention of queries [T, kv_heads, G, D] to out [T, kv_heads, G, V].

    entries: [slots, kv_heads, width], a key in the first D numbers, a value in V from value_start
    on. window: keys that a query sees, itself included; 0 for all. sinks: [kv_heads, G] float32.
    """

def prepare_grouped(
    runtime: Runtime,
    qkv: _Array,
    cosine: _Array,
    sine: _Array,
    norm_weight: _Array | None,
    norm_together: bool,
    norm_eps: float,
    clip: float,
    entries: _Array,
    write_slots: _Array,
) -> None:
    """qkv [T, kv_heads, G + 2, D]: norms queries and keys, clips all, turns queries and keys.

    norm_weight: [kv_heads or 1, G + 1, D] float32. norm_together: one mean over all queries, one
    over all keys. cosine, signed sine: [T, dim] float32, dimensions of one between. Queries stay
    in place; keys and values go to entries [slots, kv_heads, 2 D] at write_slots [T] int64.
    """

def prepare_latent(
    runtime: Runtime,
    latents: _Array,
    rotated: _Array,
    cosine: _Array,
    sine: _Array,
    norm_weight: _Array,
    norm_eps: float,
    entries: _Array,
    write_slots: _Array,
) -> None:
    """latents [T, rank + dim] to entries [slots, 1, rank + dim]: norms rank numbers, turns dim.

    rotated [T, heads, dim] is turned in place. norm_weight: [rank] float32.
    """

def likely_absent(
    chances: npt.NDArray[np.float32], absent: npt.NDArray[np.bool_], sizes: Sequence[int]
) -> list[tuple[int, float, int, list[int], list[float]]]:
    """Of the experts of layers, one after the other, those that are absent and likelier than one
    taken at random, likeliest first: (place of the layer, sum of its chances, absent ones among as
    many likeliest as that sum says, experts, chances) of every layer that has any."""

class LookaheadPredictor:
    """The gates of the next layers on this layer's input; see predictor.h."""

    def __init__(
        self,
        num_layers: int,
        num_experts: int,
        hidden: int,
        top_k: int,
        bins_per_unit: float,
        half_life_tokens: float,
        neighbour: float,
        least_chance: float,
        every_steps: int,
        hits: list[float],
        counts: list[float],
    ) -> None: ...
    def set_view(self, place: int, gates: PackedMatrix, out: _Array) -> None:
        """gates [D * E, H] of the D layers after `place`; out [D, E] is where results go."""

    def predict(self, runtime: Runtime, place: int, x: _Array, ids: _Array) -> bool:
        """Fills the view's out for x [T, H]; learns from ids [T, K]. False where nothing is
        said."""

class MarkovModel:
    """Experts follow experts; see markov_model.h."""

    def __init__(
        self,
        sizes: list[int],
        depth: int,
        num_context: int,
        steps: list[float],
        bias_step: float,
        most_logit: float,
    ) -> None: ...
    def set_out(self, place: int, out: _Array) -> None:
        """out: of all experts of the layers ahead of `place`, where results go."""

    def turn(self, rows: _Array, before: _Array, num_rows: int, top_k: int) -> None:
        """A step begins: rows[i] of it goes on from before[i] of the last."""

    def forget(self) -> None:
        """Nothing is to be learnt from what was said so far."""

    def see(self, place: int, ids: _Array) -> bool:
        """ids [T, K] were chosen. True where that is something to learn, once."""

    def learn(self, runtime: Runtime) -> None:
        """The oldest thing there is to learn."""

    def say(self, runtime: Runtime, place: int) -> None:
        """Fills the place's out: the chance that any row wants the expert."""

class ResidualPredictor:
    """Trained views; see predictor.h."""

    def __init__(self, num_layers: int, num_experts: int, hidden: int) -> None: ...
    def set_looking(
        self,
        place: int,
        products: PackedMatrix,
        expert_in: PackedMatrix,
        rank: int,
        next_rank: int,
        bias: _Array,
        chosen: _Array,
        context_out: _Array,
        expert_out: _Array,
        out: _Array,
    ) -> None:
        """The view from a layer; out [D, E] is where results go."""

    def set_last(self, place: int, products: PackedMatrix) -> None:
        """A layer that looks at nothing: products [R, H] for the layer before."""

    def begin_step(self, previous_rows: _Array) -> None:
        """For every row of the step to come the row of the last one that it follows, or -1."""

    def predict(
        self, runtime: Runtime, place: int, x: _Array, ids: _Array, weights: _Array
    ) -> bool:
        """Fills the view's out for x [T, H], of which the router chose ids, weights [T, K]. False
        where nothing is said."""
