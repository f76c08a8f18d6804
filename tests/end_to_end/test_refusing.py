"""What keeps a server from starting: it says so in one sentence, and nothing is made or lost."""

import os
from pathlib import Path

import pytest
from click.testing import CliRunner

import djinn_zmq as djinn
from djinn_zmq.cli.main import main
from djinn_zmq.server import command
from tests.end_to_end.commands import one_sentence
from tests.end_to_end.conftest import free_port

FRANCE = "the capital of france is"
TINY = Path(djinn.__file__).parent / "models" / "tiny"


@pytest.fixture
def refused_server(refused, monkeypatch):
    """What `djinn serve` says that must not serve."""
    for name in ("keep_freed_memory", "allow_many_descriptors"):
        monkeypatch.setattr(command, name, lambda: None)  # those of this process stay
    monkeypatch.setattr(command.Server, "serve", lambda server: pytest.fail("it serves"))
    return lambda *options: refused("serve", *options)


@pytest.fixture
def refused_alone(run_alone):
    """The same of a server's own process."""
    return lambda *options: one_sentence(run_alone(*options, module="djinn_zmq.server"))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--host", "0.0.0.0"], "--host 0.0.0.0 can be reached from other machines: give --keys"),
        (["--host", "::"], "--host :: can be reached from other machines: give --keys"),
        (["--host", "example.org"], "--host example.org can be reached from other machines"),
        (["--model", "nonsense"], '"nonsense" is no served name (tiny), no directory, and no hub'),
        (["--model", "./nothing"], '"./nothing" is no served name (tiny), no directory'),
        (["--model", str(TINY.parent)], "models holds no model: it has no config.json"),
        (["--keys", "/nowhere"], "no /nowhere/server.key: make it with 'djinn keys new server"),
        (["--ipc", "/" + "x" * 120], "is too long: with its suffixes 127 bytes, at most 107 fit"),
    ],
)
def test_a_server_that_cannot_serve_says_why_in_one_sentence(refused_server, home, options, words):
    assert words in refused_server("--port", free_port(), *options)
    folder = home / "djinn"
    assert not folder.exists() or os.listdir(folder) == []


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            ["--random-weights", "foo"],
            'no shape "foo": there are llama-2-13b, llama-2-7b, llama-3.1-8b, small',
        ),
        (["--grace-s", "nan"], "grace_s is nan: it must be a number"),
        (
            ["--host-memory", 10**9],
            "--host-memory 1000000000 (MiB) is more than this machine has: ",
        ),
        (["--gpu-memory", 10**9], "--gpu-memory 1000000000 (MiB) is more than this machine has: "),
        (["--state", "STATE", "--disk", 10**12], "is more than the file system of STATE has: "),
        (["--events-port", "7"], "--events-port 7 without TCP: give --port, too"),
        (["--port", "7", "--events-port", "7"], "--events-port 7 is --port: choose another"),
        (
            ["--ipc", "STATE/no/a.sock"],
            "--ipc STATE/no/a.sock: there is no directory STATE/no: make",
        ),
    ],
)
def test_what_this_machine_cannot_have_is_refused_by_name_and_nothing_is_made(
    environment, home, monkeypatch, options, words
):
    monkeypatch.setattr(command, "keep_freed_memory", lambda: None)  # that of this process stays
    monkeypatch.setattr(command.Server, "serve", lambda server: pytest.fail("it serves"))
    options = [str(option).replace("STATE", str(home)) for option in options]
    done = CliRunner(env=environment).invoke(main, ["serve", "--port", "0", *options])
    assert (done.exit_code, done.stdout) == (1, "")
    assert words.replace("STATE", str(home)) in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not list(home.glob("**/*.sock*")) and not (home / "no").exists()


@pytest.mark.parametrize(
    "options",
    [
        ["--port", "65536"],
        ["--port", "-1"],
        ["--port", "http"],
        ["--gpu", "-1"],
        ["--threads", "0"],
        ["--host-memory", "0"],
        ["--threads", "1025"],
        ["--grace-s", "0"],
        ["--grace-s", "1e9"],
        ["--spin-us", "1000001"],
        ["--dtype", "int8"],
        ["--device", "cuda"],
        ["--frobnicate"],
        ["tiny"],
    ],
)
def test_a_wrong_option_is_a_usage_error_that_names_it(environment, home, options):
    done = CliRunner(env=environment).invoke(main, ["serve", *options])
    assert (done.exit_code, done.stdout) == (2, "")
    assert done.stderr.splitlines()[-1].startswith("Error: ")
    assert options[0] in done.stderr
    assert os.listdir(home) == []


def test_a_second_server_on_a_socket_is_refused_by_name_and_the_first_goes_on(
    served, tiny, refused_alone
):
    files = sorted(os.listdir(served.path.parent))
    complaint = refused_alone("--port", 0, "--ipc", served.path)
    assert f"a server already serves {served.path}: stop it with 'djinn stop'" in complaint
    assert sorted(os.listdir(served.path.parent)) == files
    assert tiny.run(FRANCE).top(1)[0].token == "paris"
    with served.connect() as newcomer:
        assert newcomer.ping() == "serving"


def test_a_port_in_use_is_refused_by_name_and_nothing_of_the_second_server_stays(
    served, tiny, refused_alone, home
):
    port = served.tcp.rpartition(":")[2]
    complaint = refused_alone("--port", port)
    assert f"tcp://127.0.0.1:{port} is in use by another process" in complaint
    assert os.listdir(home / "djinn") == []
    assert tiny.run(FRANCE).top(1)[0].token == "paris"


def test_the_ipc_path_never_costs_a_file_that_is_no_socket(refused_server, home):
    precious = home / "notes.txt"
    precious.write_text("keep me")
    (home / "folder").mkdir()
    for path in (precious, home / "folder"):
        assert f"{path} exists and is no socket" in refused_server("--port", 0, "--ipc", path)
    beside = [
        home / f"notes.{end}" for end in ("lease", "news", "lock")
    ]  # what it makes there itself
    for path in beside:
        path.write_text("keep me")
        assert f"{path} exists and is no" in refused_server("--port", 0, "--ipc", home / "notes")
        path.rename(path.with_suffix(".mine"))
    assert precious.read_text() == "keep me"
    assert sorted(os.listdir(home)) == ["folder", "notes.mine", "notes.txt"]


@pytest.mark.parametrize("mode", [0o755, 0o701])
def test_a_runtime_directory_that_others_can_enter_is_refused(refused, refused_server, home, mode):
    (home / "djinn").mkdir()
    (home / "djinn").chmod(mode)
    words = f"{home}/djinn must be a directory of uid {os.getuid()} with mode 0700: it belongs to"
    assert words in refused_server("--port", 0)
    assert words in refused("ps")
    assert words in refused_server("--port", 0, "--ipc", home / "djinn" / "x.sock")
    assert os.listdir(home / "djinn") == []


def test_a_runtime_directory_that_is_a_link_is_refused(refused_server, home, tmp_path):
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    (home / "djinn").symlink_to(tmp_path / "elsewhere")
    assert "djinn is no directory" in refused_server("--port", 0)
