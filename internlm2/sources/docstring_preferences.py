"""Preferences that every machine has, derived from the running Python (PSF licence) without a download.

`docstring_preferences`: asked what a function or class does, its docstring is better than that of a sibling in the same
module, and better than its own beginning, cut off in the middle of a sentence. A module's preferences are held out
together with its pages in the other sources.
"""

import hashlib
from collections.abc import Iterator
from pathlib import Path

from internlm2.sources import docstring_questions, stdlib_corpus
from internlm2.sources.docstring_questions import Definition
from internlm2.sources.documents import Answer, Document
from internlm2.sources.preferences import FORMAT, comparison
from internlm2.text.chat import Message

PARTS = ("docstring_preferences",)
DOMAIN = "code"
# Raise when a change below alters the preferences: cached shards of the old kind are then not used.
DERIVATION_VERSION = 1
LONGEST_DOCSTRING = 600  # characters: two in three; longer ones differ in ways that their first lines show already


def folder(part: str) -> Path:
    """Where the preferences come from."""
    return stdlib_corpus.library_folder()


def manifest(part: str) -> str:
    """Hash of all that the preferences are made of."""
    made_of = f"{DERIVATION_VERSION} {FORMAT} {docstring_questions.manifest('functions')} {part}"
    return hashlib.sha256(made_of.encode()).hexdigest()


def input_bytes(part: str) -> int:
    """About how much text there is."""
    return docstring_questions.input_bytes("questions")


def documents(part: str) -> Iterator[Document]:
    """One record for each documented function or class with a docstring of moderate length, in a fixed order."""
    modules: dict[str, list[Definition]] = {}
    for definition in docstring_questions.definitions():
        if len(definition.docstring) <= LONGEST_DOCSTRING:
            modules.setdefault(definition.file, []).append(definition)
    for file, definitions in modules.items():
        docstrings = sorted({definition.docstring for definition in definitions})
        for definition in definitions:
            yield _record(file, definition, docstrings)


def _record(file: str, definition: Definition, docstrings: list[str]) -> Document:
    """`docstrings`: all different ones of the module."""
    answers = [(definition.docstring, 1.0), (_beginning(definition), 0.0)]
    if len(docstrings) > 1:
        own, steps = docstrings.index(definition.docstring), _draw(definition.name, "sibling") % (len(docstrings) - 1)
        answers.append((docstrings[(own + 1 + steps) % len(docstrings)], 0.0))
    return comparison(
        file,
        definition.line,
        [Message("user", definition.question)],
        [Answer((Message("assistant", text),), score) for text, score in answers],
        DOMAIN,
        stdlib_corpus.split_key(file),
    )


def _beginning(definition: Definition) -> str:
    """The first words, between a third and two thirds of them."""
    words = definition.docstring.split(" ")
    least = max(1, len(words) // 3)
    return " ".join(words[: least + _draw(definition.name, "cut") % max(1, least)])


def _draw(name: str, what: str) -> int:
    return int.from_bytes(hashlib.blake2b(f"{what} {name}".encode(), digest_size=6).digest(), "little")
