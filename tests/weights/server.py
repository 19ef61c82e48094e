"""A file server that misbehaves on order: it breaks off, lies, redirects, knows no ranges."""

from __future__ import annotations

import hashlib
import http.server
import re
import threading
from collections.abc import Callable
from contextlib import contextmanager


class Server(http.server.ThreadingHTTPServer):
    """files: path -> bytes. ways: path -> how the next requests of it are answered, in this order; then well."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.ways: dict[str, list[Callable[[Handler, bytes], None]]] = {}
        self.asked: list[tuple[str, str | None]] = []  # (path, Range)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *_) -> None:
        pass

    def do_HEAD(self) -> None:
        """As the Hugging Face hub tells of a file."""
        path = self.path.partition("?")[0]
        if path not in self.server.files:
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound")
            return self.end_headers()
        data = self.server.files[path]
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("ETag", f'"{hashlib.sha1(data).hexdigest()}"')
        self.send_header("X-Repo-Commit", "0" * 40)
        self.end_headers()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        self.server.asked.append((path, self.headers["Range"]))
        if path not in self.server.files:
            return self.send_error(404)
        ways = self.server.ways.get(path)
        (ways.pop(0) if ways else well)(self, self.server.files[path])


def well(handler: Handler, data: bytes, until: int | None = None) -> None:
    """The file, or the part of it that was asked for; `until`: the connection ends before this byte."""
    begin = int(re.fullmatch(r"bytes=(\d+)-", handler.headers["Range"] or "bytes=0-")[1])
    if begin >= len(data):
        return handler.send_error(416)
    handler.send_response(206 if begin else 200)
    if begin:
        handler.send_header("Content-Range", f"bytes {begin}-{len(data) - 1}/{len(data)}")
    handler.send_header("Content-Length", str(len(data) - begin))
    handler.end_headers()
    handler.wfile.write(data[begin:until])


def breaks_off(after: int) -> Callable[[Handler, bytes], None]:
    return lambda handler, data: well(handler, data, after)


def without_ranges(handler: Handler, data: bytes) -> None:
    del handler.headers["Range"]
    well(handler, data)


def lies(handler: Handler, data: bytes) -> None:
    """A login page, in place of whatever was asked for."""
    del handler.headers["Range"]
    well(handler, b"<html>please log in</html>")


def says(code: int) -> Callable[[Handler, bytes], None]:
    return lambda handler, data: handler.send_error(code)


def redirects(to: str) -> Callable[[Handler, bytes], None]:
    def answer(handler: Handler, data: bytes) -> None:
        handler.send_response(302)
        handler.send_header("Location", to)
        handler.end_headers()

    return answer


@contextmanager
def serving():
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()
