"""Tokenizer files that other programs read: tokenizer.json from a SentencePiece model, settings, ChatML template.

transformers 5 reads the released repositories' own tokenizer code silently wrong (spaces are lost), so an export
carries no code for the tokenizer: tokenizer.json for everything built on `tokenizers`, tokenizer.model for llama.cpp.
"""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from internlm2.config import ConfigError
from internlm2.model.chat_template import CHAT_TEMPLATE

# ChatML markers of the released chat and reward models, and the spare pieces of the shipped vocabulary that they reuse.
OFFICIAL_MARKERS = {
    "<|reward|>": "[UNUSED_TOKEN_130]",
    "<|plugin|>": "[UNUSED_TOKEN_141]",
    "<|interpreter|>": "[UNUSED_TOKEN_142]",
    "<|action_end|>": "[UNUSED_TOKEN_143]",
    "<|action_start|>": "[UNUSED_TOKEN_144]",
    "<|im_end|>": "[UNUSED_TOKEN_145]",
    "<|im_start|>": "[UNUSED_TOKEN_146]",
}
ALIASES = "tokenizer_aliases.json"
_SPACE = "\u2581"
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 1, 2, 3, 4, 6


@dataclass(frozen=True)
class TokenizerFacts:
    """What the model's own files repeat from its tokenizer: special ids, the ids that end a chat turn, and that of the
    reward token where there is one.
    """

    vocab_size: int
    bos: int
    eos: int
    pad: int
    stop: list[int]
    reward: int | None = None


def export_tokenizer(source: Path, output: Path) -> TokenizerFacts:
    """Write the tokenizer of folder (or file) `source` into the folder `output`.

    A tokenizer.json is copied with its settings, which are completed, and with a tokenizer.model beside it. A
    tokenizer.model alone is converted. ConfigError names a file that cannot be converted.
    """
    folder = source if source.is_dir() else source.parent
    stored = folder / "tokenizer.json" if source.is_dir() else source
    if stored.suffix == ".json" and stored.is_file():
        return _export_json(stored, output, _read_json(folder / ALIASES))
    model = folder / "tokenizer.model" if source.is_dir() else source
    if model.is_file():
        return _export_sentencepiece(model, output, _read_json(folder / ALIASES))
    raise ConfigError(f"{source} holds neither tokenizer.model nor tokenizer.json.")


def convert_sentencepiece(model: Path, aliases: dict[str, str] | None = None) -> tuple[Any, dict[int, str]]:
    """(tokenizers.Tokenizer that gives the ids of the SentencePiece BPE file, {id: name} of its special tokens).

    `aliases` maps markers to pieces ({"<|im_start|>": "[UNUSED_TOKEN_146]"}); the official file needs none.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors

    proto = _read_model(model)
    pieces = [(piece.piece, piece.score, piece.type) for piece in proto.pieces]
    special = {i: piece for i, (piece, _, kind) in enumerate(pieces) if kind in (_UNKNOWN, _CONTROL)}
    special |= find_markers([piece for piece, _, _ in pieces], aliases)
    # A NUL piece can never match: SentencePiece takes text up to it. Its name here must not match either.
    vocabulary = {special.get(i, "[NUL]" if piece == "\0" else piece): i for i, (piece, _, _) in enumerate(pieces)}
    if len(vocabulary) != len(pieces):
        raise ConfigError(f"{model}: two pieces would have one name, a marker's among them.")
    unknown = pieces[proto.trainer_spec.unk_id][0]
    tokenizer = Tokenizer(
        models.BPE(vocabulary, _merges(pieces), unk_token=unknown, fuse_unk=True, byte_fallback=_has_bytes(pieces))
    )
    dummy_prefix = proto.normalizer_spec.add_dummy_prefix
    steps = [normalizers.Prepend(_SPACE)] if dummy_prefix else []
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", _SPACE)])
    ends = [decoders.Strip(" ", 1, 0)] if dummy_prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *ends]
    )
    plain = [piece for i, (piece, _, kind) in enumerate(pieces) if kind == _USER_DEFINED and i not in special]
    # A piece with SentencePiece's space in it is found after the text's spaces have become that character.
    tokenizer.add_tokens([AddedToken(piece, normalized=_SPACE in piece, special=False) for piece in plain])
    tokenizer.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in special.values()])
    bos = pieces[proto.trainer_spec.bos_id][0]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos}:0 $A:0", pair=f"{bos}:0 $A:0 {bos}:1 $B:1", special_tokens=[(bos, proto.trainer_spec.bos_id)]
    )
    return tokenizer, special


def find_markers(pieces: list[str], aliases: dict[str, str] | None = None) -> dict[int, str]:
    """{id: marker}: by an alias, by the marker's own name, or by the spare piece of the official vocabulary."""
    ids = {piece: index for index, piece in enumerate(pieces)}
    official = all(piece in ids for piece in OFFICIAL_MARKERS.values())
    found = {}
    for marker, spare in OFFICIAL_MARKERS.items():
        for piece in ((aliases or {}).get(marker), marker, spare if official else None):
            if piece is not None and piece in ids:
                found[ids[piece]] = marker
                break
    return found


