"""Train a small SentencePiece BPE vocabulary on the run's own documents, laid out like the official one.

ids 0 `<unk>`, 1 `<s>`, 2 `</s>`, 3..258 the raw bytes, then learned pieces, and the seven markers on top in the
official order. As in the shipped file: byte fallback, identity normaliser, no dummy prefix, every space kept. Unlike it
(its numbers group up to three digits), each digit is a piece of its own: a vocabulary of a few thousand ids has no room
for 1,100 numbers, and single digits make arithmetic learnable.
"""

import io
from collections.abc import Iterable, Iterator

from internlm2.config import ConfigError
from internlm2.text.tokenizer import MARKERS

# SentencePiece skips longer training sentences; documents are cut at line ends below this.
SENTENCE_BYTES = 4096
TRAINER_VERSION = 1


def train_model(texts: Iterable[str], vocab_size: int) -> bytes:
    """Serialized SentencePiece model with exactly `vocab_size` pieces. The same texts in the same order give the same
    bytes.

    Raises ConfigError where the texts are too few for the vocabulary, or the vocabulary too small for the fixed pieces.
    """
    import sentencepiece
    from sentencepiece import sentencepiece_model_pb2

    buffer = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_sentences(texts),
            model_writer=buffer,
            model_type="bpe",
            vocab_size=vocab_size - len(MARKERS),
            character_coverage=0.9995,  # rarer characters are spelled in bytes
            byte_fallback=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,  # runs of spaces: indentation
            split_digits=True,
            max_sentence_length=4 * SENTENCE_BYTES,
            num_threads=1,
            minloglevel=2,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
        )
    except (RuntimeError, OSError) as error:
        reason = str(error).splitlines()[-1].rpartition("] ")[2]
        raise ConfigError(
            f"cannot train a tokenizer of data.tokenizer.vocab_size={vocab_size} on this text. {reason} "
            "Use more text (data.tokenizer.train_bytes), another size, or data.tokenizer.kind=sentencepiece."
        ) from error
    model_type = sentencepiece_model_pb2.ModelProto  # type: ignore[attr-defined]  # made at run time by protobuf
    model = model_type()
    model.ParseFromString(buffer.getvalue())
    for marker in MARKERS:
        model.pieces.add(piece=marker, score=0.0, type=model_type.SentencePiece.USER_DEFINED)
    model.trainer_spec.vocab_size = vocab_size
    model.trainer_spec.user_defined_symbols.extend(MARKERS)
    return model.SerializeToString(deterministic=True)


def _sentences(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        part: list[str] = []
        size = 0
        for line in text.splitlines(keepends=True):
            length = len(line.encode("utf-8"))
            if part and size + length > SENTENCE_BYTES:
                yield "".join(part)
                part, size = [], 0
            # A single huge line (minified text) is cut by characters; four bytes each at most.
            for start in range(0, len(line), SENTENCE_BYTES):
                part.append(line[start : start + SENTENCE_BYTES])
                if len(line) > SENTENCE_BYTES:
                    yield "".join(part)
                    part = []
            size = 0 if not part else size + length
        if part:
            yield "".join(part)
