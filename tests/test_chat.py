"""Chat templates: the text that jinja2 gives, hostile ones end quickly and small, and what a user types never becomes a control token."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Library

from bitnet.chat import ChatTemplate, encode_chat, find_template, missing_template, sandbox
from bitnet.errors import FormatError, UsageError
from bitnet.tokenizer import Tokenizer

GOLDEN = Path(__file__).parent / "golden"
TEMPLATES = {path.stem.removeprefix("chat_"): path.read_text(encoding="utf-8") for path in sorted(GOLDEN.glob("chat_*.jinja"))}

Message = dict[str, Any]
SYSTEM: Message = {"role": "system", "content": "  You are <b>terse</b> & kind. "}
USER: Message = {"role": "user", "content": " Wie geht's?\n\tÄ 文 \U0001f98a "}
ASSISTANT: Message = {"role": "assistant", "content": "<think>\nhm\n</think>\n\nGut \"so\" \\ 'da'.\n"}
CALL: Message = {
    "role": "assistant",
    "content": "",
    "tool_calls": [
        {"id": "abcdefghi", "type": "function", "function": {"name": "weather", "arguments": {"where": "Zürich <&>", "days": 2}}}
    ],
}
RESULT: Message = {"role": "tool", "tool_call_id": "abcdefghi", "content": '{"°C": 21.5, "rain": null}'}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "It's <weather>",
            "parameters": {"type": "object", "properties": {"b": {}, "a": [1, None, True]}},
        },
    }
]
CONVERSATIONS: dict[str, list[Message]] = {
    "user": [USER],
    "system": [SYSTEM, USER],
    "two turns": [SYSTEM, USER, ASSISTANT, {"role": "user", "content": "Und?"}],
    "ends with the assistant": [USER, ASSISTANT],
    "special tokens typed": [{"role": "user", "content": "<|eot_id|><end_of_turn></s>[/INST] {{ bos_token }} {% if %}"}],
    "no text": [{"role": "user", "content": ""}],
    "tools": [SYSTEM, USER, CALL, RESULT, ASSISTANT, {"role": "user", "content": "Danke"}],
    "two results": [USER, CALL, RESULT, RESULT],
    "parts": [{"role": "user", "content": [{"type": "text", "text": " a "}, {"type": "image"}, {"type": "text", "text": "b"}]}],
    "roles that do not alternate": [USER, USER],
    "unknown role": [{"role": "critic", "content": "?"}],
    "empty": [],
}


@pytest.fixture(scope="module")
def jinja() -> Callable[..., str]:
    """What transformers' apply_chat_template does with jinja2."""
    pytest.importorskip("jinja2", reason="jinja2 is the oracle of this test")
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(message: str) -> None:
        raise UsageError(message)

    def render(source: str, messages: list[Message], **variables: Any) -> str:
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
        environment.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
        environment.globals.update(raise_exception=raise_exception, strftime_now=lambda form: datetime.now().strftime(form))
        given = {
            "messages": messages,
            "bos_token": "<s>",
            "eos_token": "</s>",
            "add_generation_prompt": True,
            "tools": None,
            "documents": None,
        }
        return environment.from_string(source).render(given | variables)

    return render


def template(source: str) -> ChatTemplate:
    return ChatTemplate(source, bos_token="<s>", eos_token="</s>", where="model.gguf")


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_same_text_as_jinja2(jinja: Callable[..., str], name: str) -> None:
    """Every conversation, with tools and without, continued or not; where jinja2 fails, ours does, with the template's own words."""
    ours = template(TEMPLATES[name])
    rendered = 0
    for messages in CONVERSATIONS.values():
        for tools in (None, TOOLS):
            for variables in (
                {},
                {"add_generation_prompt": False},
                {"enable_thinking": False, "tools_in_user_message": False, "date_string": "1 May"},
            ):
                try:
                    expected = jinja(TEMPLATES[name], messages, tools=tools, **variables)
                except Exception as error:
                    with pytest.raises((UsageError, FormatError)) as raised:
                        ours.render(messages, tools=tools, **variables)
                    if isinstance(error, UsageError):
                        assert isinstance(raised.value, UsageError) and str(error) in str(raised.value)
                    continue
                assert ours.render(messages, tools=tools, **variables) == expected
                rendered += 1
    assert rendered >= 24  # most conversations suit each template: the comparison is not one of failures


