"""Records of the usual instruction data sets -> messages.

    openai    {"messages": [{"role", "content", "name"?, "loss"?, "tool_calls"?}], "tools"?: [...]}, or the bare list
    sharegpt  {"conversations": [{"from", "value", "loss"?}], "system"?, "tools"?}
    alpaca    {"instruction", "input"?, "output", "system"?, "history"?: [[question, answer], ...]}
    xtuner    {"conversation": [{"system"?, "input", "output", "output_with_loss"?}]}, or one such turn as the record;
              with neither input nor system, the output is a plain document
    pairs     {"prompt", "completion"}, {"prompt", "response"} or {"question", "answer"}

A record that cannot be used raises RecordError, whose text says which turn and why.
"""

import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from internlm2.sources.documents import Document, RecordError
from internlm2.text.chat import Action, ChatError, Message

_OPENAI_ROLES = {"developer": "system", "tool": "environment", "function": "environment"}
_SHAREGPT_ROLES = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "bing", "bard", "model", "function_call"), "assistant"),
    **dict.fromkeys(("observation", "tool", "function_response", "environment"), "environment"),
    "system": "system",
}
_PAIRS = (("prompt", "completion"), ("prompt", "response"), ("question", "answer"))
# A call as the released models and agents write it, at the end of an assistant's content.
_SPELLED_ACTION = re.compile(
    r"<\|action_start\|><\|(plugin|interpreter)\|>\n((?:(?!<\|action_).)*)<\|action_end\|>\s*$", re.S
)


@dataclass(frozen=True, slots=True)
class ConversationReader:
    """Turns records of one format into documents; `auto` tells the format of each record by its keys."""

    format: str = "auto"

    def document(self, file: str, line: int, record: Any) -> Document:
        """The record that stands at file:line. Raises RecordError."""
        found = messages_of(record, self.format)
        if isinstance(found, str):
            return Document(file, line, text=found)
        # Held out by what was asked: several answers to one question must not fall on both sides.
        question = next((message.content for message in found if message.role == "user"), None)
        return Document(file, line, messages=found, split_key=None if question is None else f"asked:{question}")


def messages_of(record: Any, format: str = "auto") -> tuple[Message, ...] | str:
    """The conversation in a record, or the text of a plain document. Raises RecordError."""
    if format == "auto":
        format = detect(record)
    try:
        found = FORMATS[format](record)
    except ChatError as error:
        raise RecordError(str(error)) from error
    if isinstance(found, str):
        return found
    if not any(message.role == "assistant" for message in found):
        raise RecordError("a conversation without an assistant turn")
    if not any(message.trained for message in found):
        raise RecordError("no turn carries loss")
    return tuple(found)


def turns_of(turns: Any) -> tuple[Message, ...]:
    """A bare list of turns in any of the formats, whoever speaks in them. Raises RecordError."""
    try:
        found = FORMATS[_turn_format(turns, "openai")](turns)
    except ChatError as error:
        raise RecordError(str(error)) from error
    assert not isinstance(found, str)
    return tuple(found)


def detect(record: Any) -> str:
    """Name of the format that a record has. Raises RecordError where its keys belong to none."""
    if isinstance(record, list):
        return _turn_format(record, "openai")
    if not isinstance(record, dict):
        raise RecordError(f"a record must be an object or a list of turns, not {_kind(record)}")
    keys = {key for key, value in record.items() if value is not None}
    for key, usual in (("messages", "openai"), ("conversations", "sharegpt"), ("conversation", "xtuner")):
        if key in keys:
            return _turn_format(record[key], usual)
    if {"instruction", "output"} <= keys:
        return "alpaca"
    if {"input", "output"} <= keys:
        return "xtuner"
    if any(set(pair) <= keys for pair in _PAIRS):
        return "pairs"
    raise RecordError(
        f"the keys {', '.join(sorted(keys)) or '(none)'} belong to no known format ({', '.join(FORMATS)})"
    )


def _turn_format(turns: Any, usual: str) -> str:
    """Many data sets keep turns of one format under the key of another: the first turn decides."""
    first = turns[0] if isinstance(turns, list) and turns and isinstance(turns[0], dict) else {}
    for key, format in (("role", "openai"), ("from", "sharegpt"), ("output", "xtuner")):
        if key in first:
            return format
    return usual


