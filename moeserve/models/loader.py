"""Fill the tensors of a model from a checkpoint, in their final dtype, on their final device.

Memory: all targets are allocated first; then parts are read in the order in which they lie on
disk, in pieces of at most PIECE_BYTES, and the mapped pages behind a piece are given back when it
has been copied. The peak is the model plus a few pieces plus the largest part that is converted,
in any case less than the model plus 1 GiB.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from moeserve.core import ModelError
from moeserve.models.checkpoint import Checkpoint, describe, list_names
from moeserve.models.targets import Target, Targets, TensorTargets, Weight
from moeserve.models.weight_map import Part, WeightRule

PIECE_BYTES = 64 * 1024 * 1024
COPIED_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
STAGE = "loading weights"
NUM_REPORTS = 1000  # a model has up to 100,000 parts; nobody wants to hear of each

Progress = Callable[[str, float], None]


def load_weights(
    checkpoint: Checkpoint,
    rules: Sequence[WeightRule],
    *,
    ignore: Sequence[str] = (),
    tied: Mapping[str, str] | None = None,
    dtype: torch.dtype,
    device: torch.device,
    targets: Targets | None = None,
    check_weights: bool = False,
    progress: Progress | None = None,
) -> dict[str, Weight]:
    """The targets of all rules, filled, by target name.

    dtype, device: of converted parts, and of targets where `targets`, the maker of others than
        plain tensors, is not given.

    ignore: regular expressions of whole names that may be in the checkpoint and are not used.
    tied: names that may be absent because the model uses another tensor in their place
        (`{"lm_head.weight": "model.embed_tokens.weight"}`); where present, both must be equal.
    check_weights: refuse NaN and Inf, counted per tensor after conversion to the target's dtype.
    progress: called with the stage and the fraction of checkpoint bytes read, 0 to 1.

    Raises ModelError that names every missing, extra, misshapen or wrongly typed tensor, copies of
    tied tensors that differ, weights that are not finite, files that changed meanwhile, and a
    device without enough memory.
    """
    tied = tied or {}
    check_names(checkpoint, rules, ignore, tied, dtype)
    for copy, original in tied.items():
        _check_tied(checkpoint, copy, original)
    maker = targets or TensorTargets(dtype, device)
    made = maker.make(rules)
    work = [(part, rule, made[rule.target]) for rule in rules for part in rule.parts]
    work.sort(key=lambda item: checkpoint.position(item[0].names[0]))
    total = sum(_num_bytes(checkpoint, part) for part, _, _ in work)
    done, reported, report = 0, 0, progress or (lambda stage, fraction: None)
    not_finite: dict[str, Counter[str]] = {}
    report(STAGE, 0.0)
    for part, rule, target in work:
        for num_bytes, stored in _fill(checkpoint, part, rule, target, device):
            if check_weights and stored is not None:
                _count_not_finite(stored, " + ".join(part.names), not_finite)
            del stored  # a view of the mapping or a converted copy: none outlives its turn
            for name in part.names:
                checkpoint.release(name)
            done += num_bytes
            if reported + total // NUM_REPORTS <= done < total:
                report(STAGE, done / total)
                reported = done
    checkpoint.check_unchanged()
    if not_finite:
        raise _not_finite_error(checkpoint, not_finite)
    report(STAGE, 1.0)
    return maker.finish(made)


def _fill(
    checkpoint: Checkpoint, part: Part, rule: WeightRule, target: Target, device: torch.device
) -> Iterator[tuple[int, Tensor | None]]:
    """Puts a part where it belongs, piece by piece: (bytes read, numbers for a check).

    Codes come without numbers: a target that takes them looks at them itself.
    """
    try:
        if part.codes is not None and target.takes_codes:
            sources = [checkpoint.read(name)[part.select] for name in part.names]
            target.put_codes(part.index, *part.codes.take(sources))
            yield sum(source.nbytes for source in sources), None
            return
        for rows, piece, num_bytes in pieces(checkpoint, part, rule, device):
            yield num_bytes, target.put(part.index, rows, piece)
    except ModelError as error:
        raise ModelError(f"{' + '.join(part.names)}: {error}") from error


def check_names(
    checkpoint: Checkpoint,
    rules: Sequence[WeightRule],
    ignore: Sequence[str],
    tied: Mapping[str, str],
    dtype: torch.dtype,
) -> None:
    """Compares what the rules want with what the checkpoint has; reads no weights.

    Raises one ModelError with everything that does not fit.
    """
    wanted: set[str] = set()
    shapes: set[str] = set()
    dtypes: set[str] = set()
    for rule in rules:
        _assert_covered(rule)
        for part in rule.parts:
            wanted.update(part.names)
            for name, expected in zip(part.names, part.shapes, strict=True):
                if name not in checkpoint:
                    continue
                found = checkpoint.shape(name)
                if found != expected:
                    shapes.add(f"{name} expected {list(expected)}, found {list(found)}")
                kept = checkpoint.dtype(name)
                if part.convert is None and not _copies(kept, rule.dtype or dtype):
                    dtypes.add(f"{name} expected {rule.dtype or 'a float type'}, found {kept}")
    allowed = re.compile("|".join(f"(?:{pattern})" for pattern in ignore) or r"(?!)")
    problems = {
        "missing tensors": [name for name in wanted if name not in checkpoint],
        "extra tensors": [
            name
            for name in checkpoint.names()
            if name not in wanted and name not in tied and not allowed.fullmatch(name)
        ],
        "misshapen tensors": shapes,
        "tensors of a type that cannot be used": dtypes,
    }
    if any(problems.values()):
        raise ModelError(
            f"{checkpoint.path}: the weights do not fit config.json: {describe(problems)}",
            hint="config.json and the weights must come from the same model",
        )


def _copies(found: torch.dtype, wanted: torch.dtype) -> bool:
    """Whether a plain copy keeps the meaning; quantised types need their scales: a convert."""
    return found == wanted or (found in COPIED_DTYPES and wanted in COPIED_DTYPES)


def _assert_covered(rule: WeightRule) -> None:
    """A missing part, the family's own mistake, would serve uninitialised memory."""
    target = torch.empty(rule.shape, device="meta")
    filled = sum(target[part.index].numel() for part in rule.parts)
    assert filled == target.numel(), f"{rule.target}: parts fill {filled} of {target.numel()}"


