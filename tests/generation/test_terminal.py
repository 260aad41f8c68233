"""The terminal chat, driven through its standard input and through a scripted model."""

import io
import json

import pytest

from internlm2.chat import MOST_CALLS, Chat, find_model, main, talk
from internlm2.generation import Completion, SamplingParams, Token
from internlm2.model.export import export_weights
from internlm2.model.weights import model_weights
from internlm2.text.chat import Action, Message, parse, render
from internlm2.text.sentencepiece_tokenizer import SentencePieceTokenizer
from internlm2.text.tokenizer_training import train_model
from tests.generation.conftest import tiny_model


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> SentencePieceTokenizer:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    path.write_bytes(train_model(["the quick brown fox jumps over the lazy dog and writes code for it\n" * 20], 300))
    return SentencePieceTokenizer(path)


class ScriptedEngine:
    """Answers with given messages, and remembers the prompts."""

    max_length = kv_tokens = 4096

    def __init__(self, tokenizer, answers):
        self.tokenizer, self.answers, self.prompts = tokenizer, list(answers), []

    def stream(self, prompts, params, row_ids):
        self.prompts.append(prompts[0])
        whole = render([self.answers.pop(0)], self.tokenizer).ids
        header = render([], self.tokenizer, generation_prompt=True).ids
        assert whole[: len(header)] == header
        completion = Completion(0, 0)
        for token in whole[len(header) : -1]:  # all but the line end after <|im_end|>
            completion.tokens.append(token)
            yield Token(completion, token, None)


def scripted(tokenizer, answers, **options):
    stops = (tokenizer.eos_id, tokenizer.special_id("<|im_end|>"))
    out = io.StringIO()
    engine = ScriptedEngine(tokenizer, answers)
    return Chat(engine, tokenizer, SamplingParams(stop_ids=stops), out=out, **options), engine, out


def test_history_grows_and_resets(tokenizer):
    chat, engine, out = scripted(
        tokenizer, [Message("assistant", "the fox"), Message("assistant", "书生")], system="be brief"
    )
    chat.say("who?")
    chat.say("and 👩‍👧?")
    assert parse(engine.prompts[1], tokenizer) == [
        Message("system", "be brief"),
        Message("user", "who?"),
        Message("assistant", "the fox"),
        Message("user", "and 👩‍👧?"),
    ]
    assert "the fox\n[" in out.getvalue()
    assert "书生\n[" in out.getvalue()
    assert "tokens/s]" in out.getvalue()
    assert "\ufffd" not in out.getvalue()
    chat.reset()
    assert chat.messages == [Message("system", "be brief")]


def test_the_interpreter_answers_the_model(tokenizer):
    call = Message("assistant", "let me see", actions=(Action("interpreter", "```python\nprint(6 * 7)\n```"),))
    chat, engine, out = scripted(tokenizer, [call, Message("assistant", "it is 42")], tools=True)
    chat.say("six times seven?")
    messages = parse(engine.prompts[1], tokenizer)
    assert messages[0].name == "interpreter"
    assert messages[-2:] == [call, Message("environment", "42", name="interpreter")]
    assert chat.messages[-1].content == "it is 42"
    assert "[interpreter]\n42\n" in out.getvalue()


def test_nothing_runs_without_tools(tokenizer, tmp_path):
    target = tmp_path / "made"
    call = Message("assistant", "", actions=(Action("interpreter", f"open({str(target)!r}, 'w')"),))
    chat, engine, _ = scripted(tokenizer, [call])
    chat.say("go")
    assert len(engine.prompts) == 1
    assert not target.exists()


def test_calls_without_end_are_ended(tokenizer):
    call = Message("assistant", "", actions=(Action("interpreter", "print(1)"),))
    chat, engine, out = scripted(tokenizer, [call] * 20, tools=True)
    chat.say("go")
    assert len(engine.prompts) == MOST_CALLS + 1
    assert "[stopped after 4 calls" in out.getvalue()


def test_a_long_conversation_forgets_its_oldest_exchange(tokenizer):
    chat, engine, _ = scripted(tokenizer, [Message("assistant", "yes")] * 9, system="s")
    engine.max_length = 200 + chat.params.max_new_tokens
    for number in range(9):
        chat.say(f"question {number} of many")
    last = parse(engine.prompts[-1], tokenizer)
    assert len(engine.prompts[-1]) <= 200
    assert last[0] == Message("system", "s")
    assert last[1].role == "user"
    assert last[1].content != "question 0 of many"
    assert last[-1].content == "question 8 of many"
    with pytest.raises(ValueError, match="there is room for 200"):
        chat.say("x" * 300)


def test_commands(tokenizer, tmp_path, capsys):
    chat, _, _ = scripted(tokenizer, [Message("assistant", "hello")] * 3)
    file = tmp_path / "saved.json"
    talk(chat, io.StringIO(f"hi\n\n/save {file}\n/reset\n/save {tmp_path}/none/x.json\n/nonsense\n/quit\nnever said\n"))
    assert json.loads(file.read_text(encoding="utf-8"))["messages"] == [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "hello"},
    ]
    assert chat.messages == []
    text = capsys.readouterr().out
    assert "[a new conversation]" in text
    assert "No such file or directory" in text
    assert "[/nonsense is no command" in text
    assert "never said" not in text


def test_the_command_on_an_export(tokenizer, tmp_path, capsys, monkeypatch):
    model = tiny_model()
    run = tmp_path / "run" / "sft"
    export_weights(model_weights(model, tokenizer.path.parent), run / "export")
    assert find_model(str(tmp_path / "run")) == str(run / "export")
    assert find_model(str(run / "export")) == str(run / "export")
    answers = []
    for arguments in ([], ["--quantize", "w8"], ["--seed", "7"], []):
        monkeypatch.setattr("sys.stdin", io.StringIO("hello\n/quit\n"))
        options = ["--max-new-tokens", "12", "--dtype", "fp32", "--device", "cpu", *arguments]
        assert main([str(tmp_path / "run"), *options]) == 0
        answers.append(capsys.readouterr().out.split("> hello\n")[1].rsplit("\n[", 1)[0])
    assert answers[0] == answers[3]
    assert answers[0] != answers[2]


def test_what_is_missing_is_named(tmp_path, capsys):
    assert main([str(tmp_path / "nothing")]) == 1
    assert f"error: {tmp_path / 'nothing'} does not exist" in capsys.readouterr().err
    export_weights(model_weights(tiny_model()), tmp_path / "bare")
    assert main([str(tmp_path / "bare")]) == 1
    assert "--tokenizer" in capsys.readouterr().err
