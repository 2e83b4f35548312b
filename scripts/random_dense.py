"""A dense Llama checkpoint of random weights, to measure what a conversion costs.

    python scripts/random_dense.py OUT [--layers 16] [--hidden 2048] [--inner 8192]

The defaults are the shape of a model of a billion parameters, in bfloat16, a shard per layer; the
tokenizer is the bundled model's. Time and memory depend on shapes; quality means nothing here.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig

from moeserve.config import BUNDLED_MODEL

WEIGHT_STD = 0.02


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("out", type=Path, help="directory to make")
    add("--layers", type=int, default=16)
    add("--hidden", type=int, default=2048)
    add("--inner", type=int, default=8192)
    add("--heads", type=int, default=32)
    add("--kv-heads", type=int, default=8)
    add("--vocab", type=int, default=32_000)
    add("--seed", type=int, default=0)
    return parser.parse_args()


def shards(args: argparse.Namespace) -> Iterator[dict[str, tuple[int, ...]]]:
    """Shapes by name, of one file after the other."""
    hidden, inner = args.hidden, args.inner
    kv = hidden // args.heads * args.kv_heads
    table = (args.vocab, hidden)
    yield {
        "model.embed_tokens.weight": table,
        "model.norm.weight": (hidden,),
        "lm_head.weight": table,
    }
    for layer in range(args.layers):
        shapes = {
            "input_layernorm": (hidden,),
            "post_attention_layernorm": (hidden,),
            "self_attn.q_proj": (hidden, hidden),
            "self_attn.k_proj": (kv, hidden),
            "self_attn.v_proj": (kv, hidden),
            "self_attn.o_proj": (hidden, hidden),
            "mlp.gate_proj": (inner, hidden),
            "mlp.up_proj": (inner, hidden),
            "mlp.down_proj": (hidden, inner),
        }
        yield {f"model.layers.{layer}.{name}.weight": shape for name, shape in shapes.items()}


def main() -> None:
    args = parse_args()
    args.out.mkdir(parents=True)
    config = LlamaConfig(
        vocab_size=args.vocab,
        hidden_size=args.hidden,
        intermediate_size=args.inner,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        num_key_value_heads=args.kv_heads,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
        dtype=torch.bfloat16,
    )
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(args.out)
    for file in Path(BUNDLED_MODEL).glob("tokenizer*"):
        shutil.copy(file, args.out)
    generator = torch.Generator().manual_seed(args.seed)
    location: dict[str, str] = {}
    num_parameters = 0
    for number, shapes in enumerate(shards(args), start=1):
        tensors = {
            name: torch.ones(shape, dtype=torch.bfloat16)
            if len(shape) == 1
            else torch.empty(shape, dtype=torch.bfloat16).normal_(
                0.0, WEIGHT_STD, generator=generator
            )
            for name, shape in shapes.items()
        }
        file_name = f"model-{number:05}-of-{args.layers + 1:05}.safetensors"
        save_file(tensors, args.out / file_name, metadata={"format": "pt"})
        location |= dict.fromkeys(tensors, file_name)
        num_parameters += sum(tensor.numel() for tensor in tensors.values())
    index = {"metadata": {}, "weight_map": location}
    (args.out / "model.safetensors.index.json").write_text(json.dumps(index))
    print(f"{args.out}: {num_parameters / 1e9:.3f} billion parameters")


if __name__ == "__main__":
    main()
