"""One file by HTTP: resumed where a connection was cut, verified by its MD5, in place under its name only when whole.

While it is on its way a file is FILE.part, with FILE.part.json beside it that remembers what the server said the file
is (length, ETag or date): a part is continued only where the server still has the same.
"""

import contextlib
import email.utils
import fcntl
import hashlib
import http.client
import json
import os
import shutil
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from tqdm import tqdm

from manifests.schema import write_atomic

CHUNK = 1 << 20
TIMEOUT = 60  # seconds without a byte
TRANSIENT = {408, 425, 429, 500, 502, 503, 504}


class DownloadError(RuntimeError):
    """A download that cannot go on; the message is one line with the URL or file, what happened and what to do."""


class _Retry(Exception):
    """A try that failed in a way that another may not; `wait` is what the server asked for, in seconds."""

    def __init__(self, reason: str, wait: float = 0.0):
        super().__init__(reason)
        self.wait = wait


class _NotFound(Exception):
    """404 or 410: the next URL may have it."""


@dataclass
class Settings:
    """How patient a download is, and who is told. `retries` counts tries in a row that brought no byte."""

    retries: int = 6
    backoff: float = 1.0  # seconds before the first retry, doubled for each further one
    longest_wait: float = 60.0
    timeout: float = TIMEOUT
    progress: bool = True
    say: Callable[[str], None] = print
    sleep: Callable[[float], None] = time.sleep


def bar(total: int | None, description: str, progress: bool, initial: int = 0) -> tqdm:
    """A bar over bytes on standard error; in a log file it writes a line every ten seconds only."""
    interval = 0.1 if os.isatty(2) else 10
    return tqdm(
        total=total,
        initial=initial,
        desc=description,
        unit="B",
        unit_scale=True,
        unit_divisor=1024,
        disable=not progress,
        mininterval=interval,
        maxinterval=max(interval, 10),
    )


def file_md5(path: Path, progress: bool = False) -> str:
    """MD5 of a file, as 32 hexadecimal digits."""
    # Not for security: it is what OpenSLR publishes. The flag is for machines that run in FIPS mode.
    digest = hashlib.md5(usedforsecurity=False)
    with open(path, "rb") as file, bar(path.stat().st_size, f"md5 {path.name}", progress) as shown:
        while data := file.read(CHUNK):
            digest.update(data)
            shown.update(len(data))
    return digest.hexdigest()


def fetch(
    urls: Sequence[str], target: Path, md5: str, settings: Settings | None = None, room_for: float = 1.0
) -> Path:
    """Download the first of `urls` that is there to `target`; an existing `target` with the right MD5 is kept.

    Args:
        urls: tried in order; only a 404 or 410 leads to the next.
        target: the file to make. Safe to interrupt at any moment and to call again.
        md5: 32 hexadecimal digits.
        room_for: how many times its length must be free on the disk (to unpack it too, say).

    Raises:
        DownloadError: not there, refused, no room, cut off again and again, or wrong bytes twice.
    """
    settings = settings or Settings()
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f"{target.name}.part")
    if target.exists():
        if file_md5(target, settings.progress) == md5:
            return target
        raise DownloadError(f"{target}: its MD5 is not {md5}: remove it, and run this again to download it")
    with locked(part, "a+b", settings.say) as file:
        for attempt in (1, 2):
            _fetch_first(urls, part, file, settings, room_for)
            file.flush()
            found = file_md5(part, settings.progress)
            if found == md5:
                os.fsync(file.fileno())
                os.replace(part, target)
                _state_path(part).unlink(missing_ok=True)
                return target
            # What is wrong cannot be told from what is right: all of it goes.
            file.seek(0)
            file.truncate()
            _state_path(part).unlink(missing_ok=True)
            if attempt == 1:
                settings.say(f"{target.name}: MD5 is {found}, not {md5}: downloading it once more")
    raise DownloadError(f"{urls[0]}: MD5 is {found}, not {md5}, twice: try another --mirror")


