#!/bin/sh
# Chooses the clippy and rustfmt that judge the sources, and writes how to reach them. Usage: setup/lint_toolchain.sh > VENV/lint.env
#
# Each release of Rust finds new things to say, so one release decides for everybody; rustup gets it where it is missing.
# Without rustup, what there is has to do.
set -eu
version=1.95.0

judges() { cargo "$@" clippy --version && cargo "$@" fmt --version; } >/dev/null 2>&1

if command -v rustup >/dev/null; then
    if ! judges "+$version"; then
        echo "setup: getting the clippy and rustfmt of Rust $version" >&2
        rustup toolchain install "$version" --profile minimal --component clippy --component rustfmt >&2 || true
    fi
    if judges "+$version"; then
        echo "export RUSTUP_TOOLCHAIN=$version"
        exit 0
    fi
fi
if ! judges; then
    echo "setup: no clippy and rustfmt found; install them: rustup component add clippy rustfmt" >&2
    exit 1
fi
echo "setup: linting with $(cargo --version) instead of $version, which may find other things" >&2
