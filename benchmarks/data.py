"""Tokenizing, packing, reading and seeking: this data room against the usual transformers way, interleaved in one
process.

    python benchmarks/data.py [--megabytes 4] [--rounds 5] [--json FILE]

Text: the standard library's modules. One thread on both sides. The rivals:
  tokenize  transformers' fast tokenizer (byte-level BPE of the same size, trained on the same text), as run_clm.py
  uses it pack      run_clm.py's group_texts (concatenate and cut) on the same token lists
  read      a torch DataLoader over the grouped rows with transformers' default collator, against `TokenStream.batch`
  seek      accelerate.skip_first_batches on a shuffled loader of 244,141 rows (10^9 tokens), against `stream[position]`
Ours does more in each: tokenizing also decides the hold-out and keeps file and line; packing keeps documents whole;
reading knows the documents' boundaries.
"""

import argparse
import importlib.util
import itertools
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["TOKENIZERS_PARALLELISM"] = "false"

import numpy as np
import torch

from internlm2.data.corpus import Corpus
from internlm2.data.encoding import encode_unit
from internlm2.data.packing import plan_rows
from internlm2.data.shards import FORMAT, Shard, write_shard
from internlm2.data.stream import TokenStream
from internlm2.sources import stdlib_corpus
from internlm2.sources.documents import MemoryUnit
from internlm2.text.sentencepiece_tokenizer import SentencePieceTokenizer
from internlm2.text.tokenizer_training import train_model

SEQ_LEN = 4096
VOCABULARY = 4096
INDEX_TOKENS = 10**9


