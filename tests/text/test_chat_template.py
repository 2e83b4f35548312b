"""Chat templates: equal to transformers, and bounded whatever the template does."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import text_models

from moeserve.core import ModelError, RequestError
from moeserve.text.chat_template import ChatTemplate, TemplateLimits

# In the style of common models: ChatML; [INST] with role checks; headers, tools and dates;
# namespaces, loop control, generation blocks and macros.
CHATML = """
{%- for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""
INST = """{{ bos_token }}{% if messages[0]['role'] == 'system' %}
{% set system = messages[0]['content'] | trim %}{% set loop_messages = messages[1:] %}
{% else %}{% set system = '' %}{% set loop_messages = messages %}{% endif %}
{% for message in loop_messages %}
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
{% endif %}
{% if message['role'] == 'user' %}
[INST] {% if loop.first and system %}{{ system }}

{% endif %}{{ message['content'] | trim }} [/INST]
{%- elif message['role'] == 'assistant' %}
 {{ message['content'] | trim }}{{ eos_token }}
{%- endif %}
{% endfor %}
"""
TOOLS = """{{- bos_token }}
{%- set date = strftime_now("%d %b %Y") %}
{%- if tools is not none %}
{{- "<|tools|>" }}{% for tool in tools %}{{ tool | tojson(indent=4) }}{{ "\\n" }}{% endfor %}
{%- endif %}
{{- "Today is " + date + "\\n" }}
{%- for message in messages %}
{%- if message.tool_calls is defined %}
{%- for call in message.tool_calls %}
{{- call.function.name ~ "(" ~ call.function.arguments | tojson ~ ")" }}
{%- endfor %}
{%- elif message.content is string %}
{{- message.role | upper ~ ": " ~ message.content }}
{%- endif %}
{%- endfor %}"""
FANCY = """{% macro block(role, text) -%}<{{ role }}>{{ text.strip().split('\\n') | join(' / ') }}
{%- endmacro %}
{% set ns = namespace(last=-1, count=0) %}
{% for message in messages %}
{% if message.role == 'system' %}{% continue %}{% endif %}
{% set ns.count = ns.count + 1 %}
{% if message.role == 'assistant' %}{% generation %}{{ block('a', message.content) }}
{% endgeneration %}{% else %}{{ block('u', message.content) }}
{% endif %}
{% if loop.index > 20 %}{% break %}{% endif %}
{% endfor %}
{{ ns.count }} {{ {'ä': [1, 2.5, none, true]} | tojson }} {{ dict(a=1).items() | list }}
"""
CHATS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "Hi"}],
    [
        {"role": "system", "content": " Be brief. "},
        {"role": "user", "content": "Tell me\nabout <b>foxes</b> & 'quotes' 🦊  "},
        {"role": "assistant", "content": "  They are red.\n\nVery."},
        {"role": "user", "content": "你好 {{ 7 * 7 }} {% raw %}"},
    ],
]
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Say <what> & where",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}


STYLES = {"chatml": CHATML, "inst": INST, "tools": TOOLS, "fancy": FANCY}


@pytest.mark.parametrize("source", STYLES.values(), ids=STYLES.keys())
def test_rendering_equals_transformers(tmp_path: Path, source: str) -> None:
    from transformers import AutoTokenizer

    text_models.byte_level(tmp_path)
    (tmp_path / "chat_template.jinja").write_text(source)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    ours = ChatTemplate.load(tmp_path, theirs.special_tokens_map)
    assert ours is not None
    variants: list[dict[str, Any]] = [
        {},
        {"add_generation_prompt": False},
        {"variables": {"enable_thinking": False}},
        {"variables": {"tools": [TOOL]}},
    ]
    for chat in CHATS:
        for options in variants:
            given = {"add_generation_prompt": True, **options}
            variables = given.pop("variables", {})
            expected = theirs.apply_chat_template(chat, tokenize=False, **given, **variables)
            assert ours.render(chat, **options) == expected
    call = {"function": {"name": "weather", "arguments": {"city": "Köln"}}}
    chat = [CHATS[0][0], {"role": "assistant", "content": None, "tool_calls": [call]}]
    if source == TOOLS:
        expected = theirs.apply_chat_template(chat, tokenize=False)
        assert ours.render(chat, add_generation_prompt=False) == expected
    open_chat = [*CHATS[0], {"role": "assistant", "content": "Well, I"}]
    if source in (CHATML, INST):
        expected = theirs.apply_chat_template(
            open_chat, tokenize=False, continue_final_message=True
        )
        assert ours.render(open_chat, continue_final_message=True) == expected
    ours.close()


