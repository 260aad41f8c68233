"""From Hydra's composed YAML to the typed `Config`, and from Hydra's exceptions to one sentence."""

import difflib
import hashlib
import re
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, get_args, get_type_hints

import yaml
from hydra import compose, initialize_config_dir
from hydra.conf import HydraConf
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from internlm2.config.checks import check, check_keys
from internlm2.config.errors import ConfigError
from internlm2.config.evaluate import SUITES, EvaluateConfig
from internlm2.config.schema import Config

CONF = Path(__file__).resolve().parents[2] / "conf"
LONGEST_NAME = 120  # of a folder that a sweep names; file systems take 255 bytes
T = TypeVar("T")


def register_schema() -> None:
    """Make the dataclasses the root nodes of conf/train.yaml, conf/evaluate.yaml and conf/suite/."""
    store = ConfigStore.instance()
    store.store(name="schema", node=Config)
    store.store(name="evaluate_schema", node=EvaluateConfig)
    for kind, suite in SUITES.items():
        store.store(group="suite", name=f"{kind}_schema", node=suite)


def check_arguments(arguments: list[str]) -> None:
    """Raise ConfigError for `group=null`, for which Hydra has a traceback and no sentence."""
    for argument in arguments:
        group, _, option = argument.partition("=")
        if option == "null" and (CONF / group).is_dir():
            raise ConfigError(f"{argument}: leave {group} out, or name an option.{_options(group, '')}")


def to_config(composed: DictConfig) -> Config:
    """The composed YAML as typed, checked objects. Raises ConfigError."""
    try:
        config = OmegaConf.to_object(composed)
    except OmegaConfBaseException as error:
        raise ConfigError(describe(error)) from error
    assert isinstance(config, Config)
    check(config)
    return config


def compose_evaluation(overrides: Sequence[str]) -> EvaluateConfig:
    """The config of one `python -m internlm2.evaluate`. Raises ConfigError and Hydra's own exceptions."""
    register_schema()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = OmegaConf.to_object(compose("evaluate", overrides=list(overrides)))
    assert isinstance(config, EvaluateConfig)
    check_keys(config)
    return config


def compose_stages(composed: DictConfig, hydra: HydraConf) -> list[Config]:
    """The configs of the stages that a command runs: one, or for stage=recipe each of its stages.

    All are checked before the first starts. Each gets the command line's overrides, except that `stage=` is replaced
    and that `init_from=` belongs to the first. In a sweep each run gets a directory named after what was swept.
    """
    configs = _compose_each(to_config(composed), list(hydra.overrides.task))
    if hydra.mode == RunMode.MULTIRUN and hydra.job.override_dirname:
        for config in configs:
            config.name = f"{config.name}/{folder_name(hydra.job.override_dirname)}"
    return configs


def folder_name(overrides: str) -> str:
    """A sweep's overrides as the name of a folder; a long list, which file systems refuse, ends in its hash."""
    if len(overrides) <= LONGEST_NAME:
        return overrides
    digest = hashlib.sha256(overrides.encode()).hexdigest()[:8]
    return f"{overrides[: LONGEST_NAME - 9]}-{digest}"


def _compose_each(first: Config, overrides: list[str]) -> list[Config]:
    if first.stage.kind != "recipe":
        return [first]
    configs = []
    for index, stage in enumerate(first.stage.stages):
        kept = [
            text
            for text in overrides
            if not text.startswith("stage=") and (index == 0 or not text.startswith("init_from="))
        ]
        try:
            configs.append(to_config(compose("train", overrides=[f"stage={stage}", *kept])))
        except (HydraException, OmegaConfBaseException, ConfigError) as error:
            raise ConfigError(f"stage {stage}: {describe(error)}") from error
    return configs


