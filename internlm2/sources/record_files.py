"""Records in files: JSON lines, JSON arrays, Parquet, plain text, and InternEvo's tokenized `.bin`.

Line-based files are split by byte ranges, so that many processes share one large file; a `.gz` is one unit.
"""

import gzip
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from internlm2.config import ConfigError
from internlm2.sources.documents import BadRecord, Document, RecordError

RANGE_BYTES = 8 << 20


class RecordReader(Protocol):
    """Turns one JSON record or Parquet row into a document; small enough to be sent to a worker process."""

    def document(self, file: str, line: int, record: Any) -> Document:
        """The record that stands at file:line. Raises RecordError."""
        ...


@dataclass(frozen=True, slots=True)
class TextReader:
    """Records with their text under the key `field`."""

    field: str

    def document(self, file: str, line: int, record: Any) -> Document:
        """The text under the key."""
        return Document(file, line, text=_text_of(record, self.field))


@dataclass(slots=True)
class LineUnit:
    """The lines of `path` that start in bytes [start, end); with `end=None` (compressed files) all lines.

    `reader` makes a document of a JSON record; None means InternEvo's `{"tokens": [...]}`.
    """

    path: Path
    name: str
    start: int
    end: int | None
    reader: RecordReader | None
    size: int
    lines: int = 0

    def documents(self) -> Iterator[Document | BadRecord]:
        """One document or bad record for each line that is not blank."""
        self.lines = 0
        for line in self._read_lines():
            self.lines += 1
            content = line.removeprefix(b"\xef\xbb\xbf") if self.start == 0 and self.lines == 1 else line
            if not content.strip():
                continue
            try:
                if self.reader is None:
                    yield Document(self.name, self.lines, tokens=_tokens_of(content))
                else:
                    yield self.reader.document(self.name, self.lines, _parse_json(content))
            except RecordError as error:
                yield BadRecord(self.name, self.lines, str(error))

    def _read_lines(self) -> Iterator[bytes]:
        if self.end is None:
            try:
                with gzip.open(self.path, "rb") as stream:
                    yield from stream
            except (EOFError, zlib.error, gzip.BadGzipFile) as error:
                raise ConfigError(
                    f"{self.path} is truncated or no gzip file after line {self.lines}: {error}"
                ) from error
            return
        with open(self.path, "rb") as stream:
            if self.start:
                stream.seek(self.start - 1)
                stream.readline()  # ends the line that the range before owns
            while stream.tell() < self.end and (line := stream.readline()):
                yield line


