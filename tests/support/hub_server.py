"""A server on this machine that speaks the routes of the Hugging Face hub and of ModelScope, for one repository."""

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

PATIENCE = 120
"""Seconds that an answer is held at most."""
COMMIT = "0123456789abcdef0123456789abcdef01234567"
NAME = "zai-org/CogVideoX-5b"
WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"
DECOYS = (
    "README.md", "teaser.png", ".gitattributes", "transformer/diffusion_pytorch_model.bin", "transformer/picture.png",
    "transformer/diffusion_pytorch_model.fp16.safetensors", "text_encoder/model.fp16-00001-of-00002.safetensors",
    "text_encoder/pytorch_model.pt", "safety/config.json", "assets/a/b.json",
)  # fmt: skip
"""Files of a repository that nobody needs."""


@dataclass
class HubServer:
    """A server of one repository, from :meth:`start` to :meth:`close`."""

    hub_name: str
    """ORG/NAME on the Hugging Face hub."""
    modelscope_name: str
    files: dict[str, bytes]
    cuts: dict[str, list[int]] = field(default_factory=dict)
    """By file, after how many bytes each of the next answers breaks off."""
    swapped: dict[str, bytes] = field(default_factory=dict)
    """What is sent instead of a file, whose size and hash stay as described."""
    held: dict[str, threading.Event] = field(default_factory=dict)
    """By file, what its answer waits for."""
    asked: list[tuple[str, int]] = field(default_factory=list)
    """The files that were asked for, each with the byte that the answer starts at."""

    def start(self) -> str:
        """Starts serving. Returns the address."""
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                hub.answer(self)

            def log_message(self, *_):
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{self._server.server_port}"

    def close(self) -> None:
        """Stops serving."""
        self._server.shutdown()
        self._server.server_close()

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        """Answers one request."""
        url = urlsplit(request.path)
        words = parse_qs(url.query)
        api = f"/api/v1/models/{self.modelscope_name}"
        if url.path == f"/api/models/{self.hub_name}/revision/main":
            return send(request, json.dumps(self.hub_description()).encode())
        if url.path == api:
            return send(request, json.dumps({"Data": {"License": "Apache License 2.0"}}).encode())
        if url.path == f"{api}/repo/files":
            return send(request, json.dumps({"Data": {"Files": self.modelscope_files()}}).encode())
        if url.path == f"{api}/repo":
            return self.send_file(request, words["FilePath"][0])
        if match := re.fullmatch(f"/{self.hub_name}/resolve/{COMMIT}/(.+)", url.path):
            return self.send_file(request, unquote(match[1]))
        send(request, b'{"error": "Repository not found"}', 404, {"X-Error-Code": "RepoNotFound"})

    def hub_description(self) -> dict:
        """The Hugging Face hub's answer about the repository."""
        siblings = []
        for name, content in self.files.items():
            one = {
                "rfilename": name,
                "size": len(content),
                "blobId": hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest(),
            }
            if name.endswith((".safetensors", ".bin")):
                one |= {"blobId": "0" * 40}
                one["lfs"] = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}
            siblings.append(one)
        card = {"license": "other", "license_name": "cogvideox", "license_link": "LICENSE"}
        return {"id": self.hub_name, "sha": COMMIT, "siblings": siblings, "cardData": card, "tags": [], "private": False}

    def modelscope_files(self) -> list[dict]:
        """ModelScope's list of the files and folders."""
        folders = {name.partition("/")[0] for name in self.files if "/" in name}
        found = [{"Path": name, "Type": "tree", "Size": 0} for name in folders]
        return found + [
            {"Path": name, "Type": "blob", "Size": len(content), "Sha256": hashlib.sha256(content).hexdigest()}
            for name, content in self.files.items()
        ]

    def send_file(self, request: BaseHTTPRequestHandler, name: str) -> None:
        """Sends a file or the rest of it, or breaks off."""
        match = re.fullmatch(r"bytes=(\d+)-", request.headers.get("Range", ""))
        start, content = int(match[1]) if match else 0, self.swapped.get(name, self.files[name])
        self.asked.append((name, start))
        if name in self.held:
            self.held[name].wait(PATIENCE)
        cuts = self.cuts.get(name)
        send(request, content[start:], 206 if match else 200, {}, cut=cuts.pop(0) if cuts else None)


def send(request, content: bytes, status: int = 200, headers: dict | None = None, *, cut: int | None = None) -> None:
    """Sends an answer; only its first ``cut`` bytes, and then the connection is closed."""
    request.send_response(status)
    for name, value in {"Content-Length": len(content), **(headers or {})}.items():
        request.send_header(name, str(value))
    request.end_headers()
    request.wfile.write(content[:cut])
    request.close_connection = cut is not None


@contextmanager
def serving(source: Path) -> Iterator[tuple[HubServer, str]]:
    """Serves a model of this machine under the name of the 5b, with files that nobody needs. Yields the server and its address."""
    files = {path.relative_to(source).as_posix(): path.read_bytes() for path in source.rglob("*") if path.is_file()}
    server = HubServer(NAME, "ZhipuAI/CogVideoX-5b", files | {"LICENSE": b"do good"} | dict.fromkeys(DECOYS, b"not needed"))
    try:
        yield server, server.start()
    finally:
        server.close()
