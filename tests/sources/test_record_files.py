"""Reading records: good ones in order, bad ones named with file and line, and no difference however a file is
divided.
"""

import gzip
import json

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from internlm2.config import ConfigError
from internlm2.sources import record_files
from internlm2.sources.documents import BadRecord, Document
from internlm2.sources.record_files import TextReader, files_units, internevo_units, json_units, parquet_units


def read(units):
    """(line, text or reason) of everything, with line numbers made absolute as the shard writer does."""
    found, before = [], 0
    for unit in units:
        for item in unit.documents():
            value = item.reason if isinstance(item, BadRecord) else item.text if item.text is not None else item.tokens
            found.append((item.line + before, isinstance(item, Document), value))
        before += unit.lines
    return found


BAD_LINES = [
    (b'{"text": "broken"', "broken JSON"),
    (b'{"body": "x"}', "no key 'text'"),
    (b'{"text": 5}', "'text' must be text, not int"),
    (b'{"text": null}', "'text' must be text, not NoneType"),
    (b'{"text": "  \\n"}', "the text is empty"),
    (b'["text"]', "a record must be an object with the key 'text', not list"),
    (b'{"text": "\xff\xfe"}', "invalid UTF-8 at byte 10"),
    (b'{"text": "a\\ud800b"}', "a lone surrogate at character 1"),
    (b"[" * 100_000, "broken JSON"),
]


def test_bad_lines_are_named_and_good_ones_kept(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(
        b'{"text": "first"}\n' + b"\n".join(line for line, _ in BAD_LINES) + b'\n\n{"text": "last \xe4\xbd\xa0"}'
    )
    found = read(json_units(path, "a.jsonl", "text"))
    assert found[0] == (1, True, "first")
    assert found[-1] == (len(BAD_LINES) + 3, True, "last 你")
    for number, ((_, reason), (line, good, got)) in enumerate(zip(BAD_LINES, found[1:-1]), start=2):
        assert (line, good) == (number, False)
        assert reason in got
    assert len(found) == len(BAD_LINES) + 2


@settings(max_examples=60, deadline=None)
@given(
    lines=st.lists(st.binary(max_size=12).map(lambda raw: raw.replace(b"\n", b"").replace(b"\r", b"")), max_size=30),
    size=st.integers(1, 40),
    final=st.booleans(),
)
def test_any_division_into_ranges_reads_the_same(tmp_path_factory, lines, size, final):
    path = tmp_path_factory.mktemp("ranges") / "a.jsonl"
    content = b"\n".join(json.dumps({"text": "t" + line.hex()}).encode() if line else b"" for line in lines)
    path.write_bytes(content + (b"\n" if final else b""))
    whole = read(record_files.line_units(path, "a", TextReader("text")))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(record_files, "RANGE_BYTES", size)
        assert read(record_files.line_units(path, "a", TextReader("text"))) == whole
    assert [value for _, _, value in whole] == ["t" + line.hex() for line in lines if line]


def test_gzip_equals_plain(tmp_path):
    content = b'{"text": "one"}\nbroken\n{"text": "two"}\n'
    (tmp_path / "a.jsonl").write_bytes(content)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(content))
    assert read(json_units(tmp_path / "a.jsonl.gz", "a", "text")) == read(json_units(tmp_path / "a.jsonl", "a", "text"))


def test_truncated_gzip_is_an_error(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(b"".join(b'{"text": "%d"}\n' % number for number in range(5000)))[:-2000])
    with pytest.raises(ConfigError, match="truncated"):
        read(json_units(path, "a", "text"))


def test_byte_order_mark_and_windows_line_ends(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "one"}\r\n{"text": "two"}\r\n')
    assert read(json_units(path, "a", "text")) == [(1, True, "one"), (2, True, "two")]


def test_json_array(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps([{"text": "one"}, {"title": "x"}, {"text": "three"}], indent=2))
    assert read(json_units(path, "a", "text")) == [(1, True, "one"), (2, False, "no key 'text'"), (3, True, "three")]
    path.write_text("[1, 2")
    with pytest.raises(ConfigError, match="no valid JSON"):
        read(json_units(path, "a", "text"))


def test_parquet_streams_row_groups(tmp_path):
    path = tmp_path / "a.parquet"
    texts = ["one", None, "three", "", "five"]
    pyarrow.parquet.write_table(pyarrow.table({"content": texts, "id": range(5)}), path, row_group_size=2)
    units = parquet_units(path, "a.parquet", "content")
    assert len(units) == 3
    expected = [(1, True, "one"), (2, False, "the text is null"), (3, True, "three"), (4, False, "the text is empty")]
    assert read(units) == [*expected, (5, True, "five")]


def test_parquet_errors(tmp_path):
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"id": [1, 2]}), path)
    with pytest.raises(ConfigError, match=r"no column 'text'.*id"):
        parquet_units(path, "a", "text")
    with pytest.raises(ConfigError, match="holds int64, not text"):
        parquet_units(path, "a", "id")
    path.write_bytes(b"PAR1 not really")
    with pytest.raises(ConfigError, match="no readable Parquet"):
        parquet_units(path, "a", "text")


def test_text_files(tmp_path, monkeypatch):
    monkeypatch.setattr(record_files, "RANGE_BYTES", 10)
    contents = {"a.txt": b"first file", "b.txt": b"\xff", "c.txt": "三".encode(), "d.txt": b" \n"}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    units = files_units([tmp_path / name for name in contents], list(contents))
    assert len(units) == 2
    items = [item for unit in units for item in unit.documents()]
    assert [item.file for item in items] == list(contents)
    assert [item.text for item in items if isinstance(item, Document)] == ["first file", "三"]
    assert [item.place for item in items if isinstance(item, BadRecord)] == ["b.txt", "d.txt"]


def write_internevo(path, rows):
    """As InternEvo's tools write it: JSON lines and an array of (byte offset, number of tokens)."""
    meta, at = [], 0
    with open(path, "wb") as stream:
        for tokens in rows:
            line = json.dumps({"tokens": tokens}).encode() + b"\n"
            stream.write(line)
            meta.append((at, len(tokens)))
            at += len(line)
    with open(f"{path}.meta", "wb") as stream:
        np.save(stream, meta)


def test_internevo_files(tmp_path):
    path = tmp_path / "x.bin"
    write_internevo(path, [[1, 5, -6, 2], [1, 7, 2]])
    assert read(internevo_units(path, "x.bin")) == [(1, True, [1, 5, -6, 2]), (2, True, [1, 7, 2])]


def test_internevo_bad_lines(tmp_path):
    path = tmp_path / "x.bin"
    path.write_bytes(b'{"tokens": []}\n{"tokens": [1, 2.5]}\n{"ids": [1]}\n{"tokens": [true]}\n{"tokens": [3]}\n')
    found = read(internevo_units(path, "x.bin"))
    assert [good for _, good, _ in found] == [False, False, False, False, True]
    assert "empty" in found[0][2]
    assert "integers only" in found[1][2]


def test_internevo_meta_of_another_file_is_refused(tmp_path):
    path = tmp_path / "x.bin"
    write_internevo(path, [[1, 5, 2], [1, 7, 2]])
    with open(path, "ab") as stream:
        stream.write(b'{"tokens": [1]}\n')
    with pytest.raises(ConfigError, match="does not belong"):
        internevo_units(path, "x.bin")
    (tmp_path / "x.bin.meta").write_bytes(b"nonsense")
    with pytest.raises(ConfigError, match="no array of offsets"):
        internevo_units(path, "x.bin")
