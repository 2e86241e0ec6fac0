"""Which wheels a node lacks, for its Python and platform, from the project's lock; fetched or built here.

The walk starts at what pyproject.toml needs and goes on through the metadata of the wheels themselves; it stops at
what the node has in a version that will do, and at what is left out. Versions and hashes are the lock's.
"""

from __future__ import annotations

import ensurepip
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from email.parser import HeaderParser
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name, parse_wheel_filename
from packaging.version import InvalidVersion, Version

from tools.offline_bundle.parts import BundleError, sha256

# wandb needs its server, the synthesizer's corpus travels as audio.
LEFT_OUT = ("wandb", "espeakng-loader")
PIP_FOR_3_12 = Version("23.2")  # the first that runs on Python 3.12


class Target(NamedTuple):
    """What the wheels are for: Python as (3, 12), and the newest platform tag that the node's glibc allows."""

    python: tuple[int, int]
    platform: str

    @property
    def glibc(self) -> tuple[int, int]:
        return tuple(map(int, re.match(r"manylinux_(\d+)_(\d+)_", self.platform).groups()))

    @property
    def machine(self) -> str:
        return re.match(r"manylinux_\d+_\d+_(.+)", self.platform)[1]

    def platforms(self) -> list[str]:
        """All tags that the node takes, newest first: pip matches them by name, so older ones must be listed."""
        machine = self.machine
        tags = [f"manylinux_2_{minor}_{machine}" for minor in range(self.glibc[1], 4, -1)]
        old = {17: "manylinux2014", 12: "manylinux2010", 5: "manylinux1"}
        return tags + [f"{name}_{machine}" for minor, name in old.items() if minor <= self.glibc[1]]

    def markers(self) -> dict[str, str]:
        """The environment that requirement markers are judged in."""
        version = ".".join(map(str, self.python))
        return {
            "python_version": version, "python_full_version": f"{version}.0", "implementation_name": "cpython",
            "platform_python_implementation": "CPython", "implementation_version": f"{version}.0", "os_name": "posix",
            "platform_machine": self.machine, "platform_system": "Linux", "sys_platform": "linux",
            "platform_release": "", "platform_version": "",
        }


def parse_target(python: str, platform: str) -> Target:
    """Raises BundleError for what is no Python version or manylinux tag."""
    if not re.fullmatch(r"3\.\d+", python):
        raise BundleError(f"--python {python}: write it as 3.12")
    short = {"manylinux2014": "manylinux_2_17", "manylinux2010": "manylinux_2_12", "manylinux1": "manylinux_2_5"}
    name, _, machine = platform.partition("_")
    tag = f"{short[name]}_{machine}" if name in short else platform
    if not re.fullmatch(r"manylinux_2_\d+_(x86_64|aarch64)", tag):
        raise BundleError(f"--platform {platform}: write it as manylinux_2_28_x86_64 (2.28: the node's "
                          "glibc, ldd --version)")
    major, minor = python.split(".")
    return Target((int(major), int(minor)), tag)


class Has(NamedTuple):
    """What the node has: canonical name to version, None where only the name is known."""

    versions: dict[str, str | None]

    def satisfies(self, requirement: Requirement) -> bool:
        name = canonicalize_name(requirement.name)
        if name not in self.versions:
            return False
        version = self.versions[name]
        return version is None or requirement.specifier.contains(version.partition("+")[0], prereleases=True)


