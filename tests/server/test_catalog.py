"""What a name stands for, and what is refused as none."""

from pathlib import Path

import pytest

from djinn_zmq.errors import AccessDenied, UnknownModel
from djinn_zmq.server.catalog import CONFIG, Catalog


@pytest.mark.parametrize(
    "name", ["", "gpt-9", "~no such user/gpt", "n" * 300, "a/" + "n" * 5000, "/", "./a", "a/b/c"]
)
def test_what_names_nothing_is_refused_with_what_is_served(name: str) -> None:
    with pytest.raises(UnknownModel):
        Catalog(()).resolve(name, trusted=True)
    with pytest.raises(UnknownModel):  # at the start, too
        Catalog((name,))


def test_who_is_not_trusted_gets_what_is_served_and_learns_of_nothing_else(tmp_path: Path) -> None:
    (tmp_path / CONFIG).touch()
    catalog = Catalog((str(tmp_path),))
    assert catalog.resolve(str(tmp_path), trusted=False) == (str(tmp_path), str(tmp_path))
    name, source = catalog.resolve("tiny", trusted=False)
    assert catalog.resolve(source, trusted=False) == (name, source)
    for other in (str(tmp_path / "none"), str(tmp_path.parent), "owner/name"):
        with pytest.raises(AccessDenied, match="a client without a key gets: tiny"):
            catalog.resolve(other, trusted=False)


def test_a_model_that_is_pulled_while_it_serves_is_served_by_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DJINN_CACHE", str(tmp_path))
    catalog = Catalog(())
    with pytest.raises(UnknownModel, match="'djinn pull' lists what it can bring"):
        catalog.resolve("smollm2", trusted=True)
    folder = tmp_path / "models" / "smollm2"
    folder.mkdir(parents=True)
    assert catalog.names == ("tiny",)  # a directory without a config is no model
    (folder / CONFIG).touch()
    assert catalog.resolve("smollm2", trusted=False) == ("smollm2", str(folder))
    assert catalog.names == ("tiny", "smollm2")