@dataclass(slots=True)
class ArrayUnit:
    """A `.json` file that holds one array of records; the line of a document is its place in the array, from 1."""

    path: Path
    name: str
    reader: RecordReader
    size: int
    lines: int = 0

    def documents(self) -> Iterator[Document | BadRecord]:
        """One document or bad record for each element."""
        opener = gzip.open if self.path.suffix == ".gz" else open
        try:
            with opener(self.path, "rb") as stream:
                records = json.loads(stream.read().decode("utf-8-sig"))
        except (ValueError, EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise ConfigError(f"{self.path} is no valid JSON: {error}") from error
        for number, record in enumerate(records, start=1):
            try:
                yield self.reader.document(self.name, number, record)
            except RecordError as error:
                yield BadRecord(self.name, number, str(error))


@dataclass(slots=True)
class ParquetUnit:
    """One row group of a Parquet file; the line of a document is its row in the file, from 1."""

    path: Path
    name: str
    field: str
    row_group: int
    first_row: int
    size: int
    lines: int = 0

    def documents(self) -> Iterator[Document | BadRecord]:
        """One document or bad record for each row, streamed in batches."""
        import pyarrow
        import pyarrow.parquet

        number = self.first_row
        try:
            file = pyarrow.parquet.ParquetFile(self.path)
            for batch in file.iter_batches(batch_size=1024, row_groups=[self.row_group], columns=[self.field]):
                for value in batch.column(0).cast(pyarrow.large_binary()).to_pylist():
                    number += 1
                    try:
                        yield Document(self.name, number, text=_decode(value))
                    except RecordError as error:
                        yield BadRecord(self.name, number, str(error))
        except (OSError, pyarrow.ArrowException) as error:
            raise ConfigError(
                f"{self.path}: row group {self.row_group} cannot be read after row {number}: {error}"
            ) from error


@dataclass(slots=True)
class ParquetRowsUnit:
    """One row group of a Parquet file whose rows are records of several columns; lines as in `ParquetUnit`."""

    path: Path
    name: str
    reader: RecordReader
    row_group: int
    first_row: int
    size: int
    lines: int = 0

    def documents(self) -> Iterator[Document | BadRecord]:
        """One document or bad record for each row, streamed in batches."""
        import pyarrow
        import pyarrow.parquet

        number = self.first_row
        try:
            file = pyarrow.parquet.ParquetFile(self.path)
            for batch in file.iter_batches(batch_size=1024, row_groups=[self.row_group]):
                for record in batch.to_pylist():
                    number += 1
                    try:
                        yield self.reader.document(self.name, number, record)
                    except RecordError as error:
                        yield BadRecord(self.name, number, str(error))
        except (OSError, pyarrow.ArrowException, UnicodeDecodeError) as error:
            raise ConfigError(
                f"{self.path}: row group {self.row_group} cannot be read after row {number}: {error}"
            ) from error


@dataclass(slots=True)
class FilesUnit:
    """Plain-text files, one document each."""

    paths: list[Path]
    names: list[str]
    size: int
    lines: int = 0
    name: str = ""

    def documents(self) -> Iterator[Document | BadRecord]:
        """One document or bad record for each file."""
        for path, name in zip(self.paths, self.names):
            try:
                yield Document(name, text=_decode(path.read_bytes().removeprefix(b"\xef\xbb\xbf")))
            except RecordError as error:
                yield BadRecord(name, 0, str(error))


def line_units(path: Path, name: str, reader: RecordReader | None) -> list[LineUnit]:
    """Units that cover a line-based file."""
    size = path.stat().st_size
    if path.suffix == ".gz":
        return [LineUnit(path, name, 0, None, reader, size)]
    starts = range(0, size, RANGE_BYTES)
    return [
        LineUnit(path, name, start, min(start + RANGE_BYTES, size), reader, min(RANGE_BYTES, size - start))
        for start in starts
    ]


def internevo_units(path: Path, name: str) -> list[LineUnit]:
    """Units of an InternEvo `.bin`; ConfigError where the `.bin.meta` beside it does not fit its content.

    The meta file is an array of (byte offset, tokens) for each line; its last line must end where the file ends.
    """
    meta = path.with_name(path.name + ".meta")
    if meta.is_file() and path.stat().st_size:
        try:
            offsets = np.load(meta, allow_pickle=False)[:, 0]
            with open(path, "rb") as stream:
                stream.seek(int(offsets[-1]))
                line = stream.readline()
                fits = offsets[0] == 0 and line.strip() != b"" and not stream.read(1)
        except (OSError, ValueError, IndexError) as error:
            raise ConfigError(f"{meta} is no array of offsets and lengths: {error}") from error
        if not fits:
            raise ConfigError(
                f"{meta} does not belong to {path} (truncated or changed?): tokenize it again or delete the meta file"
            )
    return line_units(path, name, None)


def json_units(path: Path, name: str, reader: RecordReader | str) -> list[LineUnit] | list[ArrayUnit]:
    """Units of a JSON-lines file, or of a `.json` that holds an array (told by its first character; in a `.jsonl` that
    would be a record). `reader`: or the key of the text.
    """
    reader = TextReader(reader) if isinstance(reader, str) else reader
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rb") as stream:
            head = stream.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ConfigError(f"{path} is truncated or no gzip file: {error}") from error
    if head[:1] == b"[" and ".json" in path.suffixes:
        return [ArrayUnit(path, name, reader, path.stat().st_size)]
    return line_units(path, name, reader)


def parquet_units(path: Path, name: str, reader: RecordReader | str) -> list[ParquetUnit] | list[ParquetRowsUnit]:
    """One unit for each row group; ConfigError where the file is no Parquet or lacks the text column of a `TextReader`.

    `reader`: or the name of that column.
    """
    reader = TextReader(reader) if isinstance(reader, str) else reader
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
    except (OSError, pyarrow.ArrowException) as error:
        raise ConfigError(f"{path} is no readable Parquet file: {error}") from error
    groups, row = [], 0  # (row group, first row, bytes)
    for group in range(file.num_row_groups):
        metadata = file.metadata.row_group(group)
        if metadata.num_rows:
            groups.append((group, row, metadata.total_byte_size))
        row += metadata.num_rows
    if isinstance(reader, TextReader):
        _check_text_column(path, reader.field, file.schema_arrow)
        return [ParquetUnit(path, name, reader.field, *group) for group in groups]
    return [ParquetRowsUnit(path, name, reader, *group) for group in groups]


def _check_text_column(path: Path, field: str, schema: Any) -> None:
    import pyarrow

    if field not in schema.names:
        raise ConfigError(f"{path} has no column {field!r}: set field to one of {', '.join(schema.names)}")
    kind = schema.field(field).type
    if not any(
        test(kind) for test in (pyarrow.types.is_string, pyarrow.types.is_large_string, pyarrow.types.is_binary)
    ):
        raise ConfigError(f"{path}: column {field!r} holds {kind}, not text")


def files_units(paths: list[Path], names: list[str]) -> list[FilesUnit]:
    """Units of about `RANGE_BYTES` out of many text files."""
    units: list[FilesUnit] = []
    for path, name in zip(paths, names):
        size = path.stat().st_size
        if not units or units[-1].size + size > RANGE_BYTES:
            units.append(FilesUnit([], [], 0))
        units[-1].paths.append(path)
        units[-1].names.append(name)
        units[-1].size += size
    return units


def _decode(content: bytes | None) -> str:
    if content is None:
        raise RecordError("the text is null")
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RecordError(f"invalid UTF-8 at byte {error.start}") from error
    return _checked(text)


def _checked(text: str) -> str:
    if not text.strip():
        raise RecordError("the text is empty")
    if not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise RecordError(f"a lone surrogate at character {error.start} is no valid Unicode") from error
    return text


def _parse_json(line: bytes) -> Any:
    try:
        return json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise RecordError(f"invalid UTF-8 at byte {error.start}") from error
    except (ValueError, RecursionError) as error:
        raise RecordError(f"broken JSON: {error}") from error


def _text_of(record: Any, field: str) -> str:
    if not isinstance(record, dict):
        raise RecordError(f"a record must be an object with the key {field!r}, not {type(record).__name__}")
    if field not in record:
        raise RecordError(f"no key {field!r}")
    if not isinstance(record[field], str):
        raise RecordError(f"{field!r} must be text, not {type(record[field]).__name__}")
    return _checked(record[field])


def _tokens_of(line: bytes) -> list[int]:
    record = _parse_json(line)
    tokens = record.get("tokens") if isinstance(record, dict) else None
    if not isinstance(tokens, list):
        raise RecordError("no list under the key 'tokens'")
    if not tokens:
        raise RecordError("the list of tokens is empty")
    if not all(type(token) is int for token in tokens):
        raise RecordError("'tokens' must hold integers only")
    return tokens
