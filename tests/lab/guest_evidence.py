"""What a guest that does not answer is doing, as far as the lab's kernel and our machine can tell."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

COUNTERS = Path("/sys/kernel/debug/kvm")
INTERVAL = 2.0
"""Seconds in which a guest that runs leaves its processor at least for a timer."""
PATIENCE = 30.0


def guest_evidence(name: str, pid: int, ours: bool) -> str:
    """Its threads with what they wait for, the counters of KVM that move, the last words of the lab's kernel, and its
    exits if the machine is ours. Whatever cannot be had is left out: this is asked when something is wrong."""
    before = _counters(pid)
    time.sleep(INTERVAL)
    after = _counters(pid)
    moved = [f"{key} {after[key] - count:+d}" for key, count in before.items() if after.get(key, count) != count]
    lines = [f"KVM's counters in {INTERVAL:g} s: {', '.join(moved) or 'none has moved'}", *_threads(pid)]
    lines.append(_output("dmesg", "--ctime")[-1000:])
    if ours:
        lines.append(_output("viaduct", "vm", "exits", name))
    return "\n".join(lines)


def _counters(pid: int) -> dict[str, int]:
    found = {}
    for path in sorted(COUNTERS.glob(f"{pid}-*/**/*")):
        text = _text(path)
        if text.isdecimal():
            found[path.relative_to(COUNTERS).as_posix()] = int(text)
    return found


def _threads(pid: int) -> list[str]:
    lines = []
    for task in sorted(Path(f"/proc/{pid}/task").glob("*")):
        # proc(5): behind the name, which may hold anything, the state is the first word, the times the 12th and 13th.
        words = _text(task / "stat").rpartition(")")[2].split()
        stack = " < ".join(line.split()[-1] for line in _text(task / "stack").splitlines())
        if len(words) > 12:
            lines.append(f"thread {_text(task / 'comm')}: {words[0]}, ticks {words[11]} and {words[12]}, {stack}")
    return lines


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace").strip() if path.is_file() else ""
    except OSError:
        return ""


def _output(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{' '.join(command)}: {error}"
    return done.stdout + done.stderr
