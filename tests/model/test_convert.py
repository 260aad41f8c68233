"""python -m internlm2.convert: what it prints, what it returns, what it leaves behind."""

import torch

from internlm2 import convert
from internlm2.model.weights import open_weights
from tests.model.checkpoint_folders import random_weights, write_checkpoint


def test_there_and_back(tmp_path, tiny, capsys):
    weights = random_weights(tiny)
    write_checkpoint(tmp_path / "run", tiny, weights)
    arguments = [str(tmp_path / "run"), "--to", "llama", "--output", str(tmp_path / "llama")]
    assert convert.main(arguments) == 0
    printed = capsys.readouterr().out
    assert "read checkpoint" in printed
    assert f"wrote llama layout, {sum(w.numel() for w in weights.values()):,} parameters, float32" in printed
    assert "no tokenizer was found" in printed
    back = [str(tmp_path / "llama"), "--to", "internlm2", "--output", str(tmp_path / "back"), "--dtype", "bf16"]
    assert convert.main(back) == 0
    found = dict(open_weights(tmp_path / "back"))
    assert all(torch.equal(found[name], tensor.bfloat16()) for name, tensor in weights.items())


def test_errors_are_one_message_and_leave_nothing(tmp_path, capsys):
    assert convert.main([str(tmp_path / "nowhere"), "--to", "llama", "--output", str(tmp_path / "out")]) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_an_existing_export_stays(tmp_path, tiny, capsys):
    write_checkpoint(tmp_path / "run", tiny, random_weights(tiny))
    arguments = [str(tmp_path / "run"), "--to", "internlm2", "--output", str(tmp_path / "out")]
    assert convert.main(arguments) == 0
    assert convert.main(arguments) == 1
    assert "--overwrite" in capsys.readouterr().err
    assert convert.main([*arguments, "--overwrite"]) == 0
