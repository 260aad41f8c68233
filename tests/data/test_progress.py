"""Progress passes every unit on unchanged, as a bar or as log lines."""

from types import SimpleNamespace

import numpy as np
import pytest

from internlm2.data import progress


def units():
    return [SimpleNamespace(size=10, tokens=np.zeros(count)) for count in (1, 2, 3)]


@pytest.mark.parametrize("follow", [progress.with_bar, progress.with_log])
def test_units_pass_through(follow):
    given = units()
    assert list(follow(iter(given), "tokenizing web", 30)) == given


def test_bar_goes_to_standard_error(capsys):
    list(progress.with_bar(iter(units()), "tokenizing web", 30))
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "tokenizing web" in captured.err


def test_log_lines_are_rare(caplog, monkeypatch):
    with caplog.at_level("INFO"):
        list(progress.with_log(iter(units()), "tokenizing web", 30))
        assert len(caplog.records) == 1
        assert "tokenizing web: 6 tokens" in caplog.text
        monkeypatch.setattr(progress, "LOG_SECONDS", 0.0)
        list(progress.with_log(iter(units()), "tokenizing web", 30))
    assert len(caplog.records) == 5
