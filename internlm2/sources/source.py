"""The sources that a config names: where their documents are, whether they can be read, and what identifies their
content.
"""

import glob
import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from internlm2.config import ConfigError, DataConfig, SourceConfig
from internlm2.sources import (
    dialog_packages,
    docstring_preferences,
    docstring_questions,
    needles,
    record_files,
    stdlib_corpus,
    toy_language,
)
from internlm2.sources.conversations import ConversationReader
from internlm2.sources.documents import Document, MemoryUnit, Unit
from internlm2.sources.preferences import FORMAT as PREFERENCE_FORMAT
from internlm2.sources.preferences import PreferenceReader
from internlm2.text.chat import FORMAT as CHAT_FORMAT

SUFFIXES = {
    "jsonl": (".jsonl", ".json", ".jsonl.gz", ".json.gz", ".ndjson", ".ndjson.gz"),
    "parquet": (".parquet",),
    "text": (".txt", ".md", ".rst"),
    "internevo": (".bin",),
    "conversations": (".jsonl", ".json", ".jsonl.gz", ".json.gz", ".ndjson", ".ndjson.gz", ".parquet"),
    "preferences": (".jsonl", ".json", ".jsonl.gz", ".json.gz", ".ndjson", ".ndjson.gz", ".parquet"),
}
# Kinds without files, and the module that makes the documents of their parts.
MADE = {
    "stdlib": {
        **dict.fromkeys(("code", "packages", "prose", "docstrings"), stdlib_corpus),
        **dict.fromkeys(docstring_questions.PARTS, docstring_questions),
        **dict.fromkeys(docstring_preferences.PARTS, docstring_preferences),
    },
    "package": dict.fromkeys(dialog_packages.PARTS, dialog_packages),
    "toy": dict.fromkeys(toy_language.PARTS, toy_language),
    "needles": dict.fromkeys(needles.PARTS, needles),
}
# Files up to this size are hashed whole; of larger ones samples, the size and the time of change decide whether they
# are the same.
HASH_WHOLE_BYTES = 64 << 20
_SAMPLE_BYTES = 1 << 20
_UNIT_CHARACTERS = 1 << 20


@dataclass(frozen=True)
class Source:
    """One named source of documents."""

    name: str
    kind: str
    part: str | None
    field: str
    files: tuple[Path, ...]
    base: Path
    format: str = "auto"
    domain: str = "default"

    def units(self) -> list[Unit]:
        """Everything in the source as units of work, in an order that depends on the names of the files only."""
        if self.part is not None:
            return list(_memory_units(MADE[self.kind][self.part].documents(self.part)))
        names = [path.relative_to(self.base).as_posix() for path in self.files]
        if self.kind == "text":
            return list(record_files.files_units(list(self.files), names))
        units: list[Unit] = []
        reader: record_files.RecordReader = record_files.TextReader(self.field)
        if self.kind == "conversations":
            reader = ConversationReader(self.format)
        elif self.kind == "preferences":
            reader = PreferenceReader(self.domain)
        for path, name in zip(self.files, names):
            if self.kind != "internevo" and path.suffix == ".parquet":
                units.extend(record_files.parquet_units(path, name, reader))
            elif self.kind != "internevo":
                units.extend(record_files.json_units(path, name, reader))
            else:
                units.extend(record_files.internevo_units(path, name))
        return units

    def manifest(self) -> str:
        """Hash of the content that the documents are made of, and of how they are read."""
        digest = hashlib.sha256(f"{self.kind} {self.part} {self.field}\n".encode())
        if self.kind == "conversations":
            digest.update(f"{self.format} {CHAT_FORMAT}\n".encode())
        elif self.kind == "preferences":
            digest.update(f"{self.domain} {CHAT_FORMAT} {PREFERENCE_FORMAT}\n".encode())
        if self.part is not None:
            digest.update(MADE[self.kind][self.part].manifest(self.part).encode())
        for path in self.files:
            digest.update(f"{path.relative_to(self.base).as_posix()} {_file_digest(path)}\n".encode())
        return digest.hexdigest()

    def input_bytes(self) -> int:
        """About how many bytes of input the source has (compressed size where it is compressed)."""
        if self.part is not None:
            return MADE[self.kind][self.part].input_bytes(self.part)
        return sum(path.stat().st_size for path in self.files)


def open_source(name: str, config: SourceConfig) -> Source:
    """Resolve one entry of `data.sources`; ConfigError where there is nothing to read."""
    key = f"data.sources.{name}"
    if not re.fullmatch(r"[\w-][\w.-]*", name):
        raise ConfigError(f"{key}: the name of a source becomes part of a file name; use letters, digits, - . and _")
    if config.kind in MADE:
        if config.part not in MADE[config.kind]:
            raise ConfigError(f"{key}: kind={config.kind} needs part, one of {', '.join(MADE[config.kind])}")
        folder = MADE[config.kind][config.part].folder(config.part)
        return Source(name, config.kind, config.part, config.field, (), folder)
    if config.kind not in SUFFIXES:
        raise ConfigError(f"{key}.kind={config.kind}: must be one of {', '.join((*SUFFIXES, *MADE))}")
    if config.path is None:
        raise ConfigError(f"{key}: kind={config.kind} needs path: a file, a folder or a pattern such as /data/*.jsonl")
    files, base = _find_files(key, config.path, config.kind)
    return Source(name, config.kind, None, config.field, tuple(files), base, config.format, config.domain)


