"""A server of files on this machine that answers as servers of the web do: with parts, or with errors."""

from __future__ import annotations

import contextlib
import re
import threading
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote


class Web(ThreadingHTTPServer):
    """folder: what is served. parts: whether parts of files are. fail: path -> how often its GETs fail from now on, and
    the status. asked: GETs by path. sent: bytes of files."""

    daemon_threads = True

    def __init__(self, folder: Path):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder, self.parts, self.sent = folder, True, 0
        self.fail: dict[str, tuple[int, int]] = {}
        self.asked: Counter[str] = Counter()
        self.address = f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Web

    def do_HEAD(self) -> None:
        self.answer(False)

    def do_GET(self) -> None:
        self.server.asked[unquote(self.path)] += 1
        self.answer(True)

    def answer(self, with_content: bool) -> None:
        path = unquote(self.path)
        times, status = self.server.fail.get(path, (0, 0))
        if times and with_content:
            self.server.fail[path] = times - 1, status
            return self.send(status, b"", {}, True)
        file = self.server.folder / path.lstrip("/")
        if not file.is_file():
            return self.send(404, b"", {}, True)
        content, more = file.read_bytes(), {"ETag": f'"{file.stat().st_mtime_ns}"'}
        wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if not (wanted and self.server.parts):
            return self.send(200, content, more, with_content)
        first, last = int(wanted[1]), min(int(wanted[2]), len(content) - 1)
        more["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
        return self.send(206, content[first : last + 1], more, with_content)

    def send(self, status: int, content: bytes, headers: dict[str, str], with_content: bool) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if with_content:
            self.server.sent += len(content)
            self.wfile.write(content)

    def log_message(self, *_) -> None:
        pass


@contextlib.contextmanager
def serving(folder: Path) -> Iterator[Web]:
    with Web(folder) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
