"""lm-eval's command with our models known to it: `python -m internlm2.evaluate.lm_eval --model internlm2 ...`."""

import sys

from lm_eval.__main__ import cli_evaluate

import internlm2.evaluate.harness  # noqa: F401  registers the model

if __name__ == "__main__":
    sys.argv[0] = "lm_eval"
    cli_evaluate()