def _num_bytes(checkpoint: Checkpoint, part: Part) -> int:
    """Bytes that a part reads, all its tensors together."""
    return sum(
        torch.empty(shape, dtype=checkpoint.dtype(name), device="meta")[part.select].nbytes
        for name, shape in zip(part.names, part.shapes, strict=True)
    )


def pieces(
    checkpoint: Checkpoint, part: Part, rule: WeightRule, device: torch.device
) -> Iterator[tuple[slice, Tensor, int]]:
    """(rows of the part's region, what to fill them with, bytes read), for a part.

    Whoever takes a piece must let go of it before the next one, and release the part's tensors.
    """
    region = torch.empty(rule.shape, device="meta")[part.index]
    sources = [checkpoint.read(name)[part.select] for name in part.names]
    if part.convert is not None:
        num_bytes = sum(source.nbytes for source in sources)
        # Moved before it is converted: the packed form is the smaller one to send to a device.
        piece = part.convert([source.to(device) for source in sources])
        assert piece.shape == region.shape, (
            f"{part.names}: converted to {list(piece.shape)}, wanted {list(region.shape)}"
        )
        yield slice(None), piece, num_bytes
        return
    (source,) = sources
    assert source.shape == region.shape, (
        f"{part.names}: {list(source.shape)} does not fit {list(region.shape)}"
    )
    if source.dim() == 0:
        source = source.reshape(1)
    rows = max(1, PIECE_BYTES * max(1, len(source)) // max(1, source.nbytes))
    for start in range(0, len(source), rows):
        piece = source[start : start + rows].to(device)
        yield slice(start, start + rows), piece, piece.nbytes


def check_finite(
    checkpoint: Checkpoint, rules: Sequence[WeightRule], progress: Progress | None = None
) -> None:
    """Reads all weights once, piece by piece; keeps none. Raises ModelError that names every tensor
    with NaN or Inf in it."""
    report = progress or (lambda stage, fraction: None)
    parts = [(part, rule) for rule in rules for part in rule.parts]
    parts.sort(key=lambda item: checkpoint.position(item[0].names[0]))
    not_finite: dict[str, Counter[str]] = {}
    for number, (part, rule) in enumerate(parts):
        report("checking weights", number / len(parts))
        for _, piece, _ in pieces(checkpoint, part, rule, torch.device("cpu")):
            _count_not_finite(piece, " + ".join(part.names), not_finite)
            del piece  # a view of the mapping: none outlives its turn
            for name in part.names:
                checkpoint.release(name)
    checkpoint.check_unchanged()
    if not_finite:
        raise _not_finite_error(checkpoint, not_finite)


def _count_not_finite(tensor: Tensor, name: str, counts: dict[str, Counter[str]]) -> None:
    if not tensor.is_floating_point():
        return
    if tensor.dtype.itemsize == 1:
        tensor = tensor.float()  # torch has no isfinite for its 8-bit types
    # Least and largest are NaN where one number is; a mask of all takes many times as long.
    if tensor.numel() and not torch.isfinite(torch.stack(torch.aminmax(tensor))).all():
        found = counts.setdefault(name, Counter())
        found["NaN"] += int(torch.isnan(tensor).sum())
        found["Inf"] += int(torch.isinf(tensor).sum())


def _not_finite_error(checkpoint: Checkpoint, counts: dict[str, Counter[str]]) -> ModelError:
    tensors = [f"{name}: {found['NaN']} NaN, {found['Inf']} Inf" for name, found in counts.items()]
    return ModelError(
        f"{checkpoint.path}: weights that are not finite: {list_names(tensors)}",
        hint="the checkpoint is damaged, or its values overflow the chosen dtype",
    )


def _check_tied(checkpoint: Checkpoint, copy: str, original: str) -> None:
    """A checkpoint may store a tied tensor twice; then both must be the same."""
    if copy not in checkpoint or original not in checkpoint:
        return
    equal = checkpoint.shape(copy) == checkpoint.shape(original) and checkpoint.dtype(
        copy
    ) == checkpoint.dtype(original)
    if equal:
        left = checkpoint.read(copy).reshape(-1).view(torch.uint8)
        right = checkpoint.read(original).reshape(-1).view(torch.uint8)
        for start in range(0, len(left), PIECE_BYTES):
            stop = start + PIECE_BYTES
            equal = equal and torch.equal(left[start:stop], right[start:stop])
            checkpoint.release(copy)
            checkpoint.release(original)
    if not equal:
        raise ModelError(
            f"{checkpoint.path}: {copy} and {original} differ, though config.json ties them",
            hint="set tie_word_embeddings to false in config.json",
        )
