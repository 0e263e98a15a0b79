"""The lab's Debian packages: chosen and downloaded by apt with an index of its own, unpacked without being installed.

Nothing of this needs root or changes the host. apt gets the host's archives from its configuration, but keeps its
lists, its downloads and its idea of what is installed (nothing) in the cache directory, so that packages come with all
that they depend on. Debian 12 has a QEMU without igb and a kernel whose virtio-pci is a module: there the packages come
from its backports.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

CODENAMES_WITH_BACKPORTS = ("bookworm",)
COMPONENTS = ("main", "universe")
KEYRINGS = ("/usr/share/keyrings/debian-archive-keyring.gpg", "/usr/share/keyrings/ubuntu-archive-keyring.gpg")


class LabError(Exception):
    """The lab cannot be made or run here; the message says what to do."""


def codename() -> str:
    """The name of the distribution's release, "bookworm". Raises LabError where there is no apt."""
    if shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
        raise LabError(
            "the lab is made of Debian or Ubuntu packages, and there is no apt-get and dpkg-deb here to get them with: "
            "run it on such a system or in a container of it"
        )
    return platform.freedesktop_os_release().get("VERSION_CODENAME", "")


class Packages:
    """apt with a configuration of its own in `directory`, which also keeps what was downloaded."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._environment = {**os.environ, "APT_CONFIG": str(directory / "apt.conf"), "LC_ALL": "C"}

    def download(self, names: Sequence[str]) -> list[Path]:
        """Files of the packages and of all that they depend on. Raises LabError with apt's words."""
        self._configure()
        self._apt("apt-get", "update", "-qq")
        # What is there already is not listed, so the list is asked for where there is nothing.
        nothing = f"Dir::Cache::archives={self._directory / 'nothing'}"
        listed = self._apt("apt-get", "install", "-qq", "--print-uris", "-o", nothing, *names)
        wanted = {line.split()[1] for line in listed.splitlines() if line.startswith("'")}
        self._apt("apt-get", "install", "-qq", "--yes", "--download-only", *names)
        archives = self._directory / "archives"
        for package in archives.glob("*.deb"):
            if package.name not in wanted:
                package.unlink()
        return [archives / name for name in sorted(wanted)]

    def download_one(self, name: str, release: str) -> Path:
        """The file of one package as a release has it, without what it depends on. Raises LabError with apt's words."""
        directory = self._directory / "alone"
        directory.mkdir(exist_ok=True)
        for package in directory.iterdir():
            package.unlink()
        self._apt("apt-get", "download", "-qq", f"{name}/{release}", directory=directory)
        return next(directory.iterdir())

    def _configure(self) -> None:
        for below in ("lists/partial", "archives/partial", "nothing/partial"):
            (self._directory / below).mkdir(parents=True, exist_ok=True)
        (self._directory / "status").touch()
        (self._directory / "sources.list").write_text("".join(f"{line}\n" for line in _sources()))
        settings = {
            "Dir::State": self._directory,
            "Dir::State::lists": self._directory / "lists",
            "Dir::State::status": self._directory / "status",
            "Dir::Cache": self._directory,
            "Dir::Cache::archives": self._directory / "archives",
            "Dir::Etc::SourceList": self._directory / "sources.list",
            "Dir::Etc::SourceParts": "/dev/null",
            "Dir::Etc::Preferences": "/dev/null",
            "Dir::Etc::PreferencesParts": "/dev/null",
            "APT::Sandbox::User": "",
            "APT::Install-Recommends": "false",
            "APT::Update::Post-Invoke-Success": "",
            "Acquire::Languages": "none",
        }
        if codename() in CODENAMES_WITH_BACKPORTS:
            settings["APT::Default-Release"] = f"{codename()}-backports"
        text = "".join(f'{name} "{value}";\n' for name, value in settings.items())
        (self._directory / "apt.conf").write_text(text)

    def _apt(self, *command: str, directory: Path | None = None) -> str:
        done = subprocess.run(command, env=self._environment, capture_output=True, text=True, cwd=directory)
        if done.returncode:
            raise LabError(f"{' '.join(command)} left with status {done.returncode}:\n{done.stderr.strip()}")
        return done.stdout


def _sources() -> list[str]:
    """Lines of a sources.list: the host's archives of its own release, and the backports where they are needed."""
    release = codename()
    wanted = {release, *(f"{release}-{suffix}" for suffix in ("updates", "security"))}
    listed = subprocess.run(
        ["apt-get", "indextargets", "--format", "$(REPO_URI) $(RELEASE) $(COMPONENT)", "Created-By: Packages"],
        capture_output=True,
        text=True,
    )
    targets = {tuple(line.split()) for line in listed.stdout.splitlines() if len(line.split()) == 3}
    archives = sorted(target for target in targets if target[1] in wanted and target[2] in COMPONENTS)
    if release in CODENAMES_WITH_BACKPORTS:
        archives += [(uri, f"{release}-backports", part) for uri, suite, part in archives if suite == release]
    if not any(suite == release for _, suite, _ in archives):
        raise LabError(f"apt has no archive of {release or 'this release'}, main: see /etc/apt/sources.list.d")
    keyring = next((path for path in KEYRINGS if Path(path).exists()), None)
    options = f"[signed-by={keyring}] " if keyring else ""
    return [f"deb {options}{uri} {suite} {part}" for uri, suite, part in archives]
