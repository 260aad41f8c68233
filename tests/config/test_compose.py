"""Composition, the closed schema, and what a wrong key or value says."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from internlm2.config import ConfigError, ModelConfig
from internlm2.config.compose import CONF, check_arguments, describe, known_keys, load_group
from tests.composing import composed, hydra_context  # noqa: F401 (a fixture)

REPOSITORY = Path(__file__).resolve().parents[2]


def message(*overrides: str) -> str:
    """The one sentence that a failing command line prints."""
    with pytest.raises(Exception) as caught:
        composed(*overrides)
    return describe(caught.value)


MODELS = sorted(file.stem for file in (CONF / "model").glob("*.yaml"))
STAGES = ["pretrain_4k", "pretrain_32k", "enhance"]


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("model", MODELS)
def test_every_stage_composes_with_every_model(stage, model):
    config = composed(f"stage={stage}", f"model={model}")
    assert config.stage.name == stage
    assert config.model.name == model
    assert config.train.batch_tokens % config.train.seq_len == 0


# Released shapes (report, Table 3; released config.json): parameters, non-embedding parameters, rows of wqkv.
RELEASED = {
    "1_8b": (1_889_110_016, 1_510_049_792, 4096, 4_194_304),
    "7b": (7_737_708_544, 6_979_588_096, 6144, 4_194_304),
    "20b": (19_861_149_696, 18_723_969_024, 8192, 5_242_880),
}


@pytest.mark.parametrize("name", RELEASED)
def test_released_parameter_counts(name):
    model = load_group(ModelConfig, f"model/{name}")
    counts = model.parameters()
    rows = (model.heads + 2 * model.kv_heads) * model.head_dim
    without_embeddings = counts["total"] - 2 * counts["embedding"]
    assert (counts["total"], without_embeddings, rows, model.pretrain_batch_tokens) == RELEASED[name]


def test_report_values():
    """Report 3.2.2 and 3.3: what a plain 7B pre-training command must carry."""
    short, long = composed("stage=pretrain_4k", "model=7b"), composed("stage=pretrain_32k", "model=7b")
    assert (short.optim.lr, short.optim.beta1, short.optim.beta2, short.optim.weight_decay) == (3e-4, 0.9, 0.95, 0.1)
    assert short.optim.min_lr_ratio == 0.1
    assert (short.model.rope_base, long.model.rope_base) == (50_000, 1_000_000)
    assert (short.train.seq_len, long.train.seq_len) == (4096, 32768)
    assert short.train.batch_tokens == long.train.batch_tokens == 4_194_304
    assert [(b.weight, b.min_tokens, b.max_tokens) for b in long.data.length_buckets] == [
        (0.5, None, 4096),
        (0.5, 4096, None),
    ]
    assert short.optim.schedule_end == long.optim.schedule_start
    enhance = composed("stage=enhance", "model=7b")
    assert enhance.train.tokens == 24_400_000_000
    assert enhance.optim.lr < short.optim.lr
    assert enhance.train.batch_tokens < short.train.batch_tokens


def test_command_line_beats_preset_beats_stage():
    assert composed("stage=pretrain_4k", "preset=demo").train.seq_len < composed("stage=pretrain_4k").train.seq_len
    assert composed("stage=pretrain_4k", "preset=demo", "train.seq_len=256").train.seq_len == 256


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("optim.lrr=1", "unknown key optim.lrr. Did you mean optim.lr?"),
        ("model.lr=1", "unknown key model.lr. Did you mean optim.lr?"),
        ("optim.lr=abc", "optim.lr: value 'abc' of type 'str' could not be converted to Float."),
        ("train.seq_len=4.5", "train.seq_len: value '4.5' of type 'float' could not be converted to Integer."),
        ("model=70b", "model=70b: no such option. Did you mean model=7b?"),
        ("engine.dtype=fp16", "engine.dtype=fp16 is not one of auto, bf16, fp32."),
        ("optim.lr=-1", "optim.lr=-1.0 must be at least 0.0."),
        ("optim.lr=nan", "optim.lr=nan must be at least 0.0."),
        ("model.kv_heads=3", "model.kv_heads=3 must divide model.heads=4: use one of 1, 2, 4."),
        ("model.head_dim=32", "must equal model.hidden_size=256: use model.hidden_size=128."),
        ("train.micro_batch=3", "use train.batch_tokens=36864."),
        ("train.seq_len=8192", "set model.max_position_embeddings=8192"),
        ("init_from=previous", "stage pretrain_4k is the first"),
        ("+data.weights.pretrain_4k.wikipedia=1", "no such source; data.sources has"),
        ("data.tokenizer.vocab_size=5000", "use data.tokenizer.vocab_size=4096."),
    ],
)
def test_bad_values_say_what_to_do(override, expected):
    assert expected in message(override)


def test_every_yaml_key_is_in_the_schema():
    """Hydra refuses a key of conf/train.yaml that no dataclass knows; a dataclass key without a value is found here."""
    defaults = yaml.safe_load((CONF / "train.yaml").read_text(encoding="utf-8"))
    groups = {"defaults", "hydra"}
    assert set(defaults) - groups <= {key.split(".")[0] for key in known_keys()}
    config = composed()
    assert config.train.seq_len == 4096  # to_object above would have raised MissingMandatoryValue


def test_unknown_key_in_a_group_file_names_the_file(tmp_path):
    file = tmp_path / "wide.yaml"
    file.write_text((CONF / "model/tiny.yaml").read_text(encoding="utf-8") + "hiden_size: 3\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"wide.yaml: unknown key hiden_size\. Did you mean model\.hidden_size\?"):
        load_group(ModelConfig, file)


def test_the_command_fails_with_one_line_and_code_2():
    done = subprocess.run(
        [sys.executable, "train.py", "model.kv_heads=3"], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr == "error: model.kv_heads=3 must divide model.heads=4: use one of 1, 2, 4.\n"


def test_a_group_cannot_be_null():
    with pytest.raises(ConfigError, match=r"reward=null: leave reward out, or name an option\. Available: conditional"):
        check_arguments(["stage=rm", "reward=null"])
    assert check_arguments(["init_from=null", "stage=rm"]) is None
