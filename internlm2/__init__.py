"""InternLM2, the whole recipe: pretraining, long context, enhancement, SFT, reward model and online RLHF."""

__version__ = "0.1.0"