def _read_model(path: Path) -> Any:
    from google.protobuf.message import DecodeError
    from sentencepiece import sentencepiece_model_pb2

    proto: Any = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]  # generated at import
    try:
        proto.ParseFromString(path.read_bytes())
    except DecodeError as error:
        raise ConfigError(f"{path} is not a SentencePiece model.") from error
    if not proto.pieces:
        raise ConfigError(f"{path} is not a SentencePiece model: it holds no pieces.")
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    if trainer.model_type != trainer.BPE:
        raise ConfigError(f"{path} is not a BPE model; tokenizer.json is written for BPE only.")
    if normalizer.precompiled_charsmap or normalizer.remove_extra_whitespaces:
        raise ConfigError(
            f"{path} changes its text before it splits it ({normalizer.name}, "
            f"remove_extra_whitespaces={normalizer.remove_extra_whitespaces}); only the identity is converted."
        )
    if trainer.bos_id < 0 or trainer.eos_id < 0:
        raise ConfigError(f"{path} defines no <s> or no </s>.")
    return proto


def _has_bytes(pieces: list[tuple[str, float, int]]) -> bool:
    return any(kind == _BYTE for _, _, kind in pieces)


def _merges(pieces: list[tuple[str, float, int]]) -> list[tuple[str, str]]:
    """Every split of a piece into two pieces, best score first: SentencePiece joins whichever pair scores best."""
    ranks = {piece: i for i, (piece, _, kind) in enumerate(pieces) if kind in (_NORMAL, _USER_DEFINED)}
    merges: list[tuple[float, int, int, str, str]] = []
    for piece, score, kind in pieces:
        if kind != _NORMAL:
            continue
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in ranks and right in ranks:
                merges.append((-score, ranks[left], ranks[right], left, right))
    merges.sort()
    return [(left, right) for *_, left, right in merges]


def _export_sentencepiece(model: Path, output: Path, aliases: dict[str, str]) -> TokenizerFacts:
    tokenizer, special = convert_sentencepiece(model, aliases)
    trainer = _read_model(model).trainer_spec
    shutil.copyfile(model, output / "tokenizer.model")
    tokenizer.save(str(output / "tokenizer.json"))
    if aliases:
        _write_json(output / ALIASES, aliases)
    names = {name: index for index, name in special.items()}
    bos, eos = special[trainer.bos_id], special[trainer.eos_id]
    pad = special.get(trainer.pad_id, eos)
    named = {"bos_token": bos, "eos_token": eos, "unk_token": special[trainer.unk_id], "pad_token": pad}
    markers = [name for name in special.values() if name in OFFICIAL_MARKERS]
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **named,
        "additional_special_tokens": markers,
        "add_bos_token": True,
        "add_eos_token": False,
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        "added_tokens_decoder": {
            str(index): {"content": name, "lstrip": False, "normalized": False, "rstrip": False, "single_word": False,
                         "special": True}
            for index, name in sorted(special.items())
        },
    }  # fmt: skip
    template = _read_json(model.parent / "tokenizer_config.json").get("chat_template")
    if template or {"<|im_start|>", "<|im_end|>"} <= names.keys():
        settings["chat_template"] = template or CHAT_TEMPLATE
    _write_json(output / "tokenizer_config.json", settings)
    _write_json(output / "special_tokens_map.json", {**named, "additional_special_tokens": markers})
    stop = [trainer.eos_id, *([names["<|im_end|>"]] if "<|im_end|>" in names else [])]
    size, reward = tokenizer.get_vocab_size(), names.get("<|reward|>")
    return TokenizerFacts(size, trainer.bos_id, trainer.eos_id, names[pad], stop, reward)


