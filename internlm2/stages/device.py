"""Which device a run uses, and how many CPU threads."""

import torch

from internlm2.config import ConfigError, EngineConfig


def choose_device(engine: EngineConfig) -> torch.device:
    """The device of `engine.device`; sets the CPU threads. ConfigError where CUDA is asked for and absent."""
    if engine.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("engine.device=cuda, but this torch sees no CUDA device: use engine.device=auto or install a CUDA build.")
    if engine.threads is not None:
        torch.set_num_threads(engine.threads)
    wants_cuda = engine.device == "cuda" or (engine.device == "auto" and torch.cuda.is_available())
    return torch.device("cuda", torch.cuda.current_device()) if wants_cuda else torch.device("cpu")
