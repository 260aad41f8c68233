"""Tokenizers from SentencePiece models: the official InternLM2 file, or one that the run trained."""

import itertools
import re
from functools import cached_property
from pathlib import Path

import numpy as np

from internlm2.config import ConfigError
from internlm2.text.tokenizer import SPACE_SYMBOL, Tokenizer, find_markers, hash_model, read_model, save_aliases


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece `.model` file. The official InternLM2 file is recognised by its spare pieces."""

    def __init__(self, path: str | Path, aliases: dict[str, str] | None = None) -> None:
        import sentencepiece

        self.path = Path(path)
        content = read_model(self.path)
        sentencepiece.set_min_log_level(2)  # the official file warns on standard error of its NUL piece
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_proto=content)
        except RuntimeError as error:
            raise ConfigError(f"{self.path} is not a SentencePiece model: {error}") from error
        self.aliases = dict(aliases or {})
        self._content = content
        self.vocab_size = self._model.get_piece_size()
        self.bos_id = self._model.bos_id()
        self.eos_id = self._model.eos_id()
        if self.bos_id < 0 or self.eos_id < 0:
            raise ConfigError(f"{self.path} defines no <s> or no </s>; documents could not be told apart")
        self.pad_id = self._model.pad_id() if self._model.pad_id() >= 0 else self.eos_id
        self.special_ids = find_markers(self.path, self.aliases, self._piece_id)
        surfaces = {self._model.id_to_piece(token) for token in self.special_ids.values()} | set(self.special_ids)
        guarded = "|".join(sorted(map(re.escape, surfaces), key=len, reverse=True))
        self._guarded = re.compile(rf"{guarded}|\[UNUSED_TOKEN_\d+\]" if guarded else r"\[UNUSED_TOKEN_\d+\]")
        self._space_bytes = [self._piece_id(f"<0x{byte:02X}>") for byte in SPACE_SYMBOL.encode()]

    def _piece_id(self, piece: str) -> int | None:
        token = self._model.piece_to_id(piece)
        return None if token == self._model.unk_id() else token

    def has_piece(self, piece: str) -> bool:
        return self._piece_id(piece) is not None

    def _encode_plain(self, texts: list[str]) -> list[list[int]]:
        rows: list[list[int] | None] = [None] * len(texts)
        simple = []
        for index, text in enumerate(texts):
            if SPACE_SYMBOL in text or self._guarded.search(text):
                rows[index] = self._encode_guarded(text)
            else:
                simple.append(index)
        for index, ids in zip(simple, self._model.encode([texts[index] for index in simple], num_threads=1)):
            rows[index] = ids
        return [row for row in rows if row is not None]

    def _encode_guarded(self, text: str) -> list[int]:
        """Cut every marker after its first character, so that no part of the text equals a marker piece."""
        cuts = [0, *(match.start() + 1 for match in self._guarded.finditer(text)), len(text)]
        ids: list[int] = []
        for start, end in itertools.pairwise(cuts):
            for number, part in enumerate(text[start:end].split(SPACE_SYMBOL)):
                if number:
                    ids.extend(token if token is not None else self._model.unk_id() for token in self._space_bytes)
                if part:
                    ids.extend(self._model.encode(part))
        return ids

    def _decode_plain(self, ids: list[int]) -> str:
        return self._model.decode(ids) if ids else ""

    @cached_property
    def token_bytes(self) -> np.ndarray:
        sizes = np.zeros(self.vocab_size, np.int64)
        for token in range(self.vocab_size):
            if self._model.is_byte(token):
                sizes[token] = 1
            elif not (self._model.is_control(token) or self._model.is_unknown(token) or token in self._marker_names):
                sizes[token] = len(self._model.id_to_piece(token).replace(SPACE_SYMBOL, " ").encode())
        return sizes

    @cached_property
    def fingerprint(self) -> str:
        return hash_model(self._content, self.aliases)

    def save(self, folder: Path) -> list[Path]:
        folder.mkdir(parents=True, exist_ok=True)
        target = folder / "tokenizer.model"
        if not target.exists() or not target.samefile(self.path):
            target.write_bytes(self._content)
        return [target, *save_aliases(folder, self.aliases)]
