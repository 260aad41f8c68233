"""InternLM2, the whole recipe: pretraining, long context, enhancement, SFT, reward model and online RLHF.

Importing this package also makes transformers 5 know `internlm2` checkpoints (AutoConfig, AutoModel, AutoTokenizer)
without remote code. It imports neither torch nor transformers itself.
"""

__version__ = "0.1.0"


def _register_with_transformers() -> None:
    from internlm2.transformers_hook import install

    install()


_register_with_transformers()
