"""From a data config to tokenizer and corpus, and the YAML files in conf/data."""

import json
from pathlib import Path

import pytest
import yaml
from omegaconf import OmegaConf

from internlm2.config import ConfigError, DataConfig, LengthBucketConfig, SourceConfig, TokenizerConfig
from internlm2.data import prepare as room
from internlm2.data.prepare import prepare, sample_texts
from internlm2.data.stream import TokenStream
from internlm2.sources.source import open_source

CONF = Path(__file__).resolve().parents[2] / "conf" / "data"


def make_config(tmp_path, **keys):
    texts = [
        f"def function_{number}(argument):\n    return argument + {number}\n" * (number % 9 + 1) for number in range(80)
    ]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (tmp_path / "b.txt").write_text("The quick brown fox jumps over the lazy dog.\n" * 40)
    settings = {
        "name": "test",
        "tokenizer": TokenizerConfig(kind="train", path=None, vocab_size=320, train_bytes=20_000),
        "sources": {
            "code": SourceConfig(kind="jsonl", path=str(tmp_path / "a.jsonl")),
            "prose": SourceConfig(kind="text", path=str(tmp_path / "b.txt")),
        },
        "weights": {"pretrain_4k": {"code": 0.8, "prose": 0.2}},
        "length_buckets": [LengthBucketConfig(weight=1.0)],
        "packing": "best_fit",
        "validation_fraction": 0.1,
        "cache_dir": str(tmp_path / "cache"),
        "workers": 1,
        "strict": True,
        "on_change": "refuse",
    }
    return OmegaConf.structured(DataConfig(**{**settings, **keys}))


def test_from_config_to_batches(tmp_path):
    config = make_config(tmp_path)
    tokenizer, corpus = prepare(config, 320, progress=False)
    assert tokenizer.vocab_size == 320
    assert corpus.source_names == ["code", "prose"]
    stream = TokenStream(corpus, config.weights.pretrain_4k, 64, config.packing, config.length_buckets, 0)
    batch = stream.batch(range(4))
    assert int(batch.ids.max()) < 320
    assert "function_" in tokenizer.decode(batch.ids.tolist())
    assert corpus.bytes_per_token("code") > 1.3


def test_everything_is_cached(tmp_path, monkeypatch):
    config = make_config(tmp_path)
    tokenizer, corpus = prepare(config, 320, progress=False)

    def fail(*_, **__):
        raise AssertionError("made again")

    monkeypatch.setattr(room, "train_model", fail)
    monkeypatch.setattr("internlm2.data.shards.encode_units", fail)
    again_tokenizer, again = prepare(config, 320, progress=False)
    assert again_tokenizer.fingerprint == tokenizer.fingerprint
    weights = config.weights.pretrain_4k
    assert TokenStream(again, weights, 64).fingerprint == TokenStream(corpus, weights, 64).fingerprint


def test_a_subset_of_the_sources_has_the_same_tokenizer(tmp_path):
    config = make_config(tmp_path)
    tokenizer, corpus = prepare(config, 320, progress=False, sources=["code"])
    assert corpus.source_names == ["code"]
    assert prepare(config, 320, progress=False)[0].fingerprint == tokenizer.fingerprint
    with pytest.raises(ConfigError, match="no source 'web'"):
        prepare(config, 320, progress=False, sources=["web"])


def test_a_tokenizer_larger_than_the_model_is_refused(tmp_path):
    with pytest.raises(
        ConfigError, match=r"has 320 ids but model\.vocab_size=300: set model\.vocab_size to at least 320"
    ):
        prepare(make_config(tmp_path), 300, progress=False)


def test_official_tokenizer_by_path(tmp_path, shared_data):
    path = shared_data / "internlm2-tokenizer" / "tokenizer_internlm2.model"
    settings = TokenizerConfig(kind="sentencepiece", path=str(path), vocab_size=None, train_bytes=1)
    tokenizer, corpus = prepare(make_config(tmp_path, tokenizer=settings), 92544, progress=False)
    assert corpus.shards["code"].tokens.dtype.itemsize == 4
    assert tokenizer.decode(corpus.shards["prose"].document(0)).startswith("The quick brown fox")


def test_the_sample_is_shared_out_and_leaves_out_held_out_documents(tmp_path):
    (tmp_path / "small.txt").write_text("s" * 1000)
    (tmp_path / "large.jsonl").write_text(
        "".join(json.dumps({"text": f"{number:05d} " * 50}) + "\n" for number in range(500))
    )
    sources = [
        open_source("small", SourceConfig(kind="text", path=str(tmp_path / "small.txt"))),
        open_source("large", SourceConfig(kind="jsonl", path=str(tmp_path / "large.jsonl"))),
    ]
    texts = list(sample_texts(sources, 10_000, 0.0))
    assert texts.count("s" * 1000) == 1
    assert 10_000 <= sum(map(len, texts)) < 10_300
    whole = list(sample_texts(sources, 10**9, 0.0))
    part = list(sample_texts(sources, 10**9, 0.3))
    assert len(whole) == 501
    assert 300 <= len(part) <= 400
    assert set(part) < set(whole)


@pytest.mark.parametrize("path", sorted(CONF.glob("*.yaml")), ids=lambda path: path.stem)
def test_conf_files_fit_the_schema(path):
    content = yaml.safe_load(path.read_text())
    content["tokenizer"]["vocab_size"] = 4096 if content["tokenizer"]["kind"] == "train" else None
    assert content["cache_dir"] == "${root}/cache"
    content["cache_dir"] = "cache"
    config = OmegaConf.merge(OmegaConf.structured(DataConfig), content)
    assert not OmegaConf.missing_keys(config)
    assert config.name == path.stem
    for stage in config.weights:
        assert set(config.weights[stage]) <= set(config.sources)
        if stage not in ("rm", "audit", "conflict"):  # passes over pairs, not shares
            assert sum(config.weights[stage].values()) == pytest.approx(1)
    comments = [line for line in path.read_text().splitlines() if line.lstrip().startswith("#")]
    assert len(comments) >= 4


@pytest.mark.slow
def test_the_default_corpus(tmp_path):
    """The stdlib corpus at its own settings: every stage's mixture has documents, long rows exist, and the hold-out
    is no stage's text.
    """
    content = yaml.safe_load((CONF / "stdlib.yaml").read_text())
    content["tokenizer"]["vocab_size"] = 4096
    content["cache_dir"] = str(tmp_path)
    config = OmegaConf.merge(OmegaConf.structured(DataConfig), content)
    tokenizer, corpus = prepare(config, 4096, progress=False)
    assert sum(shard.total_tokens for shard in corpus.shards.values()) > 4_000_000
    buckets = [LengthBucketConfig(weight=0.5, max_tokens=4096), LengthBucketConfig(weight=0.5, min_tokens=4096)]
    stream = TokenStream(corpus, config.weights.pretrain_32k, 32768, config.packing, buckets, 0)
    tokens = {True: 0, False: 0}
    for position in range(400):
        row = stream[position]
        lengths = corpus.shards[stream.source_names[row.sources[0]]].lengths[row.documents]
        tokens[bool((lengths < 4096).all())] += row.tokens
    assert abs(tokens[True] / sum(tokens.values()) - 0.5) < 0.02
    assert all(len(corpus.held_out_documents(source)) for source in corpus.source_names)
    sample = tokenizer.decode(stream[0].ids[: stream[0].cu_seqlens[1]])
    assert len(sample) > 1000