def open_sources(config: DataConfig) -> dict[str, Source]:
    """All sources of a config by name."""
    if not config.sources:
        raise ConfigError("data.sources is empty: name at least one source of documents")
    return {name: open_source(name, source) for name, source in config.sources.items()}


def check_sources(config: DataConfig) -> None:
    """Fail early: paths, suffixes, empty files, weights of unknown sources, the tokenizer's file. Reads no
    documents; imports nothing heavy.
    """
    open_sources(config)
    for stage, weights in config.weights.items():
        check_weights(weights, config.sources, f"data.weights.{stage}")
    tokenizer = config.tokenizer
    if tokenizer.kind == "train":
        if tokenizer.vocab_size is None:
            raise ConfigError("data.tokenizer.kind=train needs data.tokenizer.vocab_size")
        if all(source.kind == "internevo" for source in config.sources.values()):
            raise ConfigError(
                "data.tokenizer.kind=train needs text, and every source holds tokens: give the tokenizer that made them"
            )
    elif tokenizer.kind in ("inherit", "toy"):
        return  # the stage puts the file of the inherited weights in its place, or writes the one of the toy language
    elif tokenizer.path is None:
        raise ConfigError(f"data.tokenizer.kind={tokenizer.kind} needs data.tokenizer.path, the tokenizer's file")
    elif not Path(tokenizer.path).expanduser().exists():
        raise ConfigError(f"data.tokenizer.path={tokenizer.path}: no such file or folder")


def check_weights(weights, sources, key: str) -> None:
    """Weights are non-negative, of known sources, and not all zero."""
    for name, weight in weights.items():
        if name not in sources:
            raise ConfigError(f"{key}.{name}: there is no such source; data.sources has {', '.join(sources)}")
        if weight < 0:
            raise ConfigError(f"{key}.{name}={weight}: a weight is a share of the tokens and cannot be negative")
    if not any(weight > 0 for weight in weights.values()):
        raise ConfigError(f"{key}: all weights are zero; give at least one of {', '.join(sources)} a positive weight")


def _find_files(key: str, path: str, kind: str) -> tuple[list[Path], Path]:
    """Files that a path, folder or pattern names, in the order of their names, and the folder that names are
    relative to.
    """
    place = Path(path).expanduser()
    suffixes = SUFFIXES[kind]
    if place.is_dir():
        found = sorted(
            file
            for file in place.rglob("*")
            if file.is_file() and file.name.endswith(suffixes) and not _hidden(file, place)
        )
        base = place
        if not found:
            raise ConfigError(f"{key}.path: the folder {path} holds no {' or '.join(suffixes)} file")
    elif place.is_file():
        found, base = [place], place.parent
    else:
        found = sorted(Path(name) for name in glob.glob(str(place), recursive=True) if Path(name).is_file())
        base = _fixed_part(place)
        if not found:
            raise ConfigError(f"{key}.path: there is no file or folder {path}")
    if kind != "text":
        for file in found:
            if not file.name.endswith(suffixes):
                raise ConfigError(f"{key}.path: {file} must end in {', '.join(suffixes)} for kind={kind}")
    if not any(file.stat().st_size for file in found):
        raise ConfigError(f"{key}.path: {path} is empty")
    return sorted(found, key=lambda file: file.relative_to(base).as_posix()), base


def _hidden(file: Path, base: Path) -> bool:
    return any(part.startswith(".") for part in file.relative_to(base).parts)


def _fixed_part(pattern: Path) -> Path:
    """The folders of a pattern before its first wildcard."""
    fixed = []
    for part in pattern.parts[:-1]:
        if glob.has_magic(part):
            break
        fixed.append(part)
    return Path(*fixed)


def _memory_units(documents: Iterator[Document]) -> Iterator[MemoryUnit]:
    items: list[Document] = []
    size = 0
    for document in documents:
        items.append(document)
        size += len(document.plain_text or "")
        if size >= _UNIT_CHARACTERS:
            yield MemoryUnit(items, size)
            items, size = [], 0
    if items:
        yield MemoryUnit(items, size)


def _file_digest(path: Path) -> str:
    status = path.stat()
    digest = hashlib.sha256(str(status.st_size).encode())
    with open(path, "rb") as stream:
        if status.st_size <= HASH_WHOLE_BYTES:
            for block in iter(lambda: stream.read(_SAMPLE_BYTES), b""):
                digest.update(block)
            return digest.hexdigest()
        digest.update(str(status.st_mtime_ns).encode())
        for sample in range(16):
            stream.seek((status.st_size - _SAMPLE_BYTES) * sample // 15)
            digest.update(stream.read(_SAMPLE_BYTES))
    return digest.hexdigest()
