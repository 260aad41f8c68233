"""Does a reward model score the better answer above the worse one? By domain, with and without its conditions (the
comparison of report 4.2.1, Table 19).
"""

from collections.abc import Sequence
from itertools import permutations

from internlm2.config import ConfigError
from internlm2.config.evaluate import EvaluateConfig, PreferencesSuite
from internlm2.evaluate.intervals import bootstrap
from internlm2.evaluate.item_files import read_items
from internlm2.evaluate.results import Headline, Result
from internlm2.evaluate.subject import device_of, dtype_of
from internlm2.rlhf.conditions import Conditions
from internlm2.rlhf.scoring import RewardScorer
from internlm2.sources.documents import Document, RecordError
from internlm2.sources.preferences import PreferenceReader
from internlm2.text.chat import Message


def run(source: str, config: EvaluateConfig) -> list[Result]:
    """Accuracy of the reward model at `source`."""
    suite: PreferencesSuite = config.suite
    documents = read_preferences(suite)
    scorer = RewardScorer.load(
        source, device=device_of(config), dtype=dtype_of(config), attention=config.attention,
        batch_tokens=config.batch_tokens,
    )  # fmt: skip
    told = {"with conditions": scorer.conditions} if scorer.conditions.texts and suite.conditions else {}
    margins = {
        name: pair_margins(scorer_with(scorer, conditions), documents)
        for name, conditions in {**told, "without conditions": Conditions({})}.items()
    }
    first = next(iter(margins))
    domains: list[str | None] = [*sorted({document.domain or "" for document in documents})]
    rows: list[dict[str, object]] = []
    for domain in [*domains, *([None] if len(domains) > 1 else [])]:
        row: dict[str, object] = {"domain": domain or "all of them"}
        for name, found in margins.items():
            mine = [margin for where, margin in found if domain in (where, None)]
            row |= {"pairs": len(mine), f"accuracy {name}": accuracy(mine), f"margin {name}": sum(mine) / len(mine)}
        rows.append(row)
    right = [float(margin > 0) for _, margin in margins[first]]
    headline = [Headline(f"preference accuracy {first}", sum(right) / len(right), bootstrap(right, config.seed))]
    return [
        Result(
            name=suite.name,
            title="Preference pairs that the reward model orders as people did",
            rows=rows,
            headline=headline,
            note="Equal scores count as wrong.",
            records=[
                {"domain": domain, **{name: found[place][1] for name, found in margins.items()}}
                for place, (domain, _) in enumerate(margins[first])
            ],
        )
    ]


def read_preferences(suite: PreferencesSuite) -> list[Document]:
    """The file's records in any of the formats of `internlm2.sources.preferences`."""
    reader = PreferenceReader("unnamed")
    documents = []
    for number, item in enumerate(read_items("suite.path", suite.path, (), suite.limit), 1):
        try:
            documents.append(reader.document(str(suite.path), number, item))
        except RecordError as error:
            raise ConfigError(f"{suite.path}:{number}: {error}.") from error
    return documents


def scorer_with(scorer: RewardScorer, conditions: Conditions) -> RewardScorer:
    """The same model under other conditions."""
    return RewardScorer(
        scorer.model,
        scorer.tokenizer,
        conditions,
        seq_len=scorer.sequences.seq_len,
        batch_tokens=scorer.batch_tokens,
    )


def pair_margins(scorer: RewardScorer, documents: Sequence[Document]) -> list[tuple[str, float]]:
    """(domain, score of the better answer minus that of the worse) of every pair that differs in rank."""
    conversations: list[Sequence[Message]] = []
    domains: list[str] = []
    for document in documents:
        for answer in document.answers or ():
            conversations.append((*(document.messages or ()), *answer.turns))
            domains.append(document.domain or "")
    scores = iter(scorer.score(conversations, domains))
    margins = []
    for document in documents:
        given = [(answer.score, next(scores)) for answer in document.answers or ()]
        margins += [
            (document.domain or "", better - worse)
            for (rank, better), (lower, worse) in permutations(given, 2)
            if rank > lower
        ]
    return margins


def accuracy(margins: Sequence[float]) -> float:
    """Share of pairs in the right order."""
    return sum(margin > 0 for margin in margins) / len(margins)
