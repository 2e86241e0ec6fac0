"""LibriSpeech and Mini LibriSpeech: download, verify, unpack.

    python -m manifests.download DEST --subsets train-clean-5 dev-clean-2

Archives come from OpenSLR (or a --mirror), are continued where they were cut off, verified by their MD5, and unpacked
to DEST/LibriSpeech/<subset>/, which appears only when it is whole, with the file `.completed` in it. A subset that is
there already is used as it is, also without that file: what a hand-made one lacks is reported. Each archive takes its
own size once more while it is unpacked, and is removed then (--keep-archives keeps it).
"""

import argparse
import contextlib
import difflib
import json
import os
import shutil
import sys
import tarfile
import tempfile
import zlib
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from manifests.archives import ARCHIVES
from manifests.fetch import CHUNK, DownloadError, Settings, bar, fetch, locked

OPENSLR = "https://www.openslr.org/resources"
COMPLETED = ".completed"


def corpus_root(dest: Path) -> Path:
    """Where the subsets are: `dest` itself where it is called LibriSpeech or holds some, else `dest`/LibriSpeech."""
    if dest.name == "LibriSpeech" or any((dest / subset).is_dir() for subset in ARCHIVES):
        return dest
    return dest / "LibriSpeech"


def archive_urls(subset: str, mirror: str | None = None) -> list[str]:
    """URLs to try for a subset: `mirror`/<subset>.tar.gz, then `mirror`/<12 or 31>/<subset>.tar.gz as at OpenSLR.

    Raises:
        DownloadError: `mirror` is not an http(s) URL.
    """
    if mirror and not mirror.startswith(("http://", "https://")):
        raise DownloadError(f"--mirror {mirror!r}: is no URL to download from: give it as https://...")
    numbered = f"{(mirror or OPENSLR).rstrip('/')}/{ARCHIVES[subset].resource}/{subset}.tar.gz"
    return [f"{mirror.rstrip('/')}/{subset}.tar.gz", numbered] if mirror else [numbered]


