"""A local HTTP server that does everything wrong on demand, and archives for it to serve."""

import hashlib
import http.server
import io
import os
import tarfile
import threading

UTTERANCES = 3


def member(name, data=b"", kind=tarfile.REGTYPE, link="") -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.type, info.size, info.linkname = kind, len(data), link
    return info, data


def pack(*members: tuple[tarfile.TarInfo, bytes]) -> bytes:
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w:gz") as tar:
        for info, data in members:
            tar.addfile(info, io.BytesIO(data))
    return raw.getvalue()


def corpus(subset: str = "tiny", count: int = UTTERANCES) -> bytes:
    members = [member("LibriSpeech/SPEAKERS.TXT", b"1 | F | tiny | 1 | A\n")]
    members.append(member(f"LibriSpeech/{subset}/1/2/1-2.trans.txt", b"1-2-0000 A\n"))
    # Random bytes stay the size they are, so that the archive can be cut at many places.
    members += [member(f"LibriSpeech/{subset}/1/2/1-2-{n:04}.flac", os.urandom(40_000)) for n in range(count)]
    return pack(*members)


class Server(http.server.ThreadingHTTPServer):
    """Serves `body` at every path ending in .tar.gz; `script` holds one behaviour for each request, then it behaves."""

    daemon_threads = True
    # Whoever cuts a connection on purpose needs no traceback about it.
    handle_error = lambda self, *_: None  # noqa: E731

    def __init__(self, body: bytes):
        super().__init__(("127.0.0.1", 0), Handler)
        self.body = body
        self.script: list[str] = []
        self.requests: list[tuple[str, str | None, str | None]] = []  # path, Range, If-Range
        self.missing: set[str] = set()
        self.validators = True
        self.patience = threading.Event()  # set at the end, for those who stall

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    @property
    def ranges(self) -> list[str | None]:
        return [asked for _, asked, _ in self.requests]


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_GET(self):
        server, body = self.server, self.server.body
        behaviour = server.script.pop(0) if server.script else "good"
        asked = self.headers.get("Range")
        server.requests.append((self.path, asked, self.headers.get("If-Range")))
        self.close_connection = True
        if self.path in server.missing:
            return self.send_error(404)
        if behaviour.isdigit():
            self.send_response(int(behaviour))
            if behaviour == "503":
                self.send_header("Retry-After", "7")
            self.send_header("Content-Length", "0")
            return self.end_headers()
        if behaviour == "wrong bytes":
            body = bytes(len(body))
        if behaviour == "page":
            body = b"<html>Please log in</html>"
        etag = f'"{hashlib.md5(body).hexdigest()}"' if server.validators else None
        start, status = 0, 200
        if asked and behaviour != "ignore range" and self.headers.get("If-Range") in (None, etag):
            start, status = int(asked.removeprefix("bytes=").rstrip("-")), 206
            if start >= len(body):
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{len(body)}")
                self.send_header("Content-Length", "0")
                return self.end_headers()
        if behaviour == "other range" and asked:
            start = start // 2
        self.send_response(status)
        if status == 206:
            self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        if etag:
            self.send_header("ETag", etag)
        if behaviour == "no length":
            self.send_header("Connection", "close")
        else:
            self.send_header("Content-Length", str(len(body) - start))
        self.end_headers()
        left = body[start:]
        if behaviour == "cut":
            left = left[: len(left) // 2]
        if behaviour == "cut at once":
            left = b""
        if behaviour in ("stall", "hang"):
            self.wfile.write(left[: 1000 if behaviour == "stall" else len(left) // 2])
            self.wfile.flush()
            self.server.patience.wait(2 if behaviour == "stall" else 60)
            return
        if behaviour == "reset":
            self.wfile.write(left[:5000])
            self.wfile.flush()
            # An abrupt end (RST) instead of a polite one (FIN).
            self.connection.setsockopt(1, 13, b"\1\0\0\0\0\0\0\0")
            return
        self.wfile.write(left)