def seconds_of(work: Callable[[], Any]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def interleave(
    rounds: int, ours: Callable[[], Any], theirs: Callable[[], Any] | None
) -> tuple[float, float | None, float | None]:
    """Seconds of each side (minimum over rounds; the first warms up) and the median ratio theirs / ours."""
    mine, other = [], []
    for number in range(rounds + 1):
        pair = seconds_of(ours), seconds_of(theirs) if theirs else 0.0
        if number:
            mine.append(pair[0])
            other.append(pair[1])
    if theirs is None:
        return min(mine), None, None
    return min(mine), min(other), statistics.median(b / a for a, b in zip(mine, other))


def rival_tokenizer(texts: list[str]) -> Any:
    """A byte-level BPE in a transformers fast tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    model = Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    model.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=VOCABULARY, initial_alphabet=alphabet, show_progress=False)
    )
    return PreTrainedTokenizerFast(tokenizer_object=model)


def group_texts(rows: list[list[int]]) -> list[dict[str, list[int]]]:
    """The packing of transformers' examples/pytorch/language-modeling/run_clm.py, restated: concatenate, cut, drop
    the rest.
    """
    joined = list(itertools.chain(*rows))
    whole = len(joined) // SEQ_LEN * SEQ_LEN
    parts = [joined[start : start + SEQ_LEN] for start in range(0, whole, SEQ_LEN)]
    return [{"input_ids": part, "labels": list(part)} for part in parts]


def synthetic_corpus(folder: Path) -> Corpus:
    """A corpus of 10^9 tokens in documents of 900 to 1,100: real index files, and a token file that takes no room
    (sparse).
    """
    lengths = np.random.default_rng(0).integers(900, 1101, size=INDEX_TOKENS // 1000)
    lengths[0] += max(0, INDEX_TOKENS - lengths.sum())
    count, total = len(lengths), int(lengths.sum())
    columns = {
        "tokens": (None, 2 * total),
        "offsets": (np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)]), 8 * (count + 1)),
        "split_hashes": (np.full(count, 2**63, np.uint64), 8 * count),
        "text_bytes": (np.zeros(count, np.int64), 8 * count),
        "file_index": (np.zeros(count, np.int64), 8 * count),
        "lines": (np.arange(count), 8 * count),
    }
    for name, (values, size) in columns.items():
        with open(folder / f"{name}.bin", "wb") as stream:
            if values is None:
                stream.truncate(size)
            else:
                stream.write(values.data)
    meta = {"format": FORMAT, "source": "synthetic", "documents": count, "tokens": total, "masked_tokens": 0}
    meta |= {"text_bytes": 0, "content": "synthetic", "vocab_size": VOCABULARY, "bad": 0, "bad_first": [], "sizes": {}}
    (folder / "meta.json").write_text(json.dumps(meta))
    return Corpus({"synthetic": Shard("synthetic", folder)}, "synthetic", 0.0, folder / "cache")


def tokenize(
    texts: list[str], unit: MemoryUnit, tokenizer: SentencePieceTokenizer, rounds: int
) -> list[dict[str, Any]]:
    rival = rival_tokenizer(texts)
    size = sum(len(text.encode()) for text in texts) / 1e6
    ours, theirs, ratio = interleave(
        rounds,
        lambda: encode_unit(unit, tokenizer),
        lambda: [np.array(ids, np.uint16) for ids in rival(texts)["input_ids"]],
    )
    assert theirs is not None
    setting = f"{size:.1f} MB of Python, {VOCABULARY} ids"
    return [record("tokenize", "transformers fast tokenizer", size / ours, size / theirs, "MB/s", ratio, setting)]


def pack_and_read(
    unit: MemoryUnit, tokenizer: SentencePieceTokenizer, folder: Path, rounds: int
) -> list[dict[str, Any]]:
    from transformers import default_data_collator

    (folder / "shard").mkdir()
    write_shard(folder / "shard", "code", [encode_unit(unit, tokenizer)], tokenizer)
    shard = Shard("code", folder / "shard")
    lists = [shard.document(number).tolist() for number in range(shard.documents)]
    numbers, lengths, total = np.arange(shard.documents), shard.lengths, shard.total_tokens
    setting = f"{shard.documents} documents, {total:,} tokens, rows of {SEQ_LEN:,}"
    found = []
    for packing in ("concatenate", "best_fit"):
        ours, theirs, ratio = interleave(
            rounds, lambda packing=packing: plan_rows(numbers, lengths, SEQ_LEN, packing, 1), lambda: group_texts(lists)
        )
        assert theirs is not None
        found.append(
            record(
                f"pack, {packing}",
                "run_clm.py group_texts",
                total / ours / 1e6,
                total / theirs / 1e6,
                "M tokens/s",
                ratio,
                setting,
            )
        )
    stream = TokenStream(
        Corpus({"code": shard}, tokenizer.fingerprint, 0.0, folder / "cache"), {"code": 1.0}, SEQ_LEN, "concatenate"
    )
    rows = group_texts(lists)
    loader = torch.utils.data.DataLoader(rows, batch_size=4, shuffle=True, collate_fn=default_data_collator)
    count = len(rows) // 4 * 4

    def read_ours() -> None:
        for start in range(0, count, 4):
            stream.batch(range(start, start + 4))

    ours, theirs, ratio = interleave(rounds, read_ours, lambda: [None for _ in loader])
    assert theirs is not None
    tokens = count * SEQ_LEN / 1e6
    found.append(
        record(
            "read batches of 4 rows", "torch DataLoader", tokens / ours, tokens / theirs, "M tokens/s", ratio, setting
        )
    )
    return found


def seek(folder: Path, rounds: int) -> list[dict[str, Any]]:
    corpus = synthetic_corpus(folder)
    planning = seconds_of(lambda: TokenStream(corpus, {"synthetic": 1.0}, SEQ_LEN, "best_fit"))
    opening = seconds_of(lambda: TokenStream(corpus, {"synthetic": 1.0}, SEQ_LEN, "best_fit"))
    stream = TokenStream(corpus, {"synthetic": 1.0}, SEQ_LEN, "best_fit")
    rows = INDEX_TOKENS // SEQ_LEN
    positions = np.random.default_rng(1).integers(0, rows, size=2000).tolist()
    times = [seconds_of(lambda position=position: stream[position]) for position in positions]
    print(
        f"index of 10^9 tokens, {corpus.shards['synthetic'].documents:,} documents: best-fit plan made in "
        f"{planning:.1f} s, opened again in {opening * 1e3:.0f} ms; one row at a random position: median "
        f"{np.median(times) * 1e3:.3f} ms, 99th percentile {np.percentile(times, 99) * 1e3:.2f} ms"
    )
    setting = "10^9 tokens in rows of 4,096, first row after a random position"
    if importlib.util.find_spec("accelerate") is None:
        print("accelerate is not installed (pip install accelerate): its skip_first_batches is left out")
        return []
    from accelerate import skip_first_batches

    generator = torch.Generator().manual_seed(0)
    loader = torch.utils.data.DataLoader(range(rows), batch_size=1, shuffle=True, generator=generator)
    places = iter(positions * 2)
    ours, theirs, ratio = interleave(
        rounds, lambda: stream[next(places)], lambda: next(iter(skip_first_batches(loader, next(places))))
    )
    assert theirs is not None
    return [record("seek", "accelerate skip_first_batches", ours * 1e3, theirs * 1e3, "ms", ratio, setting)]


def record(
    work: str, rival: str, ours: float, theirs: float, unit: str, ratio: float | None, setting: str
) -> dict[str, Any]:
    return {
        "work": work, "rival": rival, "ours": ours, "theirs": theirs, "unit": unit, "ratio": ratio, "threads": 1,
        "setting": setting,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=4.0, help="of text")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", dest="json_file")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    items, size = [], 0
    for document in stdlib_corpus.documents("code"):
        if size < arguments.megabytes * 1e6:
            items.append(document)
            size += len(document.text or "")
    texts, unit = [document.text or "" for document in items], MemoryUnit(items, size)
    records: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "tokenizer.model").write_bytes(train_model(texts, VOCABULARY))
        tokenizer = SentencePieceTokenizer(folder / "tokenizer.model")
        records += tokenize(texts, unit, tokenizer, arguments.rounds)
        records += pack_and_read(unit, tokenizer, folder, arguments.rounds)
        (folder / "synthetic").mkdir()
        records += seek(folder / "synthetic", arguments.rounds)
    print(f"{'work':26}{'rival':34}{'ours':>12}{'theirs':>12} {'unit':12}{'ratio':>8}")
    for line in records:
        sides = f"{line['ours']:12.3f}{line['theirs']:12.3f} {line['unit']:12}"
        print(f"{line['work']:26}{line['rival']:34}{sides}{line['ratio']:7.1f}x")
    if arguments.json_file:
        Path(arguments.json_file).write_text(json.dumps(records, indent=1) + "\n")


if __name__ == "__main__":
    main()
