"""Wrong data configs fail early, with a sentence that names the key; file order never depends on the file system."""

import subprocess
import sys

import pytest

from internlm2.config import ConfigError, DataConfig, SourceConfig, TokenizerConfig
from internlm2.sources.source import check_sources, open_source


def config(tmp_path, sources, weights=None, **tokenizer):
    settings = {"kind": "train", "path": None, "vocab_size": 300, "train_bytes": 1000} | tokenizer
    return DataConfig(
        name="test",
        tokenizer=TokenizerConfig(**settings),
        sources=sources,
        weights=weights if weights is not None else {"pretrain_4k": dict.fromkeys(sources, 1.0)},
        length_buckets=[],
        packing="best_fit",
        validation_fraction=0.0,
        cache_dir=str(tmp_path / "cache"),
        workers=1,
        strict=False,
        on_change="refuse",
    )


def source(path, kind="jsonl"):
    return SourceConfig(kind=kind, path=str(path))


def test_good_config_passes(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n')
    assert check_sources(config(tmp_path, {"web": source(tmp_path / "a.jsonl")})) is None


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: SourceConfig(kind="jsonl", path=str(p / "absent.jsonl")), r"data\.sources\.web\.path: there is no"),
        (lambda p: SourceConfig(kind="jsonl", path=str(p / "*.jsonl.zst")), r"there is no file or folder"),
        (lambda p: SourceConfig(kind="jsonl", path=str(p / "none")), r"folder .* holds no \.jsonl"),
        (lambda p: SourceConfig(kind="parquet", path=str(p / "a.csv")), r"a\.csv must end in \.parquet"),
        (lambda p: SourceConfig(kind="jsonl", path=str(p / "empty.jsonl")), "is empty"),
        (lambda p: SourceConfig(kind="jsonl", path=None), "kind=jsonl needs path"),
        (lambda p: SourceConfig(kind="stdlib"), "kind=stdlib needs part"),
        (lambda p: SourceConfig(kind="csv", path=str(p)), r"kind=csv: must be one of jsonl, parquet"),
    ],
)
def test_unreadable_sources(tmp_path, make, message):
    (tmp_path / "none").mkdir()
    (tmp_path / "a.csv").write_text("x")
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(ConfigError, match=message):
        check_sources(config(tmp_path, {"web": make(tmp_path)}))


def test_wrong_names_weights_and_tokenizers(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n')
    web = {"web": source(tmp_path / "a.jsonl")}
    with pytest.raises(ConfigError, match=r"data\.sources is empty"):
        check_sources(config(tmp_path, {}))
    with pytest.raises(
        ConfigError, match=r"data\.weights\.enhance\.books: there is no such source; data\.sources has web"
    ):
        check_sources(config(tmp_path, web, {"pretrain_4k": {"web": 1.0}, "enhance": {"books": 1.0}}))
    with pytest.raises(ConfigError, match="all weights are zero"):
        check_sources(config(tmp_path, web, {"pretrain_4k": {"web": 0.0}}))
    with pytest.raises(ConfigError, match="part of a file name"):
        check_sources(config(tmp_path, {"a/b": web["web"]}))
    with pytest.raises(ConfigError, match=r"needs data\.tokenizer\.path"):
        check_sources(config(tmp_path, web, kind="sentencepiece"))
    with pytest.raises(ConfigError, match=r"data\.tokenizer\.path=/nowhere/x\.model: no such file or folder"):
        check_sources(config(tmp_path, web, kind="sentencepiece", path="/nowhere/x.model"))
    with pytest.raises(ConfigError, match=r"needs data\.tokenizer\.vocab_size"):
        check_sources(config(tmp_path, web, vocab_size=None))


def test_tokens_alone_cannot_train_a_tokenizer(tmp_path):
    (tmp_path / "x.bin").write_text('{"tokens": [1]}\n')
    with pytest.raises(ConfigError, match="every source holds tokens"):
        check_sources(config(tmp_path, {"en": source(tmp_path / "x.bin", "internevo")}))


def test_files_come_in_the_order_of_their_names(tmp_path):
    for name in ("b/2.jsonl", "a/9.jsonl", "a/10.jsonl", "c.json", ".hidden/x.jsonl", "b/skip.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text('{"text": "x"}\n')
    found = open_source("web", source(tmp_path))
    assert [path.relative_to(found.base).as_posix() for path in found.files] == [
        "a/10.jsonl",
        "a/9.jsonl",
        "b/2.jsonl",
        "c.json",
    ]
    pattern = open_source("web", source(tmp_path / "*" / "*.jsonl"))
    assert [path.relative_to(pattern.base).as_posix() for path in pattern.files] == [
        "a/10.jsonl",
        "a/9.jsonl",
        "b/2.jsonl",
    ]
    text = open_source("web", source(tmp_path / "b" / "*", "text"))
    assert [path.name for path in text.files] == ["2.jsonl", "skip.txt"]


def test_manifest_follows_content_and_names_alone(tmp_path):
    def manifest(folder, content):
        folder.mkdir()
        (folder / "a.jsonl").write_text(content)
        return open_source("web", source(folder)).manifest()

    one = manifest(tmp_path / "one", '{"text": "x"}\n')
    assert manifest(tmp_path / "two", '{"text": "x"}\n') == one
    assert manifest(tmp_path / "three", '{"text": "y"}\n') != one


def test_large_files_are_sampled(tmp_path, monkeypatch):
    from internlm2.sources import source as module

    monkeypatch.setattr(module, "HASH_WHOLE_BYTES", 10)
    monkeypatch.setattr(module, "_SAMPLE_BYTES", 4)
    path = tmp_path / "a.jsonl"
    path.write_bytes(bytes(range(200)))
    before = open_source("web", source(path)).manifest()
    assert open_source("web", source(path)).manifest() == before
    path.write_bytes(bytes(range(199)) + b"\0")
    assert open_source("web", source(path)).manifest() != before


def test_checking_imports_nothing_heavy():
    """The entry calls check_sources before it imports torch."""
    code = (
        "import sys; import internlm2.sources.source; "
        "print([name for name in ('torch', 'transformers', 'pyarrow', 'sentencepiece', 'rich') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
