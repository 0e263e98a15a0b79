"""`viaduct run` without typer reads what typer would read, and leaves to it what needs explaining."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import typer

from viaduct.cli import machine_run, root
from viaduct.cli import run as run_command
from viaduct.cli.run_words import WORDS, read


def by_typer(words: list[str], monkeypatch: pytest.MonkeyPatch) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """What reaches `run_configured` by way of typer; None where typer refuses."""
    heard: list[tuple[dict[str, Any], dict[str, Any]]] = []

    def hear(told: dict[str, Any], **others: Any) -> int:
        heard.append((told, others))
        return 0

    monkeypatch.setattr(run_command, "run_configured", hear)
    with contextlib.suppress(SystemExit):
        root.build(["run"])(args=["run", *words], prog_name="viaduct")
    if not heard:
        return None
    told, others = heard[0]
    return said(told), said(others)


def said(values: dict[str, Any]) -> dict[str, Any]:
    """Without what counts as not said."""
    return {key: value for key, value in values.items() if value is not None and value is not False}


COMMAND_LINES: tuple[list[str], ...] = (
    [],
    ["--kernel", "k"],
    ["-k", "k", "-m", "1G", "-c", "4"],
    ["--kernel=k", "--append=console=ttyS0 root=/dev/vda1", "--memory", "64M"],
    ["--append", "", "--kernel", "k"],
    ["--disk", "a,ro", "--disk=b", "--nic", "switch:web,mac=52:54:00:00:00:01", "--nic", "tap:t"],
    ["--balloon", "--json", "--config", "net.toml", "--name", "web"],
    ["--kernel", "one", "--kernel", "two"],
    ["--trace", "exits", "--gdb", "0", "--share", "/srv,tag=s", "--device", "a.py:B", "--vsock", "/tmp/v"],
    ["--console", "socket:/tmp/c", "--console-device", "virtio", "--boot", "pvh", "--transport", "mmio"],
    ["--transitional", "--port-notify", "--interrupts", "split"],
    ["--engine", "kvm", "--on-reset", "stop", "--initrd", "i"],
)


@pytest.mark.parametrize("words", COMMAND_LINES)
def test_words_are_read_as_typer_reads_them(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    plain = read(words)
    assert plain is not None
    assert (said(plain[0]), plain[1]) == by_typer(words, monkeypatch)


@pytest.mark.parametrize(
    "words",
    [
        ["--help"],
        ["-h"],
        ["--kernl", "k"],
        ["kernel"],
        ["--kernel"],
        ["--kernel", "--initrd"],
        ["--cpus", "four"],
        ["--cpus", "-1"],
        ["--balloon=yes"],
        ["-m1G"],
        ["--", "x"],
        ["-k=k"],
    ],
)
def test_whatever_needs_explaining_is_left_to_typer(words: list[str]) -> None:
    assert read(words) is None


def test_every_option_is_known_to_both() -> None:
    command = typer.main.get_command(root.build(["run"]))
    (run,) = command.commands.values()  # type: ignore[attr-defined]
    names = {name for parameter in run.params for name in parameter.opts if name not in ("-h", "--help")}
    assert names == set(WORDS)
    for parameter in run.params:
        kinds = {WORDS[name][1] for name in parameter.opts if name in WORDS}
        expected = "flag" if parameter.is_flag else "list" if parameter.multiple else "text"
        expected = "number" if parameter.type.name.startswith("int") else expected
        assert kinds <= {expected}, parameter.name


def test_nothing_said_is_not_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine_run, "_machine_config", lambda said, config: (_ for _ in ()).throw(Said(said)))
    with pytest.raises(Said) as raised:
        machine_run.run_configured({"append": None, "cpus": None, "balloon": False, "gdb": 0, "kernel": "k"})
    assert raised.value.args[0] == {"gdb": 0, "kernel": "k"}


class Said(Exception):
    """What would have been configured."""