def _openai(record: Any) -> list[Message]:
    messages = _opening(record)
    for number, turn in _turns(record):
        where = f"turn {number}"
        role = _string(turn, "role", where)
        actions = _openai_calls(turn, where)
        content, spelled = _content(_parts(turn, where, optional=bool(actions)), role)
        name = "plugin" if role in ("tool", "function") else _name(turn, where)
        role = _OPENAI_ROLES.get(role, role)
        messages.append(_message(where, role, content, name, (*spelled, *actions), _loss(turn, where)))
    return _with_tools(messages, record)


def _sharegpt(record: Any) -> list[Message]:
    messages = _opening(record)
    for number, turn in _turns(record):
        where = f"turn {number}"
        speaker = _string(turn, "from", where)
        if speaker not in _SHAREGPT_ROLES:
            raise RecordError(f"{where}: unknown speaker {speaker!r} (known: {', '.join(_SHAREGPT_ROLES)})")
        role, value = _SHAREGPT_ROLES[speaker], _string(turn, "value", where)
        if speaker == "function_call":
            content, actions = "", tuple(_call(call, where) for call in _listed(_parsed(value, f"{where}: the call")))
        else:
            content, actions = _content(value, role)
        name = "plugin" if role == "environment" else _name(turn, where)
        messages.append(_message(where, role, content, name, actions, _loss(turn, where)))
    return _with_tools(messages, record)


def _alpaca(record: Any) -> list[Message]:
    messages = _opening(record)
    for number, pair in enumerate(record.get("history") or (), start=1):
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise RecordError(f"history {number} must hold a question and an answer")
        for role, value in zip(("user", "assistant"), pair):
            messages.append(_message(f"history {number}", role, _checked(value, f"history {number}")))
    instruction, extra = _string(record, "instruction"), _string(record, "input", optional=True)
    messages.append(_message("instruction", "user", f"{instruction}\n{extra}" if extra else instruction))
    content, actions = _content(_string(record, "output"), "assistant")
    messages.append(_message("output", "assistant", content, None, actions))
    return messages


def _xtuner(record: Any) -> list[Message] | str:
    turns = [(1, record)] if isinstance(record, dict) and "conversation" not in record else list(_turns(record))
    messages: list[Message] = []
    for number, turn in turns:
        where = f"turn {number}"
        system, question = _string(turn, "system", where, optional=True), _string(turn, "input", where, optional=True)
        output = _string(turn, "output", where)
        if len(turns) == 1 and not system and not question:
            if not output.strip():
                raise RecordError("the text is empty")
            return output
        if system:
            messages.append(_message(where, "system", system))
        messages.append(_message(where, "user", question))
        content, actions = _content(output, "assistant")
        loss = _flag(turn, "output_with_loss", where)
        messages.append(_message(where, "assistant", content, None, actions, loss))
    return messages


def _pairs(record: Any) -> list[Message]:
    for question, answer in _PAIRS:
        if question in record and answer in record:
            content, actions = _content(_string(record, answer), "assistant")
            user = _message(question, "user", _string(record, question))
            return [*_opening(record), user, _message(answer, "assistant", content, None, actions)]
    raise RecordError(f"no pair of keys {', '.join('/'.join(pair) for pair in _PAIRS)}")


FORMATS: dict[str, Callable[[Any], list[Message] | str]] = {
    "openai": _openai,
    "sharegpt": _sharegpt,
    "alpaca": _alpaca,
    "xtuner": _xtuner,
    "pairs": _pairs,
}


def _message(
    where: str,
    role: str,
    content: str,
    name: str | None = None,
    actions: tuple[Action, ...] = (),
    loss: bool | None = None,
) -> Message:
    if not content.strip() and not actions and role != "environment":  # a tool may well answer nothing
        raise RecordError(f"{where} ({role}) is empty")
    try:
        return Message(role, content, name, actions, loss)
    except ChatError as error:
        raise RecordError(f"{where}: {error}") from error


def _turns(record: Any) -> Iterable[tuple[int, dict[str, Any]]]:
    """(number from 1, turn) of the list of turns that a record is or holds."""
    keys = ("messages", "conversations", "conversation")
    turns = record
    if isinstance(record, dict):
        turns = next((record[key] for key in keys if record.get(key) is not None), None)
        if turns is None:
            raise RecordError(f"no list of turns under {', '.join(keys)}")
    if not isinstance(turns, list):
        raise RecordError(f"the turns must be a list, not {_kind(turns)}")
    if not turns:
        raise RecordError("a conversation without turns")
    for number, turn in enumerate(turns, start=1):
        if not isinstance(turn, dict):
            raise RecordError(f"turn {number} must be an object, not {_kind(turn)}")
        yield number, turn


