"""Packs project, wheels and corpora into parts for a node without a network."""

from __future__ import annotations

import gzip
import io
import re
import subprocess
import tarfile
from argparse import Namespace
from pathlib import Path
from typing import NamedTuple

from tools.offline_bundle import corpora
from tools.offline_bundle.parts import BundleError, PartWriter, parse_size, show_size

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent.parent
STEM = "bundle"
# What runs on the node before anything is installed, from inside the first part. The modules that it really loads
# (__main__, node, parts, collect and manifests.schema with what that imports) need the standard library only.
ON_NODE = re.compile(r"manifests/\w+\.py|tools/__init__\.py|tools/offline_bundle/\w+\.py")
NEEDS = ("pyproject.toml", "requirements.lock")
MAIN = "import sys\n\nfrom tools.offline_bundle.__main__ import main\n\nsys.exit(main())\n"


class Project(NamedTuple):
    """The tracked files at a commit as tar.gz, some of them by name, and how many files differ from it here."""

    archive: bytes
    on_node: dict[str, bytes]
    needs: dict[str, str]
    commit: str
    changed: int


def read_project(root: Path, rev: str = "HEAD") -> Project:
    """What of the project travels. Raises BundleError where git cannot say."""
    def git(*arguments: str) -> bytes:
        done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True)
        if done.returncode:
            message = done.stderr.decode(errors="replace").strip().splitlines()
            raise BundleError(f"git {arguments[0]} in {root}: {message[0] if message else 'failed'}")
        return done.stdout

    commit = git("rev-parse", "--short=12", f"{rev}^{{commit}}").decode().strip()
    changed = git("status", "--porcelain", "--untracked-files=no").splitlines() if rev == "HEAD" else []
    archive, packed = git("archive", "--format=tar", rev), io.BytesIO()
    with gzip.GzipFile(fileobj=packed, mode="wb", mtime=0) as file:  # the same commit is the same part
        file.write(archive)
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        names = [name for name in tar.getnames() if name in NEEDS or ON_NODE.fullmatch(name)]
        read = {name: tar.extractfile(name).read() for name in names}
    if absent := [name for name in NEEDS if name not in read]:
        raise BundleError(f"{root} at {commit}: no {absent[0]}: what runs there cannot be told")
    needs = {name: read.pop(name).decode() for name in NEEDS}
    return Project(packed.getvalue(), read, needs, commit, len(changed))


def requirements(pyproject: str) -> list[str]:
    """What a pyproject.toml needs to run, any version of torch: the node's own is used."""
    listed = tomllib.loads(pyproject)["project"]["dependencies"]
    return ["torch" if item.split("=")[0].strip() == "torch" else item for item in listed]


def choose_audio(kind: str, sizes: int, limit: int) -> tuple[str, str]:
    """("flac" or "opus", why)."""
    if kind != "auto":
        return kind, "as asked"
    if sizes <= limit:
        return "flac", f"the audio takes {show_size(sizes)}, within --max-audio {show_size(limit)}"
    return "opus", f"the audio takes {show_size(sizes)} as it is, over --max-audio {show_size(limit)}"


def pack(args: Namespace, root: Path = ROOT, fetch=None) -> dict:
    """Packs by the options of `pack`; prints what is packed and how much it takes; returns the index.

    `fetch` replaces the download of wheels (see wheels.resolve). Raises BundleError and ManifestError.
    """
    from tools.offline_bundle import wheels as wheel

    part_size, work = parse_size(args.part_size), args.work.expanduser()
    target = wheel.parse_target(args.python, args.platform)
    wanted = corpora.parse_corpora(args.corpus)
    project = read_project(root, args.rev)
    say(f"project    {show_size(len(project.archive))}, commit {project.commit}")
    if project.changed:
        say(f"           note: {project.changed} tracked files differ from the commit; what is packed is the commit")
    packages: list[Path] | None = None
    roots = requirements(project.needs["pyproject.toml"])
    replaced: dict[str, str] = {}
    left_out = [*wheel.LEFT_OUT, *args.without]
    if not args.no_wheels:
        has = wheel.read_has(args.has, target)
        folder = work / "wheels" / f"{args.python}-{target.platform}"
        resolved = wheel.resolve(roots, project.needs["requirements.lock"], has, target, folder, left_out,
                                 report=lambda line: say(f"           {line}"), fetch=fetch or wheel.download)
        packages = sorted([*resolved.wheels.values(), wheel.pip_wheel(folder)])
        replaced = resolved.replaced
        total = sum(path.stat().st_size for path in packages)
        say(f"wheels     {show_size(total)}, {len(packages)} files for Python {args.python}, {target.platform}; "
            f"left out: {', '.join(left_out)}; built from source: {', '.join(resolved.built) or 'none'}")
        for path in sorted(packages, key=lambda path: -path.stat().st_size)[:5]:
            say(f"           {show_size(path.stat().st_size):>9}  {path.name}")
        for name, why in replaced.items():
            say(f"           {name}: the node has {why}: packed, it stands before the node's own")
    read = [corpora.read_corpus(name, folder, work / "built") for name, folder in wanted.items()]
    kind, why = choose_audio(args.audio, sum(corpus.bytes for corpus in read), parse_size(args.max_audio))

    writer = PartWriter(args.out, STEM, part_size, runnable=True)
    writer.add("__main__.py", MAIN.encode())
    for name, data in project.on_node.items():
        writer.add(name, data)
    writer.add("project.tar.gz", project.archive)
    for path in packages or []:
        writer.add(f"wheels/{path.name}", path)
    summary = {}
    for corpus in read:
        writer.new_part()
        size = 0
        for name, path in corpora.files(corpus, kind, args.opus_kbits, work, args.jobs):
            size += path.stat().st_size
            writer.add(name, path)
        hours = corpus.seconds / 3600
        utterances = {split: len(rows) for split, rows in corpus.splits.items()}
        summary[corpus.name] = {"audio": kind, "hours": round(hours, 3), "bytes": size, "utterances": utterances}
        say(f"{corpus.name:<10} {show_size(size)}, {hours:.2f} h as {kind} ({why}): "
            + ", ".join(f"{split} {count}" for split, count in utterances.items()))
    index = writer.finish(
        commit=project.commit, python=args.python, platform=target.platform, glibc=list(target.glibc), corpora=summary,
        wheels=None if packages is None else [path.name for path in packages],
        requires=roots, left_out=left_out,
    )
    for part in index["parts"]:
        say(f"{part['name']}  {show_size(part['bytes']):>9}  {part['files']:>5} files  sha256 {part['sha256'][:16]}...")
    total = sum(part["bytes"] for part in index["parts"])
    say(f"{args.out}: {len(index['parts'])} parts, {show_size(total)}, and {STEM}.json. On the node:")
    first = index["parts"][0]["name"]
    say(f"  python3 {first} unpack --to DIR && python3 {first} install --dir DIR")
    return index


def say(line: str) -> None:
    print(line, flush=True)

