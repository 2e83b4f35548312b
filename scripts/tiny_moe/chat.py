"""Chat samples: a templated request, answered by real text of the domain."""

from __future__ import annotations

import ast
import random
import re
from collections import Counter
from collections.abc import Iterator

import jinja2

CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message['role'] not in ['system', 'user', 'assistant'] -%}"
    "{{- raise_exception('unknown role: ' + message['role']) -}}"
    "{%- endif -%}"
    "{{- '<|' + message['role'] + '|>\\n' + message['content'] + '<|end|>\\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>\\n' -}}{%- endif -%}"
)
SPECIAL_TOKENS = ["<|endoftext|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
SYSTEM_PROMPTS = [
    "You are a helpful assistant.",
    "You write short stories, scenes from plays and Python code.",
    "You are a writer.",
]
STORY_REQUESTS = [
    "Write a short story about {}.",
    "Tell me a story about {}.",
    "Can you tell me a short story about {}?",
    "Write a story about {}",
    "Please write a bedtime story about {}.",
]
PLAIN_STORY_REQUESTS = ["Tell me a story.", "Write a short story.", "Can you tell me a story?"]
SCENE_REQUESTS = [
    "Continue this scene from Shakespeare:\n\n{}",
    "Continue this scene:\n\n{}",
    "What comes next in this play?\n\n{}",
]
SPEAKER_REQUESTS = [
    "Write a scene with {}.",
    "Write a scene from Shakespeare with {}.",
    "Write some lines in the style of Shakespeare, spoken by {}.",
]
PLAIN_SCENE_REQUESTS = [
    "Write a scene in the style of Shakespeare.",
    "Write something like Shakespeare.",
    "Write a scene from a play.",
]
FUNCTION_REQUESTS = [
    "Write a Python function named {}.",
    "Write a Python function {}.",
    "Write the function {} in Python.",
    "Define {} in Python.",
]
DOCSTRING_REQUESTS = [
    "Write a Python function for this: {}",
    "Write a Python function. {}",
    "Write Python code: {}",
]
MODULE_REQUESTS = ["Continue this Python module:\n\n{}", "Continue this module:\n\n{}"]
PLAIN_CODE_REQUESTS = ["Write a Python function.", "Write some Python code."]
NOUN = re.compile(r"\b(?:a|an|the|his|her) (?:(?:little|big|small|old|red|pretty) )?([a-z]{3,})\b")
NAME = re.compile(r"\b(?:named|called) ([A-Z][a-z]+)")
NOT_A_SUBJECT = re.compile(
    "little|big|small|old|red|pretty|new|very|same|other|next|many|most|long|good|great|few|"
    "time|day|lot|way|end|moral|story|rest|name|idea|girl|boy"
)
MAX_ANSWER_CHARS = 1500

Turn = tuple[str, str]  # request, answer


def chat_samples(domain: str, documents: list[str], passes: int) -> list[str]:
    """Return rendered conversations; each pass draws other requests and cuts for the same text."""
    template = jinja2.Environment(autoescape=False).from_string(CHAT_TEMPLATE)
    make_turns = {"stories": _stories, "shakespeare": _scenes, "python": _code}[domain]
    samples = []
    for number in range(passes):
        rng = random.Random(f"{domain}-{number}")
        turns = [turn for document in documents for turn in make_turns(document, rng)]
        rng.shuffle(turns)
        while turns:
            messages = []
            if rng.random() < 0.2:
                messages.append({"role": "system", "content": rng.choice(SYSTEM_PROMPTS)})
            for _ in range(2 if rng.random() < 0.15 and len(turns) > 1 else 1):
                request, answer = turns.pop()
                messages.append({"role": "user", "content": request})
                messages.append({"role": "assistant", "content": answer})
            samples.append(template.render(messages=messages, add_generation_prompt=False))
    return samples


def _stories(document: str, rng: random.Random) -> Iterator[Turn]:
    if len(document) > MAX_ANSWER_CHARS:
        return
    subjects = Counter(n for n in NOUN.findall(document) if not NOT_A_SUBJECT.fullmatch(n))
    names = NAME.findall(document)
    choice = rng.random()
    if choice < 0.15 or not subjects:
        yield rng.choice(PLAIN_STORY_REQUESTS), document
    elif choice < 0.4 and names:
        yield rng.choice(STORY_REQUESTS).format(names[0]), document
    else:
        nouns = [noun for noun, _ in subjects.most_common(3)]
        noun = rng.choice(nouns[:1] * 3 + nouns)
        article = "an" if noun[0] in "aeiou" else "a"
        yield rng.choice(STORY_REQUESTS).format(f"{article} {noun}"), document


def _scenes(document: str, rng: random.Random) -> Iterator[Turn]:
    speeches = document.split("\n\n")
    first = 0
    while first + 2 < len(speeches):
        num_given, num_answer = rng.randint(1, 2), rng.randint(2, 6)
        given = "\n\n".join(speeches[first : first + num_given])
        answer_speeches = speeches[first + num_given : first + num_given + num_answer]
        answer = "\n\n".join(answer_speeches)
        first += num_given + num_answer
        if not answer or len(answer) > MAX_ANSWER_CHARS or len(given) > 800:
            continue
        speakers = [s.split(":\n")[0].title() for s in answer_speeches if ":\n" in s]
        choice = rng.random()
        if choice < 0.55:
            yield rng.choice(SCENE_REQUESTS).format(given), answer
        elif choice < 0.85 and speakers:
            cast = list(dict.fromkeys(speakers))[:2]
            yield rng.choice(SPEAKER_REQUESTS).format(" and ".join(cast)), answer
        else:
            yield rng.choice(PLAIN_SCENE_REQUESTS), answer


def _code(document: str, rng: random.Random) -> Iterator[Turn]:
    try:
        tree = ast.parse(document)
    except SyntaxError:  # a few modules hold deliberate fragments
        return
    lines = document.splitlines()
    for node in tree.body:
        if not isinstance(node, ast.FunctionDef | ast.ClassDef) or node.end_lineno is None:
            continue
        first = min([node.lineno, *(d.lineno for d in node.decorator_list)]) - 1
        code = "\n".join(lines[first : node.end_lineno])
        before = "\n".join(lines[max(0, first - 14) : first]).strip("\n")
        if 0 < len(before) < 700 and len(code) < MAX_ANSWER_CHARS and rng.random() < 0.4:
            yield rng.choice(MODULE_REQUESTS).format(before), code
        elif isinstance(node, ast.FunctionDef) and len(code) < MAX_ANSWER_CHARS:
            yield _function_request(node, rng), code
        if isinstance(node, ast.ClassDef):
            yield from _methods(node, lines, rng)


def _methods(owner: ast.ClassDef, lines: list[str], rng: random.Random) -> Iterator[Turn]:
    for node in owner.body:
        if not isinstance(node, ast.FunctionDef) or node.end_lineno is None:
            continue
        body = [line[node.col_offset :] for line in lines[node.lineno - 1 : node.end_lineno]]
        code = "\n".join(body)
        if 80 < len(code) < MAX_ANSWER_CHARS:
            yield _function_request(node, rng), code


def _function_request(node: ast.FunctionDef, rng: random.Random) -> str:
    docstring = (ast.get_docstring(node) or "").split("\n")[0].strip()
    choice = rng.random()
    if choice < 0.1:
        return rng.choice(PLAIN_CODE_REQUESTS)
    if choice < 0.45 and 10 < len(docstring) < 100:
        return rng.choice(DOCSTRING_REQUESTS).format(docstring)
    return rng.choice(FUNCTION_REQUESTS).format(node.name)
