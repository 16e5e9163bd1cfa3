"""Models by name on the Hugging Face Hub, against a local stand-in of its HTTP interface."""

import base64
import dataclasses
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch

from xclip_fast import XCLIP, TextConfig, VisionConfig, XCLIPConfig
from xclip_fast.weights import checkpoint, hub
from xclip_fast.weights.checkpoint import CheckpointError
from xclip_fast.weights.recipe import FILE, Trained

huggingface_hub = pytest.importorskip("huggingface_hub")
pytest.importorskip("huggingface_hub.constants")  # not imported with the package

NAME = "org/tiny-xclip"
CONFIG = XCLIPConfig(
    vision=VisionConfig(image_size=32, patch_size=16, width=64, layers=1, heads=1),
    text=TextConfig(vocab_size=300, context_length=8, width=64, layers=1, heads=1),
    embed_dim=64,
    num_frames=2,
)


class Hub(ThreadingHTTPServer):
    """Repositories as dictionaries of files; the parts of the interface that up- and download use."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos, self.asked = {}, []
        self.address = f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *_):
        pass

    def reply(self, content, status=200, **headers):
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": len(body), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_GET(self):
        path = self.path.split("?")[0]
        self.server.asked.append(path)
        name = "/".join(path.removeprefix("/api/models/").strip("/").split("/")[:2])
        files = self.server.repos.get(name)
        if files is None:
            return self.reply({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")
        sha = hashlib.sha1(b"".join(name.encode() + files[name] for name in sorted(files))).hexdigest()
        if "/resolve/" in path:
            wanted = files.get(path.split("/resolve/")[1].partition("/")[2])
            if wanted is None:
                return self.reply({"error": "no such entry"}, 404, X_Error_Code="EntryNotFound")
            return self.reply(wanted, ETag=f'"{hashlib.sha1(wanted).hexdigest()}"', X_Repo_Commit=sha)
        entries = [
            {"type": "file", "path": each, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
            for each, content in files.items()
        ]
        if "/tree/" in path:
            return self.reply(entries)
        return self.reply({"id": name, "sha": sha, "siblings": [{"rfilename": each} for each in files], "tags": []})

    do_HEAD = do_GET

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            name = "/".join(part for part in (asked.get("organization"), asked["name"]) if part)
            self.server.repos.setdefault(name, {})
            return self.reply({"url": f"{self.server.address}/{name}", "name": name, "id": name})
        name = "/".join(self.path.split("/")[3:5])
        if "/preupload/" in self.path:
            files = json.loads(body)["files"]
            return self.reply({"files": [{**each, "uploadMode": "regular", "shouldIgnore": False} for each in files]})
        for line in body.splitlines():
            entry = json.loads(line)
            if entry["key"] == "file":
                self.server.repos[name][entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
        address = f"{self.server.address}/{name}/commit/{'1' * 40}"
        return self.reply({"commitUrl": address, "commitOid": "1" * 40, "success": True})


@pytest.fixture
def server(monkeypatch, tmp_path):
    found = Hub()
    threading.Thread(target=found.serve_forever, daemon=True).start()
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "ENDPOINT", found.address)
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.partition("/{repo_id}")
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", found.address + "".join(template[1:]))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.chdir(tmp_path)
    yield found
    found.shutdown()
    found.server_close()


def files_of(model, folder, trained=None):
    beside = {FILE: None if trained is None else trained.to_json()}
    checkpoint.write(model.state_dict(), model.config, folder, beside=beside)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def same(found, model):
    assert found.config == model.config
    assert all(torch.equal(a, b) for a, b in zip(found.parameters(), model.parameters(), strict=True))


def test_a_model_is_read_by_its_name_and_found_again_without_a_network(server, tmp_path, monkeypatch):
    model = XCLIP(CONFIG)
    files = files_of(model, tmp_path / "ours", Trained(frames=7))
    server.repos[NAME] = files | {"pytorch_model.bin": b"a second copy", "README.md": b"read me"}
    same(XCLIP.from_pretrained(NAME), model)
    fetched = {path.rpartition("/")[2] for path in server.asked if "/resolve/" in path}
    assert fetched == {"config.json", "model.safetensors", FILE}
    assert Trained.read(NAME).frames == 7
    assert hub.reference(NAME) == NAME
    assert hub.reference("ours") == str(tmp_path / "ours")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    server.asked.clear()
    same(XCLIP.from_pretrained(NAME), model)
    assert Trained.read(NAME).frames == 7
    with pytest.raises(CheckpointError, match=r"not on this disk, and(.|\n)*hf download org/other --local-dir"):
        XCLIP.from_pretrained("org/other")
    assert not server.asked


def test_transformers_finds_it_by_name(server, tmp_path):
    transformers = pytest.importorskip("transformers")
    from xclip_fast import huggingface

    config = dataclasses.replace(CONFIG, text=TextConfig(width=64, layers=1, heads=1))
    model = XCLIP(config).eval()
    server.repos[NAME] = files_of(model, tmp_path / "ours")
    huggingface.register()
    classify = transformers.pipeline(huggingface.TASK, model=NAME)
    same(classify.model.xclip, model)
    frames = torch.randint(0, 256, (2, 32, 32, 3), dtype=torch.uint8).numpy()
    assert {row["label"] for row in classify(frames, candidate_labels=["a", "b"])} == {"a", "b"}


def test_shards_of_a_repository(server, tmp_path):
    from safetensors.torch import save_file

    model = XCLIP(CONFIG)
    files = files_of(model, tmp_path / "ours")
    state = model.state_dict()
    names = sorted(state)
    for number, part in enumerate((names[::2], names[1::2])):
        save_file({name: state[name].contiguous() for name in part}, tmp_path / "part")
        files[f"part-{number}.safetensors"] = (tmp_path / "part").read_bytes()
    index = {name: f"part-{number % 2}.safetensors" for number, name in enumerate(names)}
    del files["model.safetensors"]
    server.repos[NAME] = files | {"model.safetensors.index.json": json.dumps({"weight_map": index}).encode()}
    same(XCLIP.from_pretrained(NAME), model)


def test_what_the_hub_does_not_have_is_said(server, tmp_path, monkeypatch):
    with pytest.raises(CheckpointError, match=r"and no such model on(.|\n)*hf auth login"):
        checkpoint.read("org/none")
    server.repos[NAME] = {"config.json": b"{}"}
    with pytest.raises(CheckpointError, match="org/tiny-xclip: that repository has no weights"):
        checkpoint.read(NAME)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")  # where nobody listens
    with pytest.raises(CheckpointError, match="not on this disk, and the Hugging Face Hub cannot be reached"):
        checkpoint.read("org/away")
    (tmp_path / "org").mkdir()  # a path of this disk, then
    with pytest.raises(CheckpointError, match=r"no such file or folder\. Weights are read from disk"):
        checkpoint.read("org/none")


def test_a_model_is_pushed(server, monkeypatch):
    model = XCLIP(CONFIG)
    assert "/org/pushed/commit/" in model.push_to_hub("org/pushed", private=True, token="hf_secret")
    assert set(server.repos["org/pushed"]) == {"config.json", "model.safetensors"}
    same(XCLIP.from_pretrained("org/pushed"), model)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(OSError, match="org/pushed: the Hugging Face Hub cannot be reached"):
        model.push_to_hub("org/pushed")
