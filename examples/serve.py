"""A server that classifies uploaded clips, batching requests that come together.

    pip install fastapi uvicorn
    python examples/serve.py --checkpoint xclip-base-patch16 --labels "riding a bike,swimming"
    curl --data-binary @clip.mp4 http://127.0.0.1:8000/classify

The answer is JSON: {"labels": [{"label": "swimming", "probability": 0.93}, ...]}. What a request may take is bounded:
bytes (413), seconds (504), and the number of requests that wait (503). A file that is no video is 422. A clip lies in a
temporary file while it is decoded; nothing of a request becomes a path.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import tempfile
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from fastapi import FastAPI, HTTPException, Request

from xclip_fast import XCLIP, decode
from xclip_fast.data.decode import VideoError


class Batcher:
    """Runs the model on whatever clips wait, `size` at most, `wait` seconds after the first."""

    def __init__(self, model: XCLIP, labels: Sequence[str], size: int, wait: float) -> None:
        self.model, self.size, self.wait = model, size, wait
        self.queue: asyncio.Queue[tuple[torch.Tensor, asyncio.Future[list[float]]]] = asyncio.Queue()
        self.batches: list[int] = []  # sizes of those that ran
        with torch.inference_mode():
            self.text_KE = model.encode_text(list(labels))

    async def run(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            batch = [await self.queue.get()]
            end = loop.time() + self.wait
            while len(batch) < self.size:
                try:
                    batch.append(await asyncio.wait_for(self.queue.get(), max(0.0, end - loop.time())))
                except TimeoutError:
                    break
            batch = [item for item in batch if not item[1].done()]  # the client has gone
            if not batch:
                continue
            try:
                answers = await asyncio.to_thread(self._answer, [video for video, _ in batch])
            except Exception as error:
                for _, future in batch:
                    if not future.done():
                        future.set_exception(error)
                continue
            self.batches.append(len(batch))
            for (_, future), answer in zip(batch, answers, strict=True):
                if not future.done():
                    future.set_result(answer)

    def _answer(self, videos: list[torch.Tensor]) -> list[list[float]]:
        device = next(self.model.parameters()).device
        with torch.inference_mode():
            found = self.model.encode_video(torch.stack(videos).to(device))
            return self.model.similarity(found, self.text_KE).softmax(-1).tolist()

    async def ask(self, video: torch.Tensor) -> list[float]:
        future: asyncio.Future[list[float]] = asyncio.get_running_loop().create_future()
        await self.queue.put((video, future))
        return await future


def make_app(
    model: XCLIP,
    labels: Sequence[str],
    *,
    max_bytes: int = 64 << 20,
    seconds: float = 30,
    waiting: int = 64,
    batch_size: int = 8,
    batch_wait: float = 0.01,
    decoders: int = 2,
) -> FastAPI:
    """The application. `decoders`: threads; `waiting`: requests at once, further ones are sent away."""
    batcher = Batcher(model, labels, batch_size, batch_wait)
    pool = ThreadPoolExecutor(decoders, thread_name_prefix="decode")
    config = model.config

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        task = asyncio.create_task(batcher.run())
        yield
        task.cancel()
        pool.shutdown(wait=False, cancel_futures=True)

    app = FastAPI(title="xclip-fast", lifespan=lifespan)
    app.state.batcher = batcher
    in_work = 0

    async def answer(request: Request) -> list[float]:
        loop = asyncio.get_running_loop()
        with tempfile.NamedTemporaryFile(prefix="clip-") as file:
            size = 0
            async for chunk in request.stream():
                size += len(chunk)
                if size > max_bytes:
                    raise HTTPException(413, f"larger than {max_bytes} bytes")
                file.write(chunk)
            file.flush()
            frames = {"frames": config.num_frames, "size": config.vision.image_size}
            try:
                video = await loop.run_in_executor(pool, lambda: decode(file.name, **frames))
            except VideoError as error:
                raise HTTPException(422, str(error).replace(file.name, "the upload")) from error
        return await batcher.ask(video)

    @app.post("/classify")
    async def classify(request: Request) -> dict[str, Any]:
        nonlocal in_work
        if int(request.headers.get("content-length") or 0) > max_bytes:
            raise HTTPException(413, f"larger than {max_bytes} bytes")
        if in_work >= waiting:
            raise HTTPException(503, "too many requests wait; try again", {"Retry-After": "1"})
        in_work += 1
        try:
            values = await asyncio.wait_for(answer(request), seconds)
        except TimeoutError as error:
            raise HTTPException(504, f"took longer than {seconds:g} seconds") from error
        finally:
            in_work -= 1
        ranked = sorted(zip(labels, values, strict=True), key=lambda pair: -pair[1])
        return {"labels": [{"label": label, "probability": value} for label, value in ranked]}

    @app.get("/health")
    async def health() -> dict[str, int]:
        return {"waiting": in_work}

    return app


def main() -> None:
    import uvicorn

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--labels", required=True, help="a,b,c")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0 lets other machines in; there is no password")
    parser.add_argument("--port", type=int, default=8000)
    options = parser.parse_args()
    model = XCLIP.from_pretrained(options.checkpoint, device=options.device)
    labels = [label.strip() for label in options.labels.split(",")]
    uvicorn.run(make_app(model, labels), host=options.host, port=options.port)


if __name__ == "__main__":
    main()