def _export_json(stored: Path, output: Path, aliases: dict[str, str]) -> TokenizerFacts:
    """A given tokenizer.json is copied as it is; only what tokenizer_config.json lacks is filled in."""
    import tokenizers

    try:
        tokenizer = tokenizers.Tokenizer.from_str(stored.read_text(encoding="utf-8"))
    except Exception as error:  # the library raises plain Exception for every malformed file
        raise ConfigError(f"{stored} is not a tokenizer.json of the `tokenizers` library: {error}") from error
    shutil.copyfile(stored, output / "tokenizer.json")
    for name in ("tokenizer.model", "chat_template.jinja"):
        if (stored.parent / name).is_file():
            shutil.copyfile(stored.parent / name, output / name)
    settings = _read_json(stored.parent / "tokenizer_config.json")
    # Code named here would not travel with the folder, and transformers 5 runs such code wrongly.
    settings.pop("auto_map", None)
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    settings.setdefault("clean_up_tokenization_spaces", False)
    settings.setdefault("model_input_names", ["input_ids", "attention_mask"])
    usual = {"bos": ("<s>", "<|begin_of_text|>", "<|endoftext|>"), "eos": ("</s>", "<|end_of_text|>", "<|endoftext|>")}
    ids: dict[str, int] = {}
    for key, names in usual.items():
        stated = _content(settings.get(f"{key}_token"))
        found = next((name for name in (stated, *names) if name and tokenizer.token_to_id(name) is not None), None)
        if found is None:
            raise ConfigError(f"{stored} has no {key} token: name it in a tokenizer_config.json beside it.")
        settings[f"{key}_token"], ids[key] = found, tokenizer.get_vocab()[found]
    pad = tokenizer.token_to_id(_content(settings.get("pad_token")) or "")
    if pad is None:
        settings["pad_token"], pad = settings["eos_token"], ids["eos"]
    end = tokenizer.token_to_id(aliases.get("<|im_end|>", "<|im_end|>"))
    renamed = {"<|im_start|>", "<|im_end|>"} & aliases.keys()
    speaks_chatml = not renamed and tokenizer.token_to_id("<|im_start|>") is not None and end is not None
    if speaks_chatml and not (output / "chat_template.jinja").exists():
        settings.setdefault("chat_template", CHAT_TEMPLATE)
    _write_json(output / "tokenizer_config.json", settings)
    named = {key: settings[key] for key in ("bos_token", "eos_token", "pad_token")}
    _write_json(output / "special_tokens_map.json", named)
    if aliases:
        _write_json(output / ALIASES, aliases)
    stop = list(dict.fromkeys([ids["eos"], *([] if end is None else [end])]))
    reward = tokenizer.token_to_id(aliases.get("<|reward|>", "<|reward|>"))
    return TokenizerFacts(tokenizer.get_vocab_size(), ids["bos"], ids["eos"], pad, stop, reward)


def _content(token: Any) -> str | None:
    """tokenizer_config.json writes a token as text or as {"content": text}."""
    return token.get("content") if isinstance(token, dict) else token


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{path} is not a JSON object.") from error


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
