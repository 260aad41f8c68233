"""One interface over the tokenizers: SentencePiece models (the official InternLM2 file or one trained in the run),
tokenizer.json files.

Text never turns into a control token by itself: a document that happens to contain `<|im_start|>` or
`[UNUSED_TOKEN_146]` is encoded as ordinary characters unless the caller passes `allow_special=True`.
"""

import hashlib
import itertools
import json
import re
import shutil
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


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece `.model` file. The official InternLM2 file is recognised by its spare pieces."""

    def __init__(self, path: str | Path, aliases: dict[str, str] | None = None) -> None:
        import sentencepiece

        self.path = Path(path)
        content = _read_model(self.path)
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
        self.special_ids = _find_markers(self.path, self.aliases, self._piece_id)
        surfaces = {self._model.id_to_piece(token) for token in self.special_ids.values()} | set(self.special_ids)
        guarded = "|".join(sorted(map(re.escape, surfaces), key=len, reverse=True))
        self._guarded = re.compile(rf"{guarded}|\[UNUSED_TOKEN_\d+\]" if guarded else r"\[UNUSED_TOKEN_\d+\]")
        self._space_bytes = [self._piece_id(f"<0x{byte:02X}>") for byte in SPACE_SYMBOL.encode()]

    def _piece_id(self, piece: str) -> int | None:
        token = self._model.piece_to_id(piece)
        return None if token == self._model.unk_id() else token

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
        return _fingerprint(self._content, self.aliases)

    def save(self, folder: Path) -> list[Path]:
        folder.mkdir(parents=True, exist_ok=True)
        target = folder / "tokenizer.model"
        if not target.exists() or not target.samefile(self.path):
            target.write_bytes(self._content)
        return [target, *_save_aliases(folder, self.aliases)]


class HuggingFaceTokenizer(Tokenizer):
    """A `tokenizer.json` of the `tokenizers` library (path of the file or of its folder).

    Documents begin with the beginning token and end with the end token that `tokenizer_config.json` beside it names.
    Where those are ChatML markers (as in SmolLM2-Instruct) and `<|endoftext|>` exists, that separates documents
    instead.
    """

    def __init__(self, path: str | Path, aliases: dict[str, str] | None = None) -> None:
        import tokenizers

        self.path = Path(path) / "tokenizer.json" if Path(path).is_dir() else Path(path)
        self._content = _read_model(self.path)
        try:
            self._model = tokenizers.Tokenizer.from_str(self._content.decode("utf-8"))
        except Exception as error:  # the library raises plain Exception for every malformed file
            raise ConfigError(f"{self.path} is not a tokenizer.json of the `tokenizers` library: {error}") from error
        self._model.encode_special_tokens = True  # special tokens in text stay text
        self._model.no_padding()
        self._model.no_truncation()
        self.aliases = dict(aliases or {})
        self.vocab_size = max(self._model.get_vocab(with_added_tokens=True).values()) + 1  # ids may have gaps
        self.special_ids = _find_markers(self.path, self.aliases, self._model.token_to_id)
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
        return _fingerprint(self._content, self.aliases | {"bos": str(self.bos_id), "eos": str(self.eos_id)})

    def save(self, folder: Path) -> list[Path]:
        folder.mkdir(parents=True, exist_ok=True)
        written = []
        for source in (self.path, self.path.parent / "tokenizer_config.json"):
            target = folder / ("tokenizer.json" if source == self.path else source.name)
            if source.is_file() and not (target.exists() and target.samefile(source)):
                shutil.copyfile(source, target)
            if target.exists():
                written.append(target)
        return [*written, *_save_aliases(folder, self.aliases)]


def load_tokenizer(path: str | Path, aliases: dict[str, str] | None = None) -> Tokenizer:
    """The tokenizer at `path`: a `.model` file, a tokenizer.json, or a folder that holds one of them
    (`tokenizer.model` first).
    """
    path = Path(path)
    if path.is_dir():
        stored = path / "tokenizer_aliases.json"
        if aliases is None and stored.is_file():
            aliases = json.loads(stored.read_text(encoding="utf-8"))
        found = [path / name for name in ("tokenizer.model", "tokenizer.json") if (path / name).is_file()]
        if not found:
            raise ConfigError(f"{path} holds neither tokenizer.model nor tokenizer.json")
        path = found[0]
    if path.suffix == ".json":
        return HuggingFaceTokenizer(path, aliases)
    return SentencePieceTokenizer(path, aliases)


def _read_model(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise ConfigError(f"data.tokenizer.path: there is no file {path}") from None
    except OSError as error:
        raise ConfigError(f"data.tokenizer.path: cannot read {path}: {error.strerror}") from error


def _find_markers(path: Path, aliases: dict[str, str], piece_id: Callable[[str], int | None]) -> dict[str, int]:
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


def _piece_bytes(piece: str, byte_level: bool) -> int:
    if byte_level:
        return len(piece)
    if re.fullmatch(r"<0x[0-9A-F]{2}>", piece):
        return 1
    return len(piece.replace(SPACE_SYMBOL, " ").encode())


def _fingerprint(content: bytes, settings: dict[str, str]) -> str:
    digest = hashlib.sha256(content)
    digest.update(json.dumps(settings, sort_keys=True).encode())
    return digest.hexdigest()[:32]


def _save_aliases(folder: Path, aliases: dict[str, str]) -> list[Path]:
    if not aliases:
        return []
    target = folder / "tokenizer_aliases.json"
    target.write_text(json.dumps(aliases, indent=2) + "\n", encoding="utf-8")
    return [target]
