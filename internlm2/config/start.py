"""Where a stage's first weights lie."""

from pathlib import Path

from internlm2.config.errors import ConfigError
from internlm2.config.schema import Config


def initial_weights(config: Config) -> Path | None:
    """What `init_from` means: None for random weights. Raises ConfigError where it is not there."""
    if config.init_from is None:
        return None
    if config.init_from == "smollm2":
        return Path("smollm2")
    run = Path(config.root) / config.name
    stage = config.stage.previous if config.init_from == "previous" else config.init_from
    candidates = [run / str(stage), Path(config.init_from)]
    for path in candidates:
        if path.exists():
            return path
    raise ConfigError(
        f"init_from={config.init_from}: neither {candidates[0]} nor {candidates[1]} exists. Run stage={stage} with "
        f"name={config.name} first, give a checkpoint or export folder, or init_from=null for random weights."
    )
