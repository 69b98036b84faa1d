"""Factors, adapters and models named by Hub ids, from a stand-in of the Hub on this machine."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from support.tiny_models import tiny_model, trained_adapter

from peft_svdinit import SvdLoraConfig
from peft_svdinit.cli import main as svdinit
from peft_svdinit.files import hub_pickles, resolve_file, resolve_folder

TOKENIZER_FILES = ["merges.txt", "tokenizer.model", "vocab.txt"]
FURTHER_WEIGHTS = [
    "consolidated.00.safetensors",
    "onnx/decoder.json",
    "original/model.safetensors",
    "pytorch_model.bin",
]
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def hub(root: Path) -> type[BaseHTTPRequestHandler]:
    """Serves the folders `root/<user>/<name>` as model repositories with one commit."""

    class Hub(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            parts = self.path.split("?")[0].strip("/").split("/")
            if parts[:2] == ["api", "models"]:
                self._describe(root / parts[2] / parts[3], parts[4:])
            elif len(parts) > 4 and parts[2] == "resolve":
                self._send_file(root / parts[0] / parts[1] / "/".join(parts[4:]))
            else:
                self._send(404, b"{}", "application/json")

        def _describe(self, folder: Path, rest: list[str]) -> None:
            if not folder.is_dir():
                self.error("RepoNotFound")
                return
            files = sorted(file for file in folder.rglob("*") if file.is_file())
            if rest[:1] == ["tree"]:
                listing = [
                    {
                        "type": "file",
                        "path": file.relative_to(folder).as_posix(),
                        "size": file.stat().st_size,
                        "oid": etag(file),
                    }
                    for file in files
                ]
                self._send(200, json.dumps(listing).encode(), "application/json")
                return
            info = {
                "id": "/".join(folder.parts[-2:]),
                "sha": COMMIT,
                "siblings": [{"rfilename": f.relative_to(folder).as_posix()} for f in files],
            }
            self._send(200, json.dumps(info).encode(), "application/json")

        def _send_file(self, path: Path) -> None:
            if path.is_file():
                self._send(200, path.read_bytes(), "application/octet-stream", etag(path))
            else:
                self.error("EntryNotFound")

        def error(self, code: str) -> None:
            self.send_response(404)
            self.send_header("X-Error-Code", code)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def _send(self, status: int, body: bytes, kind: str, tag: str = "none") -> None:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("ETag", f'"{tag}"')
            self.send_header("X-Repo-Commit", COMMIT)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def log_message(self, *args: object) -> None:
            pass

    return Hub


def etag(path: Path) -> str:
    return hashlib.sha1(path.read_bytes()).hexdigest()


@pytest.fixture
def endpoint(tmp_path: Path) -> Iterator[str]:
    repositories = tmp_path / "hub" / "user"
    trained_adapter(repositories / "adapter")
    tiny_model().save_pretrained(str(repositories / "base"))
    svdinit(
        f"synthesize --adapter {repositories}/adapter --base {repositories}/base --rank 6 "
        f"--lora_r 4 --plots false --output_dir {repositories}/factors".split()
    )
    further = {
        "base": [*TOKENIZER_FILES, *FURTHER_WEIGHTS],
        "pickled": ["config.json", "pytorch_model-00001-of-00001.bin", "vocab.txt"],
    }
    for repository, names in further.items():
        for name in names:
            (repositories / repository / name).parent.mkdir(exist_ok=True)
            (repositories / repository / name).write_bytes(b"{}")
    SvdLoraConfig(r=4, svd_factors="user/factors").save_pretrained(f"{repositories}/svd/last")
    server = ThreadingHTTPServer(("127.0.0.1", 0), hub(tmp_path / "hub"))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


SCRIPT = """
import json
import sys
from pathlib import Path
from transformers import AutoModelForCausalLM
from peft import get_peft_model
from peft_svdinit import SvdLoraConfig
from peft_svdinit.factors import CheckpointPair, LoraAdapter
from peft_svdinit.files import hub_pickles, resolve_folder

adapter = LoraAdapter("user/adapter")
CheckpointPair("user/base", "user/base", target_modules=list(adapter))
base = AutoModelForCausalLM.from_pretrained("user/base")
config = SvdLoraConfig(
    r=4, target_modules=list(adapter), svd_factors="user/factors", svd_factors_revision="main"
)
model = get_peft_model(base, config)
assert any(part.abs().sum() > 0 for name, part in model.named_parameters() if "lora_B" in name)
try:
    SvdLoraConfig(r=4, target_modules=list(adapter), svd_factors="user/base")
    get_peft_model(base, SvdLoraConfig(r=4, svd_factors="user/base"))
except FileNotFoundError as error:
    assert "factors.safetensors" in str(error), error

saved = SvdLoraConfig.from_pretrained("user/svd", "last", revision="main", cache_dir=sys.argv[1])
assert saved.svd_factors == "user/factors"
assert any(Path(sys.argv[1]).rglob("last/svdinit_config.json"))
for absent in ("user/base", "user/nonesuch"):
    try:
        SvdLoraConfig.from_pretrained(absent)
        raise AssertionError(absent)
    except ValueError as error:
        assert "svdinit_config.json" in str(error), error

folder = resolve_folder("user/base", argument="base")
print(json.dumps({
    "files": sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*.*")),
    "pickles": [hub_pickles(f"user/{name}") for name in ("adapter", "pickled", "absent")],
    "of a revision": hub_pickles("user/pickled", "main"),
}))
"""


def test_ids_of_the_hub_work_wherever_paths_do(endpoint, tmp_path):
    environment = {
        **os.environ,
        "HF_ENDPOINT": endpoint,
        "HF_HUB_OFFLINE": "0",
        "HF_HOME": str(tmp_path / "cache"),
        "HF_HUB_DISABLE_XET": "1",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path / "elsewhere")],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert {"config.json", "model.safetensors", *TOKENIZER_FILES} <= set(found["files"])
    assert not set(FURTHER_WEIGHTS) & set(found["files"])
    pickles = ["pytorch_model-00001-of-00001.bin"]
    assert found["pickles"] == [[], pickles, []] and found["of a revision"] == pickles


def test_a_path_has_no_pickles_of_the_hub(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    assert hub_pickles(tmp_path) == []


@pytest.mark.parametrize("there", [True, False])
def test_a_revision_of_a_path_is_refused(tmp_path, there):
    path = tmp_path / "model"
    if there:
        path.mkdir()
        (path / "config.json").write_text("{}")
        assert resolve_folder(path, argument="base") == path
        assert resolve_file(path, "config.json", argument="base") == path / "config.json"
    message = "base: a revision belongs to a repository of the Hub, got 'main' for the path .*model"
    with pytest.raises(ValueError, match=message):
        resolve_folder(path, argument="base", revision="main")
    with pytest.raises(ValueError, match=message):
        resolve_file(path, "config.json", argument="base", revision="main")