ATTACKS = {
    "a long loop": "{% for i in range(10**9) %}x{% endfor %}",
    "nested loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}"
    "{% endfor %}",
    "a huge string": "{{ 'a' * 10**10 }}",
    "a huge number": "{{ 10 ** (10 ** 10) }}",
    "doubling": "{% set n = namespace(a='x') %}{% for i in range(60) %}{% set n.a = n.a ~ n.a %}"
    "{% endfor %}{{ n.a }}",
    "padding by a filter": "{{ 'a' | center(10 ** 10) }}",
    "padding by a format": "{{ '%10000000000d' % 1 }}",
    "padding by str.format": "{{ '{:10000000000}'.format('a') }}",
    "long output": "{% for i in range(90000) %}{{ 'a' * 1000 }}{% endfor %}",
    "recursion": "{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}",
    "a deep expression": "{{ " + "(" * 50_000 + "1" + ")" * 50_000 + " }}",
    "lists in lists": "{% set n = namespace(a=[1]) %}{% for i in range(9999) %}"
    "{% set n.a = [n.a, n.a] %}{% endfor %}{{ n.a | tojson }}",
    "a quadratic join": "{{ (range(99999) | list * 99) | join(',') | replace(',', 'x' * 99999) }}",
}


@pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS.keys())
def test_attacks_are_refused_and_leave_no_trace(attack: str) -> None:
    limits = TemplateLimits(max_seconds=1.0, max_memory_bytes=256 << 20)
    template = ChatTemplate(
        {"default": attack, "tool_use": "fine {{ messages|length }}"}, {}, limits
    )
    chat = [{"role": "user", "content": "hi"}]
    for _ in range(2):
        with pytest.raises(RequestError, match="went over its limit") as caught:
            template.render(chat)
        assert caught.value.field == "messages"
    # The next request is served, whether the process had to be ended or not.
    assert template.render(chat, variables={"tools": [TOOL]}) == "fine 1"
    template.close()


@pytest.mark.parametrize(
    ("source", "undefined"),
    [
        ("{{ ''.__class__.__base__.__subclasses__() }}", False),
        ("{{ cycler.__init__.__globals__.os.popen('id').read() }}", False),
        ("{{ messages.append(1) }}", False),
        ("{{ messages[0].update({'role': 'x'}) }}", False),
        ("{% set ns = namespace(__class__=1) %}", False),
        ("{% set ns = namespace() %}{% set ns._x = 1 %}", False),
        # jinja makes these undefined, which prints as nothing
        ("{{ messages.__class__ }}", True),
        ("{{ '{0.__class__}'.format(messages) }}", True),
    ],
)
def test_the_sandbox_holds(source: str, undefined: bool) -> None:
    template = ChatTemplate({"default": source}, {})
    chat = [{"role": "user", "content": "hi"}]
    if undefined:
        assert template.render(chat) == ""
    else:
        with pytest.raises(RequestError, match=r"refuses them: .*(unsafe|safely|may not)"):
            template.render(chat)
    template.close()


def test_renderer_killed_from_outside_is_replaced() -> None:
    template = ChatTemplate({"default": "{{ messages | length }}"}, {})
    chat = [{"role": "user", "content": "hi"}]
    assert template.render(chat) == "1"
    renderer = template._renderer
    assert renderer is not None
    os.kill(renderer.pid, signal.SIGKILL)
    with pytest.raises(RequestError):
        template.render(chat)
    assert template.render(chat) == "1"
    template.close()
    template.close()


def test_errors_say_whose_fault_it_is(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "hi"}]
    cases = {
        "{% if %}": "template of this model is broken: line 1",
        "{{ raise_exception('only one user message') }}": "refuses them: only one user message",
        "{{ messages[0].nothing.at_all }}": "has no attribute 'nothing'",
        "{{ messages[0].content + 1 }}": "failed on them: TypeError",
        "{{ 1 // 0 }}": "failed on them: ZeroDivisionError",
    }
    for source, message in cases.items():
        template = ChatTemplate({"default": source}, {})
        with pytest.raises(RequestError, match=message):
            template.render(chat)
        template.close()
    with pytest.raises(ModelError, match="at most 10"):
        ChatTemplate({"default": "x" * 11}, {}, TemplateLimits(max_template_chars=10))


BROKEN = {
    "{% if %}": "line 1: Expected an expression",
    "ok\n{% for m in messages %}{{ m.content }": "line 2: unexpected '}'",
    "{{ messages | no_such_filter }}": "line 1: No filter named 'no_such_filter'",
    "{% generation %}never ended": "line 1: .*endgeneration",
    ATTACKS["a deep expression"]: "recursion",
    ATTACKS["a huge number"]: "more CPU time, memory or stack than it may",
}


