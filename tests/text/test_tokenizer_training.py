"""A vocabulary trained in the run: layout, determinism, and what it must be able to spell."""

import inspect

import pytest
import sentencepiece

from internlm2.config import ConfigError
from internlm2.text.sentencepiece_tokenizer import SentencePieceTokenizer
from internlm2.text.tokenizer import MARKERS
from internlm2.text.tokenizer_training import train_model


@pytest.fixture(scope="module")
def texts():
    return [inspect.getsource(inspect), "x = 1234567 + 89\n" * 50, "中文 text with rare characters 龘\n" * 20]


@pytest.fixture(scope="module")
def trained(texts, tmp_path_factory):
    path = tmp_path_factory.mktemp("trained") / "tokenizer.model"
    path.write_bytes(train_model(texts, 1000))
    return SentencePieceTokenizer(path)


def test_layout(trained):
    assert trained.vocab_size == 1000
    assert (trained.bos_id, trained.eos_id) == (1, 2)
    assert [trained.special_ids[name] for name in MARKERS] == list(range(993, 1000))
    assert trained.special_ids["<|im_start|>"] == 999  # highest, as in the official vocabulary
    assert trained.special_ids["<|reward|>"] == 993
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(trained.path))
    assert [pieces.id_to_piece(token) for token in range(3)] == ["<unk>", "<s>", "</s>"]
    assert [pieces.id_to_piece(3 + byte) for byte in (0, 255)] == ["<0x00>", "<0xFF>"]


def test_same_texts_give_the_same_bytes(texts, trained):
    assert train_model(iter(texts), 1000) == trained.path.read_bytes()


@pytest.mark.parametrize(
    "text", ["    if x:\n\t\treturn\r\n", "你好 😀 \u2581 \x00", "<|im_start|>system</s>", "  two  ", "𝔘𝔫𝔦"]
)
def test_round_trip(trained, text):
    ids = trained.encode(text)
    assert trained.decode(ids) == text
    assert 0 not in ids
    assert not set(ids) & set(trained.special_ids.values())


def test_digits_are_single(trained):
    assert [trained.decode([token]) for token in trained.encode("x1234567")][1:] == list("1234567")


def test_indentation_becomes_few_pieces(trained):
    assert len(trained.encode("        ")) <= 2


def test_impossible_sizes_are_explained():
    with pytest.raises(ConfigError, match=r"vocab_size=5000.*train_bytes"):
        train_model(["short text\n"], 5000)
    with pytest.raises(ConfigError, match="vocab_size=266"):
        train_model(["abcdefghijklmnopqrstuvwxyz\n" * 10], 266)


def test_a_line_longer_than_a_training_sentence_is_learned_from():
    long_line = "".join(f"token{number}," for number in range(3000))
    model = train_model([long_line], 289)
    pieces = sentencepiece.SentencePieceProcessor(model_proto=model)
    assert len(pieces.encode("token")) == 1
