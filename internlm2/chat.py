"""Talk to a model in the terminal.

    python -m internlm2.chat runs/demo/sft
    python -m internlm2.chat smollm2 --system "Answer in one sentence." --temperature 0.2
    python -m internlm2.chat exports/mine --tools < questions.txt

Reads one message a line, from the terminal or from a pipe. Commands: /reset forgets the conversation, /save FILE writes
it as JSON, /quit (or the end of the input) leaves. Ctrl-C stops an answer.
"""

import argparse
import json
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from internlm2.config import ConfigError
from internlm2.config.precision import DTYPES, settled_dtype

if TYPE_CHECKING:
    from internlm2.generation import Engine, SamplingParams
    from internlm2.text.chat import Message
    from internlm2.text.tokenizer import Tokenizer

INTERPRETER_PROMPT = (
    "You have access to a Python interpreter. To run code, write <|action_start|><|interpreter|>, a Markdown block of "
    "Python and <|action_end|>; what it prints is the next message."
)
MOST_CALLS = 4  # of the interpreter for one question: a model that keeps calling never answers


@dataclass
class Chat:
    """A conversation: `say` adds a message and streams the answer to `out`."""

    engine: "Engine"
    tokenizer: "Tokenizer"
    params: "SamplingParams"
    system: str | None = None
    tools: bool = False
    out: TextIO = field(default_factory=lambda: sys.stdout)
    messages: list["Message"] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Back to the system messages."""
        from internlm2.text.chat import ACTION_END, ACTION_START, Message

        self.messages = [Message("system", self.system)] if self.system else []
        if self.tools:
            for marker in (ACTION_START, ACTION_END, "<|interpreter|>"):
                self.tokenizer.special_id(marker)
            self.messages.append(Message("system", INTERPRETER_PROMPT, name="interpreter"))
        self.answers = 0

    def say(self, text: str) -> None:
        """One question, its answer, and with `tools` the interpreter's results and the answers to those."""
        from internlm2.generation.interpreter import code_of, run_python
        from internlm2.text.chat import Message

        self.messages.append(Message("user", text))
        for calls in range(MOST_CALLS + 1):
            answer = self._answer()
            self.messages.append(answer)
            code = [code_of(action.body) for action in answer.actions if action.tool == "interpreter"]
            if not (self.tools and code):
                return
            if calls == MOST_CALLS:
                print(f"[stopped after {MOST_CALLS} calls of the interpreter]", file=self.out)
                return
            result = "\n".join(run_python(block) for block in code)
            print(f"[interpreter]\n{result}", file=self.out, flush=True)
            self.messages.append(Message("environment", result, name="interpreter"))

    def save(self, path: Path) -> None:
        """The conversation as JSON: role, content, and name and actions where there are any."""
        rows = []
        for message in self.messages:
            row: dict[str, object] = {"role": message.role, "content": message.content}
            if message.name:
                row["name"] = message.name
            if message.actions:
                row["actions"] = [{"tool": action.tool, "body": action.body} for action in message.actions]
            rows.append(row)
        path.write_text(json.dumps({"messages": rows}, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")

    def prompt(self) -> list[int]:
        """Ids of the conversation up to the assistant's turn; the oldest exchanges go where it grows too long."""
        from internlm2.text.chat import IM_START, render

        room = min(self.engine.max_length, self.engine.kv_tokens) - self.params.max_new_tokens
        while True:
            ids = render(self.messages, self.tokenizer, generation_prompt=True).ids
            if ids[0] == ids[1] == self.tokenizer.special_ids.get(IM_START):
                ids = ids[1:]  # a vocabulary whose <s> is <|im_start|> itself (SmolLM2) has no extra one
            if len(ids) <= room:
                return ids
            questions = [index for index, message in enumerate(self.messages) if message.role == "user"]
            if len(questions) < 2:
                raise ValueError(f"the message has {len(ids)} tokens with its context; there is room for {room}.")
            del self.messages[questions[0] : questions[1]]
            print("[the oldest exchange is forgotten: the conversation is too long]", file=self.out)

    def _answer(self) -> "Message":
        from internlm2.text.chat import parse_reply

        self.answers += 1
        ids: list[int] = []
        shown = ""
        start = time.perf_counter()
        first = start
        try:
            for token in self.engine.stream([self.prompt()], self.params, row_ids=[self.answers]):
                first = first if ids else time.perf_counter()
                ids.append(token.token)
                text = self.tokenizer.decode([i for i in ids if i not in self.params.stop_ids])
                # An unfinished character decodes to U+FFFD until its last byte is there.
                if not text.endswith("\ufffd"):
                    print(text[len(shown) :], end="", file=self.out, flush=True)
                    shown = text
        except KeyboardInterrupt:
            self.engine.clear()
            print(" [stopped]", end="", file=self.out)
        seconds = time.perf_counter() - first
        rate = f"{(len(ids) - 1) / seconds:.1f} tokens/s" if len(ids) > 1 and seconds > 0 else "one token"
        print(f"\n[{len(ids)} tokens, first after {first - start:.2f} s, then {rate}]", file=self.out, flush=True)
        return parse_reply(ids, self.tokenizer)


def find_model(path: str) -> str:
    """What to load for a run, a stage's folder or an export: the newest finished export in it, else the path itself."""
    folder = Path(path)
    exports = [*folder.glob("export/config.json"), *folder.glob("*/export/config.json")]
    if (folder / "config.json").is_file() or not exports:
        return path
    return str(max(exports, key=lambda file: file.stat().st_mtime).parent)


def load(options: argparse.Namespace) -> Chat:
    """Model, tokenizer and engine for the command line's options."""
    import torch

    from internlm2.generation import Engine, SamplingParams
    from internlm2.generation.projections import ACT_BITS
    from internlm2.model.weights import load_model, open_weights
    from internlm2.ops import describe_backend, describe_quantize
    from internlm2.text.chat import IM_END
    from internlm2.text.tokenizer import load_tokenizer

    source = find_model(options.model)
    folder = options.tokenizer or open_weights(source).tokenizer
    if folder is None:
        raise ConfigError(f"{source} comes without a tokenizer: name its folder with --tokenizer.")
    tokenizer = load_tokenizer(folder)
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    precision = settled_dtype(options.dtype, torch.device(device).type)
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[precision]
    model = load_model(source, device=device, dtype=dtype)
    params = SamplingParams(
        temperature=options.temperature,
        top_p=options.top_p,
        top_k=options.top_k,
        min_p=options.min_p,
        repetition_penalty=options.repetition_penalty,
        max_new_tokens=options.max_new_tokens,
        stop_ids=(tokenizer.eos_id, tokenizer.special_id(IM_END)),
        seed=options.seed,
    )
    engine = Engine(model, max_rows=1, quantize=options.quantize, vocab_size=tokenizer.vocab_size)
    print(f"{source}: {sum(p.numel() for p in model.parameters()) / 1e6:.0f}M parameters, {precision}, {device}")
    print(describe_quantize(options.quantize, device, ACT_BITS))
    print(describe_backend(device, dtype, model.config.head_dim))
    return Chat(engine, tokenizer, params, options.system, options.tools)


def talk(chat: Chat, lines: TextIO) -> None:
    """The loop: a line is a message or a command."""
    human = lines.isatty()
    while True:
        if human:
            print("> ", end="", flush=True)
        try:
            line = lines.readline()
        except KeyboardInterrupt:
            line = ""
        if not line:
            return
        word, _, rest = line.strip().partition(" ")
        try:
            if word == "/quit":
                return
            if word == "/reset":
                chat.reset()
                print("[a new conversation]")
            elif word == "/save":
                chat.save(Path(rest.strip() or "chat.json"))
                print(f"[saved to {rest.strip() or 'chat.json'}]")
            elif word.startswith("/"):
                print(f"[{word} is no command: /reset, /save FILE, /quit]")
            elif word:
                if not human:
                    print(f"> {line.strip()}", flush=True)
                chat.say(line.strip())
        except (ValueError, OSError) as error:
            print(f"[{error}]")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(
        prog="python -m internlm2.chat", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    result.add_argument("model", help="run directory, export, checkpoint, .gguf file, or smollm2")
    result.add_argument("--system", help="system message")
    # The released chat models' own defaults.
    result.add_argument("--temperature", type=float, default=0.8, help="0 is greedy (default 0.8)")
    result.add_argument("--top-p", type=float, default=0.8, help="default 0.8")
    result.add_argument("--top-k", type=int, default=0)
    result.add_argument("--min-p", type=float, default=0.0)
    result.add_argument("--repetition-penalty", type=float, default=1.0)
    result.add_argument("--max-new-tokens", type=int, default=512, help="longest answer (default 512)")
    result.add_argument("--seed", type=int, default=0)
    result.add_argument(
        "--tools", action="store_true", help="run the Python that the model asks for (limits, see below)"
    )
    result.add_argument("--quantize", choices=("none", "w8", "w4"), default="none", help="weights in 8 or 4 bits")
    result.add_argument("--dtype", choices=DTYPES, default="auto")
    result.add_argument("--device", help="cpu or cuda (default: cuda where there is one)")
    result.add_argument("--tokenizer", type=Path, help="folder with the tokenizer, if not the model's own")
    result.epilog = (
        "--tools: each piece of code gets 10 seconds, 1 GiB and a temporary folder, and no network where the system "
        "permits it. It runs as you; on Linux it can read and write its own folder alone."
    )
    return result


def main(arguments: list[str] | None = None) -> int:
    """Run the command; 0, or 1 with one message on stderr."""
    options = parser().parse_args(arguments)
    try:
        chat = load(options)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if options.tools:
        from internlm2.generation.interpreter import network_cut

        if network_cut() is None:
            print("[tools: this system does not permit unshare, so the code that runs has network]")
    talk(chat, sys.stdin)
    return 0


if __name__ == "__main__":
    sys.exit(main())