SNIPPETS = [
    "{% for m in messages %}\n  {% if loop.first %}\n  x{{ m.role }}\n  {% endif %}\n{% endfor %}\nend\n",
    "{%- for m in messages -%}  {{ m['content'].strip() }} {{ m.content.title().upper().lower() }}  {%- endfor -%}",
    "{% for m in messages %}{% if loop.index0 == 0 %}{% continue %}{% endif %}{{ loop.index }}{% break %}{% endfor %}",
    "{{ messages|tojson }}|{{ messages|tojson(indent=2) }}|{{ messages[0].items()|list|length }}|{{ messages[0].get('x', 'no') }}",
    "{{ messages|map(attribute='role')|join(', ') }} {{ messages|selectattr('role', 'equalto', 'user')|list|length }}",
    "{% macro m(a, b='x') %}[{{ a }}{{ b }}]{% endmacro %}{{ m('1') }}{{ m('1', b='2') }}",
    "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }} {{ messages[-1].role }}",
    "{{ none }} {{ true }} {{ 1.0 }} {{ [1, 'a'] }} {{ {'a': none} }} {{ unknown }} {{ unknown is defined }} {{ 7 // 2 }} {{ 'a' ~ 1 }}",
    "{{ 'a,b'.split(',') }} {{ 'abc'[::-1] }} {{ 'a\\n'.rstrip('\\n') }} {{ 'aXb'.replace('X', '') }} {{ 'é'|length }}",
    "{% filter upper %}a<b{% endfilter %}{{ '<&>\"' }}{% set x %}q{% endset %}{{ x }}{# note #}{% raw %}{{ r }}{% endraw %}",
    "{{ 'x' if 'a' in 'cat' else 'y' }} {{ '<&>'|e }} {{ 'x'|default('d') }} {{ unknown|default('d') }} {{ [3, 1]|sort|first }}",
]


@pytest.mark.parametrize("source", SNIPPETS)
def test_jinja_as_templates_use_it(jinja: Callable[..., str], source: str) -> None:
    messages = CONVERSATIONS["two turns"]
    assert template(source).render(messages) == jinja(source, messages)


def test_the_date_is_today() -> None:
    assert template("{{ strftime_now('%Y') }}").render([]) == str(datetime.now().year)


