"""One model's answers against another's: each pair is judged in both orders, so that a judge who prefers whatever comes
first decides nothing.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from internlm2.config import ConfigError
from internlm2.config.evaluate import EvaluateConfig, PairwiseSuite
from internlm2.data.prompts import parse_prompt
from internlm2.evaluate.endpoint import Endpoint
from internlm2.evaluate.intervals import bootstrap
from internlm2.evaluate.item_files import read_items
from internlm2.evaluate.results import Headline, Result
from internlm2.evaluate.subject import Subject, device_of, dtype_of, load_subject
from internlm2.generation import SamplingParams
from internlm2.rlhf.scoring import RewardScorer
from internlm2.sources.documents import RecordError
from internlm2.text.chat import Message, parse_reply, render


@dataclass(frozen=True)
class Contest:
    """One prompt with both answers."""

    turns: tuple[Message, ...]
    domain: str
    ours: str
    theirs: str


# (contest, whether ours comes first) -> 1 where ours is better, 0 where theirs is, 0.5 for a tie
Judge = Callable[[Sequence[Contest], bool], list[float]]


def run(source: str, config: EvaluateConfig) -> list[Result]:
    """Wins, ties and losses of `source` against `suite.against`."""
    suite: PairwiseSuite = config.suite
    if suite.against is None:
        raise ConfigError("suite.against is missing: name the model to compare with.")
    prompts = read_prompts(suite)
    judge = judge_of(suite, config)
    models = (source, suite.against)
    answers = [answers_of(load_subject(model, config), prompts, suite, config.seed) for model in models]
    contests = [
        Contest(turns, domain, ours, theirs) for (turns, domain), ours, theirs in zip(prompts, *answers, strict=True)
    ]
    first, second = judge(contests, True), judge(contests, False)
    verdicts = [verdict(a, b) for a, b in zip(first, second, strict=True)]
    return [result_of(contests, verdicts, first, second, suite, config.seed)]


def verdict(first: float, second: float) -> float:
    """Of both orders: a win must hold in both (or be a tie in one); contradicting verdicts are a tie."""
    total = first + second
    return 1.0 if total > 1 else 0.0 if total < 1 else 0.5


def result_of(
    contests: Sequence[Contest],
    verdicts: Sequence[float],
    first: Sequence[float],
    second: Sequence[float],
    suite: PairwiseSuite,
    seed: int,
) -> Result:
    """The table by domain and the headline."""
    domains: list[str | None] = [*sorted({contest.domain for contest in contests})]
    rows: list[dict[str, object]] = []
    for domain in [*domains, *([None] if len(domains) > 1 else [])]:
        mine = [value for contest, value in zip(contests, verdicts) if domain in (contest.domain, None)]
        rows.append(
            {
                "domain": domain or "all of them",
                "prompts": len(mine),
                "wins": mine.count(1.0),
                "ties": mine.count(0.5),
                "losses": mine.count(0.0),
                "win rate": sum(mine) / len(mine),
            }
        )
    contradictions = sum(a != b for a, b in zip(first, second))
    return Result(
        name=suite.name,
        title=f"Answers against those of {suite.against}",
        rows=rows,
        headline=[
            Headline(f"win rate against {suite.against}", sum(verdicts) / len(verdicts), bootstrap(verdicts, seed))
        ],
        note=f"A tie counts half. The two orders disagreed on {contradictions} of {len(contests)} prompts.",
        records=[
            {
                "prompt": [{"role": turn.role, "content": turn.content} for turn in contest.turns],
                "domain": contest.domain,
                "ours": contest.ours,
                "theirs": contest.theirs,
                "verdict": value,
                "orders": [a, b],
            }
            for contest, value, a, b in zip(contests, verdicts, first, second, strict=True)
        ],
    )


def read_prompts(suite: PairwiseSuite) -> list[tuple[tuple[Message, ...], str]]:
    """(turns, domain) of each line; a prompt is a text or messages."""
    prompts = []
    for number, item in enumerate(read_items("suite.path", suite.path, ("prompt",), suite.limit), 1):
        try:
            prompt = parse_prompt(item, "unnamed")
        except RecordError as error:
            raise ConfigError(f"{suite.path}:{number}: {error}.") from error
        prompts.append((prompt.turns, prompt.domain))
    return prompts


def answers_of(
    subject: Subject, prompts: Sequence[tuple[tuple[Message, ...], str]], suite: PairwiseSuite, seed: int
) -> list[str]:
    """One answer to each prompt."""
    params = SamplingParams(
        temperature=suite.temperature, max_new_tokens=suite.max_new_tokens, stop_ids=subject.stop_ids, seed=seed
    )
    skip = 0 if subject.first_ids() else 1
    ids = [render(turns, subject.tokenizer, generation_prompt=True).ids[skip:] for turns, _ in prompts]
    completions = subject.engine.generate(ids, params)
    return [parse_reply(completion.tokens, subject.tokenizer).content for completion in completions]


def judge_of(suite: PairwiseSuite, config: EvaluateConfig) -> Judge:
    """The judge that the suite names."""
    named = suite.judge
    if (named.reward_model is None) == (named.url is None):
        raise ConfigError("suite.judge needs one of reward_model and url: who compares the answers?")
    if named.url is not None:
        if named.model is None:
            raise ConfigError("suite.judge.url needs suite.judge.model, the model's name at that endpoint.")
        return endpoint_judge(Endpoint(named.url, named.model, named.key_variable))
    assert named.reward_model is not None
    scorer = RewardScorer.load(
        named.reward_model, device=device_of(config), dtype=dtype_of(config), batch_tokens=config.batch_tokens
    )
    return reward_judge(scorer, suite.tie)


def reward_judge(scorer: RewardScorer, tie: float) -> Judge:
    """By the scores of a reward model, which knows no order."""

    def judge(contests: Sequence[Contest], ours_first: bool) -> list[float]:
        domains = [contest.domain for contest in contests]
        scores = [
            scorer.score([(*c.turns, Message("assistant", text)) for c, text in zip(contests, texts)], domains)
            for texts in ([c.ours for c in contests], [c.theirs for c in contests])
        ]
        return [0.5 if abs(a - b) <= tie else float(a > b) for a, b in zip(*scores, strict=True)]

    return judge


INSTRUCTION = """Compare two answers to the same conversation. Judge helpfulness, correctness and clarity; length and \
order do not count. Think briefly, then end with one line: "Verdict: 1", "Verdict: 2" or "Verdict: tie".

[Conversation]
{conversation}

[Answer 1]
{first}

[Answer 2]
{second}"""


def endpoint_judge(endpoint: Endpoint) -> Judge:
    """By a chat model behind an endpoint; an answer without a verdict is a tie."""

    def judge(contests: Sequence[Contest], ours_first: bool) -> list[float]:
        verdicts = []
        for contest in contests:
            shown = contest if ours_first else replace(contest, ours=contest.theirs, theirs=contest.ours)
            conversation = "\n\n".join(f"{turn.role}: {turn.content}" for turn in contest.turns)
            text = endpoint.ask(INSTRUCTION.format(conversation=conversation, first=shown.ours, second=shown.theirs))
            better = read_verdict(text)
            verdicts.append(better if ours_first or better == 0.5 else 1.0 - better)
        return verdicts

    return judge


def read_verdict(text: str) -> float:
    """1 where the last verdict names answer 1, 0 where it names answer 2, else 0.5."""
    last = text.lower().rpartition("verdict:")[2].strip().strip("*\"'. ")
    return {"1": 1.0, "2": 0.0}.get(last[:1], 0.5) if "verdict:" in text.lower() else 0.5