def _opening(record: Any) -> list[Message]:
    """The system turn of a record that keeps it apart from the turns."""
    system = _string(record, "system", optional=True) if isinstance(record, dict) else ""
    return [Message("system", system)] if system.strip() else []


def _with_tools(messages: list[Message], record: Any) -> list[Message]:
    """Put the functions on offer behind the opening system turns, as `system name=<|plugin|>`."""
    tools = (record.get("tools") or record.get("functions")) if isinstance(record, dict) else None
    if not tools:
        return messages
    tools = _parsed(tools, "tools") if isinstance(tools, str) else tools
    if not isinstance(tools, list):
        raise RecordError(f"tools must be a list of functions, not {_kind(tools)}")
    if not tools:
        return messages
    functions = [tool["function"] if isinstance(tool, dict) and "function" in tool else tool for tool in tools]
    at = next((at for at, message in enumerate(messages) if message.role != "system"), len(messages))
    return [*messages[:at], Message("system", json.dumps(functions, ensure_ascii=False), "plugin"), *messages[at:]]


def _content(text: str, role: str) -> tuple[str, tuple[Action, ...]]:
    """Content and the calls that an assistant's text spells at its end; of other roles nothing is a call."""
    actions: list[Action] = []
    while role == "assistant" and (match := _SPELLED_ACTION.search(text)):
        actions.insert(0, Action(match[1], match[2]))
        text = text[: match.start()]
    return text, tuple(actions)


def _openai_calls(turn: dict[str, Any], where: str) -> tuple[Action, ...]:
    calls = turn.get("tool_calls") or _listed(turn.get("function_call"))
    if not isinstance(calls, list):
        raise RecordError(f"{where}: tool_calls must be a list, not {_kind(calls)}")
    return tuple(_call(call.get("function", call) if isinstance(call, dict) else call, where) for call in calls)


def _call(call: Any, where: str) -> Action:
    """One function call in the released models' spelling: {"name": ..., "parameters": {...}}."""
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        raise RecordError(f"{where}: a call must be an object with a name")
    arguments = call["arguments"] if "arguments" in call else call.get("parameters", {})
    if isinstance(arguments, str):
        arguments = _parsed(arguments, f"{where}: the arguments of {call['name']}")
    return Action("plugin", json.dumps({"name": call["name"], "parameters": arguments}, ensure_ascii=False))


def _parsed(text: str, what: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RecordError(f"{what}: broken JSON: {error}") from error


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _parts(turn: dict[str, Any], where: str, optional: bool) -> str:
    """Content as one text; a list of parts may hold text only."""
    content = turn.get("content")
    if not isinstance(content, list):
        return _string(turn, "content", where, optional=optional)
    texts = []
    for part in content:
        if not isinstance(part, dict) or not isinstance(part.get("text"), str):
            kind = part.get("type") if isinstance(part, dict) else _kind(part)
            raise RecordError(f"{where}: content holds a part of type {kind}, only text can be trained on")
        texts.append(_checked(part["text"], where))
    return "".join(texts)


def _name(turn: dict[str, Any], where: str) -> str | None:
    name = _string(turn, "name", where, optional=True)
    return name.removeprefix("<|").removesuffix("|>") if name in ("<|plugin|>", "<|interpreter|>") else name or None


def _loss(turn: dict[str, Any], where: str) -> bool | None:
    """Per-turn override: `loss` true or false, or OpenAI's `weight` 0 or 1."""
    weight = turn.get("weight")
    if weight is None or turn.get("loss") is not None:
        return _flag(turn, "loss", where)
    if weight not in (0, 1):
        raise RecordError(f"{where}: weight must be 0 or 1, not {weight!r}")
    return bool(weight)


def _flag(turn: dict[str, Any], key: str, where: str) -> bool | None:
    value = turn.get(key)
    if value is not None and not isinstance(value, bool):
        raise RecordError(f"{where}: {key} must be true or false, not {value!r}")
    return value


def _string(record: Any, key: str, where: str = "", *, optional: bool = False) -> str:
    """Text under `key`; missing or null is "" where `optional`."""
    prefix = f"{where}: " if where else ""
    if not isinstance(record, dict):
        raise RecordError(f"{prefix}a record must be an object, not {_kind(record)}")
    if record.get(key) is None:
        if optional:
            return ""
        raise RecordError(f"{prefix}no {key}")
    return _checked(record[key], f"{prefix}{key}")


def _checked(value: Any, what: str) -> str:
    if not isinstance(value, str):
        raise RecordError(f"{what} must be text, not {_kind(value)}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RecordError(f"{what}: a lone surrogate at character {error.start} is no valid Unicode") from error
    return value


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")
