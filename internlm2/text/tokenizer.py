"""One interface over the tokenizers: SentencePiece models (the official InternLM2 file or one trained in the run),
tokenizer.json files.

Text never turns into a control token by itself: a document that happens to contain `<|im_start|>` or
`[UNUSED_TOKEN_146]` is encoded as ordinary characters unless the caller passes `allow_special=True`.
"""

import hashlib
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np

from internlm2.config import ConfigError

# In the order of their ids in the official vocabulary (92527 and 92538..92543), so that a trained vocabulary ends in
# the same order.
MARKERS = (
    "<|reward|>",
    "<|plugin|>",
    "<|interpreter|>",
    "<|action_end|>",
    "<|action_start|>",
    "<|im_end|>",
    "<|im_start|>",
)

# The released models reuse spare pieces of the shipped vocabulary as markers (model cards and configs of internlm2-chat
# and -reward).
OFFICIAL_ALIASES = {
    "<|reward|>": "[UNUSED_TOKEN_130]",
    "<|plugin|>": "[UNUSED_TOKEN_141]",
    "<|interpreter|>": "[UNUSED_TOKEN_142]",
    "<|action_end|>": "[UNUSED_TOKEN_143]",
    "<|action_start|>": "[UNUSED_TOKEN_144]",
    "<|im_end|>": "[UNUSED_TOKEN_145]",
    "<|im_start|>": "[UNUSED_TOKEN_146]",
}

# File beside a tokenizer's own that keeps the aliases of its markers.
ALIASES = "tokenizer_aliases.json"

# SentencePiece writes a space as this character; in text it would come back as a space, so it is encoded as its three
# bytes.
SPACE_SYMBOL = "\u2581"


