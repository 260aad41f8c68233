"""The InternLM2 chat format (ChatML, report 4.4): messages -> text or token ids with a loss mask, and back.

    <s><|im_start|>ROLE[ name=NAME]\nCONTENT<|im_end|>\n<|im_start|>...

Tools: the functions on offer stand in `system name=<|plugin|>`; a call ends the assistant's turn as
`<|action_start|><|plugin|>\nBODY<|action_end|>`; its result is a turn `environment name=<|plugin|>`. The code
interpreter does the same with `<|interpreter|>`.

What is a marker follows from the structure alone: content that happens to spell `<|im_end|>` becomes ordinary
tokens, and in text it is escaped with a backslash (`<\\|im_end|>`), so that parsing gives back exactly what was
rendered.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from internlm2.text.tokenizer import MARKERS, Tokenizer

# Raise when a change alters what a conversation is rendered to: cached shards of the old kind are then not used.
FORMAT = 1

ROLES = ("system", "user", "assistant", "environment")
# Names of turns, and tools of actions, that are written as a marker: `name=<|plugin|>`.
TOOLS = ("plugin", "interpreter")

IM_START, IM_END = "<|im_start|>", "<|im_end|>"
ACTION_START, ACTION_END = "<|action_start|>", "<|action_end|>"

_MARKER = "|".join(re.escape(marker) for marker in MARKERS)
_LOOKS_LIKE_MARKER = re.compile(rf"<(\\*)(?=(?:{'|'.join(re.escape(marker[1:]) for marker in MARKERS)}|/?s>))")
_SPLIT_TEXT = re.compile(f"({_MARKER})")


class ChatError(ValueError):
    """Messages, text or ids that are no conversation; the text says which turn and why."""


@dataclass(frozen=True, slots=True)
class Action:
    """A call in an assistant's turn: JSON of one function for `plugin`, a Markdown block of Python for
    `interpreter`.
    """

    tool: str
    body: str

    def __post_init__(self) -> None:
        if self.tool not in TOOLS:
            raise ChatError(f"an action's tool must be plugin or interpreter, not {self.tool!r}")


@dataclass(frozen=True, slots=True)
class Message:
    """One turn. `name`: `plugin`, `interpreter` or any single line of text. `loss` overrides what the role says."""

    role: str
    content: str
    name: str | None = None
    actions: tuple[Action, ...] = ()
    loss: bool | None = None

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise ChatError(f"unknown role {self.role!r}: a turn is of {', '.join(ROLES)}")
        if self.actions and self.role != "assistant":
            raise ChatError(f"a turn of {self.role} cannot hold actions, only the assistant's can")
        if self.name is not None and (
            not self.name or "\n" in self.name or self.name in ("<|plugin|>", "<|interpreter|>")
        ):
            raise ChatError(
                f"a turn's name must be one line of text (plugin and interpreter without their bars), not {self.name!r}"
            )

    @property
    def plain_text(self) -> str:
        """Content and the bodies of the actions, without markers."""
        return "\n".join((self.content, *(action.body for action in self.actions)))

    @property
    def trained(self) -> bool:
        """Whether the turn's content and its closing `<|im_end|>` are targets: the assistant's are, unless `loss`
        says otherwise.
        """
        return self.role == "assistant" if self.loss is None else self.loss


@dataclass(frozen=True, slots=True)
class Rendered:
    """Token ids of a conversation; `trained[i]` tells whether token i is a target."""

    ids: list[int]
    trained: list[bool]


@dataclass(frozen=True, slots=True)
class _Piece:
    """A marker, or text that is encoded in one go."""

    text: str
    marker: bool
    trained: bool


def render(messages: Sequence[Message], tokenizer: Tokenizer, *, generation_prompt: bool = False) -> Rendered:
    """Ids that begin with the one `<s>`. `generation_prompt` appends `<|im_start|>assistant\\n`.

    An assistant's content is encoded apart from its header, because generation starts after `assistant\\n` too; all
    else between two markers is encoded together, as a template's text would be.
    """
    pieces = list(_pieces(messages, generation_prompt))
    encoded = iter(tokenizer.encode_batch([piece.text for piece in pieces if not piece.marker]))
    ids, trained = [tokenizer.bos_id], [False]
    for piece in pieces:
        part = [tokenizer.special_id(piece.text)] if piece.marker else next(encoded)
        ids.extend(part)
        trained.extend([piece.trained] * len(part))
    return Rendered(ids, trained)


def render_text(messages: Sequence[Message], *, generation_prompt: bool = False, bos: str = "<s>") -> str:
    """The same as text, for engines that take a prompt as text and for people. Markers inside content are escaped."""
    pieces = _pieces(messages, generation_prompt)
    return bos + "".join(piece.text if piece.marker else escape(piece.text) for piece in pieces)


def parse(ids: Iterable[int], tokenizer: Tokenizer) -> list[Message]:
    """The messages of which `ids` are the rendering (`loss` is not part of it). Raises ChatError."""
    return _turns(list(_split_ids(ids, tokenizer)))


def parse_text(text: str, *, bos: str = "<s>") -> list[Message]:
    """The messages of which `text` is the rendering; the leading `<s>` may be missing. Raises ChatError."""
    return _turns(list(_split_text(text.removeprefix(bos))))


def parse_reply(ids: Iterable[int], tokenizer: Tokenizer) -> Message:
    """The assistant's message out of sampled ids (after the generation prompt), whatever the model wrote.

    It ends at `<|im_end|>` or where the ids end. A call that is not complete, and any marker out of place, stays in
    the content by name.
    """
    pieces: list[_Piece] = []
    for piece in _split_ids(ids, tokenizer):
        if piece.marker and piece.text == IM_END:
            break
        pieces.append(piece)
    content, actions = _content(pieces)
    return Message("assistant", content, actions=actions)


def escape(text: str) -> str:
    """Add a backslash to everything that looks like a marker, `<s>` or `</s>`, or like one that was escaped already."""
    return _LOOKS_LIKE_MARKER.sub(lambda match: f"<\\{match[1]}", text)


def unescape(text: str) -> str:
    """The inverse of `escape`."""
    return _LOOKS_LIKE_MARKER.sub(lambda match: f"<{match[1][1:]}", text)


def _pieces(messages: Sequence[Message], generation_prompt: bool) -> Iterator[_Piece]:
    for message in messages:
        trained = message.trained
        yield _Piece(IM_START, True, False)
        header = message.role
        if message.name in TOOLS:
            yield _Piece(f"{header} name=", False, False)
            yield _Piece(f"<|{message.name}|>", True, False)
            header = ""
        elif message.name is not None:
            header = f"{header} name={message.name}"
        if trained or message.role == "assistant":
            yield _Piece(f"{header}\n", False, False)
            yield _Piece(message.content, False, trained)
        else:
            yield _Piece(f"{header}\n{message.content}", False, False)
        for action in message.actions:
            yield _Piece(ACTION_START, True, trained)
            yield _Piece(f"<|{action.tool}|>", True, trained)
            yield _Piece(f"\n{action.body}", False, trained)
            yield _Piece(ACTION_END, True, trained)
        yield _Piece(IM_END, True, trained)
        yield _Piece("\n", False, False)
    if generation_prompt:
        yield _Piece(IM_START, True, False)
        yield _Piece("assistant\n", False, False)


def _split_ids(ids: Iterable[int], tokenizer: Tokenizer) -> Iterator[_Piece]:
    names = {tokenizer.special_ids[name]: name for name in MARKERS if name in tokenizer.special_ids}
    run: list[int] = []
    for token in ids:
        if int(token) not in names:
            run.append(int(token))
            continue
        if run:
            yield _Piece(tokenizer.decode(run), False, False)
            run = []
        yield _Piece(names[int(token)], True, False)
    if run:
        yield _Piece(tokenizer.decode(run), False, False)


def _split_text(text: str) -> Iterator[_Piece]:
    for number, part in enumerate(_SPLIT_TEXT.split(text)):
        if number % 2:
            yield _Piece(part, True, False)
        elif part:
            yield _Piece(unescape(part), False, False)


def _turns(pieces: list[_Piece]) -> list[Message]:
    pieces = [piece for piece in pieces if piece.text]
    messages: list[Message] = []
    at = 0
    while at < len(pieces):
        number = len(messages) + 1
        if not (pieces[at].marker and pieces[at].text == IM_START):
            raise ChatError(f"turn {number} begins with {pieces[at].text[:40]!r} where {IM_START} belongs")
        end = at + 1
        while end < len(pieces) and not (pieces[end].marker and pieces[end].text in (IM_START, IM_END)):
            end += 1
        turn = pieces[at + 1 : end]
        if end == len(pieces) and messages and [piece.text for piece in turn] == ["assistant\n"]:
            return messages  # a generation prompt
        if end == len(pieces) or pieces[end].text == IM_START:
            raise ChatError(f"turn {number} has no closing {IM_END}")
        messages.append(_message(turn, number))
        at = end + 1
        if at < len(pieces) and not pieces[at].marker:
            if pieces[at].text != "\n":
                raise ChatError(
                    f"{pieces[at].text[:40]!r} stands between turns {number} and {number + 1}, not only a line end"
                )
            at += 1
    return messages


def _message(turn: list[_Piece], number: int) -> Message:
    if not turn or turn[0].marker:
        raise ChatError(f"turn {number} names no role")
    header, newline, rest = turn[0].text.partition("\n")
    role, named, name = header.partition(" name=")
    if newline:
        body = [_Piece(rest, False, False), *turn[1:]]
    elif (
        named
        and not name
        and len(turn) > 2
        and turn[1].text in ("<|plugin|>", "<|interpreter|>")
        and turn[2].text.startswith("\n")
    ):
        name = turn[1].text.strip("<|>")
        body = [_Piece(turn[2].text[1:], turn[2].marker, False), *turn[3:]]
    else:
        raise ChatError(f"turn {number}: the line with the role does not end")
    content, actions = _content(body)
    try:
        return Message(role, content, name if named else None, actions)
    except ChatError as error:
        raise ChatError(f"turn {number}: {error}") from error


def _content(pieces: list[_Piece]) -> tuple[str, tuple[Action, ...]]:
    """Content and the complete actions at its end. Anything else that is marked is content, by its name."""
    pieces = [piece for piece in pieces if piece.text]
    actions: list[Action] = []
    end = len(pieces)
    while end >= 4 and _is_action(pieces[end - 4 : end]):
        actions.insert(0, Action(pieces[end - 3].text.strip("<|>"), pieces[end - 2].text[1:]))
        end -= 4
    return "".join(piece.text for piece in pieces[:end]), tuple(actions)


def _is_action(pieces: list[_Piece]) -> bool:
    start, tool, body, stop = pieces
    return (
        (start.marker and start.text == ACTION_START)
        and (tool.marker and tool.text in ("<|plugin|>", "<|interpreter|>"))
        and (not body.marker and body.text.startswith("\n"))
        and (stop.marker and stop.text == ACTION_END)
    )
