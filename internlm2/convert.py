"""Convert checkpoints: `python -m internlm2.convert SOURCE --to internlm2|llama --output DIR`.

SOURCE is a stage's run directory or one checkpoint in it, a folder in the official InternLM2 layout, a folder in any
Llama layout, a .gguf file of the Llama architecture, or the word smollm2.
"""

import argparse
import sys
from pathlib import Path

from internlm2.config import ConfigError

_EXAMPLES = """examples:
  python -m internlm2.convert runs/demo/enhance --to internlm2 --output exports/demo --dtype bf16
  python -m internlm2.convert runs/demo/enhance/checkpoints/step_00000400 --to llama --output exports/demo-llama
  python -m internlm2.convert downloads/internlm2-7b --to llama --output exports/internlm2-7b-llama
  python -m internlm2.convert smollm2 --to internlm2 --output exports/smollm2
  python -m internlm2.convert smollm2 --adapter runs/demo/sft/adapter --to internlm2 --output exports/merged

internlm2  the released layout: transformers 5 (after `import internlm2`, or with trust_remote_code), vLLM, SGLang,
           LMDeploy, llama.cpp
llama      the same weights under Llama's names: every other program, and transformers 4
"""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(
        prog="python -m internlm2.convert",
        description="Convert a checkpoint to the official InternLM2 layout or to the Llama layout.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    result.add_argument("source", help="run directory, checkpoint, InternLM2 or Llama folder, .gguf file, or smollm2")
    result.add_argument("--to", required=True, choices=("internlm2", "llama"), help="layout of the new folder")
    result.add_argument("--output", required=True, type=Path, help="the new folder")
    result.add_argument("--dtype", choices=("bf16", "fp32"), help="of the tensors (default: as they are stored)")
    result.add_argument(
        "--tokenizer", type=Path, help="folder with tokenizer.model or tokenizer.json, if not the source's"
    )
    result.add_argument("--adapter", type=Path, help="folder with a LoRA or QLoRA adapter, merged into the weights")
    result.add_argument("--shard-size", type=float, default=5.0, metavar="GB", help="largest file (default 5)")
    result.add_argument(
        "--keep-dynamic-rope", action="store_true", help="write dynamic NTK into config.json; engines disagree about it"
    )
    result.add_argument("--overwrite", action="store_true", help="replace an export that lies at --output")
    return result


def main(arguments: list[str] | None = None) -> int:
    """Run the command; 0, or 1 with one message on stderr."""
    options = parser().parse_args(arguments)
    try:
        _convert(options)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _convert(options: argparse.Namespace) -> None:
    if options.shard_size <= 0:
        raise ConfigError(f"--shard-size={options.shard_size} must be above 0.")
    # Heavy imports only now, so that --help and a wrong flag answer at once.
    import torch

    from internlm2.model.export import export_weights
    from internlm2.model.weights import open_weights

    dtypes = {"bf16": torch.bfloat16, "fp32": torch.float32, None: None}
    weights = open_weights(options.source)
    if options.adapter is not None:
        from internlm2.model.adapters import adapted_weights

        weights = adapted_weights(weights, options.adapter)
    print(f"read {weights.kind}: {weights.origin}")
    done = export_weights(
        weights,
        options.output,
        layout=options.to,
        dtype=dtypes[options.dtype],
        tokenizer=options.tokenizer,
        shard_bytes=int(options.shard_size * 1e9),
        keep_dynamic_rope=options.keep_dynamic_rope,
        overwrite=options.overwrite,
    )
    dtype = str(done.dtype).removeprefix("torch.")
    print(f"wrote {done.layout} layout, {done.parameters:,} parameters, {dtype}: {done.folder}")
    print(f"files: {', '.join(done.files)}")
    for note in done.notes:
        print(f"note: {note}")


if __name__ == "__main__":
    sys.exit(main())
