"""A stand-in for the part of a Hugging Face hub that uploads and downloads of small files need, on loopback."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit


class Hub(ThreadingHTTPServer):
    """Keeps one revision of each repository: {name: {path: bytes}}."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Answers)
        self.files: dict[str, dict[str, bytes]] = {}
        self.url = f"http://127.0.0.1:{self.server_port}"
        self._thread = threading.Thread(target=self.serve_forever, daemon=True)

    def __enter__(self) -> Hub:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self._thread.join()
        self.server_close()


def _sha(files: dict[str, bytes]) -> str:
    return hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()


class _Answers(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *_: object) -> None:
        pass

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        parts = urlsplit(self.path).path.split("/")[1:]
        if parts == ["api", "repos", "create"]:
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            self.server.files.setdefault(name, {})
            self._json({"url": f"{self.server.url}/{name}"})
        elif parts == ["api", "validate-yaml"]:
            self._json({"errors": [], "warnings": []})
        elif parts[4] == "preupload":
            paths = [file["path"] for file in json.loads(body)["files"]]
            self._json({"files": [{"path": p, "uploadMode": "regular", "shouldIgnore": False} for p in paths]})
        elif parts[4] == "commit":
            name = "/".join(parts[2:4])
            files = self.server.files[name]
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            address = f"{self.server.url}/{name}/commit/{_sha(files)}"
            self._json({"success": True, "commitOid": _sha(files), "commitUrl": address})

    def do_GET(self) -> None:
        parts = [unquote(part) for part in urlsplit(self.path).path.split("/")[1:]]
        is_about = parts[0] == "api"
        files = self.server.files.get("/".join(parts[2:4] if is_about else parts[:2]), {})
        if not is_about:
            self._file(files, "/".join(parts[4:]))
        elif "tree" in parts:
            self._json([{"type": "file", "path": p, "size": len(c), "oid": _sha({p: c})} for p, c in files.items()])
        else:
            name = "/".join(parts[2:4])
            self._json({"id": name, "sha": _sha(files), "siblings": [{"rfilename": path} for path in files]})

    do_HEAD = do_GET

    def _file(self, files: dict[str, bytes], path: str) -> None:
        content = files.get(path)
        if content is None:
            self._json({}, 404, {"X-Error-Code": "EntryNotFound"})
        else:
            self._send(content, 200, {"ETag": f'"{_sha({path: content})}"', "X-Repo-Commit": _sha(files)})

    def _json(self, value: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self._send(json.dumps(value).encode(), status, {"Content-Type": "application/json"} | (headers or {}))

    def _send(self, content: bytes, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(content))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)
