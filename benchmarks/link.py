"""Simulate a link of a given bandwidth behind S3's GetObject and HeadObject: `python -m benchmarks.link FOLDER MB/S SECONDS`.

Serves the files of a folder as `/<bucket>/<key>`, whole or a range, as S3 answers (tests/test_benchmarks.py holds it against
moto's server), until its standard input closes. Every request waits before its first byte, and all answers together go no
faster than the link. Server and link are one process, and files go out by sendfile: what another copy through a proxy costs
would be taken from the loader on few cores. moto itself reads an object whole for every range of it.
"""

from __future__ import annotations

import os
import re
import sys
import threading
import time
from contextlib import suppress
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

CHUNK = 128 << 10  # a connection's turn on the link


class Link:
    """A link that all connections share: bytes pass one after the other."""

    def __init__(self, bytes_per_second: float) -> None:
        self._rate, self._free, self._lock = bytes_per_second, 0.0, threading.Lock()

    def pass_through(self, nbytes: int) -> None:
        """Wait until the last byte has passed; idle time is not saved up."""
        with self._lock:
            self._free = max(self._free, time.monotonic()) + nbytes / self._rate
            until = self._free
        time.sleep(max(0.0, until - time.monotonic()))


class Server(ThreadingHTTPServer):
    """Server with one thread per connection."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, folder: Path, bytes_per_second: float, delay: float) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.folder, self.link, self.delay = folder, Link(bytes_per_second), delay


class Answer(BaseHTTPRequestHandler):
    """Answer one request."""

    protocol_version = "HTTP/1.1"
    server: Server

    def do_GET(self) -> None:
        """Send the object or the range that was asked for; for HEAD only the headers."""
        time.sleep(self.server.delay)
        key = self.path.partition("?")[0].lstrip("/").partition("/")[2]
        try:
            fd = os.open(self.server.folder / key, os.O_RDONLY)
        except OSError:
            body = b"<Error><Code>NoSuchKey</Code><Message>The specified key does not exist.</Message></Error>"
            self._head(404, len(body), {"Content-Type": "application/xml"})
            self.wfile.write(body)
            return
        try:
            self._send(fd)
        finally:
            os.close(fd)

    do_HEAD = do_GET

    def _send(self, fd: int) -> None:
        stat = os.fstat(fd)
        begin, end, asked = 0, stat.st_size, re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range") or "")
        headers = {
            "ETag": f'"{stat.st_mtime_ns:x}-{stat.st_size:x}"',
            "Last-Modified": formatdate(stat.st_mtime, usegmt=True),
            "Content-Type": "binary/octet-stream",
            "Accept-Ranges": "bytes",
        }
        if asked:
            begin, end = int(asked[1]), min(int(asked[2]) + 1, end)
            headers["Content-Range"] = f"bytes {begin}-{end - 1}/{stat.st_size}"
        self._head(206 if asked else 200, end - begin, headers)
        while begin < end and self.command == "GET":
            turn = min(CHUNK, end - begin)
            self.server.link.pass_through(turn)
            while turn:
                sent = os.sendfile(self.connection.fileno(), fd, begin, turn)
                begin, turn = begin + sent, turn - sent

    def _head(self, status: int, length: int, told: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**told, "Content-Length": str(length)}.items():
            self.send_header(name, value)
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        """Log nothing."""


def main() -> None:
    """Print the port, and serve until the end of standard input."""
    folder, megabytes, delay = sys.argv[1:]
    server = Server(Path(folder), float(megabytes) * 1e6, float(delay))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print(server.server_address[1], flush=True)
    with suppress(KeyboardInterrupt):
        sys.stdin.read()


if __name__ == "__main__":
    main()
