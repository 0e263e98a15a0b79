#!/bin/sh
# Sees to it that the Debian packages the tests need are there. Usage: setup/debian_packages.sh
#
# Root: installs what is missing. Anybody else: says what is missing and the command that installs it. The services that
# come with the packages (Open vSwitch) are not started: the tests run their own, on their own sockets.
set -eu

# What for: real guests (a kernel for them is downloaded by the tests, not installed) | peers | their tools and headers
# | counting instructions | ACPI tables
packages="
    qemu-system-x86 qemu-utils busybox-static cpio kmod xz-utils zstd
    dpdk-dev openvswitch-switch-dpdk
    libdpdk-dev gcc g++ libc6-dev pkg-config iproute2 iputils-ping procps tshark gdb
    valgrind acpica-tools
"

missing=
for package in $packages; do
    case $(dpkg-query --show --showformat='${db:Status-Status}' "$package" 2>/dev/null || true) in
        installed) ;;
        *) missing="$missing $package" ;;
    esac
done
[ -n "$missing" ] || exit 0

if ! command -v apt-get >/dev/null; then
    echo "setup: the tests need the Debian packages:$missing" >&2
    echo "       This is no Debian; install what corresponds to them, or run only: make lint unit" >&2
    exit 1
fi
if [ "$(id -u)" != 0 ]; then
    echo "setup: these packages are missing:$missing" >&2
    echo "       Install them:  sudo apt update && sudo apt install --no-install-recommends$missing" >&2
    echo "       or run only what needs none of them:  make lint unit" >&2
    exit 1
fi

echo "setup: installing$missing"
policy=/usr/sbin/policy-rc.d
if [ ! -e $policy ]; then
    trap 'rm -f $policy' EXIT
    printf '#!/bin/sh\nexit 101\n' >$policy # invoke-rc.d(8): 101 forbids the action
    chmod +x $policy
fi
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq
# The names are words: $missing is split on purpose.
# shellcheck disable=SC2086
apt-get install -qq -y --no-install-recommends $missing >/dev/null
