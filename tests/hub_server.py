"""A Hub on 127.0.0.1 for tests: folders `root/<owner>/<name>` and `root/datasets/<owner>/<name>`, with faults by name.

A repository whose name starts with `gated` answers 403, `private` 401, `truncated` sends half of each weight file. One
that holds a file `.gated` answers 403 to whoever brings no token. Every file that is sent is noted in `sent`.
"""

import hashlib
import json
import math
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

sent: list[str] = []
COMMIT = "c0ffee" + "0" * 34


def parameters(file: Path) -> int:
    """How many numbers a safetensors file holds, from its header: NDIF sizes models by this."""
    with open(file, "rb") as opened:
        header = json.loads(opened.read(int.from_bytes(opened.read(8), "little")))
    return sum(math.prod(entry["shape"]) for name, entry in header.items() if name != "__metadata__")


def make_handler(root: Path):
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def answer(self, status: int, body: bytes = b"", **headers):
            self.send_response(status)
            for name, value in {"Content-Length": len(body), "X-Repo-Commit": COMMIT, **headers}.items():
                self.send_header(name.replace("_", "-"), str(value))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def do_GET(self):
            parts = self.path.split("?")[0].strip("/").split("/")
            api = parts[0] == "api"
            parts = parts[1:] if api else parts
            dataset = parts[0] == "datasets"
            parts = parts[1:] if parts[0] in {"models", "datasets"} else parts
            if (root / parts[0] / "config.json").is_file():  # a model of the Hub's first years, without an owner
                parts = ["", *parts]
            if len(parts) < 2:
                return self.answer(404)
            folder = root / ("datasets" if dataset else "") / parts[0] / parts[1]
            if not folder.is_dir():
                return self.answer(404, b"", X_Error_Code="RepoNotFound", X_Error_Message="Repository not found")
            if api and "tree" in parts:
                files = [p for p in sorted(folder.iterdir()) if p.is_file()]
                tree = [{"type": "file", "path": p.name, "size": p.stat().st_size, "oid": "0" * 40} for p in files]
                return self.answer(200, json.dumps(tree).encode(), Content_Type="application/json")
            if api:
                files = [{"rfilename": p.name} for p in sorted(folder.iterdir())]
                count = sum(parameters(p) for p in folder.glob("*.safetensors"))
                info = {"id": "/".join(parts[:2]), "sha": COMMIT, "siblings": files, "private": False}
                info["safetensors"] = {"total": count, "parameters": {"F32": count}}
                return self.answer(200, json.dumps(info).encode(), Content_Type="application/json")
            file = folder.joinpath(*parts[4:])
            if parts[3] not in {"main", COMMIT}:
                return self.answer(404, b"", X_Error_Code="RevisionNotFound", X_Error_Message="Revision not found")
            if not file.is_file():
                return self.answer(404, b"", X_Error_Code="EntryNotFound", X_Error_Message="Entry not found")
            closed = (folder / ".gated").is_file() and "Authorization" not in self.headers
            if parts[1].startswith("gated") or closed:
                return self.answer(403, b"", X_Error_Code="GatedRepo", X_Error_Message="Access is restricted")
            if parts[1].startswith("private"):
                return self.answer(401, b"", X_Error_Code="GatedRepo", X_Error_Message="Log in")
            body = file.read_bytes()
            if self.command == "GET":
                sent.append("/".join(part for part in [*parts[:2], *parts[4:]] if part))
            headers = {"ETag": f'"{hashlib.sha1(body).hexdigest()}"'}
            if parts[1].startswith("truncated") and file.suffix == ".safetensors" and self.command == "GET":
                self.send_response(200)
                for name, value in {"Content-Length": len(body), "X-Repo-Commit": COMMIT, **headers}.items():
                    self.send_header(name, str(value))
                self.end_headers()
                self.wfile.write(body[: len(body) // 2])
                self.close_connection = True
                return None
            return self.answer(200, body, **headers)

        do_HEAD = do_GET

        def log_message(self, *args):
            pass

    return Handler


@contextmanager
def hub(root: Path):
    """Serve `root`; yields the endpoint's address."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), make_handler(root))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
