"""Write a trained model as a Hugging Face directory and check it against transformers."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor

from tiny_moe.chat import CHAT_TEMPLATE, SPECIAL_TOKENS
from tiny_moe.data import END_OF_TEXT, token_id
from tiny_moe.model import TinyModel

END_OF_TURN = "<|end|>"
WEIGHTS = "model.safetensors"
SIZE_LIMIT_BYTES = 11_500_000
LOGIT_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Sample:
    """A prompt and what the exported model wrote; `stopped` when it ended by itself."""

    title: str
    prompt: str
    text: str
    stopped: bool


def export_model(model: TinyModel, tokenizer: Tokenizer, out: Path) -> None:
    """Write weights (bfloat16), configuration, tokenizer and chat template."""
    out.mkdir(parents=True, exist_ok=True)
    weights = {name: t.to(torch.bfloat16).contiguous() for name, t in model.state_dict().items()}
    save_file(weights, out / WEIGHTS, metadata={"format": "pt"})
    (out / WEIGHTS).chmod(0o644)  # safetensors writes it for the owner only
    end_of_text = token_id(tokenizer, END_OF_TEXT)
    end_of_turn = token_id(tokenizer, END_OF_TURN)
    _write_json(out / "config.json", model.config.to_hf(eos_token_id=end_of_turn))
    _write_json(
        out / "generation_config.json",
        {
            "do_sample": True,
            "eos_token_id": [end_of_turn, end_of_text],
            "pad_token_id": end_of_text,
            "temperature": 0.7,
            "top_p": 0.9,
        },
    )
    _write_json(
        out / "tokenizer_config.json",
        {
            "additional_special_tokens": [t for t in SPECIAL_TOKENS if t != END_OF_TEXT],
            "clean_up_tokenization_spaces": False,
            "eos_token": END_OF_TURN,
            "model_max_length": model.config.max_position_embeddings,
            "pad_token": END_OF_TEXT,
            "tokenizer_class": "PreTrainedTokenizerFast",
        },
    )
    tokenizer.save(str(out / "tokenizer.json"), pretty=False)
    (out / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def load_exported(model: TinyModel, out: Path) -> TinyModel:
    """Return the model that a reader of the directory gets: bfloat16 weights, float32 sums."""
    exported = TinyModel(model.config)
    exported.load_state_dict({name: t.float() for name, t in load_file(out / WEIGHTS).items()})
    return exported.eval()


@torch.no_grad()
def verify(exported: TinyModel, out: Path, rows: Tensor) -> float:
    """Compare with transformers on held-out rows; return the largest logit difference."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    reference = AutoModelForCausalLM.from_pretrained(out)
    reference.train(False)
    if reference.dtype != torch.float32:
        raise RuntimeError(f"transformers loaded {reference.dtype}, wanted float32")
    difference = float((reference(rows).logits - exported(rows).logits).abs().max())
    if difference > LOGIT_TOLERANCE:
        raise RuntimeError(f"logits differ from transformers by {difference}")

    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Write a story about a dog.\n\ndef f(x):\n    return x"},
    ]
    tokenizer = AutoTokenizer.from_pretrained(out)
    rendered = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    template = jinja2.Environment(autoescape=False).from_string(CHAT_TEMPLATE)
    if rendered != template.render(messages=messages, add_generation_prompt=True):
        raise RuntimeError("transformers renders the chat template differently")
    if tokenizer(rendered).input_ids != _read_tokenizer(out).encode(rendered).ids:
        raise RuntimeError("transformers tokenises differently")
    if tokenizer.decode(tokenizer(rendered).input_ids) != rendered:
        raise RuntimeError("the tokenizer does not round-trip")
    return difference


def _read_tokenizer(out: Path) -> Tokenizer:
    return Tokenizer.from_file(str(out / "tokenizer.json"))


def check_size(out: Path) -> int:
    """Return the size of the directory in bytes; refuse one that is too large to bundle."""
    size_bytes = sum(p.stat().st_size for p in out.iterdir())
    if size_bytes > SIZE_LIMIT_BYTES:
        raise RuntimeError(f"{out} has {size_bytes} bytes, more than {SIZE_LIMIT_BYTES}")
    return size_bytes


PLAIN_PROMPTS = {
    "Shakespeare": "ROMEO:\n",
    "Story": "Once upon a time, there was a little dog",
    "Python": "def read_lines(path):\n",
}
CHAT_PROMPTS = {
    "Chat, story": "Write a short story about a dog.",
    "Chat, Shakespeare": "Continue this scene from Shakespeare:\n\nKING RICHARD III:\n"
    "My lord, what news from London?",
    "Chat, Python": "Write a Python function named get_name.",
}


@torch.no_grad()
def write_samples(out: Path, seed: int, max_new_tokens: int = 220) -> list[Sample]:
    """Let transformers write from fixed prompts with the exported generation defaults."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model: Any = AutoModelForCausalLM.from_pretrained(out)
    model.train(False)
    tokenizer = AutoTokenizer.from_pretrained(out)
    end_ids = set(model.generation_config.eos_token_id)
    prompts = [(title, prompt, prompt) for title, prompt in PLAIN_PROMPTS.items()]
    for title, request in CHAT_PROMPTS.items():
        message = [{"role": "user", "content": request}]
        text = tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
        prompts.append((title, request, str(text)))
    samples = []
    for title, shown, text in prompts:
        torch.manual_seed(seed)
        inputs = tokenizer(text, return_tensors="pt")
        ids = model.generate(
            input_ids=inputs.input_ids,
            attention_mask=inputs.attention_mask,
            max_new_tokens=max_new_tokens,
        )
        new_ids = ids[0, inputs.input_ids.shape[1] :].tolist()
        written = str(tokenizer.decode(new_ids, skip_special_tokens=True))
        samples.append(Sample(title, shown, written, stopped=new_ids[-1] in end_ids))
    return samples
