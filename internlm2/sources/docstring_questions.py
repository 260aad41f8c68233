"""Dialogs that every machine has, derived from the running Python (PSF licence) without a download.

`questions`: what a documented function or class does, and of some functions which arguments they take, as a second
turn. `functions`: write this function. `topics`: explain this topic of the language reference. A module's dialogs
are held out together with its pages in the pre-training sources.
"""

import ast
import builtins
import hashlib
import inspect
import re
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from internlm2.sources import stdlib_corpus
from internlm2.sources.documents import Document
from internlm2.text.chat import FORMAT as CHAT_FORMAT
from internlm2.text.chat import Message

PARTS = ("questions", "functions", "topics")
# Raise when a change below alters the dialogs: cached shards of the old kind are then not used.
DERIVATION_VERSION = 1

SHORTEST_DOCSTRING = 40  # characters; shorter ones say little ("Return x.")
LONGEST_FUNCTION = 45  # lines
LONGEST_TOPIC = 6000  # characters
_FOLLOW_UP = 4  # of this many functions with arguments, one is asked for them too
_BUILTIN_TYPES = (str, list, dict, set, int, float, bytes, tuple, bytearray, frozenset)


@dataclass(frozen=True)
class Definition:
    """A public function or class with a docstring."""

    file: str
    name: str  # in full, as it is imported
    kind: str  # function or class
    docstring: str
    arguments: str
    source: str  # empty where it is too long or no function
    line: int

    @property
    def question(self) -> str:
        """What a user would ask."""
        return f"What does the Python {self.kind} `{self.name}` do?"


def folder(part: str) -> Path:
    """Where the dialogs of a part come from."""
    return stdlib_corpus.library_folder()


def manifest(part: str) -> str:
    """Hash of all that the dialogs of a part are made of."""
    texts = stdlib_corpus.topics() if part == "topics" else stdlib_corpus.modules()
    digest = hashlib.sha256(
        f"{DERIVATION_VERSION} {stdlib_corpus.SPLIT_SALT} {stdlib_corpus.TOPIC_SALT} {CHAT_FORMAT} {part}".encode()
    )
    for name, text in sorted(texts.items()):
        digest.update(f"{name}\0{text}\0".encode())
    if part == "questions":
        for name, text in _builtin_docstrings():
            digest.update(f"{name}\0{text}\0".encode())
    return digest.hexdigest()


def input_bytes(part: str) -> int:
    """About how much text a part holds; for progress bars and sample shares."""
    if part == "topics":
        return sum(len(text) for text in stdlib_corpus.topics().values() if len(text) < LONGEST_TOPIC)
    return sum(map(len, stdlib_corpus.modules().values())) // 7


def documents(part: str) -> Iterator[Document]:
    """Dialogs of one part, in a fixed order."""
    yield from {"questions": _questions, "functions": _functions, "topics": _topics}[part]()


def _questions() -> Iterator[Document]:
    for definition in definitions():
        messages = [Message("user", definition.question), Message("assistant", definition.docstring)]
        if definition.arguments and _chosen(definition.name):
            messages.append(Message("user", "Which arguments does it take?"))
            messages.append(Message("assistant", f"`{definition.name.rpartition('.')[2]}({definition.arguments})`"))
        yield _document(definition, messages)
    for name, docstring in _builtin_docstrings():
        asked = Message("user", f"What does the Python function `{name}` do?")
        yield Document(
            "builtins",
            messages=(asked, Message("assistant", docstring)),
            split_key=f"stdlib-{stdlib_corpus.SPLIT_SALT}:builtins {name}",
        )


def _functions() -> Iterator[Document]:
    for definition in definitions():
        if not definition.source:
            continue
        name = definition.name.rpartition(".")[2]
        purpose = " ".join(definition.docstring.split("\n\n")[0].split())
        request = f"Write a Python function `{name}({definition.arguments})`. {purpose}"
        answer = f"```python\n{definition.source}\n```"
        yield _document(definition, [Message("user", request), Message("assistant", answer)])


def _topics() -> Iterator[Document]:
    for name, text in sorted(stdlib_corpus.topics().items()):
        if len(text) >= LONGEST_TOPIC:
            continue
        title = text.strip().splitlines()[0].strip()
        question = f"Explain this part of the Python language reference: {title} (`help({name!r})`)"
        yield Document(
            name,
            messages=(Message("user", question), Message("assistant", text.strip())),
            split_key=stdlib_corpus.topic_key(name),
        )


def _document(definition: Definition, messages: list[Message]) -> Document:
    return Document(
        definition.file,
        definition.line,
        messages=tuple(messages),
        split_key=stdlib_corpus.split_key(definition.file),
    )


@lru_cache(maxsize=1)
def definitions() -> tuple[Definition, ...]:
    """Every public function and class with a docstring in a public module, each name once."""
    found: list[Definition] = []
    for file, text in stdlib_corpus.modules().items():
        module = file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        if any(part.startswith("_") for part in module.split(".")):
            continue
        try:
            tree = ast.parse(text)
        except (SyntaxError, ValueError):
            continue
        seen: set[str] = set()
        for definition in _inside(tree, module, file, text.split("\n")):
            if definition.name not in seen:  # overloads, and the setters of a property
                seen.add(definition.name)
                found.append(definition)
    return tuple(found)


def _inside(node: ast.AST, name: str, file: str, lines: list[str]) -> Iterator[Definition]:
    for child in getattr(node, "body", []):
        if not isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) or child.name.startswith("_"):
            continue
        full_name, docstring = f"{name}.{child.name}", (ast.get_docstring(child) or "").strip()
        if len(docstring) >= SHORTEST_DOCSTRING:
            yield _definition(child, full_name, docstring, file, lines)
        if isinstance(child, ast.ClassDef):
            yield from _inside(child, full_name, file, lines)


def _definition(
    node: ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef, name: str, docstring: str, file: str, lines: list[str]
) -> Definition:
    if isinstance(node, ast.ClassDef):
        return Definition(file, name, "class", docstring, "", "", node.lineno)
    first, last = node.lineno - 1, node.end_lineno or node.lineno
    has_body = len(node.body) > 1  # more than the docstring
    source = textwrap.dedent("\n".join(lines[first:last])) if has_body and last - first <= LONGEST_FUNCTION else ""
    return Definition(file, name, "function", docstring, ast.unparse(node.args), source, node.lineno)


def _builtin_docstrings() -> Iterator[tuple[str, str]]:
    """Functions written in C, which no source file documents: (name, docstring)."""
    owners: list[tuple[str, object]] = [("", builtins), *((kind.__name__ + ".", kind) for kind in _BUILTIN_TYPES)]
    for prefix, owner in owners:
        for name in sorted(dir(owner)):
            member = getattr(owner, name)
            # Addresses and site-specific helpers (`exit`, `copyright`) would differ from run to run.
            if name.startswith("_") or not callable(member) or isinstance(member, type) or _is_site_helper(member):
                continue
            docstring = inspect.cleandoc(getattr(member, "__doc__", None) or "")
            if len(docstring) >= SHORTEST_DOCSTRING and not re.search(r"0x[0-9a-f]{6,}", docstring):
                yield prefix + name, docstring


def _is_site_helper(member: object) -> bool:
    return type(member).__module__ == "_sitebuiltins"


def _chosen(name: str) -> bool:
    return hashlib.blake2b(name.encode(), digest_size=1).digest()[0] % _FOLLOW_UP == 0
