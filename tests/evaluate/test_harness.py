"""The adapter for lm-eval against its own `hf` backend, on the same weights and local tasks."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

lm_eval = pytest.importorskip("lm_eval")

TASKS = {
    "local_choice": """
task: local_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/choice.jsonl}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "Question: {{{{question}}}}\\nAnswer:"
doc_to_target: answer
doc_to_choice: choices
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
""",
    "local_answer": """
task: local_answer
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/choice.jsonl}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{choices[answer]}}}}"
generation_kwargs: {{until: ["."], max_gen_toks: 12, do_sample: false}}
metric_list: [{{metric: exact_match}}]
""",
    "local_text": """
task: local_text
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/choice.jsonl}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list: [{{metric: word_perplexity}}, {{metric: byte_perplexity}}, {{metric: bits_per_byte}}]
""",
}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    from internlm2.sources.needles import ENGLISH, prose

    lines = []
    for number in range(10):
        sentences = [text for text, _ in zip(prose(ENGLISH, number), range(3 + 6 * number))]
        choices = [*ENGLISH.secrets[number : number + 3], f"{ENGLISH.secrets[number]} and more"]
        line = {"question": sentences[0], "choices": choices, "answer": number % 4, "text": " ".join(sentences)}
        lines.append(json.dumps(line))
    (folder / "choice.jsonl").write_text("\n".join(lines) + "\n")
    for name, text in TASKS.items():
        (folder / f"{name}.yaml").write_text(text.format(folder=folder))
    return folder


def evaluate(tasks: Path, model: str, arguments: str) -> dict:
    from lm_eval.tasks import TaskManager

    import internlm2.evaluate.harness  # noqa: F401  registers the model

    return lm_eval.simple_evaluate(
        model=model,
        model_args=arguments,
        tasks=list(TASKS),
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
        device="cpu",
        batch_size=1,
        bootstrap_iters=0,
        log_samples=True,
    )


@pytest.fixture(scope="module")
def both(tasks, export, tmp_path_factory):
    patch = pytest.MonkeyPatch()
    patch.setenv("HF_HUB_OFFLINE", "1")
    patch.setenv("HF_DATASETS_OFFLINE", "1")
    patch.setenv("HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("datasets")))
    ours = evaluate(tasks, "internlm2", f"path={export},dtype=fp32,threads=1")
    theirs = evaluate(tasks, "hf", f"pretrained={export},dtype=float32")
    patch.undo()
    return ours, theirs


def test_every_metric_is_equal(both):
    ours, theirs = both
    for task in TASKS:
        found, wanted = ours["results"][task], theirs["results"][task]
        numbers = {key for key, value in wanted.items() if isinstance(value, float)}
        assert numbers
        for key in numbers:
            assert found[key] == pytest.approx(wanted[key], rel=1e-4), (task, key)


def test_every_likelihood_and_text_is_equal(both):
    ours, theirs = both
    for task in TASKS:
        for mine, other in zip(ours["samples"][task], theirs["samples"][task], strict=True):
            assert mine["doc_id"] == other["doc_id"]
            for a, b in zip(mine["resps"], other["resps"], strict=True):
                if task == "local_answer":
                    assert a == b
                elif task == "local_text":
                    assert float(a[0]) == pytest.approx(float(b[0]), rel=1e-5)
                else:
                    assert float(a[0][0]) == pytest.approx(float(b[0][0]), abs=1e-4)
                    assert str(a[0][1]) == str(b[0][1])


@pytest.mark.slow
def test_the_command_knows_the_model(tasks, export, tmp_path):
    words = [sys.executable, "-m", "internlm2.evaluate.lm_eval", "--model", "internlm2", "--tasks", "local_choice"]
    words += ["--model_args", f"path={export},dtype=fp32,threads=1", "--include_path", str(tasks), "--device", "cpu"]
    offline = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(tmp_path)}
    done = subprocess.run(words, capture_output=True, text=True, env=offline)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "local_choice" in done.stdout