@contextlib.contextmanager
def locked(path: Path, mode: str, say: Callable[[str], None] = print) -> Iterator[BinaryIO]:
    """A file, open and with a lock that ends with the process that holds it; one left empty is removed.

    `say` is told where the file system has no locks: two processes would write into one file there, and what they make
    would look like a broken download.

    Raises:
        DownloadError: another process holds the lock.
    """
    with open(path, mode) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise DownloadError(f"{path}: another process is at work on it: wait for it to end") from error
        except OSError as error:
            say(f"{path}: cannot be locked ({error.strerror or error}): let no other process download to this folder")
        try:
            yield file
        finally:
            with contextlib.suppress(FileNotFoundError):
                if path.stat().st_size == 0:
                    path.unlink()


def _state_path(part: Path) -> Path:
    return part.with_name(f"{part.name}.json")


def _read_state(part: Path) -> dict:
    try:
        state = json.loads(_state_path(part).read_text())
    except (OSError, ValueError):
        return {}
    return state if isinstance(state, dict) and isinstance(state.get("length"), int) else {}


def _fetch_first(urls: Sequence[str], part: Path, file: BinaryIO, settings: Settings, room_for: float) -> None:
    for url in urls:
        with contextlib.suppress(_NotFound):
            return _fetch_patiently(url, part, file, settings, room_for)
    raise DownloadError(f"{' and '.join(urls)}: not there (HTTP 404): check the name and --mirror")


def _fetch_patiently(url: str, part: Path, file: BinaryIO, settings: Settings, room_for: float) -> None:
    """Fill the part from `url`, trying again after what may pass. Raises _NotFound, DownloadError."""
    failures = 0
    while True:
        before = file.seek(0, os.SEEK_END)
        try:
            return _fetch_once(url, part, file, settings, room_for)
        except _Retry as problem:
            # Only tries that bring nothing count: a line that drops every minute still gets there.
            failures = failures + 1 if file.seek(0, os.SEEK_END) <= before else 1
            if failures > settings.retries:
                message = f"{url}: {problem}, {failures} times in a row: run it again later to go on"
                raise DownloadError(message) from problem
            wait = min(max(settings.backoff * 2 ** (failures - 1), problem.wait), settings.longest_wait)
            settings.say(f"{url}: {problem}: trying again in {wait:.0f} s")
            settings.sleep(wait)


def _fetch_once(url: str, part: Path, file: BinaryIO, settings: Settings, room_for: float) -> None:
    have = file.seek(0, os.SEEK_END)
    state = _read_state(part)
    if have and not 0 < have <= state.get("length", 0):
        have = _start_over(part, file)
    if have and have == state["length"]:
        return
    headers = {"User-Agent": "nemo-ctc-recipes", "Accept-Encoding": "identity"}
    if have:
        headers["Range"] = f"bytes={have}-"
        # A weak ETag must not be used here (RFC 9110, 13.1.5).
        if validator := state.get("validator"):
            headers["If-Range"] = validator
    try:
        request = urllib.request.Request(url, headers=headers)
        with urllib.request.urlopen(request, timeout=settings.timeout) as response:
            _receive(url, response, part, file, have, state, settings, room_for)
    except urllib.error.HTTPError as error:
        _judge_status(url, error, part, file, have)
    except ssl.SSLCertVerificationError as error:
        raise DownloadError(f"{url}: {error.verify_message}: check the machine's certificates and clock") from error
    except urllib.error.URLError as error:
        if isinstance(error.reason, ssl.SSLCertVerificationError):
            message = f"{url}: {error.reason.verify_message}: check the machine's certificates and clock"
            raise DownloadError(message) from error
        raise _Retry(f"no connection ({error.reason})") from error
    except http.client.InvalidURL as error:
        raise DownloadError(f"{url}: is no URL ({error}): give --mirror as https://...") from error
    except (http.client.HTTPException, ConnectionError, TimeoutError, ssl.SSLError) as error:
        raise _Retry(f"connection cut ({type(error).__name__})") from error


