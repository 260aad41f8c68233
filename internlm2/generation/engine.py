"""Continuous batching: rows leave when they are finished, and the next prompts take their places.

    engine = Engine(model, max_rows=64)
    for answer in engine.generate(prompts, SamplingParams(temperature=0.8, stop_ids=(2,), n=4)):
        print(answer.prompt, answer.sample, answer.tokens, answer.finish)

A row's tokens are a function of its prompt, its parameters, the seed and its id alone. On CPU that holds bit for bit,
in float32 and bfloat16: each product, attention and sampling step treats a row alike whatever stands beside it (see
`projections`). On a GPU the matrix library may pick another kernel for another number of rows; rounding then differs,
and a near-tie between two tokens can fall the other way.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from internlm2.config import ConfigError
from internlm2.generation.cache import round_up
from internlm2.generation.network import Network
from internlm2.generation.parameters import SamplingParams
from internlm2.generation.prefixes import Prompt, Reading, plan
from internlm2.generation.sampling import Drawn, sample
from internlm2.generation.uniform import uniform
from internlm2.model.transformer import CausalLM


@dataclass
class Completion:
    """One answer. The log-probabilities are natural, one a token: `logprobs` under the model's own distribution,
    `sampling_logprobs` under the tempered and truncated one that it was drawn from (0 for greedy).

    finish  "stop" where the last token is a stop id, "length" where max_new_tokens was reached
    """

    prompt: int
    sample: int
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    sampling_logprobs: list[float] = field(default_factory=list)
    finish: str | None = None


@dataclass
class Token:
    """One new token of a stream. `completion` grows as the stream goes on."""

    completion: Completion
    token: int
    finish: str | None


@dataclass
class _Group:
    """The samples of one prompt: the first that is admitted reads the prompt, the others copy its keys and values."""

    ids: list[int]
    params: SamplingParams
    row_id: int
    completions: list[Completion]
    admitted: int = 0
    hidden: Tensor | None = None  # [1, C] after the prompt
    slots: list["_Row"] = field(default_factory=list)

    @property
    def limit(self) -> int:
        """Tokens in the cache at the end: the last new one is never read."""
        return len(self.ids) + self.params.max_new_tokens - 1


@dataclass(eq=False)
class _Row:
    group: _Group
    completion: Completion
    slot: int


class Engine:
    """Generates with a CausalLM's current weights.

    max_rows        rows that are decoded together
    kv_tokens       the cache's size: rows x longest row (rounded up to 64 tokens) never exceeds it
    prefill_tokens  prompts are read in passes of about this many tokens
    max_length      longest prompt + answer; None takes max_position_embeddings, stretched by linear or dynamic scaling
    dtype           of the arithmetic; None takes the weights' own
    quantize        none, w8 or w4
    vocab_size      only ids below it are drawn: the tokenizer's size, where the model has rows beyond it (to round its
                    shape); None draws from all rows
    """

    def __init__(
        self,
        model: CausalLM,
        *,
        max_rows: int = 64,
        kv_tokens: int = 65536,
        prefill_tokens: int = 4096,
        max_length: int | None = None,
        dtype: torch.dtype | None = None,
        quantize: str = "none",
        vocab_size: int | None = None,
    ):
        limits = {"max_rows": max_rows, "kv_tokens": kv_tokens, "prefill_tokens": prefill_tokens}
        for name, value in (limits | {"vocab_size": vocab_size}).items():
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be at least 1, got {value}.")
        self.network = Network(model, dtype=dtype, quantize=quantize)
        self.max_rows, self.kv_tokens, self.prefill_tokens = max_rows, kv_tokens, prefill_tokens
        self.vocab_size = vocab_size
        scaling = model.config.rope_scaling
        reach = model.config.max_position_embeddings * (1.0 if scaling.kind == "none" else scaling.factor)
        self.max_length = max_length or int(reach)
        self._released = False
        self.clear()

    def refresh(self) -> None:
        """Take over the model's weights after a training step. Rows in flight are dropped: they would mix models."""
        self.clear()
        self.network.refresh()
        self._released = False

    def release(self) -> None:
        """Free the packed copies of the weights and the cache; `refresh` makes them again. While a model trains, its
        sampler then costs no memory.
        """
        self.clear()
        if not self._released:
            self.network.release()
        self._released = True

    def clear(self) -> None:
        """Drop everything that is waiting or running, and the cache's memory."""
        self._waiting: deque[_Group] = deque()
        self._rows: list[_Row] = []  # row of each slot
        self._seen: Tensor | None = None  # [slots, V] bool, for repetition penalties
        self._cache = self.network.new_cache()
        self._held: dict[int, Prompt] = {}  # prompts whose keys and values lie in a slot, also after their row left

    @property
    def busy(self) -> bool:
        return bool(self._rows or self._waiting)

    def submit(
        self, prompt: Sequence[int], params: SamplingParams, *, row_id: int | None = None, index: int = 0
    ) -> list[Completion]:
        """Queue one prompt -> its `params.n` completions, filled in as `step` is called.

        row_id names the prompt's own random numbers (default: index); index only appears in the completions.
        """
        if self._released:
            raise RuntimeError("the engine's weights were released: call refresh() before it generates.")
        ids = [int(token) for token in prompt]
        self._check(ids, params)
        completions = [Completion(index, number) for number in range(params.n)]
        self._waiting.append(_Group(ids, params, index if row_id is None else row_id, completions))
        return completions

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams | Sequence[SamplingParams],
        *,
        row_ids: Sequence[int] | None = None,
    ) -> list[Completion]:
        """All completions, prompt by prompt and sample by sample.

        row_ids give each prompt its random numbers, e.g. its index in the whole data set; by default its index here.
        """
        completions = self._submit_all(prompts, params, row_ids)
        while self.busy:
            self.step()
        return completions

    def stream(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams | Sequence[SamplingParams],
        *,
        row_ids: Sequence[int] | None = None,
    ) -> Iterator[Token]:
        """Tokens as they come, rows interleaved."""
        self._submit_all(prompts, params, row_ids)
        while self.busy:
            yield from self.step()

    @torch.inference_mode()
    def stop(self, completions: Sequence[Completion]) -> None:
        """End running rows now, for instance because a stop text was written; they keep what they have."""
        ended = {id(completion) for completion in completions}
        for row in self._rows:
            if id(row.completion) in ended:
                row.completion.finish = "stop"
        if ended:
            self._leave()

    @torch.inference_mode()
    def step(self) -> list[Token]:
        """Waiting prompts that fit are read and get their first token; if there are none, every row gets one more."""
        chosen = self._admit()
        if chosen:
            return self._draw(chosen, torch.cat([row.group.hidden for row in chosen if row.group.hidden is not None]))
        if not self._rows:
            return []
        ids = torch.tensor([row.completion.tokens[-1] for row in self._rows], device=self.network.device)
        return self._draw(self._rows, self.network.decode(ids, self._cache))

    def _submit_all(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams | Sequence[SamplingParams],
        row_ids: Sequence[int] | None,
    ) -> list[Completion]:
        if self.busy:
            raise RuntimeError(
                "the engine still has rows in flight: finish them with step(), or drop them with clear()."
            )
        each = [params] * len(prompts) if isinstance(params, SamplingParams) else list(params)
        ids = range(len(prompts)) if row_ids is None else row_ids
        if not len(prompts) == len(each) == len(ids):
            raise ValueError(
                f"{len(prompts)} prompts, {len(each)} sampling parameters and {len(ids)} row ids: these must be equal."
            )
        completions: list[Completion] = []
        try:
            for index, prompt in enumerate(prompts):
                completions += self.submit(prompt, each[index], row_id=ids[index], index=index)
        except ValueError:
            self.clear()
            raise
        return completions

    def _check(self, ids: list[int], params: SamplingParams) -> None:
        if not ids:
            raise ValueError("a prompt is empty: start it with the tokenizer's <s>.")
        size = self.network.config.vocab_size
        if min(ids) < 0 or max(ids) >= size:
            raise ValueError(f"a prompt holds token {min(min(ids), max(ids), key=lambda t: 0 <= t < size)}, "
                             f"but the vocabulary has {size} tokens.")  # fmt: skip
        length = len(ids) + params.max_new_tokens
        if length > self.max_length:
            raise ValueError(
                f"a prompt of {len(ids)} tokens and max_new_tokens={params.max_new_tokens} make {length}, "
                f"beyond the limit of {self.max_length} tokens: shorten one of them or raise max_length."
            )
        if round_up(length - 1) > self.kv_tokens:
            raise ValueError(
                f"a prompt of {len(ids)} tokens and max_new_tokens={params.max_new_tokens} need {round_up(length - 1)} "
                f"tokens of cache, but kv_tokens={self.kv_tokens}."
            )

    # Admission

    def _admit(self) -> list[_Row]:
        """Give free rows to waiting prompts in their order, and read these prompts."""
        chosen = self._choose()
        if not chosen:
            return []
        total = len(self._rows) + len(chosen)
        longest = max(row.group.limit for row in (*self._rows, *chosen))
        self._cache.reserve(total, longest, self.max_rows, self.kv_tokens)
        slots, capacity = self._cache.slots, self._cache.capacity
        self._held = {s: Prompt(p.ids[:capacity], p.base) for s, p in self._held.items() if s < slots}
        for row in chosen:
            row.slot = len(self._rows)
            self._rows.append(row)
        self._cache.rotate_by([row.group.limit for row in self._rows])
        self._read(chosen)
        self._mark_prompts(chosen)
        return chosen

    def _choose(self) -> list[_Row]:
        chosen: list[_Row] = []
        longest = max((row.group.limit for row in self._rows), default=0)
        while self._waiting and len(self._rows) + len(chosen) < self.max_rows:
            group = self._waiting[0]
            longest = max(longest, group.limit)
            if (len(self._rows) + len(chosen) + 1) * round_up(longest) > self.kv_tokens:
                break
            chosen.append(_Row(group, group.completions[group.admitted], -1))
            group.admitted += 1
            if group.admitted == len(group.completions):
                self._waiting.popleft()
        return chosen

    def _read(self, chosen: list[_Row]) -> None:
        """Prompts into the cache: computed once a group, copied to the other samples; what prompts begin with alike is
        computed once for all.
        """
        readers: dict[int, _Row] = {}  # by slot
        copiers: list[_Row] = []
        for row in chosen:
            # A sample that comes later copies from a running sibling; without one the prompt is read again.
            if row.group.slots:
                copiers.append(row)
            else:
                readers[row.slot] = row
            row.group.slots.append(row)
        prompts = {slot: self._prompt(row) for slot, row in readers.items()}
        readings = plan(prompts, self._held)
        for row in chosen:
            self._held.pop(row.slot, None)
        for wave in range(max((reading.wave for reading in readings), default=-1) + 1):
            self._read_wave([reading for reading in readings if reading.wave == wave], readers)
        self._held |= {row.slot: self._prompt(row) for row in chosen}
        for group in {id(row.group): row.group for row in copiers}.values():
            targets = [row.slot for row in copiers if row.group is group]
            self._cache.copy([group.slots[0].slot], targets, len(group.ids))
            self._cache.lengths[targets] = len(group.ids)

    def _prompt(self, row: _Row) -> Prompt:
        return Prompt(row.group.ids, self._cache.base(row.group.limit))

    def _read_wave(self, readings: list[Reading], readers: dict[int, _Row]) -> None:
        """Copy what is there, then read the rest in passes."""
        moved = [reading for reading in readings if reading.source != reading.slot]
        for start in {reading.start for reading in moved}:
            alike = [reading for reading in moved if reading.start == start]
            self._cache.copy([reading.source for reading in alike], [reading.slot for reading in alike], start)
        at = 0
        while at < len(readings):
            end, tokens = at, 0
            while end < len(readings):
                more = len(readers[readings[end].slot].group.ids) - readings[end].start
                if end > at and tokens + more > self.prefill_tokens:
                    break
                end, tokens = end + 1, tokens + more
            batch = readings[at:end]
            rest = [readers[reading.slot].group.ids[reading.start :] for reading in batch]
            ids = torch.tensor([token for part in rest for token in part], device=self.network.device)
            slots, past = [reading.slot for reading in batch], [reading.start for reading in batch]
            hidden = self.network.prefill(ids, [len(part) for part in rest], slots, self._cache, past)
            for reading, last in zip(batch, hidden.split(1)):
                readers[reading.slot].group.hidden = last
            at = end

    def _mark_prompts(self, chosen: list[_Row]) -> None:
        if self._seen is None and all(row.group.params.repetition_penalty == 1.0 for row in chosen):
            return
        old, slots = self._seen, self._cache.slots
        if old is None or len(old) < slots:
            shape = (slots, self.network.config.vocab_size)
            self._seen = torch.zeros(shape, dtype=torch.bool, device=self.network.device)
            if old is not None:
                self._seen[: len(old)] = old
        assert self._seen is not None
        for row in chosen:
            self._seen[row.slot] = False
            self._seen[row.slot, torch.tensor(row.group.ids, device=self._seen.device)] = True

    # Drawing

    def _draw(self, rows: list[_Row], hidden: Tensor) -> list[Token]:
        """The next token of each row from its hidden state; rows that end leave."""
        params = [row.group.params for row in rows]
        numbers = [
            0.0 if p.greedy else uniform(p.seed, row.group.row_id, row.completion.sample, len(row.completion.tokens))
            for p, row in zip(params, rows)
        ]
        slots = torch.tensor([row.slot for row in rows], device=hidden.device)
        seen = None if self._seen is None else self._seen[slots]
        drawn = sample(self.network.logits(hidden), params, numbers, seen, vocab_size=self.vocab_size)
        if self._seen is not None:
            self._seen[slots, drawn.tokens] = True
        tokens = self._record(rows, drawn)
        if any(token.finish for token in tokens):
            self._leave()
        return tokens

    def _record(self, rows: list[_Row], drawn: Drawn) -> list[Token]:
        tokens = []
        values = zip(rows, drawn.tokens.tolist(), drawn.logprobs.tolist(), drawn.sampling_logprobs.tolist())
        for row, token, logprob, sampling_logprob in values:
            completion, params = row.completion, row.group.params
            completion.tokens.append(token)
            completion.logprobs.append(logprob)
            completion.sampling_logprobs.append(sampling_logprob)
            if token in params.stop_ids:
                completion.finish = "stop"
            elif len(completion.tokens) == params.max_new_tokens:
                completion.finish = "length"
            tokens.append(Token(completion, token, completion.finish))
        return tokens

    def _leave(self) -> None:
        """Take finished rows out; the last rows move into their slots, so that the active slots are the first ones."""
        for row in self._rows:
            if row.completion.finish:
                row.group.slots.remove(row)
        alive = [row for row in self._rows if not row.completion.finish]
        count = len(alive)
        holes = [row.slot for row in self._rows[:count] if row.completion.finish]
        movers = [row for row in self._rows[count:] if not row.completion.finish]
        if movers:
            longest = max(len(row.group.ids) + len(row.completion.tokens) for row in movers)
            self._cache.copy([row.slot for row in movers], holes, min(longest, self._cache.capacity))
            if self._seen is not None:
                self._seen[holes] = self._seen[[row.slot for row in movers]]
            for row, slot in zip(movers, holes):
                self._held[slot] = self._prompt(row)
                row.slot = slot
        self._rows = sorted(alive, key=lambda row: row.slot)
        if self._cache.offsets is not None:
            self._cache.rotate_by([row.group.limit for row in self._rows])
