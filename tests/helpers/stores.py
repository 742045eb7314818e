"""A real S3 API on loopback (moto's server) behind a proxy that delays, breaks and spoils on request."""

from __future__ import annotations

import http.client
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from moto.server import ThreadedMotoServer

Fault = Callable[["Request"], str | None]


class Request:
    """One that the proxy has in hand. number: how many objects were asked for before it."""

    def __init__(self, method: str, path: str, span: str, number: int) -> None:
        self.method, self.path, self.span, self.number = method, path, span, number


class Proxy(ThreadingHTTPServer):
    """Passes on to a server. fault: of a request for a shard's bytes "500", "cut", "spoil", "hang" or None; seen: those."""

    daemon_threads = True
    block_on_close = False

    def __init__(self, port: int) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.behind, self.delay = port, 0.0
        self._lock = threading.Lock()
        self.refuses = False  # all that is asked, as of a key that S3 does not know
        self.fault: Fault = lambda request: None
        self.seen: list[Request] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def judge(self, handler: BaseHTTPRequestHandler) -> str | None:
        if handler.command != "GET" or ".safetensors" not in handler.path:
            return None
        with self._lock:
            request = Request(handler.command, handler.path, str(handler.headers.get("Range")), len(self.seen))
            self.seen.append(request)
        return self.fault(request)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Proxy

    def _pass_on(self) -> None:
        fault = self.server.judge(self)
        time.sleep(self.server.delay)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.server.refuses:
            told = b"<Error><Code>InvalidAccessKeyId</Code><AWSAccessKeyId>AKIDSECRET</AWSAccessKeyId></Error>"
            self.send_response(403)
            self.send_header("Content-Type", "application/xml")
            self.send_header("Content-Length", str(len(told)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(told)
            return
        if fault == "500":
            self.send_response(500)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        behind = http.client.HTTPConnection("127.0.0.1", self.server.behind)
        behind.request(self.command, self.path, body or None, dict(self.headers))
        answer = behind.getresponse()
        data = answer.read()
        self.send_response(answer.status)
        for name, value in answer.getheaders():
            if name.lower() not in ("transfer-encoding", "connection", "date", "server", "content-length"):
                self.send_header(name, value)
        length = answer.getheader("Content-Length") if self.command == "HEAD" else str(len(data))
        self.send_header("Content-Length", length or "0")
        self.end_headers()
        if fault == "cut":
            self.wfile.write(data[: len(data) // 2])
            self.close_connection = True
            return
        if fault == "spoil" and data:
            data = data[:-1] + bytes([data[-1] ^ 1])
        if self.command != "HEAD":
            self.wfile.write(data)

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _pass_on

    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def s3() -> Iterator[Proxy]:
    """The server and the proxy before it."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    proxy = Proxy(server.get_host_and_port()[1])
    thread = threading.Thread(target=proxy.serve_forever, daemon=True)
    thread.start()
    try:
        yield proxy
    finally:
        proxy.shutdown()
        proxy.server_close()
        reset = http.client.HTTPConnection("127.0.0.1", proxy.behind)
        reset.request("POST", "/moto-api/reset")  # its buckets are the process's, and the next server would have them
        assert reset.getresponse().status == 200
        server.stop()