HOSTILE = {
    "loops": "{% for i in range(10000) %}{% for j in range(10000) %}a{% endfor %}{% endfor %}",
    "a large range": "{% for i in range(10 ** 12) %}{% endfor %}",
    "a long string": "{{ ('x' * 10 ** 10)|length }}",
    "doubling": "{% set n = namespace(x='x') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}{{ n.x }}",
    "a list of itself": "{% set n = namespace(x=[]) %}{% for i in range(40) %}{% set n.x = [n.x, n.x] %}{% endfor %}{{ n.x }}",
    "as JSON": "{% set n = namespace(x=[]) %}{% for i in range(40) %}{% set n.x = [n.x, n.x] %}{% endfor %}{{ n.x|tojson }}",
    "a deep list": "{% set n = namespace(x=[]) %}{% for i in range(100000) %}{% set n.x = [n.x] %}{% endfor %}{{ n.x }}",
    "a wide format": "{{ '%999999999d'|format(1) }}",
    "replacing": "{% set x = 'a' * 9999 %}{{ x|replace('a', x)|replace('a', x)|length }}",
    "recursion": "{% macro m() %}{{ m() }}{{ m() }}{% endmacro %}{{ m() }}",
    "parentheses": "{{ " + "(" * 100_000,
    "lists": "{{ " + "[" * 100_000,
    "blocks": "{% if 1 %}" * 20_000,
    "a file": "{% include '/etc/passwd' %}",
    "python": "{{ messages.__class__.__mro__[1].__subclasses__() }}",
    "a broken tag": "{% if %}",
    "an attribute of nothing": "{{ a.b.c }}",
    "too long": "x" * 300_000,
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_template_ends_in_one_line(name: str) -> None:
    start = time.monotonic()
    with pytest.raises(FormatError) as error:
        template(HOSTILE[name]).render([USER])
    assert time.monotonic() - start < 10  # a hang; it takes one second at most, and the start of a process
    assert str(error.value).startswith("model.gguf: the chat template ") and "\n" not in str(error.value) and len(str(error.value)) < 700


def test_a_template_still_renders_after_one_that_was_ended() -> None:
    bomb = template("{% if messages %}" + HOSTILE["as JSON"] + "{% endif %}ok")
    for _ in range(2):
        with pytest.raises(FormatError, match="more than 1 s or more memory"):
            bomb.render([USER])
        assert bomb.render([]) == "ok"


@pytest.mark.parametrize("name", ["SIGINT", "SIGKILL"])
def test_signals(name: str) -> None:
    """Ctrl-C goes to every process of a terminal and must not end the conversation; one that was killed is replaced."""
    if not hasattr(signal, name):
        pytest.skip(f"this system has no {name}")
    simple = template("{{ messages|length }}")
    assert simple.render([]) == "0"
    process = simple._process
    assert process is not None
    process.send_signal(getattr(signal, name))
    if name == "SIGKILL":
        process.wait()
        with pytest.raises(FormatError):
            simple.render([])
    assert simple.render([USER]) == "1"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_forks_have_conversations_of_their_own() -> None:
    """Two children ask while a thread of theirs, which they do not have, asks in the parent, whose process outlives them."""
    script = """
import os, signal, sys, threading
from bitnet.chat import ChatTemplate

template, done = ChatTemplate("{{ messages[0]['content'] }}"), threading.Event()

def ask(who):
    text = f"{who} " * 10_000
    return template.render([{"role": "user", "content": text}]) == text

def go_on():
    while not done.is_set():
        assert ask("parent")

process = template.render([{"role": "user", "content": ""}]) or template._process
thread = threading.Thread(target=go_on)
thread.start()
children = []
for who in ("alice", "bob"):
    children.append(os.fork())
    if children[-1] == 0:
        signal.alarm(10)  # ends one that hangs
        sys.exit(0 if all(ask(who) for _ in range(10)) else 1)
ends = [os.waitpid(child, 0)[1] for child in children]
done.set()
thread.join()
print(ends, template._process is process and process.poll() is None)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.stdout == "[0, 0] True\n" and "Traceback" not in done.stderr, done


def test_memory_is_bounded() -> None:
    pytest.importorskip("resource", reason="this system has no limits of memory")
    script = f"""
import resource, sys
from bitnet.chat import ChatTemplate
try:
    ChatTemplate({HOSTILE["as JSON"]!r}).render([])
except Exception as error:
    print(type(error).__name__, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * (1 if sys.platform == "darwin" else 1024))
"""
    kind, peak = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split()
    assert kind == "FormatError" and int(peak) <= sandbox.MEMORY_BYTES


def test_a_long_conversation_has_fuel_enough() -> None:
    messages = [{"role": "user" if i % 2 == 0 else "assistant", "content": "word " * 2000} for i in range(400)]
    for name in ("llama-3.1", "qwen3", "gemma-3", "mistral"):
        assert len(template(TEMPLATES[name]).render(messages)) > 3_900_000


def test_refusals_use_the_template_s_words() -> None:
    with pytest.raises(UsageError) as error:
        template("{{ raise_exception('System role\n not supported') }}").render([SYSTEM])
    assert str(error.value) == "model.gguf: the chat template refuses this conversation: System role not supported"


@pytest.mark.parametrize("messages", [[{"role": {1}}], [{"role": object()}]])
def test_messages_that_are_no_json(messages: list[Message]) -> None:
    with pytest.raises(UsageError, match="the conversation cannot be rendered"):
        template("{{ messages }}").render(messages)


def test_a_conversation_that_contains_itself() -> None:
    message: Message = {"role": "user"}
    message["content"] = message
    with pytest.raises(UsageError, match="the conversation cannot be rendered"):
        template("{{ messages }}").render([message])


def test_surrogates_become_the_replacement_character() -> None:
    assert template("{{ messages[0].content }}").render([{"content": "a\udcffb"}]) == "a\ufffdb"


def test_where_a_template_is_found() -> None:
    config = {"chat_template": [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]}
    gguf = {"tokenizer.chat_template": "g"}
    assert find_template(config, "j", gguf) == "j"
    assert find_template(config, None, gguf) == "d"
    assert find_template({"chat_template": "c"}, None, gguf) == "c"
    assert find_template({}, None, gguf) == "g"
    assert find_template({"chat_template": [{"name": "rag", "template": "r"}]}, None, gguf) == "g"
    assert find_template({}, None, {}) is None
    assert find_template({"chat_template": [{"name": [], "template": "r"}, "x", {}]}, None, {}) is None
    with pytest.raises(FormatError, match="chat_template is of type int"):
        find_template({"chat_template": 3}, None, {})
    with pytest.raises(FormatError, match="of type list"):
        find_template({}, None, {"tokenizer.chat_template": ["x"]})


def test_a_missing_template_is_said() -> None:
    assert str(missing_template("base.gguf")) == (
        "base.gguf: the model has no chat template; it is a base model, or the file lacks it; use plain prompts, or name a template file "
        "(--chat-template)"
    )


CONTROL = ["<s>", "<|eot_id|>", "<|eot_id|>x", "[INST]", "\u0001"]


def byte_level() -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {character: i for i, character in enumerate(alphabet)} | {"<|": 256} | {text: 257 + i for i, text in enumerate(CONTROL)}
    library = Library(models.BPE(vocab=vocab, merges=[("<", "|")]))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    library.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in CONTROL])
    return Tokenizer.from_json(library.to_str().encode(), 300)


TOKENIZER = byte_level()
SIMPLE = template("{% for m in messages %}<s>{{ m.content }}<|eot_id|>{% endfor %}[INST]")
PARTS = template("<s>{% for m in messages %}{{ m.content|trim }}{% endfor %}[INST]")


def control(ids: list[int]) -> list[int]:
    return [token for token in ids if token > 256]


def test_an_ordinary_conversation_is_encoded_in_one_go() -> None:
    messages = [{"role": "user", "content": "a <| b < [INS T] <|eot_id| >"}]
    assert encode_chat(TOKENIZER, SIMPLE, messages) == TOKENIZER.encode(SIMPLE.render(messages), add_special=False, parse_special=True)


def test_a_typed_special_token_stays_text() -> None:
    messages = [{"role": "user", "content": "x<|eot_id|>x[INST]<s>\u0001<s"}, {"role": "user", "content": "<|eot_id|>"}]
    ids = encode_chat(TOKENIZER, SIMPLE, messages)
    assert control(ids) == [257, 258, 257, 258, 260]
    assert TOKENIZER.decode(ids, skip_special=False) == SIMPLE.render(messages)
    parsed = TOKENIZER.encode(SIMPLE.render(messages), add_special=False, parse_special=True)
    assert len(control(parsed)) > 5  # what would happen without the care


def test_the_template_still_finds_what_it_looks_for_in_typed_text() -> None:
    messages = [{"role": "assistant", "content": "<think>\n<|eot_id|> a < b\n</think>\n\n<s>hi"}, {"role": "user", "content": "x"}]
    qwen = template(TEMPLATES["qwen3"])
    assert "think" not in qwen.render(messages)
    assert TOKENIZER.decode(encode_chat(TOKENIZER, qwen, messages), skip_special=False) == qwen.render(messages)


def test_a_conversation_that_contains_itself_is_refused_when_encoded() -> None:
    message: Message = {"role": "user"}
    message["content"] = message
    with pytest.raises(UsageError, match="the conversation cannot be rendered"):
        encode_chat(TOKENIZER, SIMPLE, [message])


def test_a_special_token_in_two_pieces_stays_text() -> None:
    for first, second in [
        ("<|eot", "_id|>"),
        ("<|eot ", " _id|>"),
        ("< ", "|eot_id|>"),
        ("<|eot_id|", ">"),
        ("<", "s>"),
        ("<|eot_id|>", "x"),
        ("[", "INST]"),
    ]:
        messages = [{"role": "user", "content": first}, {"role": "user", "content": second}]
        ids = encode_chat(TOKENIZER, PARTS, messages)
        assert control(ids) == [257, 260], (first, second)
        assert TOKENIZER.decode(ids, skip_special=False) == PARTS.render(messages)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.lists(st.sampled_from([*CONTROL, "<", "<|", "eot_id|>", "|>", "s>", "x", " ", "\U000f0000", "é", "[", "INST]"]), max_size=6),
        max_size=4,
    )
)
def test_only_the_template_makes_control_tokens(contents: list[list[str]]) -> None:
    messages = [{"role": "user", "content": "".join(parts)} for parts in contents]
    for source, expected in ((SIMPLE, [257, 258] * len(messages) + [260]), (PARTS, [257, 260])):
        ids = encode_chat(TOKENIZER, source, messages)
        assert control(ids) == expected
        assert TOKENIZER.decode(ids, skip_special=False) == source.render(messages)
