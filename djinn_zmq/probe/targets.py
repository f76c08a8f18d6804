"""Files that a command line names to be written: looked at before anything is measured."""

import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click


class Target(click.Path):
    """A file to be written; its folder must be there."""

    def __init__(self) -> None:
        super().__init__(path_type=Path, dir_okay=False, writable=True)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        path: Path = super().convert(value, param, ctx)
        folder = path.absolute().parent
        if not folder.is_dir():
            self.fail(f'there is no folder "{folder}" to write {path.name} into', param, ctx)
        if not os.access(folder, os.W_OK):
            self.fail(f'the folder "{folder}" cannot be written to', param, ctx)
        return path


class Picture(Target):
    """A figure to be drawn; its ending says in which format."""

    ENDINGS = (".png", ".pdf", ".svg")

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        path: Path = super().convert(value, param, ctx)
        if path.suffix not in self.ENDINGS:
            self.fail(f'"{path.name}" is none of {", ".join(self.ENDINGS)}', param, ctx)
        if find_spec("matplotlib") is None:
            self.fail("figures need matplotlib: pip install 'djinn-zmq[bench]'", param, ctx)
        return path
