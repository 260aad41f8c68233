"""The engine's config group becomes an engine on a device."""

import logging

import pytest
import torch
from tiny_training import OPTIM, Model

from internlm2.config import ConfigError, EngineConfig
from internlm2.engine.build import build_engine, prepare_device


def config(**changes) -> EngineConfig:
    values = {"name": "single", "device": "cpu", "dtype": "bf16", "attention": "auto", "recompute": "none"}
    values |= {"threads": None, "on_nonfinite": "stop", "spike_factor": 2.0, "max_bad_steps": 7}
    return EngineConfig(**(values | changes))


def test_every_key_arrives(caplog):
    with caplog.at_level(logging.INFO, logger="internlm2"):
        engine = build_engine(Model(), config(), OPTIM, 40)
    assert engine.device == torch.device("cpu")
    assert {parameter.dtype for parameter in engine.model.parameters()} == {torch.bfloat16}
    assert (engine.guard.policy, engine.guard.spike_factor, engine.guard.max_bad_steps) == ("stop", 2.0, 7)
    assert engine.total_steps == 40
    # 29 * 12 embedding + 144 + 12 + 348 head; the embedding and the norm do not decay
    assert "852 trained parameters, weight decay 0.1 on 492 of them" in caplog.text


def test_device_and_threads(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert prepare_device(config(device="auto", threads=2)) == torch.device("cpu")
    assert torch.get_num_threads() == 2
    with pytest.raises(ConfigError, match=r"engine\.device=cuda, but torch sees no CUDA device"):
        prepare_device(config(device="cuda"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert prepare_device(config(device="auto")) == torch.device("cuda")
    assert prepare_device(config(device="cpu")) == torch.device("cpu")
