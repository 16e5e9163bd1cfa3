"""The serving example, over loopback: right answers in batches, and bounds that hold."""

import http.client
import importlib.util
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from small import CONFIG

from xclip_fast import XCLIP, decode
from xclip_fast.data.motion import CLASSES, render, write_clip

pytest.importorskip("fastapi", reason="FastAPI is not installed: pip install fastapi uvicorn")
uvicorn = pytest.importorskip("uvicorn", reason="uvicorn is not installed: pip install fastapi uvicorn")

LABELS = ["growing", "a cat", "moving right"]


@pytest.fixture(scope="module")
def example():
    path = Path(__file__).parents[2] / "examples" / "serve.py"
    spec = importlib.util.spec_from_file_location("serve", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def serve(example):
    servers = []

    def start(model: XCLIP, **options):
        app = example.make_app(model, LABELS, **options)
        server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="error"))
        thread = threading.Thread(target=server.run, daemon=True)
        thread.start()
        servers.append((server, thread))
        end = time.monotonic() + 20
        while not server.started and time.monotonic() < end:
            time.sleep(0.02)
        port = server.servers[0].sockets[0].getsockname()[1]

        def post(body: bytes) -> tuple[int, dict]:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
            connection.request("POST", "/classify", body)
            response = connection.getresponse()
            return response.status, json.loads(response.read())

        return app, post

    yield start
    for server, thread in servers:
        server.should_exit = True
        thread.join(10)


def clip(tmp_path: Path, index: int) -> Path:
    write_clip(tmp_path / f"{index}.mp4", render(CLASSES[index], 0, frames=12, size=(48, 64)))
    return tmp_path / f"{index}.mp4"


def test_requests_that_come_together_are_one_batch(serve, tmp_path):
    torch.manual_seed(0)
    model = XCLIP(CONFIG).eval()
    app, post = serve(model, batch_size=4, batch_wait=0.3)
    paths = [clip(tmp_path, index) for index in range(4)]
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(post, [path.read_bytes() for path in paths]))
    with torch.inference_mode():
        found = model.encode_video(torch.stack([decode(path, 3, size=32) for path in paths]))
        want = model.similarity(found, model.encode_text(LABELS)).softmax(-1)
    for (status, answer), row in zip(answers, want, strict=True):
        assert status == 200
        given = {item["label"]: item["probability"] for item in answer["labels"]}
        assert given == pytest.approx(dict(zip(LABELS, row.tolist(), strict=True)), abs=1e-5)
        assert list(given.values()) == sorted(given.values(), reverse=True)
    assert sum(app.state.batcher.batches) == 4
    assert max(app.state.batcher.batches) > 1


def test_what_a_request_may_take_is_bounded(serve, tmp_path):
    model = XCLIP(CONFIG).eval()
    good = clip(tmp_path, 0).read_bytes()
    _, post = serve(model, max_bytes=len(good), waiting=1, seconds=1.0)
    assert post(good)[0] == 200
    assert post(good + b"x")[0] == 413
    status, answer = post(b"no video" * 9)
    assert status == 422
    assert "/tmp" not in answer["detail"]
    assert "the upload" in answer["detail"]

    honest = model.encode_video

    def slow(video):
        time.sleep(2)
        return honest(video)

    model.encode_video = slow
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(post, good)
        time.sleep(0.3)
        assert post(good)[0] == 503
        assert first.result()[0] == 504
    model.encode_video = honest
    time.sleep(1.5)  # the batch that was given up ends
    assert post(good)[0] == 200


def test_a_model_that_fails_does_not_end_the_server(serve, tmp_path):
    model = XCLIP(CONFIG).eval()
    good = clip(tmp_path, 0).read_bytes()
    _, post = serve(model)
    honest, model.encode_video = model.encode_video, None
    with pytest.raises(json.JSONDecodeError):  # plain text: Internal Server Error
        post(good)
    model.encode_video = honest
    assert post(good)[0] == 200
