"""Evaluate a model: `python -m internlm2.evaluate RUN suite=NAME [key=value ...]`.

RUN is a stage's run directory, a checkpoint, an export, any folder in the InternLM2 or Llama layout, a .gguf file, or
the word smollm2. Results are printed and written to evaluation/ of the run directory, whose report shows them.

  python -m internlm2.evaluate runs/demo/pretrain_32k                    bits per byte on held-out text
  python -m internlm2.evaluate runs/demo/pretrain_32k suite=needle       needle in a haystack, with a heat map
  python -m internlm2.evaluate smollm2 suite=gsm8k suite.path=test.jsonl suite.shots_path=train.jsonl
  python -m internlm2.evaluate smollm2 suite=humaneval                   programs that must pass their tests
  python -m internlm2.evaluate smollm2 suite=choices suite.path=questions.jsonl
  python -m internlm2.evaluate smollm2 suite=contamination suite.test=test.jsonl suite.reference=fresh.jsonl
  python -m internlm2.evaluate runs/mine/rm suite=preferences suite.path=pairs.jsonl
  python -m internlm2.evaluate runs/mine/ppo suite=pairwise suite.against=runs/mine/sft suite.path=prompts.jsonl

The keys of a suite, with a comment above each, are in conf/suite/; --cfg prints a composed config and starts nothing.
"""

import sys
from collections.abc import Sequence

from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from internlm2.config import ConfigError
from internlm2.config.compose import compose_evaluation, describe
from internlm2.config.evaluate import EvaluateConfig


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command: 0, or 2 with one message on stderr."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or "-h" in words or "--help" in words:
        print(__doc__)
        return 0
    try:
        source, config = words[0], compose_evaluation([word for word in words[1:] if word != "--cfg"])
        if "--cfg" in words:
            print(OmegaConf.to_yaml(OmegaConf.structured(config)))
            return 0
        evaluate(source, config)
    except (ConfigError, HydraException, OmegaConfBaseException) as error:
        print(f"error: {describe(error, EvaluateConfig)}", file=sys.stderr)
        return 2
    return 0


def evaluate(source: str, config: EvaluateConfig) -> None:
    """Load the model, run the suite, write and print what it found."""
    import time

    from internlm2.evaluate.results import output_folder, save
    from internlm2.evaluate.subject import stage_of
    from internlm2.evaluate.suites import run_suite

    started = time.perf_counter()
    for result in run_suite(source, config):
        result.seconds = time.perf_counter() - started
        print(result.text())
        for path in save(result, output_folder(source, config), source, config):
            print(f"written   {path}")
    stage = stage_of(source)
    if stage is not None:
        from internlm2.run.report import write_report, write_stage_report

        write_stage_report(stage)
        print(f"report    {write_report(stage.parent)}")


if __name__ == "__main__":
    sys.exit(main())
