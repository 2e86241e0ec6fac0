"""On the node: unpack what was carried in, and make an environment of what the node has and the wheels. No network.

Standard library only: this runs from inside the first part, before anything is installed.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import signal
import site
import subprocess
import sys
import tarfile
import time
import venv
from importlib import metadata
from pathlib import Path

from manifests.schema import write_atomic
from tools.offline_bundle.parts import STATE, BundleError, read_index, show_size, unpack

EXIT_WAITING = 3  # parts are still missing
EXIT_DOUBTS = 4  # the check worked, but packages are missing or in another version than they should be
INSTALLED = ".installed"  # in the environment: what was installed into it


def say(line: str) -> None:
    print(line, flush=True)


def list_packages() -> str:
    """name==version of everything this Python has, one a line: what `pack --has` reads."""
    found: dict[str, str] = {}
    for distribution in metadata.distributions():
        if name := distribution.metadata["Name"]:
            found.setdefault(name.lower().replace("_", "-"), distribution.version)
    return "\n".join(f"{name}=={version}" for name, version in sorted(found.items()))


def run_unpack(folders: list[Path], dest: Path) -> int:
    """Unpacks what has arrived; 0 when the bundle is whole, EXIT_WAITING when parts are missing, 1 for damaged ones."""
    known = dest / STATE / "incoming"
    index = read_index([*folders, known] if not any(any(folder.glob("*.json")) for folder in folders) else folders)
    write_atomic(known / f"{index['stem']}.json", (json.dumps(index) + "\n").encode())
    for other in known.glob("*.json"):
        if other.name != f"{index['stem']}.json":
            other.unlink()
    begin = time.monotonic()
    before = _state(dest)
    result = unpack(index, folders, dest, report=say)
    for message in result.damaged:
        print(f"unpack: {message}", file=sys.stderr)
    if result.missing:
        say(f"{len(result.before) + len(result.now)} of {len(index['parts'])} parts are unpacked in {dest}; "
            f"bring: {', '.join(result.missing)}")
    if not result.complete:
        return 1 if result.damaged else EXIT_WAITING
    _drop_old_wheels(dest, index)
    expand_project(dest)
    # What an earlier bundle brought and this one does not is still there: wheels under new code, other corpora.
    kept = {"corpora": {**before.get("corpora", {}), **index.get("corpora", {})}}
    if index.get("wheels") is None and before.get("wheels") is not None:
        kept |= {key: before[key] for key in ("wheels", "python", "platform", "glibc")}
    write_atomic(dest / STATE / "index.json", (json.dumps(index | kept, indent=1) + "\n").encode())
    total = show_size(sum(part["bytes"] for part in index["parts"]))
    say(f"{dest}: complete, {len(index['parts'])} parts, {total}, in {time.monotonic() - begin:.0f} s")
    return 0


def _drop_old_wheels(dest: Path, index: dict) -> None:
    """Wheels of an earlier bundle in another version would stand in the new ones' way."""
    if index.get("wheels") is not None:
        for path in (dest / "wheels").glob("*.whl"):
            if path.name not in index["wheels"]:
                path.unlink()


