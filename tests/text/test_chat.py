"""The chat format: its text, its ids and loss mask, parsing as the inverse, and the template that exports carry."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.utils.chat_template_utils import render_jinja_template

from internlm2.model.chat_template import CHAT_TEMPLATE
from internlm2.model.tokenizer_export import export_tokenizer
from internlm2.text.chat import (
    Action,
    ChatError,
    Message,
    escape,
    parse,
    parse_reply,
    parse_text,
    render,
    render_text,
    unescape,
)
from internlm2.text.tokenizer import MARKERS, load_tokenizer
from internlm2.text.tokenizer_training import train_model

WEATHER = '{"name": "get_weather", "parameters": {"city": "Shanghai"}}'
TOOL_CHAT = [
    Message("system", "You are a helpful assistant."),
    Message("system", '[{"name": "get_weather"}]', name="plugin"),
    Message("user", "Weather in Shanghai?"),
    Message("assistant", "I will look.", actions=(Action("plugin", WEATHER),)),
    Message("environment", '{"temperature": 22}', name="plugin"),
    Message("assistant", "It is 22 degrees."),
]
# Written by hand from the released chat format: one <s>, roles with names, a call at the end of the assistant's turn.
TOOL_TEXT = (
    "<s><|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    '<|im_start|>system name=<|plugin|>\n[{"name": "get_weather"}]<|im_end|>\n'
    "<|im_start|>user\nWeather in Shanghai?<|im_end|>\n"
    '<|im_start|>assistant\nI will look.<|action_start|><|plugin|>\n{"name": "get_weather", "parameters": {"city": '
    '"Shanghai"}}'
    "<|action_end|><|im_end|>\n"
    '<|im_start|>environment name=<|plugin|>\n{"temperature": 22}<|im_end|>\n'
    "<|im_start|>assistant\nIt is 22 degrees.<|im_end|>\n"
)
INTERPRETER_CHAT = [
    Message("system", "You have a Python environment.", name="interpreter"),
    Message("user", "A table\nof numbers", name="file"),
    Message("assistant", "", actions=(Action("interpreter", "```python\nprint(1)\n```\n"),)),
    Message("environment", "1\n", name="interpreter"),
    Message("assistant", "One."),
]
INTERPRETER_TEXT = (
    "<s><|im_start|>system name=<|interpreter|>\nYou have a Python environment.<|im_end|>\n"
    "<|im_start|>user name=file\nA table\nof numbers<|im_end|>\n"
    "<|im_start|>assistant\n<|action_start|><|interpreter|>\n```python\nprint(1)\n```\n<|action_end|><|im_end|>\n"
    "<|im_start|>environment name=<|interpreter|>\n1\n<|im_end|>\n"
    "<|im_start|>assistant\nOne.<|im_end|>\n"
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """A small vocabulary of the official layout, with byte fallback for every other character."""
    text = "user assistant system name= You are a helpful assistant. What is the weather? It is 22 degrees.\n" * 40
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    path.write_bytes(train_model([text], 340))
    return load_tokenizer(path)


@pytest.fixture(scope="module")
def official(shared_data):
    return load_tokenizer(shared_data / "internlm2-tokenizer" / "tokenizer_internlm2.model")


@pytest.mark.parametrize(("messages", "text"), [(TOOL_CHAT, TOOL_TEXT), (INTERPRETER_CHAT, INTERPRETER_TEXT)])
def test_text_is_the_released_format(messages, text):
    assert render_text(messages) == text
    assert parse_text(text) == messages
    assert render_text(messages[:3], generation_prompt=True).endswith("<|im_end|>\n<|im_start|>assistant\n")


def trained_text(messages, tokenizer) -> str:
    """Trained tokens as text, each run in square brackets."""
    rendered = render(messages, tokenizer)
    runs: list[list[int]] = []
    for index, token in enumerate(rendered.ids):
        if not rendered.trained[index]:
            continue
        if index and rendered.trained[index - 1]:
            runs[-1].append(token)
        else:
            runs.append([token])
    return "".join(f"[{tokenizer.decode(run)}]" for run in runs)


def test_assistant_turns_and_their_end_are_trained(tokenizer):
    call = f"<|action_start|><|plugin|>\n{WEATHER}<|action_end|>"
    assert trained_text(TOOL_CHAT, tokenizer) == f"[I will look.{call}<|im_end|>][It is 22 degrees.<|im_end|>]"


def test_loss_overrides_the_role(tokenizer):
    chat = [
        Message("user", "a", loss=True),
        Message("assistant", "b", loss=False),
        Message("user", "c"),
        Message("assistant", "d"),
        Message("environment", "e", name="plugin", loss=True),
    ]
    assert trained_text(chat, tokenizer) == "[a<|im_end|>][d<|im_end|>][e<|im_end|>]"


def test_ids_have_one_beginning_and_one_id_per_marker(tokenizer):
    ids = render(TOOL_CHAT, tokenizer, generation_prompt=True).ids
    assert ids[0] == tokenizer.bos_id
    assert ids.count(tokenizer.bos_id) == 1
    assert ids.count(tokenizer.special_ids["<|im_start|>"]) == 7
    assert ids.count(tokenizer.special_ids["<|im_end|>"]) == 6
    assert ids.count(tokenizer.special_ids["<|action_start|>"]) == 1
    assert tokenizer.decode(ids) == TOOL_TEXT.removeprefix("<s>") + "<|im_start|>assistant\n"


PARTS = [*MARKERS, "<s>", "</s>", "<\\", "\\", "<", "|>", "\n", " ", "a", "\u4f60"]
SPELLED = st.lists(st.sampled_from(PARTS), max_size=6).map("".join)
CONTENT = st.one_of(SPELLED, st.text(st.characters(exclude_categories=["Cs"]), max_size=20))
NAME = st.one_of(
    st.none(),
    st.sampled_from(["plugin", "interpreter", "file", "a name=b", "<|im_end|>"]),
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\n"), min_size=1, max_size=8),
).filter(lambda name: name not in ("<|plugin|>", "<|interpreter|>"))
ACTIONS = st.lists(st.builds(Action, st.sampled_from(["plugin", "interpreter"]), CONTENT), max_size=2).map(tuple)
MESSAGE = st.one_of(
    st.builds(Message, st.sampled_from(["system", "user", "environment"]), CONTENT, NAME),
    st.builds(Message, st.just("assistant"), CONTENT, NAME, ACTIONS),
)
CHAT = st.lists(MESSAGE, max_size=5)


@given(CHAT, st.booleans())
@settings(max_examples=150, deadline=None)
def test_text_and_parsing_are_inverse(chat, prompt):
    text = render_text(chat, generation_prompt=prompt and bool(chat))
    assert text.count("<s>") == 1
    assert parse_text(text) == chat


@given(CHAT)
@settings(max_examples=150, deadline=None)
def test_ids_and_parsing_are_inverse(tokenizer, chat):
    rendered = render(chat, tokenizer)
    assert len(rendered.ids) == len(rendered.trained)
    assert parse(rendered.ids, tokenizer) == chat
    assert rendered.ids.count(tokenizer.special_ids["<|im_end|>"]) == len(chat)


@given(CHAT)
@settings(max_examples=80, deadline=None)
def test_official_tokenizer_parses_back(official, chat):
    assert parse(render(chat, official).ids, official) == chat


@given(SPELLED)
def test_escaping_is_reversible_and_leaves_no_marker(text):
    escaped = escape(text)
    assert unescape(escaped) == text
    assert not any(marker in escaped for marker in (*MARKERS, "<s>", "</s>"))


def as_template_input(chat):
    """Messages as transformers takes them."""
    made = []
    for message in chat:
        record = {"role": message.role, "content": message.content}
        if message.name:
            record["name"] = message.name
        for action in message.actions:
            record["content"] += f"<|action_start|><|{action.tool}|>\n{action.body}<|action_end|>"
        made.append(record)
    return made


def from_template(messages, **options):
    rendered, _ = render_jinja_template([messages], chat_template=CHAT_TEMPLATE, bos_token="<s>", **options)
    return rendered[0]


@given(CHAT.filter(lambda chat: not any(mark in repr(chat) for mark in ("<|", "<s>", "</s>", "<\\"))), st.booleans())
@settings(max_examples=80, deadline=None)
def test_template_renders_the_same_text(chat, prompt):
    expected = render_text(chat, generation_prompt=prompt)
    assert from_template(as_template_input(chat), add_generation_prompt=prompt) == expected


@pytest.mark.parametrize("chat", [TOOL_CHAT, INTERPRETER_CHAT])
def test_template_renders_actions_in_content(chat):
    assert from_template(as_template_input(chat)) == render_text(chat)


def test_template_takes_openai_tools():
    function = {"name": "get_weather"}
    call = {"type": "function", "function": {"name": "get_weather", "arguments": {"city": "Shanghai"}}}
    messages = [
        {"role": "system", "content": "You are a helpful assistant."},
        {"role": "user", "content": [{"type": "text", "text": "Weather in Shanghai?"}]},
        {"role": "assistant", "content": "I will look.", "tool_calls": [call]},
        {"role": "tool", "content": '{"temperature": 22}', "tool_call_id": "0"},
        {"role": "assistant", "content": "It is 22 degrees."},
    ]
    assert from_template(messages, tools=[{"type": "function", "function": function}]) == TOOL_TEXT
    call["function"]["arguments"] = json.dumps(call["function"]["arguments"])
    assert from_template(messages, tools=[{"type": "function", "function": function}]) == TOOL_TEXT


def test_reply_of_a_model(tokenizer):
    def ids(text):
        return tokenizer.encode(text, allow_special=True)

    assert parse_reply(ids("Hello.<|im_end|>\n<|im_start|>user"), tokenizer) == Message("assistant", "Hello.")
    assert parse_reply(ids("Hello"), tokenizer) == Message("assistant", "Hello")
    call = ids("Look.<|action_start|><|interpreter|>\n```python\n1\n```\n<|action_end|><|im_end|>")
    assert parse_reply(call, tokenizer) == Message(
        "assistant", "Look.", actions=(Action("interpreter", "```python\n1\n```\n"),)
    )
    unfinished = parse_reply(ids("Look.<|action_start|><|plugin|>\n{"), tokenizer)
    assert unfinished == Message("assistant", "Look.<|action_start|><|plugin|>\n{")


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("hello", "turn 1 begins with 'hello'"),
        ("<|im_start|>user\nhello", "turn 1 has no closing"),
        ("<|im_start|>user\nhello<|im_start|>assistant\n", "turn 1 has no closing"),
        ("<|im_start|>wizard\nhello<|im_end|>\n", "turn 1: unknown role 'wizard'"),
        ("<|im_start|>user\n<|im_end|>\n<|im_start|>user name=<|im_end|>\n", "turn 2: the line with the role"),
        ("<|im_start|>user\na<|im_end|>\nrest", "between turns 1 and 2"),
    ],
)
def test_malformed_text_is_named(text, complaint):
    with pytest.raises(ChatError, match=complaint):
        parse_text(text)


def test_impossible_messages_are_refused():
    with pytest.raises(ChatError, match="unknown role 'wizard'"):
        Message("wizard", "a")
    with pytest.raises(ChatError, match="cannot hold actions"):
        Message("user", "a", actions=(Action("plugin", "{}"),))
    with pytest.raises(ChatError, match="one line of text"):
        Message("user", "a", name="two\nlines")


@pytest.mark.parametrize("chat", [TOOL_CHAT, INTERPRETER_CHAT])
def test_export_gives_the_same_ids_in_transformers(official, tmp_path, chat):
    """The real vocabulary, exported, read by transformers: its apply_chat_template against ours, markers one id
    each.
    """
    transformers = pytest.importorskip("transformers")
    export_tokenizer(official.path, tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    ids = theirs.apply_chat_template(as_template_input(chat), add_generation_prompt=True)["input_ids"]
    assert ids == render(chat, official, generation_prompt=True).ids
    assert theirs.decode(ids) == render_text(chat, generation_prompt=True)
    released = {"<|im_start|>": 92543, "<|im_end|>": 92542, "<|action_start|>": 92541, "<|action_end|>": 92540}
    counts = {name: ids.count(token) for name, token in released.items()}
    assert counts == {
        "<|im_start|>": len(chat) + 1,
        "<|im_end|>": len(chat),
        "<|action_start|>": 1,
        "<|action_end|>": 1,
    }
    assert ids.count(92539 if chat is INTERPRETER_CHAT else 92538) == 3
    assert ids.count(1) == 1
