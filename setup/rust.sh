#!/bin/sh
# Finds or gets a Rust toolchain and a linker, and writes how to reach them. Usage: setup/rust.sh VENV > VENV/rust.env
#
# A toolchain that is new enough is used as it is. Otherwise puccinialin, the package by which maturin itself offers Rust to
# `pip install`, puts one into the user's cache directory (~/.cache/puccinialin), and nothing else on the machine changes.
# Rust links through a C compiler; where there is none, zig's does (a package on PyPI, into the environment).
set -eu
venv=$1
here=$(dirname "$0")
wanted=$(sed -n 's/^rust-version = "\(.*\)"/\1/p' "$here/../Cargo.toml")

new_enough() {
    found=$(cargo --version 2>/dev/null | cut -d' ' -f2) && [ -n "$found" ] &&
        [ "$(printf '%s\n%s\n' "$wanted" "$found" | sort -V | head -n1)" = "$wanted" ]
}

if ! new_enough; then
    echo "setup: Rust $wanted or later is wanted, found ${found:-none}; getting one into the cache directory" >&2
    "$venv/bin/pip" install --quiet puccinialin >&2
    "$venv/bin/python" -m puccinialin --info-json "$venv/rust.json" >&2
    "$venv/bin/python" - "$venv/rust.json" <<'PYTHON'
import json, shlex, sys

environment = json.load(open(sys.argv[1]))["env"]
for name in ("RUSTUP_HOME", "CARGO_HOME"):
    print(f"export {name}={shlex.quote(environment[name])}")
print(f"export PATH={shlex.quote(environment['CARGO_HOME'] + '/bin')}:\"$PATH\"")
PYTHON
fi

if ! command -v cc >/dev/null; then
    echo "setup: no C compiler found to link with; using zig's from PyPI" >&2
    "$venv/bin/pip" install --quiet ziglang >&2
    linker=$(cd "$venv" && pwd)/bin/zig-cc
    printf '#!/bin/sh\nexec "%s/python" -m ziglang cc "$@"\n' "$(dirname "$linker")" >"$linker"
    chmod +x "$linker"
    target=$(uname -m | tr a-z A-Z)_UNKNOWN_LINUX_GNU
    echo "export CARGO_TARGET_${target}_LINKER='$linker'"
fi
