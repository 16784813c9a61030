"""A stub of the Hugging Face Hub on the loopback address: repositories of models, with Git LFS for large files."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import yaml
from flask import Flask, Response, jsonify, request
from werkzeug.serving import make_server

TOKEN = "hf_aTokenOfTheStub"
LFS_SUFFIXES = (".safetensors", ".onnx", ".data")


@dataclass
class Hub:
    """What a stub has received."""

    endpoint: str = ""
    namespaces: tuple[str, ...] = ("org",)  # where the token may write
    private: dict[str, bool] = field(default_factory=dict)  # by repository
    files: dict[str, dict[str, bytes]] = field(default_factory=dict)  # by repository, then by name
    uploaded: dict[str, bytes] = field(default_factory=dict)  # by SHA-256

    def app(self) -> Flask:
        app = Flask(__name__)

        @app.before_request
        def authorise() -> Response | None:
            if request.path.startswith("/lfs/") or request.headers.get("Authorization") == f"Bearer {TOKEN}":
                return None
            return _error(401, "Invalid user token.")

        @app.post("/api/repos/create")
        def create() -> Any:
            wanted = request.get_json()
            name = f"{wanted['organization']}/{wanted['name']}"
            if wanted["organization"] not in self.namespaces:
                return _error(403, "You don't have the rights to create a model under this namespace")
            if name in self.files:
                return _error(409, "You already created this model repo", url=f"{self.endpoint}/{name}")
            self.files[name], self.private[name] = (
                {},
                wanted.get("visibility") == "private" or wanted.get("private", False),
            )
            return jsonify({"url": f"{self.endpoint}/{name}", "name": name})

        @app.post("/api/validate-yaml")
        def validate() -> Any:
            metadata = yaml.safe_load(request.get_json()["content"].split("---\n")[1])
            if metadata.get("license") == "free":
                response = jsonify({"errors": [{"message": '"license" must be one of [apache-2.0, mit, other]'}]})
                response.status_code = 400
                return response
            return jsonify({"errors": [], "warnings": []})

        @app.get("/api/models/<org>/<name>")
        def info(org: str, name: str) -> Any:
            if f"{org}/{name}" not in self.files:
                return _error(404, "Repository not found", code="RepoNotFound")
            return jsonify({"id": f"{org}/{name}", "sha": "0" * 40, "private": self.private[f"{org}/{name}"]})

        @app.post("/api/models/<org>/<name>/preupload/main")
        def modes(org: str, name: str) -> Any:
            paths = [file["path"] for file in request.get_json()["files"]]
            mode = {path: "lfs" if path.endswith(LFS_SUFFIXES) else "regular" for path in paths}
            return jsonify({"files": [{"path": p, "uploadMode": mode[p], "shouldIgnore": False} for p in paths]})

        @app.post("/<org>/<name>.git/info/lfs/objects/batch")
        def batch(org: str, name: str) -> Any:
            objects = [
                {**one, "actions": {"upload": {"href": f"{self.endpoint}/lfs/{one['oid']}"}}}
                for one in request.get_json(force=True)["objects"]
            ]
            return jsonify({"transfer": "basic", "objects": objects})

        @app.put("/lfs/<oid>")
        def upload(oid: str) -> Any:
            content = request.get_data()
            if hashlib.sha256(content).hexdigest() != oid:
                return _error(400, "another SHA-256")
            self.uploaded[oid] = content
            return ""

        @app.post("/api/models/<org>/<name>/commit/main")
        def commit(org: str, name: str) -> Any:
            files = self.files[f"{org}/{name}"]
            for line in request.get_data().splitlines():
                change = json.loads(line)
                value = change["value"]
                if change["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif change["key"] == "lfsFile":
                    files[value["path"]] = self.uploaded[value["oid"]]
            return jsonify({"commitUrl": f"{self.endpoint}/{org}/{name}/commit/{'1' * 40}", "commitOid": "1" * 40})

        return app


def _error(status: int, message: str, *, code: str = "", **more: str) -> Response:
    response = jsonify({"error": message, **more})
    response.status_code = status
    response.headers["X-Error-Message"] = message
    if code:
        response.headers["X-Error-Code"] = code
    return response


@contextmanager
def hub_stub() -> Iterator[Hub]:
    """An empty stub, in a thread."""
    hub = Hub()
    server = make_server("127.0.0.1", 0, hub.app(), threaded=True)
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