@pytest.mark.parametrize("source", BROKEN, ids=range(len(BROKEN)))
def test_a_broken_template_is_found_when_the_model_loads(tmp_path: Path, source: str) -> None:
    file = tmp_path / "chat_template.jinja"
    file.write_text(source)
    message = rf"^{file}: chat template 'default' does not compile: .*{BROKEN[source]}"
    with pytest.raises(ModelError, match=message):
        ChatTemplate.load(tmp_path, {}, TemplateLimits(max_seconds=1.0))


def test_a_broken_template_is_named_with_its_file(tmp_path: Path) -> None:
    config = tmp_path / "tokenizer_config.json"
    named = [{"name": "default", "template": "x"}, {"name": "rag", "template": "{% if %}"}]
    config.write_text(json.dumps({"chat_template": named}))
    with pytest.raises(ModelError, match=rf"^{config}: chat template 'rag' does not compile"):
        ChatTemplate.load(tmp_path, {})
    (tmp_path / "chat_template.jinja").write_text("{{ messages | length }}")
    template = ChatTemplate.load(tmp_path, {})  # it replaces those of the config
    assert template is not None
    template.close()
    file = tmp_path / "additional_chat_templates" / "tool_use.jinja"
    file.parent.mkdir()
    file.write_text("{% if %}")
    with pytest.raises(ModelError, match=rf"^{file}: chat template 'tool_use' does not compile"):
        ChatTemplate.load(tmp_path, {})


def test_only_plain_data_goes_in() -> None:
    template = ChatTemplate({"default": "{{ messages | length }} {{ self }} {{ a }}"}, {})
    chat = [{"role": "user", "content": "hi"}]
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    for value in (b"bytes", object(), deep):
        with pytest.raises(RequestError, match="not plain JSON data"):
            template.render(chat, variables={"a": value})
    # Names of ours cannot be taken over.
    mine = {"messages": [], "add_generation_prompt": 5, "a": "x", "environment": 1}
    assert template.render(chat, variables=mine).startswith("1 ")
    template.close()


def test_roles() -> None:
    template = ChatTemplate({"default": "{% if messages[0].role == 'ipython' %}ok{% endif %}"}, {})
    assert template.render([{"role": "ipython", "content": "x"}]) == "ok"
    with pytest.raises(RequestError, match=r"messages\[0\]\.role: 'robot' is not known") as caught:
        template.render([{"role": "robot", "content": "x"}])
    assert caught.value.field == "messages[0].role"
    template.close()


def test_continuing_a_message_that_the_template_leaves_out() -> None:
    template = ChatTemplate({"default": "{{ messages[0].content }}"}, {})
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    with pytest.raises(RequestError, match="leaves out the last message"):
        template.render(chat, continue_final_message=True)
    template.close()


def test_where_templates_are_found(tmp_path: Path) -> None:
    text_models.byte_level(tmp_path)
    assert ChatTemplate.load(tmp_path, {}) is None
    chat = [{"role": "user", "content": "hi"}]

    def rendered(**options: Any) -> str:
        template = ChatTemplate.load(tmp_path, {})
        assert template is not None
        text = template.render(chat, **options)
        template.close()
        return text

    config = tmp_path / "tokenizer_config.json"
    config.write_text(json.dumps({"chat_template": "from config"}))
    assert rendered() == "from config"
    named = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "tools"}]
    config.write_text(json.dumps({"chat_template": named}))
    assert (rendered(), rendered(variables={"tools": [TOOL]})) == ("plain", "tools")
    (tmp_path / "chat_template.jinja").write_text("from file")
    assert rendered(variables={"tools": [TOOL]}) == "from file"
    for broken in (5, [{"name": "default"}], [{"name": "other", "template": "x"}]):
        (tmp_path / "chat_template.jinja").unlink(missing_ok=True)
        config.write_text(json.dumps({"chat_template": broken}))
        with pytest.raises(ModelError, match=r"chat_template|chat templates"):
            ChatTemplate.load(tmp_path, {})


def test_the_renderer_sees_no_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOESERVE_API_KEY", "secret")
    template = ChatTemplate({"default": "x"}, {})
    template.render([{"role": "user", "content": "hi"}])
    assert template._renderer is not None
    environment = Path(f"/proc/{template._renderer.pid}/environ").read_bytes()
    assert b"secret" not in environment
    template.close()
