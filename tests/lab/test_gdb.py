"""A stock gdb stops a guest's kernel at breakpoints, reads its memory, steps, and lets it go on."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from interop.peer_process import PeerProcess

from lab.guest import PATIENCE, Guest, viaduct_guest

pytestmark = pytest.mark.lab

PORT = 1234
STEPS = 3
SYMBOLS = ("start_kernel", "linux_banner", "__x64_sys_sethostname")
SHOW = ("-ex", 'printf "now at %#lx\\n", $pc', "-ex", "x/2i $pc")


@pytest.fixture(scope="module")
def symbols(tmp_path_factory: pytest.TempPathFactory) -> dict[str, int]:
    """Addresses in the guests' kernel, which is at the same place in each of them (nokaslr)."""
    wanted = "|".join(SYMBOLS)
    with viaduct_guest("symbols", tmp_path_factory.mktemp("symbols")) as guest:
        lines = guest.run(f"grep -wE '{wanted}' /proc/kallsyms").splitlines()
    found = {name: int(address, 16) for address, _, name in map(str.split, lines)}
    assert sorted(found) == sorted(SYMBOLS)
    return found


@pytest.fixture
def guest(tmp_path: Path) -> Iterator[Guest]:
    """A machine that waits for gdb before its first instruction."""
    guest = viaduct_guest("debugged", tmp_path, "--gdb", str(PORT))
    try:
        guest.start()
        yield guest
    finally:
        guest.stop()


def test_stock_gdb_stops_and_steps_a_kernel(symbols: dict[str, int], guest: Guest, tmp_path: Path) -> None:
    """First where the kernel begins, with interrupts off, and then in a system that runs."""
    command = ["gdb", "-nx", "-batch", "-ex", f"set remotetimeout {PATIENCE:.0f}"]
    command += ["-ex", "set architecture i386:x86-64", "-ex", f"target remote 127.0.0.1:{PORT}"]
    command += ["-ex", f"hbreak *{symbols['start_kernel']:#x}", "-ex", "continue", *SHOW]
    command += ["-ex", f"x/s {symbols['linux_banner']:#x}", *("-ex", "stepi", *SHOW) * STEPS]
    command += ["-ex", "delete", "-ex", f"hbreak *{symbols['__x64_sys_sethostname']:#x}", "-ex", "continue"]
    command += [*SHOW, "-ex", "detach"]
    with PeerProcess("gdb", command, tmp_path / "gdb.log") as gdb:
        guest.wait_ready()
        guest.send("hostname was-stopped")
        gdb.wait_for(lambda: not gdb.running(), "its end", PATIENCE)
        output = gdb.output()
    assert "Linux version" in output, output
    stops = [int(address, 16) for address in re.findall(r"^now at (0x[0-9a-f]+)$", output, re.M)]
    assert stops[0] == symbols["start_kernel"], output
    assert stops[-1] == symbols["__x64_sys_sethostname"], output
    # What is stepped over is followed by the next instruction, or by that to which it says that it goes.
    code = re.findall(r"^=> (0x[0-9a-f]+).*:\t(.*)\n +(0x[0-9a-f]+)", output, re.M)
    assert [int(address, 16) for address, _, _ in code] == stops, output
    assert len(stops) == STEPS + 2, output
    for (_, instruction, following), stop in zip(code[:STEPS], stops[1:], strict=False):
        assert stop == int(following, 16) or f"{stop:#x}" in instruction, output
    assert guest.run("hostname").strip() == "was-stopped"
    assert guest.power_off() == 0
