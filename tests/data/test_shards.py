"""Shards: what was written is what is read, in the same order with any number of processes, and bad records are
named.
"""

import json
import logging

import numpy as np
import pytest

from internlm2.config import ConfigError, SourceConfig
from internlm2.data import encoding
from internlm2.data.shards import Shard, is_complete, shard_of
from internlm2.sources import record_files
from internlm2.sources.source import open_source


@pytest.fixture
def jsonl(tmp_path):
    """120 documents in two files."""
    folder = tmp_path / "in"
    folder.mkdir()
    texts = [f"document {number} " + "lorem ipsum " * (number % 17) for number in range(120)]
    for name, part in (("a.jsonl", texts[:70]), ("b.jsonl", texts[70:])):
        (folder / name).write_text("".join(json.dumps({"text": text}) + "\n" for text in part))
    return folder, texts


def source_of(path, kind="jsonl", **keys):
    return open_source("web", SourceConfig(kind=kind, path=str(path), **keys))


def test_round_trip(jsonl, tokenizer, tmp_path):
    folder, texts = jsonl
    shard = shard_of(source_of(folder), tokenizer, tmp_path / "cache", progress=False)
    assert shard.documents == 120
    assert shard.tokens.dtype == np.uint16
    for number, text in enumerate(texts):
        ids = shard.document(number).tolist()
        assert (ids[0], ids[-1]) == (tokenizer.bos_id, tokenizer.eos_id)
        assert tokenizer.decode(ids) == text
        assert shard.document_bytes[number] == len(text.encode())
    assert shard.offsets[-1] == shard.total_tokens == shard.lengths.sum()
    assert shard.origin(0) == "a.jsonl:1"
    assert shard.origin(75) == "b.jsonl:6"
    assert shard.text_bytes == sum(len(text.encode()) for text in texts)


def test_the_number_of_processes_changes_nothing(jsonl, tokenizer, tmp_path, monkeypatch):
    folder, _ = jsonl
    monkeypatch.setattr(record_files, "RANGE_BYTES", 500)
    one = shard_of(source_of(folder), tokenizer, tmp_path / "one", workers=1, progress=False)
    two = shard_of(source_of(folder), tokenizer, tmp_path / "two", workers=2, progress=False)
    for name in one.meta["sizes"]:
        assert (one.folder / name).read_bytes() == (two.folder / name).read_bytes(), name
    assert one.meta == two.meta


def test_ranges_keep_line_numbers(jsonl, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(record_files, "RANGE_BYTES", 333)
    shard = shard_of(source_of(jsonl[0]), tokenizer, tmp_path / "cache", progress=False)
    assert [shard.origin(number) for number in (0, 69, 70, 119)] == [
        "a.jsonl:1",
        "a.jsonl:70",
        "b.jsonl:1",
        "b.jsonl:50",
    ]


def test_cache_is_used_until_the_content_changes(jsonl, tokenizer, tmp_path, monkeypatch):
    folder, _ = jsonl
    first = shard_of(source_of(folder), tokenizer, tmp_path / "cache", progress=False)
    with monkeypatch.context() as patch:
        patch.setattr(encoding, "encode_unit", None)  # would fail if anything were tokenized
        again = shard_of(source_of(folder), tokenizer, tmp_path / "cache", progress=False)
    assert again.folder == first.folder
    with open(folder / "b.jsonl", "a") as stream:
        stream.write('{"text": "new"}\n')
    changed = shard_of(source_of(folder), tokenizer, tmp_path / "cache", progress=False)
    assert changed.documents == 121
    assert changed.content != first.content


def test_a_damaged_shard_is_made_again(jsonl, tokenizer, tmp_path):
    shard = shard_of(source_of(jsonl[0]), tokenizer, tmp_path / "cache", progress=False)
    content = (shard.folder / "tokens.bin").read_bytes()
    with open(shard.folder / "tokens.bin", "r+b") as stream:
        stream.truncate(10)
    assert not is_complete(shard.folder)
    again = shard_of(source_of(jsonl[0]), tokenizer, tmp_path / "cache", progress=False)
    assert (again.folder / "tokens.bin").read_bytes() == content


def test_bad_records_are_counted_named_and_skipped(tmp_path, tokenizer, caplog, monkeypatch):
    monkeypatch.setattr(record_files, "RANGE_BYTES", 20)
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "good"}\n\nbroken\n{"text": "good too"}\n{"text": ""}\n')
    with caplog.at_level(logging.WARNING):
        shard = shard_of(source_of(path), tokenizer, tmp_path / "cache", progress=False)
    assert shard.documents == 2
    assert shard.meta["bad"] == 2
    assert "2 bad records, a.jsonl:3 (broken JSON" in caplog.text
    assert "a.jsonl:5 (the text is empty)" in caplog.text
    assert shard.origin(1) == "a.jsonl:4"


