"""A local stand-in for the Hugging Face hub that serves one file to huggingface_hub."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread


@dataclass
class Hub:
    """The file to serve and the requests received."""

    path: str
    revision: str
    content: bytes
    cut_at: int | None = None  # the first response breaks off after so many bytes
    url: str = ""
    requests: list[str] = field(default_factory=list)  # for the file: "HEAD 0", "GET <first byte>"


@contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    """Serves `hub` on a free port of 127.0.0.1 and sets its `url`."""

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self._answer("HEAD", 0)

        def do_GET(self) -> None:
            first = self.headers.get("Range", "bytes=0-").removeprefix("bytes=").rstrip("-")
            self._answer("GET", int(first))

        def _answer(self, method: str, first: int) -> None:
            if self.path != hub.path:  # the library also asks for pages of its own
                self.send_error(404)
                return
            hub.requests.append(f"{method} {first}")
            size = len(hub.content)
            self.send_response(206 if first else 200)
            self.send_header("ETag", f'"{hashlib.sha256(hub.content).hexdigest()}"')
            self.send_header("X-Repo-Commit", hub.revision)
            self.send_header("Accept-Ranges", "bytes")
            self.send_header("Content-Length", str(size - first))
            if first:
                self.send_header("Content-Range", f"bytes {first}-{size - 1}/{size}")
            self.end_headers()
            if method == "GET":
                end = size if first else hub.cut_at
                self.wfile.write(hub.content[first:end])

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, daemon=True).start()
    hub.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