def load_group(schema: type[T], path: str | Path) -> T:
    """One YAML group file (for example conf/model/7b.yaml) as its dataclass. Raises ConfigError."""
    file = Path(path) if Path(path).suffix else CONF / f"{path}.yaml"
    if not file.is_file():
        raise ConfigError(f"{file}: no such file.")
    try:
        values = OmegaConf.create(yaml.safe_load(file.read_text(encoding="utf-8")))
        loaded = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), values))
    except (OmegaConfBaseException, yaml.YAMLError) as error:
        raise ConfigError(f"{file}: {describe(error)}") from error
    assert isinstance(loaded, schema)
    return loaded


def describe(error: BaseException, schema: Any = Config) -> str:
    """What is wrong with the config and what to do, in one or two sentences. `schema` knows the keys that exist."""
    if isinstance(error, ConfigError):
        return str(error)
    root = error
    while root.__cause__ is not None:
        root = root.__cause__
    key = getattr(root, "full_key", None) or ""
    text = str(root).split("\n")[0].strip().rstrip(".")
    outer = str(error).split("\n")[0]
    where = re.search(r"In '([^']+)'", outer)
    place = f"conf/{where.group(1)}.yaml: " if where else ""
    if isinstance(root, MissingMandatoryValue):
        return f"{place}{key or text} has no value."
    unknown = re.search(r"Key '([^']+)' (?:is )?not in", str(root))
    overridden = re.search(r"Could not override '([^']+)'", outer)
    if unknown:
        key = key or (overridden.group(1) if overridden else unknown.group(1))
        return f"{place}unknown key {key}.{_nearest(key, schema)}"
    missing = re.search(r"Could not find '([^']+)/([^'/]+)'", outer)
    if missing:
        return f"{missing.group(1)}={missing.group(2)}: no such option.{_options(*missing.groups())}"
    if overridden and key in ("", overridden.group(1)):
        return f"{overridden.group(1)}: {_nearest(overridden.group(1), schema).strip() or text + '.'}"
    if key:
        return f"{place}{key}: {text[0].lower() + text[1:]}."
    return f"{place}{text}."


def known_keys(schema: Any = Config, prefix: str = "") -> list[str]:
    """Every dotted key of a schema."""
    keys, hints = [], get_type_hints(schema)
    for item in fields(schema):
        keys.append(prefix + item.name)
        for hint in get_args(hints[item.name]) or (hints[item.name],):  # PPOConfig | None holds a group, too
            if is_dataclass(hint):
                keys += known_keys(hint, f"{prefix}{item.name}.")
    return keys


def _nearest(key: str, schema: Any) -> str:
    suites = [f"suite.{item.name}" for suite in SUITES.values() for item in fields(suite)]
    groups = [folder.name for folder in CONF.iterdir() if folder.is_dir()]
    keys = [*known_keys(schema), *(suites if schema is EvaluateConfig else groups)]
    if key.startswith("data.weights."):
        return f" To add an entry to a mapping, write +{key}=..."
    if key.startswith("data.sources."):
        return " Put a new source into a file beside conf/data/my_corpus.yaml and choose it with data=<its name>."
    keys = [known for known in keys if not key.startswith(f"{known}.")]
    same_name = [known for known in keys if known.rsplit(".", 1)[-1] == key.rsplit(".", 1)[-1]]  # in another group
    close = same_name[:1] or difflib.get_close_matches(key, keys, n=1, cutoff=0.5)
    if close:
        return f" Did you mean {close[0]}?"
    parent = key.rsplit(".", 1)[0] + "."
    siblings = [known[len(parent) :] for known in keys if known.startswith(parent) and "." not in known[len(parent) :]]
    return f" {parent[:-1]} has {', '.join(siblings)}." if siblings else ""


def _options(group: str, option: str) -> str:
    names = sorted(file.stem for file in (CONF / group).glob("*.yaml"))
    close = difflib.get_close_matches(option, names, n=1, cutoff=0.5)
    hint = f" Did you mean {group}={close[0]}?" if close else ""
    return f"{hint} Available: {', '.join(names)}." if names else hint