def test_strict_refuses_bad_records_also_from_the_cache(tmp_path, tokenizer):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "good"}\nbroken\n')
    for cached in (False, True):
        if cached:
            shard_of(source_of(path), tokenizer, tmp_path / "cache", progress=False)
        with pytest.raises(ConfigError, match=r"a\.jsonl:2 \(broken JSON.*data\.strict=false"):
            shard_of(source_of(path), tokenizer, tmp_path / "cache", progress=False, strict=True)


def test_a_source_without_a_usable_document_is_an_error(tmp_path, tokenizer):
    path = tmp_path / "a.jsonl"
    path.write_text("\nbroken\n")
    with pytest.raises(ConfigError, match=r"data\.sources\.web holds no usable document.*a\.jsonl:2"):
        shard_of(source_of(path), tokenizer, tmp_path / "cache", progress=False)
    assert not list((tmp_path / "cache" / "shards").glob("web-*[!k]/"))


def test_internevo_tokens_and_masks(tmp_path, tokenizer):
    path = tmp_path / "x.bin"
    path.write_text('{"tokens": [1, 40, 41, 2]}\n{"tokens": [1, -50, -51, 60, 2]}\n{"tokens": [1, 0, 2]}\n')
    shard = shard_of(source_of(path, "internevo"), tokenizer, tmp_path / "cache", progress=False)
    assert shard.tokens.tolist() == [1, 40, 41, 2, 1, 50, 51, 60, 2, 1, 0, 2]
    assert shard.mask.tolist() == [0, 0, 0, 0, 0, 1, 1, 0, 0, 0, 1, 0]
    assert shard.text_bytes == 0


def test_a_mask_that_begins_late_and_ends_early(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(record_files, "RANGE_BYTES", 1)
    path = tmp_path / "x.bin"
    path.write_text('{"tokens": [1, 40]}\n{"tokens": [1, -5]}\n{"tokens": [1, 41, 2]}\n')
    shard = shard_of(source_of(path, "internevo"), tokenizer, tmp_path / "cache", progress=False)
    assert shard.mask.tolist() == [0, 0, 0, 1, 0, 0, 0]


def test_tokens_of_another_vocabulary_stop_the_run(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(record_files, "RANGE_BYTES", 30)
    path = tmp_path / "x.bin"
    path.write_text('{"tokens": [1, 40, 41, 2]}\n{"tokens": [1, 92543, 2]}\n')
    with pytest.raises(ConfigError, match=r"x\.bin:2 .*92543.*300 ids"):
        shard_of(source_of(path, "internevo"), tokenizer, tmp_path / "cache", progress=False)


def test_hold_out_depends_on_content_alone(tmp_path, tokenizer):
    """Adding documents, other files and other orders moves nothing; exact copies lie on one side."""
    texts = [f"text number {number}" for number in range(400)]

    def sides(name, order):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in order))
        shard = shard_of(source_of(path), tokenizer, tmp_path / "cache", progress=False)
        held = shard.held_out(0.1)
        return {tokenizer.decode(shard.document(number)): bool(held[number]) for number in range(shard.documents)}, held

    first, held = sides("first", texts[:200])
    second, _ = sides("second", [*reversed(texts), *texts[:50]])
    assert all(second[text] == side for text, side in first.items())
    assert 5 <= held.sum() <= 40
    assert not Shard("web", next((tmp_path / "cache" / "shards").glob("web-*[!k]"))).held_out(0.0).any()


def test_content_ignores_file_names_and_ranges(jsonl, tokenizer, tmp_path, monkeypatch):
    """A copy of the data on another machine has the same content hash, so that a run can go on there."""
    folder, texts = jsonl
    first = shard_of(source_of(folder), tokenizer, tmp_path / "cache", progress=False)
    (tmp_path / "all.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    monkeypatch.setattr(record_files, "RANGE_BYTES", 700)
    second = shard_of(source_of(tmp_path / "all.jsonl"), tokenizer, tmp_path / "cache", progress=False)
    assert second.folder != first.folder
    assert second.content == first.content
