"""What the benchmark of machines says of a process, and how its table is made."""

from __future__ import annotations

from pathlib import Path

import pytest
from bench import machine
from bench.machine import FIGURES, Results
from bench.machine_accounts import Memory, exits, own_memory

GUEST = 256 << 20
SMAPS = """\
55e0a0000000-55e0a0400000 r-xp 00000000 08:01 123                        /usr/bin/python3.11
Size:               4096 kB
Rss:                3000 kB
Pss:                1500 kB
Pss_Dirty:           100 kB
VmFlags: rd ex mr mw me
7f0000000000-7f0010000000 rw-p 00000000 00:00 0 \n\
Size:             262144 kB
Rss:               90000 kB
Pss:               90000 kB
AnonHugePages:     88064 kB
VmFlags: rd wr mr mw me dd hg
7f0020000000-7f0020100000 rw-p 00000000 00:00 0                          [heap]
Size:               1024 kB
Rss:                 500 kB
Pss:                 500 kB
Swap:                  0 kB
"""


def test_the_guests_memory_is_left_out() -> None:
    assert own_memory(SMAPS, GUEST) == Memory(resident=3500 << 10, proportional=2000 << 10, guest=90000 << 10)


def test_it_has_to_be_there_and_only_once() -> None:
    with pytest.raises(ValueError, match="0 mappings"):
        own_memory(SMAPS, 2 * GUEST)
    with pytest.raises(ValueError, match="2 mappings"):
        own_memory(SMAPS + SMAPS, GUEST)


def test_this_process_has_memory() -> None:
    text = Path("/proc/self/smaps").read_text()
    start = text.partition("-")[0]
    found = own_memory(text.replace(text.split()[0], f"{start}-{int(start, 16) + GUEST:x}", 1), GUEST)
    assert found.resident >= found.proportional > 0


def test_exits_are_those_of_the_one_machine_of_a_process(tmp_path: Path) -> None:
    (tmp_path / "exits").write_text("900\n")  # of all machines
    with pytest.raises(ValueError, match="process 12 has 0 machines"):
        exits(12, tmp_path)
    for name, content in (("exits", "70\n"), ("io_exits", "30\n"), ("halt_exits", "0\n"), ("wait_hist", "1 2 3\n")):
        file = tmp_path / "12-9" / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(content)
    (tmp_path / "12-9" / "vcpu0").mkdir()
    (tmp_path / "123-9").mkdir()
    assert exits(12, tmp_path) == {"exits": 70, "io_exits": 30}
    (tmp_path / "12-10").mkdir()
    with pytest.raises(ValueError, match="process 12 has 2 machines"):
        exits(12, tmp_path)


def turn(number: int, monitor: str, seconds: float) -> dict[str, float | int | str]:
    return {"round": number, "measure": "start", "monitor": monitor, "seconds": seconds}


def test_ratios_are_taken_within_a_round_and_a_lone_turn_counts_for_nothing() -> None:
    turns = [turn(n, *pair) for n, f in enumerate((1, 2, 5)) for pair in (("viaduct", 0.8 * f), ("qemu", 1.0 * f))]
    results = Results("", {}, [*turns, turn(9, "qemu", 100.0)])
    figure = FIGURES[0]
    ratio = results.ratio(figure)
    assert ratio is not None
    assert ratio.median == pytest.approx(0.8)
    assert ratio.n == 3
    assert results.ratio(FIGURES[-1]) is None
    row = next(line for line in machine.text(results).splitlines() if figure.title in line)
    assert "0.80 [0.80-0.80]" in row
    assert "| met |" in row


@pytest.mark.parametrize(
    ("figure", "ratio", "said"),
    [
        (FIGURES[0], 0.9, "met"),
        (FIGURES[0], 0.99, "**missed by 10%**"),
        (FIGURES[-1], 1.0, "met"),
        (FIGURES[-1], 0.8, "**missed by 20%**"),
    ],
)
def test_a_miss_is_said_with_its_size(figure: machine.Figure, ratio: float, said: str) -> None:
    assert figure.verdict(ratio) == said


def test_the_table_goes_between_its_markers(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n{machine.BEGIN}\nold\n{machine.END}\nafter\n")
    machine.insert(page, "new\n")
    assert page.read_text() == f"before\n{machine.BEGIN}\nnew\n{machine.END}\nafter\n"
    page.write_text("no place")
    machine.insert(page, "new\n")
    assert page.read_text() == "no place"
