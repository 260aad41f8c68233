"""Has the model learned how to answer? Held-out questions answered greedily, beside their reference answers.

A loss falls long before an answer has the right form. Three shares tell the form apart from the content: answers that
end by themselves, answers that begin with the reference's first word (a docstring with its verb, a function with
`def`), and how long an answer is beside its reference.
"""

import json
import logging
from dataclasses import dataclass
from typing import Any

import numpy as np

from internlm2.config import GenerationConfig
from internlm2.data.corpus import Corpus
from internlm2.generation.parameters import SamplingParams
from internlm2.model.transformer import CausalLM
from internlm2.permutation import derive_key, shuffled
from internlm2.run.directory import RunDirectory
from internlm2.stages.samples import complete
from internlm2.text.tokenizer import Tokenizer

log = logging.getLogger(__name__)

TABLE = "evaluation/answers.json"


@dataclass(frozen=True)
class Question:
    """A conversation up to its first answer, and that answer with its end; token ids."""

    source: str
    prompt: list[int]
    reference: list[int]


def held_out_questions(corpus: Corpus, sources: list[str], count: int, longest: int) -> list[Question]:
    """Up to `count` of each source: the same for every run, stage and seed with the same corpus.

    Only those whose reference has at most `longest` tokens, so that a right answer has room to end.
    """
    found = []
    for source in sources:
        shard, documents = corpus.shard(source), corpus.held_out_documents(source)
        if shard.mask is None:  # plain text has no answers
            continue
        order = documents[shuffled(len(documents), derive_key("held-out questions", source))]
        taken: list[Question] = []
        for document in order:
            if len(taken) == count:
                break
            ids, silent = shard.document(document), shard.mask[shard.offsets[document] : shard.offsets[document + 1]]
            spoken = np.flatnonzero(silent == 0)
            if not len(spoken) or spoken[0] == 0:
                continue
            begin = int(spoken[0])
            rest = np.flatnonzero(silent[begin:])
            end = begin + int(rest[0]) if len(rest) else len(ids)
            if end - begin <= longest:
                taken.append(Question(source, ids[:begin].tolist(), ids[begin:end].tolist()))
        found += taken
    return found


class HeldOutAnswers:
    """`questions` answered again at each validation, with at most `longest` tokens; only for a rank that writes."""

    def __init__(self, questions: list[Question], tokenizer: Tokenizer, longest: int) -> None:
        self.questions, self.tokenizer = questions, tokenizer
        stops = (tokenizer.eos_id, tokenizer.special_id("<|im_end|>"))
        self.params = SamplingParams(temperature=0.0, max_new_tokens=longest, stop_ids=stops)

    def measure(self, model: CausalLM, generation: GenerationConfig, step: int, run: RunDirectory) -> None:
        """A row for each source, to the log and to the table in evaluation/, which holds every step's."""
        prompts = [question.prompt for question in self.questions]
        written = complete(model, self.tokenizer, generation, prompts, self.params)
        answers = [
            (question, list(text.tokens), text.finish == "stop") for question, text in zip(self.questions, written)
        ]
        rows = []
        for source in dict.fromkeys(question.source for question in self.questions):
            rows.append(
                {"step": step, "source": source, **self._form([row for row in answers if row[0].source == source])}
            )
            log.info(
                "step %d, held-out questions: %s",
                step,
                ", ".join(f"{k} {v}" for k, v in rows[-1].items() if k != "step"),
            )
        path = run.path / TABLE
        earlier = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else []
        kept = [row for row in earlier if row["step"] < step]
        note = f"answered greedily with at most {self.params.max_new_tokens} tokens"
        run.write_json(TABLE, {"title": "Held-out questions", "note": note, "rows": kept + rows})

    def _form(self, answers: list[tuple[Question, list[int], bool]]) -> dict[str, Any]:
        def share(hits: list[bool]) -> str:
            return f"{sum(hits)} of {len(hits)}"

        return {
            "ended": share([ended for _, _, ended in answers]),
            "begin as the reference": share(
                [self._first_word(ids) == self._first_word(question.reference) for question, ids, _ in answers]
            ),
            "tokens": round(sum(len(ids) for _, ids, _ in answers) / len(answers), 1),
            "tokens of the reference": round(sum(len(q.reference) for q, _, _ in answers) / len(answers), 1),
        }

    def _first_word(self, ids: list[int]) -> str:
        return next(iter(self.tokenizer.decode(ids, skip_special=True).split()), "")