def expand_project(dest: Path) -> None:
    """DEST/project from project.tar.gz, replaced as a whole where it was another one."""
    archive, project = dest / "project.tar.gz", dest / "project"
    if not archive.is_file():  # a bundle of results
        return
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    stamp = dest / STATE / "project"
    if project.is_dir() and stamp.is_file() and stamp.read_text() == digest:
        return
    fresh, old = dest / ".project.part", dest / ".project.old"
    for path in (fresh, old):
        shutil.rmtree(path, ignore_errors=True)
    with tarfile.open(archive) as tar:
        # Pythons before 3.11.4 know no filters; the archive's checksum is the packer's.
        tar.extractall(fresh, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    if project.is_dir():
        os.replace(project, old)
    os.replace(fresh, project)
    write_atomic(stamp, digest.encode())
    shutil.rmtree(old, ignore_errors=True)


def _state(dest: Path) -> dict:
    try:
        return json.loads((dest / STATE / "index.json").read_text())
    except (OSError, ValueError):
        return {}


def installed_index(dest: Path) -> dict:
    """The index of the bundle that is unpacked in `dest`. Raises BundleError where it is not complete."""
    if not (index := _state(dest)):
        raise BundleError(f"{dest}: no complete bundle there: run unpack --to {dest} first")
    return index


def python_of(dest: Path) -> Path:
    return dest / "venv" / "bin" / "python"


def install(dest: Path, check: bool = True, check_arguments: list[str] | None = None) -> int:
    """Makes DEST/venv over the packages of the Python that runs this; then the self-check. Returns its exit status.

    Raises BundleError for a Python, processor or glibc that the wheels are not for, and where pip fails.
    """
    index = installed_index(dest)
    fits_here(index)
    wheels = sorted((dest / "wheels").glob("*.whl"))
    key = hashlib.sha256("\n".join([sys.executable, sys.version, *(path.name for path in wheels)]).encode()).hexdigest()
    stamp = dest / "venv" / INSTALLED
    if stamp.is_file() and stamp.read_text() == key:
        say(f"{dest / 'venv'}: {len(wheels)} wheels, installed before")
    else:
        begin = time.monotonic()
        make_environment(dest, wheels)
        write_atomic(stamp, key.encode())
        say(f"{dest / 'venv'}: {len(wheels)} wheels installed over {sys.prefix}, no index, "
            f"in {time.monotonic() - begin:.0f} s")
    if not check:
        return 0
    return run_program(dest, ["tools.offline_bundle.check", "--dir", str(dest), *(check_arguments or [])])


def fits_here(index: dict) -> None:
    """Raises BundleError where this Python, its processor or its glibc is not what the wheels were chosen for."""
    here = f"{sys.version_info[0]}.{sys.version_info[1]}"
    if index.get("wheels") is not None and here != index["python"]:
        raise BundleError(f"this is Python {here} ({sys.executable}), the wheels are for {index['python']}: run it "
                          f"with python{index['python']}, or pack with --python {here}")
    machine = index["platform"].partition("_")[2].split("_", 2)[-1]
    if platform.machine() != machine:
        raise BundleError(f"this machine is {platform.machine()}, the wheels are for {machine}: pack with --platform "
                          f"manylinux_..._{platform.machine()}")
    name, version = platform.libc_ver()
    if name == "glibc" and tuple(map(int, version.split(".")[:2])) < tuple(index["glibc"]):
        have = version.replace(".", "_")
        need = ".".join(map(str, index["glibc"]))
        raise BundleError(f"this machine has glibc {version}, the wheels may need {need}: "
                          f"pack with --platform manylinux_{have}_{machine}")


def make_environment(dest: Path, wheels: list[Path]) -> None:
    """An environment that sees the running Python's packages behind its own. Raises BundleError."""
    folder = dest / "venv"
    venv.EnvBuilder(system_site_packages=True, clear=True, symlinks=True, with_pip=False).create(folder)
    own = folder / "lib" / f"python{sys.version_info[0]}.{sys.version_info[1]}" / "site-packages"
    if sys.prefix != sys.base_prefix:
        # Python is in an environment itself (as a cluster's module often is): ours would see only that one's base.
        lines = [f"import site; site.addsitedir({path!r})" for path in site.getsitepackages()]
        (own / "packages_of_the_node.pth").write_text("\n".join(lines) + "\n")
    pip = [path for path in wheels if path.name.startswith("pip-")]
    if not pip:
        raise BundleError(f"{dest / 'wheels'}: no wheel of pip: unpack a bundle packed without --no-wheels first")
    # Nothing of the machine's pip configuration may bring an index back.
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PIP_")}
    command = [str(python_of(dest)), str(pip[-1] / "pip"), "--isolated", "--disable-pip-version-check", "install", "-q",
               "--no-index", "--no-deps", "--no-compile", *map(str, wheels)]
    done = subprocess.run(command, capture_output=True, text=True, env={**clean, "PIP_CONFIG_FILE": os.devnull})
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        raise BundleError(f"pip: {lines[-1].strip() if lines else 'failed without a message'}")


def run_program(dest: Path, module: list[str]) -> int:
    """Runs `python -m MODULE ARGS` of the environment in DEST/project, hands SIGTERM on to it, returns its exit status.

    Raises BundleError where nothing is installed.
    """
    if not (dest / "venv" / INSTALLED).is_file():
        raise BundleError(f"{dest / 'venv'}: not installed: run install --dir {dest} first")
    process = subprocess.Popen([str(python_of(dest)), "-m", *module], cwd=dest / "project")
    before = signal.signal(signal.SIGTERM, lambda *_: process.send_signal(signal.SIGTERM))
    try:
        while True:
            try:
                return process.wait()
            except KeyboardInterrupt:  # the terminal sends it to the program as well, which ends by itself
                continue
    finally:
        signal.signal(signal.SIGTERM, before)
