"""Builds the fuzz targets and runs them, several at a time. `make fuzz` and `make fuzz-short` call it.

    fuzz/run.py --seconds 30 --jobs 2 [TARGET ...]

Coverage comes from LLVM's sanitizer pass, which any stable compiler has, and libFuzzer from the crate libfuzzer-sys;
AddressSanitizer needs RUSTC_BOOTSTRAP=1 on a stable compiler, and is left out where its runtime is missing. So nothing
is needed but Rust and a C++ compiler. `cargo fuzz` works as well, if you have it.

What is found new goes to `build/fuzz/corpus`, what fails to `build/fuzz/artifacts`; `--minimise` makes what is kept in
`fuzz/corpus` anew from both.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
import tomllib
from pathlib import Path

FUZZ = Path(__file__).resolve().parent
BUILD = FUZZ.parent / "build" / "fuzz"
LARGEST_KEPT = 1024
"""Bytes of an input that is kept in the repository."""

_COVERAGE = (
    "-Cpasses=sancov-module",
    "-Cllvm-args=-sanitizer-coverage-level=4",
    "-Cllvm-args=-sanitizer-coverage-inline-8bit-counters",
    "-Cllvm-args=-sanitizer-coverage-pc-table",
    "-Cllvm-args=-sanitizer-coverage-trace-compares",
    "-Cllvm-args=-simplifycfg-branch-fold-threshold=0",
    "-Ccodegen-units=1",
    "-Cdebug-assertions",
    "-Coverflow-checks",
    "--cfg=fuzzing",
)


def targets() -> list[str]:
    """Their names, as the manifest has them."""
    return [each["name"] for each in tomllib.loads((FUZZ / "Cargo.toml").read_text())["bin"]]


def host() -> str:
    """This machine, as the compiler calls it: named, so that the flags are not for programs that only help to build."""
    said = subprocess.run(["rustc", "-vV"], capture_output=True, text=True, check=True).stdout
    return next(line.split()[1] for line in said.splitlines() if line.startswith("host:"))


def sanitizer() -> tuple[str, ...]:
    """The flag for AddressSanitizer, if the toolchain has its runtime."""
    command = ["rustc", "--print", "target-libdir"]
    libdir = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    if any(Path(libdir).glob("librustc-*_rt.asan.a")):
        return ("-Zsanitizer=address",)
    print("fuzz: this toolchain has no AddressSanitizer; running without it", file=sys.stderr)
    return ()


def build(names: list[str]) -> Path:
    """Builds the programs; returns their directory."""
    environment = {
        **os.environ,
        "RUSTC_BOOTSTRAP": "1",
        "CARGO_ENCODED_RUSTFLAGS": "\x1f".join((*_COVERAGE, *sanitizer())),
        "CARGO_TARGET_DIR": str(BUILD / "target"),
    }
    environment.pop("RUSTFLAGS", None)
    machine = host()
    command = ["cargo", "build", "--release", "--locked", "--features", "libfuzzer", "--target", machine]
    for name in names:
        command += ["--bin", name]
    command += ["--manifest-path", str(FUZZ / "Cargo.toml")]
    subprocess.run(command, env=environment, check=True)
    return BUILD / "target" / machine / "release"


class Run:
    """One target at work."""

    def __init__(self, programs: Path, name: str, seconds: int, seed: int) -> None:
        self.name = name
        self.found = BUILD / "corpus" / name
        artifacts = BUILD / "artifacts" / name
        for directory in (self.found, artifacts):
            directory.mkdir(parents=True, exist_ok=True)
        self.log = BUILD / f"{name}.log"
        command = [
            str(programs / name),
            str(self.found),
            str(FUZZ / "corpus" / name),
            f"-max_total_time={seconds}",
            f"-artifact_prefix={artifacts}/",
            "-max_len=4096",
            "-timeout=60",
            f"-seed={seed}",
            "-rss_limit_mb=2048",
            "-print_final_stats=1",
        ]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        self.begun = time.monotonic()

    def report(self) -> bool:
        """Waits, says in one line how it went and returns whether nothing was found."""
        status = self.process.wait()
        text = self.log.read_text(errors="replace")
        counted = re.search(r"stat::number_of_executed_units: (\d+)", text)
        runs = int(counted[1]) if counted else 0
        covered = re.findall(r"cov: (\d+)", text)
        seconds = time.monotonic() - self.begun
        what = "no finding" if status == 0 else f"FAILED with status {status}"
        edges = covered[-1] if covered else "?"
        print(f"{self.name:14} {what}: {runs:>10,} inputs in {seconds:,.0f} s, {edges} edges covered", flush=True)
        if status != 0:
            print(text[-8000:])
            print(f"{self.name}: the input is in {BUILD / 'artifacts' / self.name}; {self.log} has the whole log")
        return status == 0


def fuzz(programs: Path, names: list[str], seconds: int, jobs: int, seed: int) -> bool:
    """Runs the targets, `jobs` at a time. Returns whether nothing was found."""
    good = True
    waiting = list(names)
    running: list[Run] = []
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                running.append(Run(programs, waiting.pop(0), seconds, seed))
            ended = [run for run in running if run.process.poll() is not None]
            for run in ended:
                running.remove(run)
                good &= run.report()
            if not ended:
                time.sleep(0.1)
    finally:
        for run in running:
            run.process.kill()
            run.process.wait()
    return good


def minimise(programs: Path, names: list[str]) -> None:
    """Keeps few inputs that together reach what all found inputs reach, and those that somebody gave a name."""
    for name in names:
        kept = FUZZ / "corpus" / name
        merged = BUILD / "merged" / name
        shutil.rmtree(merged, ignore_errors=True)
        merged.mkdir(parents=True)
        kept.mkdir(parents=True, exist_ok=True)
        sources = [str(path) for path in (kept, BUILD / "corpus" / name) if path.exists()]
        command = [str(programs / name), "-set_cover_merge=1", "-use_counters=0", f"-max_len={LARGEST_KEPT}"]
        subprocess.run([*command, str(merged), *sources], check=True, stderr=subprocess.DEVNULL)
        for path in kept.iterdir():
            if re.fullmatch("[0-9a-f]{40}", path.name):
                path.unlink()
        for path in merged.iterdir():
            shutil.copy(path, kept / path.name)
        sizes = [path.stat().st_size for path in kept.iterdir()]
        print(f"{name}: {len(sizes)} inputs, {sum(sizes)} bytes")


def main() -> int:
    """Build, then fuzz or minimise."""
    names = targets()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=f"all by default: {', '.join(names)}")
    parser.add_argument("--seconds", type=int, default=30, help="for each target (default: %(default)s)")
    parser.add_argument("--jobs", type=int, default=2, help="targets at a time (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of libFuzzer's chance; 0, the default: any")
    parser.add_argument("--minimise", action="store_true", help="make fuzz/corpus anew instead of fuzzing")
    options = parser.parse_args()
    chosen = options.targets or names
    if unknown := set(chosen) - set(names):
        parser.error(f"no such target: {', '.join(sorted(unknown))}; there are {', '.join(names)}")
    programs = build(chosen)
    if options.minimise:
        minimise(programs, chosen)
        return 0
    return 0 if fuzz(programs, chosen, options.seconds, options.jobs, options.seed) else 1


if __name__ == "__main__":
    sys.exit(main())
