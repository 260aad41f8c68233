"""Prompts for online RLHF: turns to answer, the domain by which the answer is judged, and whatever a judge needs.

    {"prompt": "What is 2 + 3?", "domain": "math", "answer": "5"}
    {"prompt": [{"role": "user", "content": "..."}], "domain": "harmless"}

JSON lines, one prompt a line; a prompt is text or messages in the openai format. Fields other than `prompt` and
`domain` are kept in `reference` for rules and gold rewards; nothing of them reaches a model. `question` may stand for
`prompt`, as in GSM8K.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from internlm2.config import ConfigError
from internlm2.config.ppo import PromptsConfig, PromptSourceConfig
from internlm2.data import docstring_prompts
from internlm2.data.encoding import split_hash
from internlm2.data.mixture import SlotTable
from internlm2.permutation import derive_key, permute, shuffled
from internlm2.sources import arithmetic, toy_language
from internlm2.sources.conversations import messages_of
from internlm2.sources.documents import RecordError
from internlm2.text.chat import ChatError, Message

# Kinds without a file: record of (seed, split, index).
MADE: dict[str, Callable[[int, str, int], dict[str, Any]]] = {
    "arithmetic": arithmetic.prompt_record,
    "toy": toy_language.prompt_record,
    "stdlib": docstring_prompts.prompt_record,
}


@dataclass(frozen=True)
class Prompt:
    """Turns that end where the assistant's answer begins."""

    turns: tuple[Message, ...]
    domain: str
    reference: dict[str, Any] = field(default_factory=dict)
    source: str = ""

    def record(self) -> dict[str, Any]:
        """The exchange format, as it was read."""
        turns = [{"role": turn.role, "content": turn.content} for turn in self.turns]
        return {"prompt": turns, "domain": self.domain, **self.reference}


class PromptSource:
    """The prompts of one source, training and held-out ones apart."""

    def __init__(self, name: str, settings: PromptSourceConfig, validation_fraction: float, seed: int) -> None:
        self.name, self.settings, self.seed = name, settings, seed
        self._lines: list[tuple[int, dict[str, Any]]] = []
        self._training: list[int] = []
        self._validation: list[int] = []
        if settings.kind in MADE:
            identity = f"{settings.kind} {settings.count} {seed}"
            self.size, self.held_out = settings.count, settings.count
        else:
            identity = self._read(validation_fraction)
            self.size, self.held_out = len(self._training), len(self._validation)
        self.fingerprint = hashlib.sha256(f"{identity} {settings.domain}".encode()).hexdigest()[:32]
        if not self.size:
            raise ConfigError(f"prompts.sources.{name}: there is no prompt to train on in {settings.path}.")

    def training(self, index: int) -> Prompt:
        """Prompt `index` of `size`."""
        if self.settings.kind in MADE:
            return self._made("train", index)
        return self._prompt(self._training[index])

    def validation(self, index: int) -> Prompt:
        """Prompt `index` of `held_out`; never among the training ones."""
        if self.settings.kind in MADE:
            return self._made("validation", index)
        return self._prompt(self._validation[index])

    def _made(self, split: str, index: int) -> Prompt:
        return self._parse(MADE[self.settings.kind](self.seed, split, index), f"{self.name}[{index}]")

    def _prompt(self, place: int) -> Prompt:
        line, record = self._lines[place]
        return self._parse(record, f"{self.settings.path}:{line}")

    def _read(self, validation_fraction: float) -> str:
        """Fill the lists; a prompt is held out by the hash of its record. Returns the content's hash."""
        path = Path(str(self.settings.path)).expanduser()
        if not path.is_file():
            raise ConfigError(f"prompts.sources.{self.name}.path: there is no file {path}.")
        limit, digest = int(validation_fraction * 2.0**64), hashlib.sha256(f"{validation_fraction}".encode())
        with open(path, "rb") as lines:
            for number, line in enumerate(lines, start=1):
                digest.update(line)
                if not line.strip():
                    continue
                try:
                    record = json.loads(line)
                except ValueError as error:
                    raise ConfigError(f"{path}:{number} is not JSON: {error}.") from error
                self._parse(record, f"{path}:{number}")
                held = split_hash(json.dumps(record, sort_keys=True).encode()) < limit
                (self._validation if held else self._training).append(len(self._lines))
                self._lines.append((number, record))
        return digest.hexdigest()

    def _parse(self, record: Any, where: str) -> Prompt:
        try:
            return parse_prompt(record, self.settings.domain or self.name, self.name)
        except (RecordError, ChatError) as error:
            raise ConfigError(f"{where}: {error}.") from error


