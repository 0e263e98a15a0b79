#!/bin/sh
# Makes the local Python environment. Usage: setup/venv.sh DIRECTORY
#
# Wants Python 3.11 or later. Debian splits pip out of Python (python3-venv); where that part is missing, uv or a pip that
# is already there does instead, root on Debian installs the package, and anybody else is told what to type.
set -eu
venv=$1

python=
for candidate in ${PYTHON:-python3 python3.14 python3.13 python3.12 python3.11}; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
        python=$candidate
        break
    fi
done
if [ -z "$python" ]; then
    echo "setup: needs Python 3.11 or later; found: $(python3 --version 2>&1 || true)" >&2
    echo "       Install one (Debian 12: apt install python3 python3-venv) and say where: make PYTHON=/path/to/python3.12" >&2
    exit 1
fi

has_ensurepip() { "$python" -c 'import ensurepip, venv' 2>/dev/null; }
if ! has_ensurepip && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null && ! command -v uv >/dev/null; then
    version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
    echo "setup: this Python cannot make environments; installing python$version-venv"
    apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends "python$version-venv" >/dev/null
fi
if has_ensurepip; then
    "$python" -m venv "$venv"
elif command -v uv >/dev/null; then
    uv venv --quiet --seed --python "$python" "$venv"
elif "$python" -c 'import pip, venv' 2>/dev/null; then
    "$python" -m venv --without-pip "$venv"
    "$python" -m pip --python "$venv/bin/python" install --quiet pip
else
    echo "setup: $python cannot make environments: its module ensurepip is missing" >&2
    echo "       Debian and Ubuntu: sudo apt install python3-venv     then run make again" >&2
    exit 1
fi
