"""Which names are served, and what they stand for."""

import os
import re
from importlib import resources
from pathlib import Path

from djinn_zmq.errors import AccessDenied, UnknownModel
from djinn_zmq.settings import models_dir

CONFIG = "config.json"


def shape_names() -> list[str]:
    """What can be served with random weights. The engine reads the file whole, as YAML: a package that
    this process does without."""
    text = (resources.files("djinn_zmq") / "models" / "shapes.yaml").read_text()
    return sorted(re.findall(r"^([\w.-]+):", text, re.MULTILINE))


class Catalog:
    """Names → sources. A source is a directory, or a hub id that transformers resolves."""

    def __init__(self, models: tuple[str, ...], shapes: tuple[str, ...] = ()) -> None:
        """models: what `--model` named: served names, directories or hub ids. shapes: what
        `--random-weights` named. Raises UnknownModel for what is none."""
        self._sources: dict[str, str] = {}
        self._find(Path(str(resources.files("djinn_zmq") / "models")))
        self._find(models_dir())
        for shape in shapes:
            if shape not in shape_names():
                raise UnknownModel(f'no shape "{shape}": there are {", ".join(shape_names())}')
        self._sources |= {shape: f"random:{shape}" for shape in shapes}
        self.at_start = (*(self._add(model) for model in models), *shapes)

    @property
    def names(self) -> tuple[str, ...]:
        self._find(models_dir())
        return tuple(self._sources)

    def _find(self, directory: Path) -> None:
        """Serve the models in *directory* by name, besides those known: some are pulled meanwhile."""
        for folder in sorted(directory.glob("*/")):
            if folder.name not in self._sources and os.path.exists(folder / CONFIG):
                self._sources[folder.name] = str(folder)

    def _add(self, model: str) -> str:
        name, source = self.resolve(model, trusted=True)
        self._sources[name] = source
        return name

    def resolve(self, model: str, *, trusted: bool) -> tuple[str, str]:
        """(name, source) of a served name, a directory or a hub id.

        trusted: may the asker name things on this machine that nobody chose to serve?
        Raises UnknownModel, or AccessDenied for an untrusted asker.
        """
        if model not in self._sources:
            self._find(models_dir())
        if model in self._sources:
            return model, self._sources[model]
        if model in self._sources.values():
            return next(item for item in self._sources.items() if item[1] == model)
        known = ", ".join(self._sources)
        if not model:
            raise UnknownModel(f"an empty model name: served are {known}")
        if not trusted:
            raise AccessDenied(
                f'"{model}" is not served here; a client without a key gets: {known}'
            )
        try:
            path = Path(model).expanduser()
            if path.is_dir():
                if not (path / CONFIG).exists():
                    raise UnknownModel(f"{path} holds no model: it has no {CONFIG}")
                return str(path.resolve()), str(path.resolve())
        except (OSError, RuntimeError) as exc:  # too long, not to be entered, or of no such user
            raise UnknownModel(f'"{model}" names no model that can be read: {exc}') from exc
        if path.is_absolute() or model.startswith(".") or model.count("/") != 1:
            pull = "" if "/" in model else "; 'djinn pull' lists what it can bring"
            raise UnknownModel(
                f'"{model}" is no served name ({known}), no directory, and no hub id (OWNER/NAME){pull}'
            )
        return model, model
