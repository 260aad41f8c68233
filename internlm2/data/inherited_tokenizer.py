"""`data.tokenizer.kind=inherit`: the tokenizer that came with the weights that a stage starts from."""

from internlm2.config import Config, ConfigError, TokenizerConfig
from internlm2.config.start import initial_weights
from internlm2.model.weights import open_weights


def settle_tokenizer(config: Config) -> TokenizerConfig:
    """`data.tokenizer`, with kind=inherit replaced by the file that came with the weights of `init_from`."""
    settings = config.data.tokenizer
    if settings.kind != "inherit":
        return settings
    source = initial_weights(config)
    folder = None if source is None else open_weights(source).tokenizer
    if folder is None:
        raise ConfigError(
            f"data.tokenizer.kind=inherit: init_from={config.init_from} has no tokenizer beside its weights. "
            "Name one with data.tokenizer.kind and data.tokenizer.path."
        )
    for kind, name in (("sentencepiece", "tokenizer.model"), ("huggingface", "tokenizer.json")):
        if (folder / name).is_file():
            return TokenizerConfig(kind, str(folder / name), None, settings.train_bytes, settings.aliases)
    raise ConfigError(f"data.tokenizer.kind=inherit: {folder} holds neither tokenizer.model nor tokenizer.json.")
