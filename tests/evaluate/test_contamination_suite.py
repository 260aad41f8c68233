"""The probe: its arithmetic on known losses, and a model into whose training a test set was mixed."""

import json
import random

import pytest
import torch

from internlm2.config.compose import compose_evaluation
from internlm2.evaluate import contamination
from internlm2.evaluate.contamination import difference, leaked, mean_of
from internlm2.evaluate.held_out_suite import text_row
from internlm2.evaluate.subject import Subject
from internlm2.model.transformer import CausalLM
from tests.evaluate.conftest import small_config


def test_means_count_tokens_and_differences_have_intervals():
    low, high = [(10.0, 10), (30.0, 10)], [(60.0, 20), (60.0, 20)]
    assert mean_of(low) == 2.0
    found = difference("d", low, high, seed=1)
    assert found.value == -1.0
    assert found.interval == (-2.0, 0.0)
    assert not leaked(found)
    assert leaked(difference("d", [(1.0, 10)] * 9, [(2.0, 10), (2.1, 10)] * 5, seed=1))


def problems(seed: int, count: int) -> list[dict[str, str]]:
    """Sums in words, all different between seeds."""
    draw = random.Random(seed)
    names = ["Anna", "Ben", "Cara", "Dan"]
    lines = []
    for _ in range(count):
        a, b = draw.randrange(10, 99), draw.randrange(10, 99)
        name = draw.choice(names)
        question = f"Question: {name} has {a} apples and finds {b} more. How many has {name}?"
        lines.append({"question": question, "answer": f"Answer: {a} + {b} = {a + b} #### {a + b}"})
    return lines


def train(tokenizer, items: list[dict[str, str]], steps: int) -> CausalLM:
    model = CausalLM.from_config(small_config(initializer_range=0.05), seed=3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    rows = [text_row(f"{item['question']} {item['answer']}", tokenizer, 256) for item in items]
    draw = random.Random(0)
    for _ in range(steps):
        chosen = [draw.choice(rows) for _ in range(16)]
        bounds = torch.tensor([0, *(row.tokens for row in chosen)]).cumsum(0).int()
        ids, labels = (
            torch.cat([torch.from_numpy(getattr(row, name)) for row in chosen]) for name in ("ids", "labels")
        )
        loss = model(ids, bounds, None, labels) / (labels >= 0).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


@pytest.mark.slow
@pytest.mark.parametrize("planted", [False, True])
def test_the_probe_flags_a_leak_and_clears_a_clean_model(subject, tmp_path, planted):
    sets = {"train": problems(1, 120), "test": problems(2, 60), "reference": problems(3, 60)}
    keys = ["suite=contamination", "suite.template={question} {answer}"]
    for name, items in sets.items():
        path = tmp_path / f"{name}.jsonl"
        path.write_text("\n".join(map(json.dumps, items)) + "\n")
        keys.append(f"suite.{name}={path}")
    model = train(subject.tokenizer, [*sets["train"], *(sets["test"] * 2 if planted else [])], 400)
    suspect = Subject("suspect", model, subject.tokenizer, subject.generation, subject.batch_tokens)
    (result,) = contamination.run(suspect, compose_evaluation(["suite=contamination", *keys[2:]]).suite, 1)
    delta_1, delta_2 = result.headline
    assert leaked(delta_1) is planted, (delta_1, result.rows)
    assert ("probably trained on" in result.note) is planted
    if not planted:  # the training set itself is known: the second difference says so
        assert delta_2.interval is not None
        assert delta_2.interval[0] > 0
        assert "The training set is easier" in result.note
