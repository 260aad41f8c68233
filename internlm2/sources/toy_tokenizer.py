"""The vocabulary of the toy language as an ordinary tokenizer.json: one token a word, with and without a space before
it, so that text and ids are exactly invertible. Spare pieces fill it up to the size of `model=micro`.
"""

import json
from pathlib import Path

from internlm2.sources.toy_language import WORDS
from internlm2.text.chat import ROLES
from internlm2.text.tokenizer import MARKERS, SPACE_SYMBOL

UNKNOWN, BEGIN, END = "<unk>", "<s>", "</s>"
CONTROL = (UNKNOWN, BEGIN, END)
SIZE = 300


def vocabulary() -> list[str]:
    """All pieces in the order of their ids; the markers last, as in the official vocabulary."""
    pieces = [*CONTROL, "\n", *ROLES, *WORDS, *(SPACE_SYMBOL + word for word in WORDS)]
    spare = [f"[UNUSED_TOKEN_{number}]" for number in range(SIZE - len(pieces) - len(MARKERS))]
    return [*pieces, *spare, *MARKERS]


def write_tokenizer(folder: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json into `folder`."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    pieces = vocabulary()
    tokenizer = Tokenizer(models.WordLevel({piece: number for number, piece in enumerate(pieces)}, UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split("\n", "isolated"),
            pre_tokenizers.Metaspace(SPACE_SYMBOL, prepend_scheme="never", split=True),
        ]
    )
    tokenizer.decoder = decoders.Sequence([decoders.Replace(SPACE_SYMBOL, " "), decoders.Fuse()])
    tokenizer.add_special_tokens([AddedToken(piece, special=True) for piece in (*CONTROL, *MARKERS)])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"bos_token": BEGIN, "eos_token": END, "pad_token": END, "unk_token": UNKNOWN}
    settings = json.dumps(names | {"tokenizer_class": "PreTrainedTokenizerFast"}, indent=1)
    (folder / "tokenizer_config.json").write_text(settings + "\n", encoding="utf-8")
