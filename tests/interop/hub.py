"""A hub on this machine that takes what is pushed to it, as much of its protocol as `HfApi` needs for small files."""

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Hub(ThreadingHTTPServer):
    """Keeps the files of commits by repository."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files: dict[str, dict[str, bytes]] = {}
        self.made: list[dict[str, Any]] = []
        self.address = f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *args: Any) -> None:
        """Say nothing."""

    def do_POST(self) -> None:
        length = self.headers.get("Content-Length")
        body = self.rfile.read(int(length)) if length is not None else self._chunks()
        self._answer(*self._taken(self.path, body))

    def do_GET(self) -> None:
        self._answer(200, {"id": "me/films", "sha": "0" * 40, "siblings": []})

    def _chunks(self) -> bytes:
        found = b""
        while size := int(self.rfile.readline(), 16):
            found += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return found

    def _taken(self, path: str, body: bytes) -> tuple[int, Any]:
        if self.headers.get("Authorization") != "Bearer hf_ours":
            return 401, {"error": "Invalid username or password."}
        if path == "/api/repos/create":
            self.server.made.append(json.loads(body))
            return 200, {"url": f"{self.server.address}/me/films", "name": "me/films", "id": "me/films"}
        if "/preupload/" in path:
            names = [one["path"] for one in json.loads(body)["files"]]
            entry = {"uploadMode": "regular", "shouldIgnore": False, "oid": None}
            return 200, {"files": [{"path": name, **entry} for name in names]}
        if "/commit/" in path:
            kept = self.server.files.setdefault(path.split("/api/models/")[1].split("/commit/")[0], {})
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    kept[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            url = f"{self.server.address}/me/films/commit/{'0' * 40}"
            return 200, {"commitUrl": url, "commitOid": "0" * 40, "hookOutput": "", "success": True}
        return 200, {}

    def _answer(self, code: int, value: Any) -> None:
        content = json.dumps(value).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


@contextmanager
def running() -> Iterator[Hub]:
    """Run a hub while the context lasts."""
    with Hub() as hub:
        thread = threading.Thread(target=hub.serve_forever)
        thread.start()
        try:
            yield hub
        finally:
            hub.shutdown()
            thread.join()