class Tokenizer(ABC):
    """Text <-> ids. `vocab_size` ids in all; `special_ids` maps the ChatML, action and reward markers that exist to
    their ids.
    """

    path: Path
    aliases: dict[str, str]
    vocab_size: int
    bos_id: int
    eos_id: int
    pad_id: int
    special_ids: dict[str, int]

    @abstractmethod
    def _encode_plain(self, texts: list[str]) -> list[list[int]]:
        """Ids of each text; markers in it are ordinary characters."""

    @abstractmethod
    def _decode_plain(self, ids: list[int]) -> str:
        """Text of ids that hold no marker."""

    @abstractmethod
    def has_piece(self, piece: str) -> bool:
        """Is there an id for this very piece?"""

    @cached_property
    @abstractmethod
    def token_bytes(self) -> np.ndarray:
        """[vocab_size] int64: UTF-8 bytes of text that each id stands for; 0 for control tokens and markers.

        Over the ids of a text they sum to its length in bytes, so that a loss in bits per byte is exact.
        """

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """Hash of everything that decides the ids of a text."""

    @abstractmethod
    def save(self, folder: Path) -> list[Path]:
        """Write the files from which the same tokenizer can be loaded into `folder`; returns them."""

    def encode(self, text: str, allow_special: bool = False) -> list[int]:
        """Ids of `text`, without `<s>` and `</s>`. With `allow_special` the marker names in it become their single ids.

        A string with a lone surrogate (no valid UTF-8) raises UnicodeEncodeError.
        """
        if not allow_special:
            return self.encode_batch([text])[0]
        ids: list[int] = []
        for part in self._marker_pattern.split(text):
            if part in self.special_ids:
                ids.append(self.special_ids[part])
            elif part:
                ids.extend(self.encode_batch([part])[0])
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text as by `encode(text)`."""
        for text in texts:
            text.encode("utf-8")
        return self._encode_plain(list(texts))

    def decode(self, ids: Iterable[int], skip_special: bool = False) -> str:
        """Text of `ids`; markers appear by their names, or are left out with `skip_special`. `<s>` and `</s>` never
        appear.
        """
        text: list[str] = []
        run: list[int] = []
        for token in ids:
            token = int(token)
            if not 0 <= token < self.vocab_size:
                raise ValueError(f"token id {token} lies outside the vocabulary of {self.vocab_size} ids")
            name = self._marker_names.get(token)
            if name is None:
                if token not in (self.bos_id, self.eos_id):
                    run.append(token)
                continue
            text.append(self._decode_plain(run))
            run = []
            if not skip_special:
                text.append(name)
        text.append(self._decode_plain(run))
        return "".join(text)

    def special_id(self, name: str) -> int:
        """Id of a marker; ConfigError that says how to provide it where the vocabulary has none."""
        if name in self.special_ids:
            return self.special_ids[name]
        raise ConfigError(
            f"{self.path} has no token for {name}. Name a spare piece of its vocabulary in data.tokenizer.aliases, "
            f'for instance aliases: {{"{name}": "[UNUSED_TOKEN_0]"}}.'
        )

    @cached_property
    def _marker_names(self) -> dict[int, str]:
        return {token: name for name, token in self.special_ids.items() if token not in (self.bos_id, self.eos_id)}

    @cached_property
    def _marker_pattern(self) -> re.Pattern[str]:
        names = sorted(self.special_ids, key=len, reverse=True)
        return re.compile("(" + "|".join(map(re.escape, names)) + ")" if names else r"(?!)")


def load_tokenizer(path: str | Path, aliases: dict[str, str] | None = None) -> Tokenizer:
    """The tokenizer at `path`: a `.model` file, a tokenizer.json, or a folder that holds one of them
    (`tokenizer.model` first).
    """
    from internlm2.text.huggingface_tokenizer import HuggingFaceTokenizer
    from internlm2.text.sentencepiece_tokenizer import SentencePieceTokenizer

    path = Path(path)
    if path.is_dir():
        stored = path / ALIASES
        if aliases is None and stored.is_file():
            aliases = json.loads(stored.read_text(encoding="utf-8"))
        found = [path / name for name in ("tokenizer.model", "tokenizer.json") if (path / name).is_file()]
        if not found:
            raise ConfigError(f"{path} holds neither tokenizer.model nor tokenizer.json")
        path = found[0]
    if path.suffix == ".json":
        return HuggingFaceTokenizer(path, aliases)
    return SentencePieceTokenizer(path, aliases)


def read_model(path: Path) -> bytes:
    """Content of a tokenizer's file; ConfigError where it cannot be read."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise ConfigError(f"data.tokenizer.path: there is no file {path}") from None
    except OSError as error:
        raise ConfigError(f"data.tokenizer.path: cannot read {path}: {error.strerror}") from error


def find_markers(path: Path, aliases: dict[str, str], piece_id: Callable[[str], int | None]) -> dict[str, int]:
    """Ids of the markers: by an explicit alias, by their own name, or by the spare piece that the official models
    use.
    """
    for name, piece in aliases.items():
        if name not in MARKERS:
            raise ConfigError(f"data.tokenizer.aliases: unknown marker {name!r}; the markers are {', '.join(MARKERS)}")
        if piece_id(piece) is None:
            raise ConfigError(f"data.tokenizer.aliases: {path} has no piece {piece!r}, wanted for {name}")
    official = all(piece_id(piece) is not None for piece in OFFICIAL_ALIASES.values())
    found = {}
    for name in MARKERS:
        for candidate in (aliases.get(name), name, OFFICIAL_ALIASES[name] if official else None):
            token = piece_id(candidate) if candidate else None
            if token is not None:
                found[name] = token
                break
    return found


def hash_model(content: bytes, settings: dict[str, str]) -> str:
    """Hash of a model file and of the settings that change its ids."""
    digest = hashlib.sha256(content)
    digest.update(json.dumps(settings, sort_keys=True).encode())
    return digest.hexdigest()[:32]


def save_aliases(folder: Path, aliases: dict[str, str]) -> list[Path]:
    """Write `tokenizer_aliases.json` where there are any; returns what was written."""
    if not aliases:
        return []
    target = folder / ALIASES
    target.write_text(json.dumps(aliases, indent=2) + "\n", encoding="utf-8")
    return [target]
