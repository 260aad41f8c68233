"""Tokenizers from a `tokenizer.json` of the `tokenizers` library, for instance SmolLM2's."""

import json
import re
import shutil
from functools import cached_property
from pathlib import Path

import numpy as np

from internlm2.config import ConfigError
from internlm2.text.tokenizer import (
    MARKERS,
    SPACE_SYMBOL,
    Tokenizer,
    find_markers,
    hash_model,
    read_model,
    save_aliases,
)


class HuggingFaceTokenizer(Tokenizer):
    """A `tokenizer.json` of the `tokenizers` library (path of the file or of its folder).

    Documents begin with the beginning token and end with the end token that `tokenizer_config.json` beside it names.
    Where those are ChatML markers (as in SmolLM2-Instruct) and `<|endoftext|>` exists, that separates documents
    instead.
    """

    def __init__(self, path: str | Path, aliases: dict[str, str] | None = None) -> None:
        import tokenizers

        self.path = Path(path) / "tokenizer.json" if Path(path).is_dir() else Path(path)
        self._content = read_model(self.path)
        try:
            self._model = tokenizers.Tokenizer.from_str(self._content.decode("utf-8"))
        except Exception as error:  # the library raises plain Exception for every malformed file
            raise ConfigError(f"{self.path} is not a tokenizer.json of the `tokenizers` library: {error}") from error
        self._model.encode_special_tokens = True  # special tokens in text stay text
        self._model.no_padding()
        self._model.no_truncation()
        self.aliases = dict(aliases or {})
        self.vocab_size = max(self._model.get_vocab(with_added_tokens=True).values()) + 1  # ids may have gaps
        self.special_ids = find_markers(self.path, self.aliases, self._model.token_to_id)
        named = self._named_tokens()
        self.bos_id = self._boundary("bos_token", named, ("<s>", "<|begin_of_text|>", "<|endoftext|>"))
        self.eos_id = self._boundary("eos_token", named, ("</s>", "<|end_of_text|>", "<|endoftext|>"))
        pad = self._model.token_to_id(named.get("pad_token", ""))
        self.pad_id = self.eos_id if pad is None else pad

    def _named_tokens(self) -> dict[str, str]:
        settings = self.path.parent / "tokenizer_config.json"
        if not settings.is_file():
            return {}
        content = json.loads(settings.read_text(encoding="utf-8"))
        named = {}
        for key in ("bos_token", "eos_token", "pad_token"):
            value = content.get(key)
            value = value.get("content") if isinstance(value, dict) else value
            if isinstance(value, str):
                named[key] = value
        return named

    def _boundary(self, key: str, named: dict[str, str], usual: tuple[str, ...]) -> int:
        candidates = [named[key], *usual] if key in named else list(usual)
        if candidates[0] in MARKERS and self._model.token_to_id("<|endoftext|>") is not None:
            candidates.insert(0, "<|endoftext|>")
        for candidate in candidates:
            token = self._model.token_to_id(candidate)
            if token is not None:
                return token
        raise ConfigError(f"{self.path} has no {key}: put a tokenizer_config.json that names it beside the file")

    def has_piece(self, piece: str) -> bool:
        return self._model.token_to_id(piece) is not None

    def _encode_plain(self, texts: list[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self._model.encode_batch_fast(texts, add_special_tokens=False)]

    def _decode_plain(self, ids: list[int]) -> str:
        return self._model.decode(ids, skip_special_tokens=False)

    @cached_property
    def token_bytes(self) -> np.ndarray:
        sizes = np.zeros(self.vocab_size, np.int64)
        added = {token for token, piece in self._model.get_added_tokens_decoder().items() if piece.special}
        for piece, token in self._model.get_vocab(with_added_tokens=True).items():
            if token not in added and token not in self._marker_names:
                sizes[token] = _piece_bytes(piece, self._byte_level)
        return sizes

    @cached_property
    def _byte_level(self) -> bool:
        """Whether pieces are spelled in the byte-level alphabet, one character a byte."""
        return '"ByteLevel"' in json.dumps(json.loads(self._content).get("decoder"))

    @cached_property
    def fingerprint(self) -> str:
        return hash_model(self._content, self.aliases | {"bos": str(self.bos_id), "eos": str(self.eos_id)})

    def save(self, folder: Path) -> list[Path]:
        folder.mkdir(parents=True, exist_ok=True)
        written = []
        for source in (self.path, self.path.parent / "tokenizer_config.json"):
            target = folder / ("tokenizer.json" if source == self.path else source.name)
            if source.is_file() and not (target.exists() and target.samefile(source)):
                shutil.copyfile(source, target)
            if target.exists():
                written.append(target)
        return [*written, *save_aliases(folder, self.aliases)]


def _piece_bytes(piece: str, byte_level: bool) -> int:
    if byte_level:
        return len(piece)
    if re.fullmatch(r"<0x[0-9A-F]{2}>", piece):
        return 1
    return len(piece.replace(SPACE_SYMBOL, " ").encode())
