"""Every command explains itself, and a wrong one is answered in one line with the right exit code."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from viaduct.cli import COMMANDS

from .running import viaduct


def test_help_names_every_command() -> None:
    done = viaduct("--help")
    assert done.returncode == 0
    for command in COMMANDS:
        assert f"\n  {command} " in done.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_each_command(command: str) -> None:
    done = viaduct(command, "--help")
    assert done.returncode == 0
    assert done.stdout.startswith(f"Usage: viaduct {command} ")
    assert "--help" in done.stdout


def test_help_keeps_the_lines_of_examples() -> None:
    assert "\n      viaduct switch --config net.toml --pollers 2,3\n" in viaduct("switch", "--help").stdout


def test_version() -> None:
    from viaduct import __version__

    assert viaduct("--version").stdout == f"viaduct {__version__}\n"


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["prot"], "Did you mean 'port'"),
        (["stats", "--wacth"], "--watch"),
        (["switch", "-p", "vm1=vhost-usr:/tmp/x"], "unknown kind of port 'vhost-usr'; did you mean 'vhost-user'?"),
        (["switch", "-p", "a=null", "-p", "a=null"], "a port of that name exists already"),
        (["switch", "-p", "a=tap:t", "-p", "b=tap:t"], "port 'a' uses the interface 't' already"),
        (["switch", "--pollers", "one"], "'one' is not a list of CPU numbers such as 2,3"),
        (["switch", "--pollers", "1,1"], "a CPU stands twice"),
        (["switch", "--polling", "busi"], "did you mean 'busy'? (allowed: adaptive, busy, interrupt)"),
        (["switch", "--config", "/nowhere.toml"], "/nowhere.toml: cannot be read: No such file"),
        (["port", "add", "x"], "needs a name: NAME=KIND:ARG"),
    ],
)
def test_wrong_usage(words: list[str], problem: str) -> None:
    done = viaduct(*words)
    assert done.returncode == 2
    assert problem in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_configuration_file_with_a_typo(tmp_path: Path) -> None:
    file = tmp_path / "net.toml"
    file.write_text('[ports.vm1]\nkind = "vhost-user"\npath = "vm1.sock"\nqueus = 2\n')
    done = viaduct("switch", "--config", str(file))
    assert done.returncode == 2
    assert done.stderr.startswith(f"viaduct: {file}:4: ports.vm1.queus: unknown key 'queus'; did you mean 'queues'?")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "words", [["port", "list"], ["stats"], ["macs"], ["events"], ["port", "del", "a"], ["capture", "a", "-w", "x"]]
)
def test_no_switch(words: list[str], tmp_path: Path) -> None:
    done = viaduct(*words, "--control", str(tmp_path / "nobody.sock"))
    assert done.returncode == 3
    assert "no switch answers at" in done.stderr
    assert "viaduct switch" in done.stderr


def test_something_else_answers(tmp_path: Path) -> None:
    import socket
    import threading

    path = tmp_path / "other.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()

        def answer() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(1000)
                connection.sendall(b"220 mail.example ESMTP\r\n")

        thread = threading.Thread(target=answer)
        thread.start()
        done = viaduct("stats", "--control", str(path))
        thread.join()
    assert done.returncode == 3
    assert "what answered is no switch" in done.stderr


def test_a_command_loads_only_what_it_needs() -> None:
    script = "import sys\nfrom viaduct.cli import application\napplication(['macs'])\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert "viaduct.cli.macs" in loaded
    assert not loaded & {"viaduct.cli.switch", "viaduct._core", "asyncio", "rich", "msgspec"}


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_of_commands(shell: str) -> None:
    environment = {
        "_VIADUCT_COMPLETE": f"complete_{shell}",
        "COMP_WORDS": "viaduct ca",
        "COMP_CWORD": "1",
        "_TYPER_COMPLETE_ARGS": "viaduct ca",
        "_TYPER_COMPLETE_FISH_ACTION": "get-args",
    }
    assert "capture" in viaduct(**environment).stdout


def test_completion_of_a_device_of_ones_own(tmp_path: Path) -> None:
    """Directories and files, then the classes in a file, which is not executed."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "toys.py").write_text("class Dice: ...\nclass Disc: ...\nclass _Base: ...\nraise SystemExit\n")
    (tmp_path / "mine" / "notes.txt").touch()

    def completed(word: str) -> set[str]:
        words = f"viaduct run --device {word}"
        done = viaduct(
            _VIADUCT_COMPLETE="complete_fish", _TYPER_COMPLETE_ARGS=words, _TYPER_COMPLETE_FISH_ACTION="get-args"
        )
        return set(done.stdout.split())

    assert completed(f"{tmp_path}/m") == {f"{tmp_path}/mine/"}
    assert completed(f"{tmp_path}/mine/") == {f"{tmp_path}/mine/toys.py:"}
    assert completed(f"{tmp_path}/mine/toys.py:Di") == {
        f"{tmp_path}/mine/toys.py:Dice",
        f"{tmp_path}/mine/toys.py:Disc",
    }
    assert completed(f"{tmp_path}/nowhere/toys.py:") == set()
