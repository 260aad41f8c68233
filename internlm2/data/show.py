"""Look at what a stage trains on: `python -m internlm2.data.show data=docstrings stage=sft rows=2`.

Prints packed rows of the stage's mixture, trained tokens in colour, documents set apart, and statistics of lengths and
masks. `rows=` rows from `position=` on; every other override is the same as for train.py.
"""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console
from rich.table import Table
from rich.text import Text

from internlm2.config import Config, ConfigError
from internlm2.config.compose import CONF, describe, register_schema, to_config
from internlm2.data.corpus import Corpus
from internlm2.data.prepare import prepare
from internlm2.data.rows import IGNORE, Row
from internlm2.data.stream import TokenStream
from internlm2.data.usage import usage_table
from internlm2.text.inherited_tokenizer import settle_tokenizer
from internlm2.text.tokenizer import Tokenizer

TRAINED, PLAIN, MARKER = "bold green", "dim", "magenta"
LONGEST_SHOWN = 4000  # tokens of one document on the screen; the middle of a longer one is left out


@dataclass(frozen=True)
class RowStatistics:
    """Of some rows: how full they are and how much of them is trained."""

    rows: int
    capacity: int  # rows x seq_len
    tokens: int
    targets: int  # positions with a label
    documents: int
    without_target: int  # documents in which nothing is trained
    lengths: np.ndarray  # [documents] tokens of each


def statistics(rows: Sequence[Row], seq_len: int) -> RowStatistics:
    """Count tokens, targets and documents of packed rows."""
    lengths = np.concatenate([np.diff(row.cu_seqlens) for row in rows])
    targets = np.concatenate(
        [np.add.reduceat((row.labels != IGNORE).astype(np.int64), row.cu_seqlens[:-1]) for row in rows]
    )
    tokens = sum(len(row.ids) for row in rows)
    return RowStatistics(
        len(rows), len(rows) * seq_len, tokens, int(targets.sum()), len(lengths), int((targets == 0).sum()), lengths
    )


def colored(ids: Sequence[int], trained: Sequence[bool], tokenizer: Tokenizer) -> Text:
    """Text of a document: what is a target stands out, markers have a colour of their own."""
    markers = {token: name for name, token in tokenizer.special_ids.items()}
    names = markers | {tokenizer.bos_id: "<s>", tokenizer.eos_id: "</s>"}
    text, run = Text(), []
    for place, token in enumerate(ids):
        if token not in names:
            run.append(token)
        ends = place + 1 == len(ids) or trained[place + 1] != trained[place] or ids[place + 1] in names
        if run and (ends or token in names):
            text.append(tokenizer.decode(run), TRAINED if trained[place] else PLAIN)
            run = []
        if token in names:
            text.append(names[token], f"{MARKER} {TRAINED if trained[place] else PLAIN}")
    return text


def show_row(row: Row, number: int, corpus: Corpus, tokenizer: Tokenizer, console: Console) -> None:
    """One packed row, document by document, each with where it comes from."""
    bounds = row.cu_seqlens.tolist()
    console.rule(f"row {number}: {len(row.ids):,} tokens, {len(bounds) - 1} documents", characters="-")
    for index, (begin, end) in enumerate(pairwise(bounds)):
        source = corpus.source_names[row.sources[index]]
        # labels[t] is the target of position t: token t + 1 is trained where labels[t] is there
        trained = np.append(False, row.labels[begin : end - 1] != IGNORE)
        origin = corpus.shards[source].origin(int(row.documents[index]))
        console.print(
            Text(
                f"[{source}] {origin}  {end - begin:,} tokens, {int((row.labels[begin:end] != IGNORE).sum()):,} targets"
            ),
            style="cyan",
        )
        for part in _shown(end - begin):
            if part is None:
                console.print(Text(f" ... {end - begin - LONGEST_SHOWN:,} tokens left out ... ", "cyan"))
                continue
            ids = row.ids[begin:end][part].tolist()
            console.print(colored(ids, trained[part].tolist(), tokenizer))


def _shown(length: int) -> Iterator[slice | None]:
    if length <= LONGEST_SHOWN:
        yield slice(None)
        return
    yield slice(0, LONGEST_SHOWN // 2)
    yield None
    yield slice(length - LONGEST_SHOWN // 2, length)


def statistics_table(stats: RowStatistics) -> Table:
    """The counts as a table."""
    table = Table(show_header=False, box=None)
    quantiles = np.quantile(stats.lengths, (0.0, 0.1, 0.5, 0.9, 1.0)).astype(int).tolist()
    for label, value in (
        ("rows", f"{stats.rows:,}"),
        ("tokens", f"{stats.tokens:,} ({stats.tokens / stats.capacity:.1%} of the rows' room)"),
        ("targets", f"{stats.targets:,} ({stats.targets / stats.tokens:.1%} of the tokens)"),
        ("documents", f"{stats.documents:,} ({stats.documents / stats.rows:.1f} a row)"),
        ("without a target", f"{stats.without_target:,}"),
        ("length: least, 10%, median, 90%, most", ", ".join(f"{value:,}" for value in quantiles)),
    ):
        table.add_row(label, value)
    return table


def show(config: Config, rows: int, position: int, console: Console) -> None:
    """Prepare the data of the config's stage, print `rows` rows from `position` on and statistics of 200 rows."""
    config.data.tokenizer = settle_tokenizer(config)
    weights = {name: weight for name, weight in config.data.weights[config.stage.name].items() if weight > 0}
    tokenizer, corpus = prepare(config.data, config.model.vocab_size, progress=console.is_terminal, sources=weights)
    stream = TokenStream(
        corpus,
        weights,
        config.train.seq_len,
        config.data.packing,
        config.data.length_buckets,
        config.seed,
        config.data.long_conversations,
    )
    for number in range(position, position + rows):
        show_row(stream[number], number, corpus, tokenizer, console)
    console.rule("mixture of 200 rows", characters="-")
    console.print(Text(usage_table(stream.describe(200))))
    console.rule("statistics of 200 rows", characters="-")
    console.print(statistics_table(statistics([stream[position + n] for n in range(200)], config.train.seq_len)))
    for source, done in stream.shortened.items():
        if done.conversations:
            console.print(Text(done.sentence(source, config.train.seq_len, config.data.long_conversations)))


def main(arguments: list[str] | None = None) -> int:
    """Run the command; 0, or 2 with one sentence on stderr."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if "--help" in given or "-h" in given:
        print(__doc__)
        return 0
    register_schema()
    try:
        numbers = {"rows": 2, "position": 0}
        for key in numbers:
            for text in [text for text in given if text.startswith(f"{key}=")]:
                given.remove(text)
                if not text.partition("=")[2].isdecimal():
                    raise ConfigError(f"{text}: must be a whole number.")
                numbers[key] = int(text.partition("=")[2])
        with initialize_config_dir(str(CONF), version_base="1.3"):
            config = to_config(compose("train", overrides=given))
        show(config, numbers["rows"], numbers["position"], Console(highlight=False, soft_wrap=True))
    except (ConfigError, HydraException, OmegaConfBaseException) as error:
        print(f"error: {describe(error)}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