def check_subsets(subsets: Sequence[str]) -> list[str]:
    """The subsets without repetitions. Raises DownloadError for an unknown one, naming the nearest and all others."""
    for subset in subsets:
        if subset not in ARCHIVES:
            near = difflib.get_close_matches(subset, ARCHIVES, 1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise DownloadError(f"no archive {subset!r}: {hint}there are: {', '.join(ARCHIVES)}")
    return list(dict.fromkeys(subsets))


def count_utterances(folder: Path) -> int:
    """FLAC files in <speaker>/<chapter>/ under a subset's folder."""
    return sum(1 for path in folder.glob("*/*/*.flac") if not path.name.startswith("."))


def download_subset(
    dest: str | os.PathLike,
    subset: str,
    mirror: str | None = None,
    *,
    keep_archive: bool = False,
    settings: Settings | None = None,
) -> Path:
    """Make sure that a subset is under `dest`; returns its folder.

    Args:
        dest: folder for LibriSpeech/<subset>, or the LibriSpeech folder itself.
        subset: a key of ARCHIVES.
        mirror: base URL instead of OpenSLR's.
        keep_archive: leave <subset>.tar.gz in `dest`.
        settings: retries, progress bars and where messages go.

    Raises:
        DownloadError: unknown subset, no such URL, wrong bytes, no room, or an archive that is not what it should be.
    """
    settings = settings or Settings()
    check_subsets([subset])
    dest = Path(dest)
    root = corpus_root(dest)
    folder = root / subset
    expected = ARCHIVES[subset].utterances
    if (folder / COMPLETED).is_file():
        settings.say(f"{subset}: complete in {folder}")
        return folder
    if folder.is_dir() and (count := count_utterances(folder)):
        part = "" if count == expected else f" of {expected}, a part: remove the folder to download it whole"
        settings.say(f"{subset}: used as it is in {folder}: {count} utterances{part}")
        return folder
    archive = dest / f"{subset}.tar.gz"
    settings.say(f"{subset}: downloading to {archive}")
    # FLAC does not shrink, so that the tree takes the archive's size once more.
    fetch(archive_urls(subset, mirror), archive, ARCHIVES[subset].md5, settings, room_for=2.05)
    settings.say(f"{subset}: MD5 is right, unpacking")
    with locked(archive, "rb", settings.say):
        unpack(archive, root, subset, expected, settings)
        if not keep_archive:
            archive.unlink()
    settings.say(f"{subset}: complete in {folder}: {expected} utterances")
    return folder


def unpack(archive: Path, root: Path, subset: str, expected: int, settings: Settings) -> None:
    """Unpack a subset's archive to root/<subset>, which is not seen there before all of it is.

    Raises:
        DownloadError: a member that reaches outside, a broken archive, or another number of utterances than `expected`.
    """
    root.mkdir(parents=True, exist_ok=True)
    # What a killed run has left is of no use: a folder cannot be continued.
    for stale in root.glob(f".{subset}.unpacking.*"):
        shutil.rmtree(stale, ignore_errors=True)
    scratch = Path(tempfile.mkdtemp(dir=root, prefix=f".{subset}.unpacking."))
    try:
        extract(archive, scratch, settings.progress)
        tree = scratch / "LibriSpeech" / subset
        count = count_utterances(tree) if tree.is_dir() else 0
        if count != expected:
            message = f"{archive}: holds {count} utterances of {subset}, not {expected}: remove it and try again"
            raise DownloadError(message)
        marker = {"md5": ARCHIVES[subset].md5, "utterances": count}
        (tree / COMPLETED).write_text(json.dumps(marker) + "\n")
        for path in (scratch / "LibriSpeech").iterdir():
            # SPEAKERS.TXT and its like come with every archive; the first to come, or a longer one, stays.
            kept = root / path.name
            if path.is_file() and (not kept.exists() or path.stat().st_size > kept.stat().st_size):
                os.replace(path, kept)
        with contextlib.suppress(OSError):
            (root / subset).rmdir()  # an empty folder in the way
        os.rename(tree, root / subset)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def extract(archive: Path, into: Path, progress: bool = False) -> None:
    """Extract a .tar.gz of plain files and folders into a folder; nothing is ever written outside it.

    Links and devices are refused whole, since no corpus holds them, and so are absolute paths and "..".

    Raises:
        DownloadError: such a member, named; or a file that is no whole .tar.gz.
    """
    into = into.resolve()
    with open(archive, "rb") as raw, bar(archive.stat().st_size, f"unpack {archive.name}", progress) as shown:
        try:
            with tarfile.open(fileobj=raw, mode="r|gz", bufsize=CHUNK) as tar:
                for member in tar:
                    check_member(archive, member, into)
                    # Python's own filter as well, where this Python has it (3.10.12, 3.11.4 and later).
                    if hasattr(tarfile, "data_filter"):
                        member = tarfile.data_filter(member, str(into))
                    path = into / member.name
                    if member.isdir():
                        path.mkdir(parents=True, exist_ok=True)
                    else:
                        # Written by hand: owners, modes and times of the archive are none of this machine's.
                        path.parent.mkdir(parents=True, exist_ok=True)
                        with open(path, "wb") as file:
                            shutil.copyfileobj(tar.extractfile(member), file, CHUNK)
                    shown.update(raw.tell() - shown.n)
            shown.update(raw.tell() - shown.n)
        except (tarfile.TarError, EOFError, zlib.error, OSError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise DownloadError(f"{into}: cannot unpack {archive.name}: {error.strerror}") from error
            raise DownloadError(f"{archive}: is no whole .tar.gz ({error}): remove it and download it again") from error


def check_member(archive: Path, member: tarfile.TarInfo, into: Path) -> None:
    """Refuse, by DownloadError, a member that is no plain file or folder strictly inside `into` (an absolute path)."""
    path = PurePosixPath(member.name)
    kind = "" if member.isreg() or member.isdir() else "a link" if member.issym() or member.islnk() else "a device"
    if kind:
        raise DownloadError(f"{archive}: member {member.name!r} is {kind}, not a file: do not use this archive")
    if path.is_absolute() or ".." in path.parts or "\0" in member.name or "\\" in member.name:
        raise DownloadError(f"{archive}: member {member.name!r} leads outside the target: do not use this archive")
    # Nothing extracted here can be a link, so this holds whatever stands above; it costs little to look.
    if not (into / path).resolve().is_relative_to(into):
        raise DownloadError(f"{archive}: member {member.name!r} leads outside {into}: do not use this archive")


def main(argv: Sequence[str] | None = None) -> int:
    known = "\n".join(f"  {name:16} {archive.utterances:7} utterances" for name, archive in ARCHIVES.items())
    parser = argparse.ArgumentParser(
        prog="python -m manifests.download",
        description=f"{__doc__}\nsubsets:\n{known}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("dest", metavar="DEST", type=Path, help="folder for LibriSpeech/<subset>")
    parser.add_argument("--subsets", metavar="SUBSET", nargs="+", required=True, help="which archives")
    parser.add_argument("--mirror", metavar="URL", help=f"base URL with <subset>.tar.gz (default {OPENSLR}/<12 or 31>)")
    parser.add_argument("--keep-archives", action="store_true", help="leave the archives in DEST")
    args = parser.parse_args(argv)
    settings = Settings(say=lambda line: print(line, file=sys.stderr, flush=True))
    try:
        for subset in check_subsets(args.subsets):
            download_subset(args.dest, subset, args.mirror, keep_archive=args.keep_archives, settings=settings)
    except (DownloadError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted: the same command goes on from here", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
