"""Unmodified Hugging Face programs: `from_pretrained` of a served name gives the served model.

transformers is the program's to import, when and how it likes; what is changed in it is changed as its modules
come. Config, generation config and tokenizer are made by transformers itself, of a directory with the files
that the server sends. What is not served falls through to the library.
"""

import functools
import importlib.abc
import importlib.machinery
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from djinn_zmq.client.model import Model
from djinn_zmq.client.server import Server
from djinn_zmq.errors import NoTokenizer, NotServed

CAUSAL = "AutoModelForCausalLM"
CHANGED: dict[str, tuple[str, ...]] = {  # module: its classes that read small files by a name
    "transformers.models.auto.configuration_auto": ("AutoConfig",),
    "transformers.configuration_utils": ("PreTrainedConfig",),
    "transformers.models.auto.tokenization_auto": ("AutoTokenizer",),
    "transformers.tokenization_utils_base": ("PreTrainedTokenizerBase",),
    "transformers.generation.configuration_utils": ("GenerationConfig",),
    # A pipeline tries these too, and goes on without what there is none of: not to be asked of a hub.
    "transformers.models.auto.processing_auto": ("AutoProcessor",),
    "transformers.models.auto.feature_extraction_auto": ("AutoFeatureExtractor",),
    "transformers.models.auto.image_processing_auto": ("AutoImageProcessor",),
    "transformers.models.auto.video_processing_auto": ("AutoVideoProcessor",),
}
AUTO = "transformers.models.auto.modeling_auto"
OWN = "transformers.modeling_utils"


class Programs:
    """What a program's `from_pretrained` finds on one server."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._folders: dict[str, tempfile.TemporaryDirectory[str]] = {}

    def find(self, name: Any) -> Model | None:
        """The served model that *name* means, None where none is served by that name."""
        if not isinstance(name, (str, os.PathLike)):
            return None
        text = os.fspath(name)
        status = self._server.status()
        found = text if text in status.names else None
        for one in status.models:
            if text == one.name or (_is_folder(text, one.source)):
                found = found or one.name
        return None if found is None else self._server.model(found)

    def folder(self, model: Model) -> str:
        """A directory with its config and tokenizer, which lasts as long as this process."""
        from djinn_zmq.hf.opening import write_card

        folder = self._folders.get(model.name)
        if folder is None:
            folder = tempfile.TemporaryDirectory(prefix="djinn-card-")
            write_card(model, Path(folder.name))
            self._folders[model.name] = folder
        return folder.name

    # ---- what stands in for from_pretrained

    def of_files(self, own: Callable[..., Any]) -> Callable[..., Any]:
        """For classes that read small files."""

        def from_pretrained(cls: Any, name: Any = None, *args: Any, **named: Any) -> Any:
            name = _name_in(name, named)
            model = self.find(name)
            if model is None:
                return own(cls, name, *args, **named)
            if "Tokenizer" in cls.__name__ and not model.has_tokenizer:
                raise NoTokenizer(f'"{name}" is served without a tokenizer')
            made = own(cls, self.folder(model), *args, **named)
            for one in made if isinstance(made, tuple) else (made,):
                if hasattr(one, "name_or_path"):
                    one.name_or_path = os.fspath(name)
            return made

        return from_pretrained

    def of_weights(self, own: Callable[..., Any], causal: bool) -> Callable[..., Any]:
        """For models. causal: any causal language model will do; else only one of the class itself."""

        def from_pretrained(cls: Any, name: Any = None, *args: Any, **named: Any) -> Any:
            name = _name_in(name, named)
            model = self.find(name)
            if model is None:
                return own(cls, name, *args, **named)
            return self._open(model, cls, causal, os.fspath(name), args, named)

        return from_pretrained

    def _open(
        self, model: Model, cls: Any, causal: bool, name: str, args: Any, named: dict[str, Any]
    ) -> Any:
        from djinn_zmq.hf.loading import loaded
        from djinn_zmq.hf.models import class_of

        architecture = model.info.architecture
        own = class_of(architecture).architecture
        if not causal and cls is not own:
            raise NotServed(
                f'{cls.__name__}.from_pretrained("{name}"): it is served as {architecture}; '
                f"{CAUSAL} gives that"
            )
        if args:
            raise NotServed(
                f'from_pretrained("{name}", …): arguments of the model\'s own constructor'
            )
        made = loaded(model, name, named)
        if causal:
            registered = cls._model_mapping._extra_content.get(made.config.__class__, own)
            if registered is not own:
                raise NotServed(
                    f'{CAUSAL}.from_pretrained("{name}"): {registered.__name__} is registered for its config, '
                    f"it is served as transformers' {architecture}"
                )
        return made


def _name_in(name: Any, named: dict[str, Any]) -> Any:
    for key in ("pretrained_model_name_or_path", "pretrained_model_name"):
        if name is None and key in named:
            name = named.pop(key)
    return name


def _is_folder(text: str, source: str) -> bool:
    return os.path.isdir(text) and os.path.realpath(text) == os.path.realpath(source)


# ---- as transformers' modules come


class Change(importlib.abc.MetaPathFinder):
    """Lets *change* see a module right after it was carried out."""

    def __init__(self, wanted: Sequence[str], change: Callable[[ModuleType], None]) -> None:
        self._wanted = frozenset(wanted)
        self._change = change

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if name not in self._wanted:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is None or spec.loader is None:
            return None
        spec.loader = _Changed(spec.loader, self._change)
        return spec


class _Changed(importlib.abc.Loader):
    def __init__(self, own: Any, change: Callable[[ModuleType], None]) -> None:
        self._own = own
        self._change = change

    def create_module(self, spec: Any) -> Any:
        return self._own.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._own.exec_module(module)
        self._change(module)

    def __getattr__(self, name: str) -> Any:  # get_source, for tracebacks and inspect
        return getattr(self._own, name)


def install(server: Server) -> None:
    """From now on programs in this process find *server*'s models. transformers is not imported yet."""
    programs = Programs(server)

    def change(module: ModuleType) -> None:
        if module.__name__ == AUTO:
            base = module._BaseAutoModelClass
            for kind in {one for one in vars(module).values() if isinstance(one, type)}:
                if issubclass(kind, base) and kind is not base:
                    causal = kind.__name__ == CAUSAL
                    _replace(kind, functools.partial(programs.of_weights, causal=causal))
        elif module.__name__ == OWN:
            _replace(module.PreTrainedModel, functools.partial(programs.of_weights, causal=False))
        for name in CHANGED.get(module.__name__, ()):
            _replace(getattr(module, name), programs.of_files)

    sys.meta_path.insert(0, Change([AUTO, OWN, *CHANGED], change))


def _replace(kind: Any, other: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    own = kind.from_pretrained.__func__
    kind.from_pretrained = classmethod(functools.wraps(own)(other(own)))