def _judge_status(url: str, error: urllib.error.HTTPError, part: Path, file: BinaryIO, have: int) -> None:
    if error.code in (404, 410):
        raise _NotFound from error
    if error.code == 416 and have:
        # The part is longer than the file is now: it is of another file.
        _start_over(part, file)
        raise _Retry("the server's file is shorter than the part of it here, so it starts anew") from error
    if error.code in TRANSIENT:
        raise _Retry(f"HTTP {error.code}", _retry_after(error.headers.get("Retry-After"))) from error
    raise DownloadError(f"{url}: HTTP {error.code} {error.reason}: check the URL and --mirror") from error


def _retry_after(value: str | None) -> float:
    """Seconds asked for by a Retry-After header, which is a number or a date; 0 for none."""
    if not value:
        return 0.0
    if value.strip().isdigit():
        return float(value)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except ValueError:
        return 0.0


def _start_over(part: Path, file: BinaryIO) -> int:
    file.seek(0)
    file.truncate()
    _state_path(part).unlink(missing_ok=True)
    return 0


def _receive(
    url: str,
    response: http.client.HTTPResponse,
    part: Path,
    file: BinaryIO,
    have: int,
    state: dict,
    settings: Settings,
    room_for: float,
) -> None:
    """Append a response's body to the part, after looking whether it is the continuation asked for."""
    length = response.headers.get("Content-Length")
    total = int(length) if length and length.isdigit() else None
    if response.status == 206 and have:
        first, whole = _content_range(response.headers.get("Content-Range"))
        if first != have or whole != state["length"]:
            _start_over(part, file)
            raise _Retry(f"the server answered with another range ({response.headers.get('Content-Range')})")
        total = whole
    elif response.status == 200:
        # The whole file: the server ignores ranges, or has another file by now.
        if have:
            settings.say(f"{url}: the server sends it from its start: {have} bytes here are dropped")
        have = _start_over(part, file)
        validator = response.headers.get("ETag") or ""
        if not validator or validator.startswith("W/"):
            validator = response.headers.get("Last-Modified") or ""
        if total is not None:
            write_atomic(_state_path(part), json.dumps({"length": total, "validator": validator, "url": url}).encode())
    else:
        raise DownloadError(f"{url}: HTTP {response.status}, which no file comes with: check the URL and --mirror")
    if total is not None:
        free = shutil.disk_usage(part.parent).free
        if (need := int(total * room_for) - have) > free:
            raise DownloadError(
                f"{part.parent}: {free / 1e9:.2f} GB free, {need / 1e9:.2f} GB needed for {url}:"
                " make room or use another disk"
            )
    with bar(total, part.name.removesuffix(".part"), settings.progress, have) as shown:
        while total is None or have < total:
            try:
                # What has come so far, so that a cut loses nothing; never past the end, where some servers stay silent.
                data = response.read1(CHUNK)
            except (OSError, http.client.HTTPException) as error:
                file.flush()
                raise _Retry(f"connection cut at {have} bytes ({type(error).__name__})") from error
            if not data:
                break
            file.write(data)
            have += len(data)
            shown.update(len(data))
        file.flush()
    if total is not None and have < total:
        raise _Retry(f"connection cut at {have} of {total} bytes")


def _content_range(value: str | None) -> tuple[int, int]:
    """(first byte, length of the whole file) of `bytes FIRST-LAST/WHOLE`; (-1, -1) for anything else."""
    unit, _, rest = (value or "").partition(" ")
    span, _, whole = rest.partition("/")
    first = span.partition("-")[0]
    return (int(first), int(whole)) if unit == "bytes" and first.isdigit() and whole.isdigit() else (-1, -1)
