"""tools/hash_constraints.py: which files' hashes are pinned, and how the file is written."""

from __future__ import annotations

import json
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread

import pytest
from packaging.requirements import Requirement

from tools.hash_constraints import TARGETS, hashes, with_hashes


def files(*names: str) -> list[dict[str, object]]:
    return [{"filename": name, "hashes": {"sha256": name}} for name in names]


EVERYWHERE = (
    "a-1.0-cp312-cp312-manylinux_2_28_aarch64.whl",
    "a-1.0-cp314-cp314-manylinux_2_28_x86_64.whl",
    "a-1.0-cp311-cp311-manylinux2014_x86_64.manylinux_2_17_x86_64.whl",
    "a-1.0-cp311-cp311-linux_aarch64.whl",
    "a-1.0-cp39-abi3-manylinux_2_17_x86_64.whl",
    "a-1.0-py3-none-manylinux_2_17_aarch64.whl",
)
NOWHERE = (
    "a-1.0-cp310-cp310-manylinux2014_x86_64.whl",
    "a-1.0-cp313-cp313t-manylinux2014_x86_64.whl",
    "a-1.0-pp311-pypy311_pp73-manylinux2014_x86_64.whl",
    "a-1.0-cp312-cp312-musllinux_1_2_x86_64.whl",
    "a-1.0-cp312-cp312-macosx_11_0_arm64.whl",
    "a-1.0-cp312-cp312-win_amd64.whl",
    "a-1.0-cp312-cp312-manylinux2014_i686.whl",
    "a-1.0.1-py3-none-any.whl",
    "a-1.0.exe",
)


def test_the_hashes_are_those_of_files_that_a_target_installs() -> None:
    pin = Requirement("a==1.0")
    assert hashes(pin, files(*NOWHERE, *EVERYWHERE, "a-1.0.tar.gz")) == sorted(EVERYWHERE)
    assert hashes(pin, files(*NOWHERE, "a-1-py3-none-any.whl", "a-1.0.tar.gz")) == ["a-1-py3-none-any.whl"]
    assert hashes(pin, files(*NOWHERE, "a-1.0.tar.gz")) == ["a-1.0.tar.gz"]


def test_a_source_distribution_is_for_targets_without_a_wheel() -> None:
    wheels = [f"a-1.0-cp3{minor}-cp3{minor}-linux_{machine}.whl" for minor, machine in TARGETS if minor < 13]
    listed = files(*wheels, "a-1.0.tar.gz")
    assert hashes(Requirement("a==1.0"), listed) == sorted([*wheels, "a-1.0.tar.gz"])
    assert hashes(Requirement('a==1.0; python_version < "3.13"'), listed) == sorted(wheels)
    with pytest.raises(SystemExit, match=r"a==1\.0: the index has no file for Python 3\.13 on x86_64"):
        hashes(Requirement("a==1.0"), files(*wheels))


@pytest.fixture
def index() -> Iterator[str]:
    """A package index with a package of two versions."""

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            assert self.headers["Accept"] == "application/vnd.pypi.simple.v1+json"
            self.send_response(200 if self.path == "/simple/two-words/" else 404)
            self.end_headers()
            names = [f"two_words-{version}-py3-none-any.whl" for version in ("1.0", "2.0")]
            self.wfile.write(json.dumps({"files": files(*names)}).encode())

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Answer) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/simple/"
        server.shutdown()


def test_hashes_are_renewed_and_the_rest_stays(index: str) -> None:
    old = "# Comment\n\nTwo_words==1.0 \\\n    --hash=sha256:0 \\\n    --hash=sha256:1\n# End\n"
    new = with_hashes(old, index)
    assert new == ("# Comment\n\nTwo_words==1.0 \\\n    --hash=sha256:two_words-1.0-py3-none-any.whl\n# End\n")
    assert with_hashes(new, index) == new
    assert with_hashes(new.replace("==1.0", "==2.0"), index) == new.replace("1.0", "2.0")
    with pytest.raises(SystemExit, match=rf"other==1: {index}other/: HTTP Error 404"):
        with_hashes("other==1\n", index)
