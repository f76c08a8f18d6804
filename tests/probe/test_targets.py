"""Where results cannot be written, that is said before anything is measured."""

import click
import pytest
from click.testing import CliRunner

from djinn_zmq.probe.targets import Picture, Target


@click.command()
@click.option("--json", type=Target())
@click.option("--plot", type=Picture())
def command(json, plot):
    click.echo(f"measured for {json} {plot}")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--json=/no/such/place/a.json"], 'there is no folder "/no/such/place"'),
        (["--plot=/no/such/place/a.png"], 'there is no folder "/no/such/place"'),
        (["--plot=a.foo"], '"a.foo" is none of .png, .pdf, .svg'),
        (["--json=/"], "is a directory"),
    ],
)
def test_a_place_that_cannot_be_written_to_is_refused(options, words):
    ended = CliRunner().invoke(command, options)
    assert ended.exit_code == 2 and words in ended.stderr and "measured" not in ended.stdout


def test_a_file_that_is_there_or_not_is_taken(tmp_path):
    (tmp_path / "a.json").write_text("{}")
    ended = CliRunner().invoke(
        command, [f"--json={tmp_path / 'a.json'}", f"--plot={tmp_path / 'b.svg'}"]
    )
    assert ended.exit_code == 0 and "b.svg" in ended.stdout
