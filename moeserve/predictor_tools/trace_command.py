"""`moeserve trace`: records a model's routing, of a text that is given or of answers to prompts,
and what runs when while it answers."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from moeserve.cli_options import add_flags, check_output, read_flags, write_output
from moeserve.config import (
    BUNDLED_MODEL,
    EngineConfig,
    ExpertConfig,
    KvConfig,
    ModelConfig,
    SchedulerConfig,
)
from moeserve.core import ConfigError, EngineRequest, RequestError, SamplingParams
from moeserve.engine.engine import Engine
from moeserve.models.packed_model import config_sha256
from moeserve.models.registry import LoadedModel
from moeserve.predictor_tools.model_runs import (
    WindowRunner,
    engine_threads,
    loaded_model,
    observed,
)
from moeserve.predictor_tools.trace import RoutingRecorder
from moeserve.predictor_tools.train_command import RUN_SETTINGS, check_numbers
from moeserve.progress import LoadingBar
from moeserve.text.tokenizer import Tokenizer
from moeserve.text_windows import read_texts, token_windows
from moeserve.timeline import Recording

DEFAULT_TOKENS = 16_384


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model",
        nargs="?",
        default=str(BUNDLED_MODEL),
        metavar="MODEL",
        help="directory or hub id (default: the bundled model)",
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--text",
        type=Path,
        nargs="+",
        metavar="PATH",
        help="text files, or directories of .txt, .md and .py files, run in windows",
    )
    source.add_argument(
        "--prompts", type=Path, metavar="FILE", help="a prompt per line, answered by the model"
    )
    source.add_argument("--prompt", metavar="TEXT", help="one prompt, answered by the model")
    parser.add_argument("-o", "--out", type=Path, help="npz file to write: the routing")
    parser.add_argument(
        "--timeline",
        type=Path,
        metavar="FILE",
        help="JSON file to write: what runs when, for https://ui.perfetto.dev; with --prompt(s). "
        "Routing is recorded in steps that are not fused: ask for one of the two",
    )
    parser.add_argument(
        "--tokens", type=int, default=DEFAULT_TOKENS, help="with --text: most tokens (%(default)s)"
    )
    parser.add_argument(
        "--window", type=int, default=512, help="with --text: tokens of a sequence (%(default)s)"
    )
    parser.add_argument(
        "--max-tokens", type=int, default=256, help="with --prompt(s): per answer (%(default)s)"
    )
    parser.add_argument(
        "--temperature", type=float, default=0.0, help="with --prompt(s) (%(default)s: greedy)"
    )
    parser.add_argument("--seed", type=int, default=0, help="with --prompt(s) (%(default)s)")
    add_flags(parser, ModelConfig, only=RUN_SETTINGS)
    add_flags(parser, ExpertConfig)


def run(args: argparse.Namespace) -> int:
    """Writes the file, says what is in it. Raises ConfigError, ModelError, RequestError."""
    check_numbers(args, tokens=1, window=1)
    _check_files(args)
    config, experts = read_flags(ModelConfig, args), read_flags(ExpertConfig, args)
    with LoadingBar() as bar, loaded_model(config, experts, bar) as loaded:
        sizes = {n: ffn.experts.num_experts for n, ffn in loaded.spec.moe_layers.items()}
        if args.timeline is not None:
            recorded = _timeline(loaded, config, experts, args, bar)
            write_output("timeline", args.timeline, recorded.to_json())
            print(f"{args.timeline}: {len(recorded.spans)} spans", file=sys.stderr)
            return 0
        if not sizes:
            raise ConfigError("trace: the model has no MoE layer", field="model")
        recorder = RoutingRecorder(sizes)
        with observed(loaded, recorder):
            if args.text is not None:
                texts = read_texts(args.text)
                _run_text(loaded, texts, recorder, args.window, args.tokens, bar)
            else:
                engine = _engine(loaded, config, experts)
                _answer(engine, _prompts(args), recorder.end_sequence, args, bar)
        recorder.save(args.out, config_sha256(loaded.path))
    arrays = recorder.arrays()
    shape = " x ".join(map(str, arrays["ids"].shape))
    print(f"{args.out}: {shape} ids, {len(arrays['lens'])} sequences", file=sys.stderr)
    return 0


def _check_files(args: argparse.Namespace) -> None:
    if (args.out is None) == (args.timeline is None):
        raise ConfigError("trace: give -o FILE.npz or --timeline FILE.json, one of them")
    if args.timeline is not None and args.text is not None:
        raise ConfigError("timeline: it is of answers; give --prompt TEXT", field="timeline")
    for name in ("out", "timeline"):
        path = getattr(args, name)
        if path is not None:
            check_output(name, path)


def _run_text(
    loaded: LoadedModel,
    texts: Sequence[str],
    recorder: RoutingRecorder,
    window_tokens: int,
    max_tokens: int,
    progress: Callable[[str, float], None],
) -> None:
    end = loaded.eos_token_ids[0] if loaded.eos_token_ids else None
    length = min(window_tokens, loaded.context_tokens)
    windows = token_windows(Tokenizer.load(loaded.path), texts, end, length, max_tokens)
    runner = WindowRunner(loaded, length)
    for start in range(0, len(windows), runner.windows_per_step):
        together = windows[start : start + runner.windows_per_step]
        runner.run(together)
        for window in together:
            recorder.end_sequence(window.tolist())
        progress("running the text", (start + len(together)) / len(windows))


def _prompts(args: argparse.Namespace) -> list[str]:
    if args.prompt is not None:
        return [args.prompt]
    prompts = [line for line in read_texts([args.prompts])[0].splitlines() if line.strip()]
    if not prompts:
        raise ConfigError(f"prompts: {args.prompts} has no line with text", field="prompts")
    return prompts


def _timeline(
    loaded: LoadedModel,
    config: ModelConfig,
    experts: ExpertConfig,
    args: argparse.Namespace,
    progress: Callable[[str, float], None],
) -> Recording:
    engine = _engine(loaded, config, experts)
    prompts = _prompts(args)
    with engine_threads(loaded):
        engine.timeline.start()
        _answer(engine, prompts, lambda _: None, args, progress)
        return engine.timeline.stop()


def _engine(loaded: LoadedModel, config: ModelConfig, experts: ExpertConfig) -> Engine:
    """One request at a time, so that rows come in the order of tokens."""
    engine_config = EngineConfig(
        model=config,
        kv=KvConfig(prefix_reuse=False),  # reused tokens would not run through the layers
        scheduler=SchedulerConfig(max_running=1),
        experts=experts,
    )
    return Engine(engine_config, loaded)


def _answer(
    engine: Engine,
    prompts: Sequence[str],
    end_sequence: Callable[[Sequence[int]], None],
    args: argparse.Namespace,
    progress: Callable[[str, float], None],
) -> None:
    """end_sequence: told the tokens of each prompt and answer that went through the model."""
    tokenizer = Tokenizer.load(engine.loaded.path)
    params = SamplingParams(
        max_tokens=args.max_tokens, temperature=args.temperature, seed=args.seed
    )
    for number, prompt in enumerate(prompts):
        tokens = tokenizer.encode(prompt)
        request = EngineRequest(request_id=str(number), token_ids=tokens, params=params)
        engine.add(request)
        generated: list[int] = []
        while engine.has_work:
            for delta in engine.step():
                generated += delta.token_ids
                if delta.error is not None:
                    raise RequestError(f"prompts: line {number + 1}: {delta.error}")
        # The last token was chosen and has not been through the layers.
        end_sequence([*tokens, *generated[:-1]])
        progress("answering", (number + 1) / len(prompts))
