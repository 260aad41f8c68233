"""tokenizer.json against SentencePiece's own ids, with the real InternLM2 file and one trained here."""

import json
from pathlib import Path

import pytest
import tokenizers
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from internlm2.config import ConfigError
from internlm2.model.tokenizer_export import convert_sentencepiece, export_tokenizer, find_markers
from tests.model.trained_tokenizer import train

spm = pytest.importorskip("sentencepiece")

TEXTS = [
    "def add(a, b):\n    return a + b  # two spaces, then four\n\tx = {'k': [1, 2.5e-3, 0xFF]}\n",
    "书生·浦语大模型,支持二十万字超长上下文。龘靐齉",
    "emoji: 👩‍👩‍👧 🇨🇳 e\u0301 ＡＢＣ —— …… \u200b",
    "  leading and trailing  ",
    "numbers 1234567890 and 3.14159, 2024-03-26",
    "",
    " ",
    "a\u2581b literally, \\n and \r\n",
    "don't x_y-z CamelCase ÄÖÜß ñ Ж ع ह",
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return train(tmp_path_factory.mktemp("spm") / "tokenizer.model")


@pytest.fixture(scope="module")
def official(shared_data):
    return shared_data / "internlm2-tokenizer" / "tokenizer_internlm2.model"


@pytest.fixture(scope="module")
def official_pair(official):
    return convert_sentencepiece(official)[0], spm.SentencePieceProcessor(model_file=str(official))


@pytest.mark.parametrize("text", TEXTS)
def test_the_official_vocabulary_gives_sentencepiece_ids(official_pair, text):
    converted, reference = official_pair
    encoding = converted.encode(text)
    assert encoding.ids == [1, *reference.encode(text)]
    assert converted.decode(encoding.ids) == text.replace("\u2581", " ")


@settings(max_examples=150, deadline=None)
@given(text=st.text(alphabet=st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=60))
def test_the_official_vocabulary_on_any_text(official_pair, text):
    # The name of a special token is that token here, and ordinary text to SentencePiece; with spare pieces that became
    # markers it is the other way round.
    assume("<" not in text)
    assume("[UNUSED_TOKEN_1" not in text)
    converted, reference = official_pair
    assert converted.encode(text, add_special_tokens=False).ids == reference.encode(text)


def test_the_official_vocabulary_on_code(official_pair):
    converted, reference = official_pair
    texts = [*Path(json.__file__).read_text(encoding="utf-8").split("\n\n"), *(" " * n for n in range(1, 140, 7))]
    for text in texts:
        assert converted.encode(text, add_special_tokens=False).ids == reference.encode(text)


def test_official_markers_are_single_ids(official_pair):
    converted, _ = official_pair
    chat = "<|im_start|>user\nhi<|im_end|>\n"
    ids = converted.encode(chat).ids
    assert ids[:2] == [1, 92543]
    assert ids.count(92542) == 1
    assert converted.token_to_id("<|reward|>") == 92527
    names = ["<|plugin|>", "<|interpreter|>", "<|action_end|>", "<|action_start|>"]
    assert [converted.token_to_id(name) for name in names] == [92538, 92539, 92540, 92541]
    assert converted.get_vocab_size() == 92544
    assert converted.decode(ids, skip_special_tokens=False).startswith("<s><|im_start|>user\nhi<|im_end|>")


@settings(max_examples=100, deadline=None)
@given(text=st.text(alphabet=st.sampled_from("adefn() +:,大模型书 生\n\t<|imstar_>é"), max_size=40))
def test_a_trained_vocabulary(trained, text):
    # Their names are these tokens here, and ordinary text to SentencePiece; markers are single ids in both.
    assume(not any(name in text for name in ("<s>", "</s>", "<unk>")))
    converted, _ = convert_sentencepiece(trained)
    reference = spm.SentencePieceProcessor(model_file=str(trained))
    assert converted.encode(text, add_special_tokens=False).ids == reference.encode(text)
    assert converted.decode(reference.encode(text), skip_special_tokens=False) == text


@pytest.mark.parametrize("text", ["a cat", " a cat", "大模型", ""])
def test_a_vocabulary_with_a_dummy_prefix(tmp_path, text):
    model = train(tmp_path / "tokenizer.model", add_dummy_prefix=True)
    converted, _ = convert_sentencepiece(model)
    reference = spm.SentencePieceProcessor(model_file=str(model))
    ids = converted.encode(text, add_special_tokens=False).ids
    assert ids == reference.encode(text)
    assert converted.decode(ids) == reference.decode(ids)


def test_the_folder_is_complete(tmp_path, trained):
    facts = export_tokenizer(trained.parent, tmp_path)
    written = {entry.name for entry in tmp_path.iterdir()}
    assert written == {"tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"}
    reference = spm.SentencePieceProcessor(model_file=str(trained))
    assert facts.vocab_size == reference.get_piece_size()
    assert (facts.bos, facts.eos, facts.pad) == (1, 2, 2)
    assert facts.stop == [2, reference.piece_to_id("<|im_end|>")]
    stored = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert "auto_map" not in stored
    assert stored["added_tokens_decoder"][str(facts.stop[1])]["content"] == "<|im_end|>"
    again = tmp_path / "again"
    again.mkdir()
    assert export_tokenizer(tmp_path, again) == facts
    assert (again / "tokenizer.json").read_bytes() == (tmp_path / "tokenizer.json").read_bytes()
    assert (again / "tokenizer.model").read_bytes() == trained.read_bytes()


def test_the_chat_template_speaks_chatml(tmp_path, trained):
    transformers = pytest.importorskip("transformers")
    export_tokenizer(trained, tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    messages = [
        {"role": "system", "name": "plugin", "content": "[]"},
        {"role": "user", "content": "hi"},
        {"role": "environment", "name": "<|interpreter|>", "content": "42"},
    ]
    assert tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == (
        "<s><|im_start|>system name=<|plugin|>\n[]<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n"
        "<|im_start|>environment name=<|interpreter|>\n42<|im_end|>\n<|im_start|>assistant\n"
    )
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    assert ids.count(1) == 1
    assert ids.count(tokenizer.convert_tokens_to_ids("<|im_start|>")) == 4
    assert tokenizer("hi").input_ids[0] == 1


def test_a_given_tokenizer_json_is_copied(tmp_path):
    source, output = tmp_path / "a", tmp_path / "b"
    source.mkdir()
    output.mkdir()
    model = tokenizers.models.BPE({"<|endoftext|>": 0, "<|im_start|>": 1, "<|im_end|>": 2, "a": 3}, [])
    tokenizers.Tokenizer(model).save(str(source / "tokenizer.json"))
    (source / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<|im_end|>"}, "auto_map": {}}))
    facts = export_tokenizer(source, output)
    assert (facts.vocab_size, facts.bos, facts.eos, facts.pad, facts.stop) == (4, 0, 2, 2, [2])
    assert (output / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    assert "auto_map" not in json.loads((output / "tokenizer_config.json").read_text())


def test_markers_are_found_by_alias_name_or_spare_piece():
    spare = [f"[UNUSED_TOKEN_{i}]" for i in range(147)]
    assert find_markers(spare)[146] == "<|im_start|>"
    assert find_markers(["<unk>", "<|im_end|>"]) == {1: "<|im_end|>"}
    assert find_markers(["x", "spare"], {"<|im_end|>": "spare"}) == {1: "<|im_end|>"}
    assert find_markers(["x", "[UNUSED_TOKEN_146]"]) == {}  # one piece of that name does not make it the official file


def test_what_cannot_be_converted_is_named(tmp_path):
    for path, content, message in [
        ("tokenizer.model", b"not a model at all \xff\xff", r"tokenizer\.model is not a SentencePiece model"),
        ("tokenizer.json", b"{}", r"tokenizer\.json is not a tokenizer\.json"),
    ]:
        folder = tmp_path / path.split(".")[1]
        folder.mkdir()
        (folder / path).write_bytes(content)
        with pytest.raises(ConfigError, match=message):
            export_tokenizer(folder, tmp_path)
    with pytest.raises(ConfigError, match="neither"):
        export_tokenizer(tmp_path, tmp_path)
    unigram = train(tmp_path / "unigram.model", model_type="unigram", vocab_size=290)
    with pytest.raises(ConfigError, match="not a BPE model"):
        convert_sentencepiece(unigram)
    normalized = train(tmp_path / "nfkc.model", normalization_rule_name="nmt_nfkc")
    with pytest.raises(ConfigError, match="only the identity"):
        convert_sentencepiece(normalized)