def read_has(items: list[str], target: Target) -> Has:
    """The node's packages from files (`pip list`, `pip freeze`, JSON, or a name a line) and comma-separated names.

    A package known by its name alone is there with its dependencies, as far as they are installed here to be asked;
    a list with versions is taken to be whole. Raises BundleError for a line that is neither.
    """
    versions: dict[str, str | None] = {}
    for item in items:
        path = Path(item)
        if path.is_file():
            for number, (name, version) in _listed(path):
                if not re.fullmatch(r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?", name):
                    raise BundleError(f"{path}:{number}: {name!r} is no package name: give the output of pip list")
                versions[canonicalize_name(name)] = version
        elif "/" in item or item.endswith((".txt", ".json")):
            raise BundleError(f"--has {item}: no such file")
        else:
            for name in filter(None, (part.strip() for part in item.split(","))):
                base, _, version = name.partition("==")
                versions[canonicalize_name(base)] = version or None
    waiting = [name for name, version in versions.items() if version is None]
    while waiting:
        for requirement in _requirements_here(waiting.pop(), target):
            name = canonicalize_name(requirement.name)
            if name not in versions:
                versions[name] = None
                waiting.append(name)
    return Has(versions)


def _listed(path: Path):
    """(line number, (name, version or None)) of a list of packages."""
    text = path.read_text()
    if text.lstrip().startswith("["):
        for entry in json.loads(text):
            yield 1, (entry["name"], entry.get("version"))
        return
    for number, line in enumerate(text.splitlines(), 1):
        words = line.split("#")[0].split("@")[0].replace("==", " ").split()
        if not words or words[0] in ("Package", "-e") or set(words[0]) == {"-"}:
            continue
        version = words[1] if len(words) > 1 else None
        try:
            Version(version or "0")
        except InvalidVersion:
            version = None
        yield number, (words[0], version)


def _requirements_here(name: str, target: Target) -> list[Requirement]:
    try:
        return applying(metadata.requires(name) or [], set(), target)
    except metadata.PackageNotFoundError:
        return []


def applying(requires: list[str], extras: set[str], target: Target) -> list[Requirement]:
    """The requirements whose markers hold on the target, with any of the extras."""
    found = []
    for text in requires:
        try:
            requirement = Requirement(text)
        except InvalidRequirement:
            continue
        environments = [{**target.markers(), "extra": extra} for extra in ("", *extras)]
        if requirement.marker is None or any(requirement.marker.evaluate(env) for env in environments):
            found.append(requirement)
    return found


def read_lock(text: str, target: Target) -> dict[str, tuple[str, list[str]]]:
    """Canonical name to (version, hashes) of what a lock's text holds for the target."""
    lock: dict[str, tuple[str, list[str]]] = {}
    for line in text.replace("\\\n", " ").splitlines():
        if not line.strip() or line.startswith("#"):
            continue
        pinned, *hashes = line.split("--hash=")
        requirement = Requirement(pinned.strip())
        if requirement.marker is None or requirement.marker.evaluate({**target.markers(), "extra": ""}):
            version = str(requirement.specifier).removeprefix("==")
            lock[canonicalize_name(requirement.name)] = (version, [item.strip() for item in hashes])
    return lock


class Resolved(NamedTuple):
    """Wheels by package name, names of those built from source here, and what the node has in a wrong version."""

    wheels: dict[str, Path]
    built: list[str]
    replaced: dict[str, str]


def resolve(roots: list[str], lock_text: str, has: Has, target: Target, folder: Path, left_out=LEFT_OUT,
            report=lambda line: None, fetch=None) -> Resolved:
    """Fetches into `folder` the wheels that `roots` need and the node lacks. What is in the folder is used again.

    `fetch(pins, target, folder)` gets wheels for {name: (version, hashes)}; by default `download`. Raises BundleError.
    """
    fetch = fetch or download
    lock = read_lock(lock_text, target)
    out = {canonicalize_name(name) for name in left_out}
    resolved = Resolved({}, [], {})
    seen: set[tuple[str, str]] = set()
    level = [requirement for requirement in applying(roots, set(), target)]
    folder.mkdir(parents=True, exist_ok=True)
    while level:
        wanted: dict[str, tuple[str, list[str]]] = {}
        asked: dict[str, set[str]] = {}
        for requirement in level:
            name = canonicalize_name(requirement.name)
            if name in out or has.satisfies(requirement):
                continue
            if has.versions.get(name):
                resolved.replaced[name] = f"{has.versions[name]}, but {requirement} is needed"
            if name == "torch":
                there = f"has {has.versions[name]}" if name in has.versions else "is said to have none"
                raise BundleError(f"torch (gigabytes) does not travel and the node {there}; needed is {requirement}: "
                                  "install it there, and name it in --has")
            if name not in lock:
                raise BundleError(f"{requirement}: not in requirements.lock: make the lock again (tools/lock.py), or "
                                  f"leave it out with --without {name}")
            asked.setdefault(name, set()).update(requirement.extras)
            if name not in resolved.wheels:
                wanted[name] = lock[name]
        if wanted:
            report(f"{len(wanted)} packages: {', '.join(sorted(wanted))}")
            found, built = fetch(wanted, target, folder)
            resolved.wheels.update(found)
            resolved.built.extend(built)
        level = []
        for name, extras in asked.items():
            key = (name, ",".join(sorted(extras)))
            if key not in seen:
                seen.add(key)
                level += applying(wheel_requires(resolved.wheels[name]), extras, target)
    return resolved


def wheel_requires(path: Path) -> list[str]:
    """The Requires-Dist lines of a wheel. Raises BundleError for a file that is none."""
    try:
        with zipfile.ZipFile(path) as wheel:
            name = next(n for n in wheel.namelist() if re.fullmatch(r"[^/]+\.dist-info/METADATA", n))
            return HeaderParser().parsestr(wheel.read(name).decode()).get_all("Requires-Dist") or []
    except (OSError, StopIteration, zipfile.BadZipFile) as error:
        raise BundleError(f"{path}: not a whole wheel ({error}): remove it and pack again") from error


def wheels_in(folder: Path, target: Target) -> dict[tuple[str, str], Path]:
    """(name, version) to file, of the wheels that the target takes."""
    python = "".join(map(str, target.python))
    tags = {"any", *target.platforms()}
    found = {}
    for path in sorted(folder.glob("*.whl")):
        name, version, _, wheel_tags = parse_wheel_filename(path.name)
        for tag in wheel_tags:
            right = tag.interpreter in (f"cp{python}", "py3", f"py{python}") or (
                tag.abi == "abi3" and int(tag.interpreter[3:] or 0) <= target.python[1])
            if right and tag.platform in tags:
                found[(name, str(version))] = path
                break
    return found


def download(pins: dict[str, tuple[str, list[str]]], target: Target, folder: Path) -> tuple[dict[str, Path], list[str]]:
    """Gets the pinned wheels by pip, hashes checked; builds those that exist as source only. Raises BundleError."""
    here = wheels_in(folder, target)
    absent = {}
    for name, (version, hashes) in pins.items():
        path = here.get((name, str(Version(version))))
        # What was built here has no hash in the lock; the source that it came from had.
        known = path and (f"sha256:{sha256(path)}" in hashes or (folder / f"{path.name}.built").exists())
        if not known:
            absent[name] = (version, hashes)
    source_only: dict[str, tuple[str, list[str]]] = {}
    while absent:
        list_path = folder / ".wanted.txt"
        list_path.write_text("".join(_pin(name, *pin) for name, pin in absent.items()))
        only = [word for tag in target.platforms() for word in ("--platform", tag)]
        # The lock has chosen by Python version already; old versions of pip would ask their own Python once more.
        done = _pip("download", "--no-deps", "--require-hashes", "--only-binary=:all:", "--ignore-requires-python",
                    "--implementation", "cp", "--python-version", ".".join(map(str, target.python)), *only,
                    "--dest", str(folder), "-r", str(list_path))
        if done.returncode == 0:
            break
        match = re.search(r"No matching distribution found for ([A-Za-z0-9._-]+?)==", done.stderr)
        name = canonicalize_name(match[1]) if match else ""
        if name not in absent:
            raise BundleError(f"pip download: {_last_error(done.stderr)}")
        source_only[name] = absent.pop(name)
    for name, pin in source_only.items():
        build(name, *pin, folder)
    here = wheels_in(folder, target)
    built = [path.name for name, (version, _) in pins.items()
              if (path := here.get((name, str(Version(version))))) and (folder / f"{path.name}.built").exists()]
    missing = [f"{name}=={pin[0]}" for name, pin in pins.items() if (name, str(Version(pin[0]))) not in here]
    if missing:
        raise BundleError(f"no wheel of {', '.join(missing)} for Python {target.python[0]}.{target.python[1]} on "
                          f"{target.platform}: is the node's glibc newer? Then give a newer --platform")
    return {name: here[(name, str(Version(pin[0])))] for name, pin in pins.items()}, built


def build(name: str, version: str, hashes: list[str], folder: Path) -> Path:
    """A wheel from a source package, hash checked. Raises BundleError where it holds code compiled for this machine."""
    list_path = folder / ".wanted.txt"
    list_path.write_text(_pin(name, version, hashes))
    with tempfile.TemporaryDirectory(dir=folder, prefix=".build-") as made_in:
        done = _pip("wheel", "--no-deps", "--no-build-isolation", "--no-binary", name, "--require-hashes",
                    "--wheel-dir", made_in, "-r", str(list_path))
        made = sorted(Path(made_in).glob("*.whl"))
        if done.returncode or not made:
            raise BundleError(f"{name}=={version} is source only and cannot be built: {_last_error(done.stderr)}")
        if not made[0].name.endswith("-none-any.whl"):
            raise BundleError(f"{name}=={version} exists as source only and holds compiled code: build its wheel on a "
                              f"machine like the node, and put it into {folder}")
        (folder / f"{made[0].name}.built").touch()
        os.replace(made[0], folder / made[0].name)
        return folder / made[0].name


def pip_wheel(folder: Path) -> Path:
    """pip's own wheel: it runs from the file on a Python that has none. The one inside this Python where it will do."""
    here = sorted(folder.glob("pip-*.whl"))
    bundled = sorted((Path(ensurepip.__file__).parent / "_bundled").glob("pip-*.whl"))
    if not here and bundled and parse_wheel_filename(bundled[-1].name)[1] >= PIP_FOR_3_12:
        shutil.copyfile(bundled[-1], folder / f".{bundled[-1].name}.part")
        os.replace(folder / f".{bundled[-1].name}.part", folder / bundled[-1].name)
        return folder / bundled[-1].name
    if not here:
        done = _pip("download", "--no-deps", "--only-binary=:all:", "--dest", str(folder), "pip")
        here = sorted(folder.glob("pip-*.whl"))
        if done.returncode or not here:
            raise BundleError(f"pip download pip: {_last_error(done.stderr)}")
    return here[-1]


def _pin(name: str, version: str, hashes: list[str]) -> str:
    return f"{name}=={version} {' '.join(f'--hash={item}' for item in hashes)}\n"


def _pip(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", *arguments]
    return subprocess.run(command, capture_output=True, text=True)


def _last_error(stderr: str) -> str:
    lines = [line for line in stderr.splitlines() if line.strip() and not line.startswith("WARNING")]
    errors = [line for line in lines if line.startswith("ERROR")]
    return (errors or lines or ["no message"])[-1].strip()[:300]
