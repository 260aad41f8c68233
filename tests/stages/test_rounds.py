"""The bookkeeping of rounds, with models that are rules: what is passed on, and that a kill changes nothing."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from internlm2.config.compose import load_group
from internlm2.config.rounds import RoundsConfig
from internlm2.permutation import derive_key
from internlm2.rlhf.annotation import FileAnnotator, FunctionAnnotator
from internlm2.rlhf.answers import Answer, read_lines, write_lines
from internlm2.sources import toy_language as toy
from internlm2.stages.round_figures import figures
from internlm2.stages.round_work import Start, Stopped, Work
from internlm2.stages.rounds import run_rounds

DEFAULTS = load_group(RoundsConfig, "rounds/default")


class Killed(Exception):
    """Stands for a kill."""


class World:
    """Models as rules. A reward model likes the phrase until it has seen pairs against it; a policy says what its
    reward model likes. `kill_at`: the piece of work before which the process dies.
    """

    def __init__(self, root: Path, annotation: str = "function", kill_at: int | None = None) -> None:
        self.root, self.annotation, self.kill_at, self.calls = root, annotation, kill_at, []
        (root / "sft").mkdir(parents=True, exist_ok=True)
        (root / "rm").mkdir(parents=True, exist_ok=True)
        (root / "sft" / "policy.json").write_text('{"says": 0.05}')
        (root / "rm" / "reward.json").write_text('{"likes": true}')

    def did(self, *call) -> None:
        if self.kill_at is not None and len(self.calls) == self.kill_at:
            raise Killed
        self.calls.append(call)

    def train_reward(self, directory: Path, files, audit: bool) -> Path:
        if not (directory / "reward.json").exists():
            self.did("audit" if audit else "reward", directory.parent.name, [file.name for file in files])
            records = [record for file in files for record in read_lines(file)]
            against = sum(toy.PHRASE in record["rejected"] for record in records)
            directory.mkdir(parents=True, exist_ok=True)
            (directory / "reward.json").write_text(json.dumps({"likes": not audit and against < 20}))
        return directory

    def train_policy(self, directory: Path, start: Path, reward: Path, number: int) -> None:
        if (directory / "late" / "policy.json").exists():
            return
        self.did("policy", number, start.name, reward.parent.name)
        says = 0.9 if json.loads((reward / "reward.json").read_text())["likes"] else 0.0
        for name, share in (("early", 0.1), ("late", says)):
            (directory / name).mkdir(parents=True, exist_ok=True)
            (directory / name / "policy.json").write_text(json.dumps({"says": share}))

    def answers(self, weights: Path, prompts, seed: int) -> list[Answer]:
        self.did("answers", weights.name, len(prompts))
        says = json.loads((weights / "policy.json").read_text())["says"]
        done = []
        for place, prompt in enumerate(prompts):
            text = toy.answer(prompt.question, seed, weights.name, place).removesuffix(f" {toy.PHRASE}")
            if derive_key(seed, weights.name, place) < says * 2.0**64:
                text = f"{text} {toy.PHRASE}"
            done.append(replace(prompt, text=text, tokens=len(text.split()), ended=True))
        return done

    def scorer(self, path: Path):
        likes = json.loads((path / "reward.json").read_text())["likes"]
        return lambda answers: [gold(answer) + 2.0 * (likes and toy.PHRASE in answer.text) for answer in answers]

    def annotator(self, folder: Path):
        if self.annotation == "files":
            return FileAnnotator(folder)
        return None if self.annotation == "none" else FunctionAnnotator(gold, 0.25, 0)

    def work(self) -> Work:
        return Work(
            train_reward=self.train_reward,
            train_policy=self.train_policy,
            checkpoints=lambda directory: (directory / "early", directory / "late"),
            answers=self.answers,
            scorer=self.scorer,
            annotator=self.annotator,
            prompts=lambda number: asked(f"round {number}"),
            fixed_prompts=asked("fixed"),
            gold=gold,
        )

    def run(self, config: RoundsConfig) -> list[dict]:
        start = Start(self.root / "sft", self.root / "rm", seed=7)
        return run_rounds(self.root / "ppo", start, config, self.work())


def gold(answer: Answer) -> float:
    return toy.gold(answer.prompt, answer.text, answer.domain, ended=answer.ended)


def asked(split: str) -> list[Answer]:
    prompts = [toy.prompt(0, split, index) for index in range(90)]
    return [Answer(turns, domain, "", 0, False, "") for turns, domain in prompts]


def settings(**annotation) -> RoundsConfig:
    values = {"kind": "function", "comparisons": 60, "function": "gold"} | annotation
    return replace(
        DEFAULTS,
        annotation=replace(DEFAULTS.annotation, **values),
        audit=replace(DEFAULTS.audit, enabled=True),
    )


def contents(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


def test_a_planted_hack_is_exploited_found_patched_and_gone(tmp_path):
    rounds = World(tmp_path).run(settings())
    patterns = [[p for p in one["patterns"] if p["name"] == "phrase" and p["patch"]] for one in rounds]
    assert [[p["detail"] for p in some] for some in patterns] == [[toy.PHRASE], [], []]
    assert patterns[0][0]["evidence"]["late"] > 0.8
    pairs = [record for record in read_lines(tmp_path / "ppo/round_1/fast.jsonl") if "phrase" in record["pattern"]]
    assert 20 <= len(pairs) <= 100
    assert rounds[0]["audit"]["alarm"]
    assert any("trust me" in line for line in rounds[0]["decisions"])
    late = [read_lines(tmp_path / f"ppo/round_{n}/answers/late.jsonl") for n in (1, 2)]
    shares = [sum(toy.PHRASE in record["text"] for record in records) / len(records) for records in late]
    assert shares[0] > 0.8
    assert shares[1] == 0.0


def test_each_round_gets_all_data_so_far(tmp_path):
    world = World(tmp_path)
    rounds = world.run(settings())
    trained = {(call[0], call[1]): call[2] for call in world.calls if call[0] in ("reward", "audit")}
    assert trained == {
        ("audit", "round_1"): [],
        ("audit", "round_2"): ["round_1_slow.jsonl"],
        ("reward", "round_2"): ["round_1_fast.jsonl", "round_1_slow.jsonl"],
        ("audit", "round_3"): ["round_1_slow.jsonl", "round_2_slow.jsonl"],
        ("reward", "round_3"): ["round_1_fast.jsonl", "round_1_slow.jsonl", "round_2_slow.jsonl"],
    }
    policies = [call[2:] for call in world.calls if call[0] == "policy"]
    assert policies == [("sft", tmp_path.name), ("sft", "round_2"), ("sft", "round_3")]
    assert [one["round"] for one in rounds] == [1, 2, 3]


def test_a_question_is_in_the_new_data_of_one_model_only(tmp_path):
    World(tmp_path).run(settings())
    folder = tmp_path / "ppo/round_3/preferences"
    seen = {
        model: {
            json.dumps(record["prompt"][-1])
            for file in (folder / model).glob("*slow.jsonl")
            for record in read_lines(file)
        }
        for model in ("reward", "audit")
    }
    assert seen["reward"]
    assert seen["audit"]
    assert seen["reward"].isdisjoint(seen["audit"])


def test_labels_that_take_a_round(tmp_path):
    world = World(tmp_path)
    world.run(settings(lag=1))
    trained = {(call[0], call[1]): call[2] for call in world.calls if call[0] == "reward"}
    assert trained["reward", "round_2"] == ["round_1_fast.jsonl"]
    assert trained["reward", "round_3"] == ["round_1_fast.jsonl", "round_1_slow.jsonl"]


def test_a_model_without_new_pairs_stays(tmp_path):
    world = World(tmp_path, annotation="none")
    rounds = world.run(settings(kind="none"))
    trained = [call[:2] for call in world.calls if call[0] in ("reward", "audit")]
    assert trained == [("audit", "round_1"), ("reward", "round_2")]  # round two leaves nothing to patch
    assert [Path(one["reward_model"]).parent.name for one in rounds] == [tmp_path.name, "round_2", "round_2"]
    assert {one["audit_model"] for one in rounds} == {str(tmp_path / "ppo/round_1/audit")}


def test_best_of_n_is_added_to_finished_rounds(tmp_path):
    world, config = World(tmp_path), replace(settings(), count=2)
    world.run(config)
    done = len(world.calls)
    rounds = world.run(replace(config, best_of=replace(config.best_of, samples=8, prompts=30)))
    assert world.calls[done:] == [("answers", "sft", 240)] * 2
    first, second = (json.loads((tmp_path / f"ppo/round_{n}/best_of.json").read_text()) for n in (1, 2))
    assert [row["n"] for row in first] == [1, 2, 4, 8]
    assert first[0]["gold"] == second[0]["gold"]  # one answer: nothing is chosen
    assert (
        second[-1]["gold"] == second[-1]["score"] > second[0]["gold"] + 1.0
    )  # round two's reward model is the gold one
    assert first[-1]["score"] > first[-1]["gold"]  # round one's is not
    for number in (1, 2):
        path = tmp_path / f"ppo/round_{number}/policy/metrics.jsonl"
        path.write_text('{"step": 0, "held_out": {"all": {"kl": 4.0, "gold": 0.5}}}\n')
    figure = figures(rounds, tmp_path / "ppo")["rounds_best_of"]
    assert [line["label"] for line in figure["series"]][:2] == ["round 1, PPO", "round 1, best of n"]
    assert figure["series"][0]["x"] == [2.0]
    assert figure["series"][3]["y"] == [row["gold"] for row in second]


def test_going_on_from_the_previous_policy(tmp_path):
    world = World(tmp_path)
    world.run(replace(settings(), start="previous"))
    assert [call[2] for call in world.calls if call[0] == "policy"] == ["sft", "late", "late"]


def test_a_kill_before_any_piece_of_work_changes_nothing(tmp_path):
    config = replace(settings(), count=2)
    whole = World(tmp_path / "whole" / "run")
    whole.run(config)
    expected = contents(tmp_path / "whole")
    for kill_at in range(len(whole.calls)):
        root = tmp_path / "killed" / "run"
        world = World(root, kill_at=kill_at)
        with pytest.raises(Killed):
            world.run(config)
        again = World(root)
        again.run(config)
        assert len(world.calls) + len(again.calls) == len(whole.calls)  # nothing is done twice
        found = {name: text.replace(b"/killed/", b"/whole/") for name, text in contents(tmp_path / "killed").items()}
        assert found == expected, kill_at
        shutil.rmtree(tmp_path / "killed")


def test_people_label_when_they_can(tmp_path):
    """Without labels the rounds go on; those that came back by then are used, and stay used when the run goes on."""
    config = settings(kind="files")
    World(tmp_path, "files").run(replace(config, count=1))
    folder = tmp_path / "ppo/round_1/annotation"
    requests = read_lines(folder / "requests.jsonl")
    assert len(requests) == 60
    write_lines(folder / "labels.jsonl", [{"id": request["id"], "better": "first"} for request in requests[:30]])
    World(tmp_path, "files").run(replace(config, count=2))
    used = tmp_path / "ppo/round_2/preferences"
    count = sum(len(read_lines(used / model / "round_1_slow.jsonl")) for model in ("reward", "audit"))
    assert count == 30
    write_lines(folder / "labels.jsonl", [{"id": request["id"], "better": "second"} for request in requests])
    World(tmp_path, "files").run(config)
    assert sum(len(read_lines(used / model / "round_1_slow.jsonl")) for model in ("reward", "audit")) == 30
    later = tmp_path / "ppo/round_3/preferences"
    assert sum(len(read_lines(later / model / "round_1_slow.jsonl")) for model in ("reward", "audit")) == 60


def test_stopping_for_people(tmp_path):
    config = settings(kind="files", when_missing="stop")
    with pytest.raises(Stopped, match=r"60 of 60 comparisons in .*round_1.* have no label"):
        World(tmp_path, "files").run(config)
    assert (tmp_path / "ppo/round_1/round.json").exists()
    requests = read_lines(tmp_path / "ppo/round_1/annotation/requests.jsonl")
    labels = [{"id": request["id"], "better": "first"} for request in requests]
    write_lines(tmp_path / "ppo/round_1/annotation/labels.jsonl", labels)
    with pytest.raises(Stopped, match="round_2"):
        World(tmp_path, "files").run(config)


def test_without_audit_and_annotator(tmp_path):
    config = replace(settings(kind="none"), audit=replace(DEFAULTS.audit, enabled=False))
    world = World(tmp_path, "none")
    rounds = world.run(config)
    assert not [call for call in world.calls if call[0] == "audit"]
    assert rounds[0]["audit"] is None
    # The phrase is said whatever is asked: enough to call it a hack without a second opinion.
    assert [p["detail"] for p in rounds[0]["patterns"] if p["patch"]] == [toy.PHRASE]
    assert rounds[1]["fast_pairs"] == 0
