"""The step line, the log, and the bar."""

import io
import logging

import pytest
from rich.console import Console

from internlm2.run.console import StepProgress, duration, logging_to, quantity, step_line

FIELDS = {"loss": 3.48213, "lr": 2.95e-4, "grad_norm": 0.8312, "tokens_per_second": 12345.0, "memory_bytes": 3 << 30}


def test_step_line_reads_well():
    line = step_line(120, 1000, **FIELDS, mfu=0.4123, seconds_left=252, note="skipped: the loss is nan")
    assert line == (
        "step  120/1000 | loss  3.4821 | lr 2.95e-04 | norm  0.831 | 12.3k tok/s | MFU 41.2% | 3.0 GiB | "
        "4 min 12 s left | skipped: the loss is nan"
    )
    assert "MFU" not in step_line(1, 10, **FIELDS, mfu=None, seconds_left=None)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (59.6, "1 min 0 s"), (200, "3 min 20 s"), (18720, "5 h 12 min"), (1_047_600, "12 d 3 h")],
)
def test_duration(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(950, "950"), (999.9, "1.00k"), (12345, "12.3k"), (123456, "123k"), (4194304, "4.19M"), (1.8e12, "1.80T")],
)
def test_quantity(value, text):
    assert quantity(value) == text


def test_log_goes_to_the_console_unwrapped_and_to_the_file_with_times(tmp_path):
    stream = io.StringIO()
    long = "[bold]not markup[/bold] " + "word " * 60
    with logging_to(tmp_path / "log.txt", Console(file=stream, width=40)):
        logging.getLogger("internlm2.engine").info(long)
        logging.getLogger("internlm2.data").warning("odd")
    logging.getLogger("internlm2.engine").info("after the end")
    assert stream.getvalue().splitlines() == [long, "warning: odd"]
    first, second = (tmp_path / "log.txt").read_text().splitlines()
    assert first.endswith(f" INFO    {long}")
    assert second.endswith(" WARNING odd")


def test_other_ranks_only_warn(tmp_path):
    stream = io.StringIO()
    with logging_to(tmp_path / "log.txt", Console(file=stream), enabled=False):
        logging.getLogger("internlm2.engine").info("quiet")
        logging.getLogger("internlm2.engine").warning("loud")
    assert stream.getvalue() == "warning: loud\n"
    assert not (tmp_path / "log.txt").exists()


def test_bar_on_a_terminal_and_nothing_elsewhere():
    plain, terminal = io.StringIO(), io.StringIO()
    for console in (Console(file=plain), Console(file=terminal, force_terminal=True, width=100)):
        with StepProgress(console, "pretrain_4k", 10, done=2) as bar:
            bar.advance(3, 252.0)
            console.print("line")
    assert plain.getvalue() == "line\n"
    assert "3/10" in terminal.getvalue()
    assert "4 min 12 s left" in terminal.getvalue()
