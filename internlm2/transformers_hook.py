"""Makes transformers 5 know `internlm2` without remote code, the moment its auto classes are imported.

`import internlm2` must stay free of torch and transformers, so registration waits for transformers' own modules: a
finder in front of the import system runs a callback after each of them. Modules that are imported already are served
at once.
"""

import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


def _register_config(module: Any) -> None:
    from internlm2.model.huggingface.configuration_internlm2 import InternLM2Config

    module.AutoConfig.register("internlm2", InternLM2Config, exist_ok=True)


def _register_models(module: Any) -> None:
    from internlm2.model.huggingface.configuration_internlm2 import InternLM2Config
    from internlm2.model.huggingface.modeling_internlm2 import (
        InternLM2ForCausalLM,
        InternLM2ForRewardModel,
        InternLM2Model,
    )

    # Of several classes transformers takes the one that config.json names under `architectures`, else the first.
    module.AutoModel.register(InternLM2Config, (InternLM2Model, InternLM2ForRewardModel), exist_ok=True)
    module.AutoModelForCausalLM.register(InternLM2Config, InternLM2ForCausalLM, exist_ok=True)
    module.AutoModelForSequenceClassification.register(InternLM2Config, InternLM2ForRewardModel, exist_ok=True)


def _register_tokenizer(module: Any) -> None:
    from internlm2.model.huggingface.tokenization_internlm2 import InternLM2Tokenizer, TokenizerName

    # By the class name that the released folders ask for, not by InternLM2Config: a tokenizer registered by config
    # gives way to the folder's own code under trust_remote_code=True, and that code gives wrong ids on transformers
    # 5.
    module.AutoTokenizer.register(TokenizerName, tokenizer_class=InternLM2Tokenizer, exist_ok=True)


def _nothing(module: Any) -> None:
    """For modules that the callbacks import: none of them may be half imported when a callback runs."""


_CALLBACKS: dict[str, Callable[[Any], None]] = {
    "transformers.configuration_utils": _nothing,
    "transformers.modeling_utils": _nothing,
    "transformers.models.llama.configuration_llama": _nothing,
    "transformers.models.llama.modeling_llama": _nothing,
    "transformers.models.auto.configuration_auto": _register_config,
    "transformers.models.auto.modeling_auto": _register_models,
    "transformers.models.auto.tokenization_auto": _register_tokenizer,
}


def install() -> None:
    """Register now what transformers has imported, and the rest when it does. Calling it again changes nothing."""
    if any(isinstance(finder, _Finder) for finder in sys.meta_path):
        return
    finder = _Finder()
    sys.meta_path.insert(0, finder)
    for name in _CALLBACKS:
        if name in sys.modules:
            finder.imported(name)


class _Finder(MetaPathFinder):
    """Finds the modules named above as everybody else would, and wraps their loader.

    They import each other: callbacks wait until the outermost of these imports has ended.
    """

    def __init__(self) -> None:
        self._searching: set[str] = set()
        self._waiting: list[str] = []
        self._depth = 0

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in _CALLBACKS or fullname in self._searching:
            return None
        self._searching.add(fullname)
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self._searching.discard(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, self)
        return spec

    def importing(self) -> None:
        self._depth += 1

    def imported(self, name: str | None) -> None:
        """One of the modules is there, or failed to import (None)."""
        self._depth = max(self._depth - 1, 0)
        if name is not None:
            self._waiting.append(name)
        while self._depth == 0 and self._waiting:
            ready = self._waiting.pop(0)
            self._depth += 1  # what a callback imports must not start the next one inside it
            try:
                _CALLBACKS[ready](sys.modules[ready])
            finally:
                self._depth -= 1


class _Loader(Loader):
    def __init__(self, loader: Loader, finder: _Finder) -> None:
        self._loader, self._finder = loader, finder

    def __getattr__(self, name: str) -> Any:  # get_source, get_filename and the like: inspect and tracebacks ask
        return getattr(self._loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._finder.importing()
        done = False
        try:
            self._loader.exec_module(module)
            done = True
        finally:
            self._finder.imported(module.__name__ if done else None)