def parse_prompt(record: Any, domain: str, source: str = "") -> Prompt:
    """One record as a Prompt; `domain` where it names none. Raises RecordError."""
    if not isinstance(record, Mapping):
        raise RecordError("a prompt is a JSON object with the key prompt")
    key = "prompt" if "prompt" in record else "question"
    if key not in record:
        raise RecordError("it has no key prompt (text, or a list of messages)")
    given = record[key]
    if isinstance(given, str):
        if not given.strip():
            raise RecordError(f"its {key} is empty")
        turns: tuple[Message, ...] = (Message("user", given),)
    else:
        # The reader of conversations wants an answer; it is put behind the turns and taken off again.
        messages = [*given, {"role": "assistant", "content": "."}] if isinstance(given, list) else given
        read = messages_of({"messages": messages}, "openai")
        if isinstance(read, str):
            raise RecordError(read)
        turns = read[:-1]
    if not turns or turns[-1].role == "assistant":
        raise RecordError("a prompt ends with a turn that is to be answered, not with the assistant's")
    named = record.get("domain", domain)
    if not isinstance(named, str):
        raise RecordError(f"its domain is {named!r}, not text")
    reference = {name: value for name, value in record.items() if name not in (key, "domain")}
    return Prompt(turns, named, reference, source)


class PromptStream:
    """`stream[position]` is the prompt at a global position: a pure function of seed and position.

    Sources take turns by their weights (counted in prompts); each epoch of a source shows every prompt once, in an
    order of its own. The whole state is the position.
    """

    def __init__(self, config: PromptsConfig, seed: int) -> None:
        weights = {name: source.weight for name, source in config.sources.items() if source.weight > 0}
        if not weights:
            raise ConfigError("prompts.sources: no source has a weight above 0.")
        self.sources = [
            PromptSource(name, config.sources[name], config.validation_fraction, derive_key(seed, "prompts", name))
            for name in weights
        ]
        self._keys = [derive_key(seed, "prompt order", name) for name in weights]
        self._slots = SlotTable(list(weights.values()))
        self.parts = {source.name: f"{source.fingerprint} {weights[source.name]}" for source in self.sources}

    @cached_property
    def fingerprint(self) -> str:
        return hashlib.sha256(json.dumps(self.parts, sort_keys=True).encode()).hexdigest()[:32]

    def __getitem__(self, position: int) -> Prompt:
        """The prompt at a position from 0; there is no last one."""
        if position < 0:
            raise IndexError(f"position {position} is negative")
        number, turn = self._slots.locate(position)
        source = self.sources[number]
        epoch, place = divmod(turn, source.size)
        return source.training(permute(place, source.size, derive_key(self._keys[number], epoch)))

    def held_out(self, rows: int) -> list[Prompt]:
        """Up to `rows` held-out prompts of each source: the same in every iteration, round and run with these data."""
        found = []
        for source in self.sources:
            order = shuffled(min(source.held_out, 1 << 20), derive_key("validation prompts", source.name))
            found += [source.validation(int(place)) for place in order[:rows]]
        return found

    def check_fingerprint(self, saved: str) -> None:
        """ConfigError where a checkpoint was made with other prompts: its position would mean others."""
        if saved != self.fingerprint:
            raise ConfigError(
                "the prompts changed since the checkpoint, so that its position would mean other ones. Restore "
                "prompts.sources, or choose another name=."
            )
