"""Train or fine-tune an X-CLIP (sections 4.1 to 4.5 of the paper; the recipe is in config.py).

    xclip-fast train config.yaml data.train=train.jsonl optim.lr=1e-5
    torchrun --nproc-per-node 8 -m xclip_fast train config.yaml

A step never waits for the device: its measurements are copied to pinned memory and read a few steps later. Every
random number depends on (seed, step, process) or (seed, epoch, video) alone. So a resumed run gives the same weights as
an unbroken one.

B videos of a batch, T frames, S side in pixels, K labels.
"""

from __future__ import annotations

import contextlib
import json
import math
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..data.manifest.manifest import Manifest
from ..evaluate.loop import evaluate
from ..files import write_text
from ..inference.processes import Process, find_device, join_processes
from ..inference.tuning import tune_before
from ..model import XCLIP
from ..schema import ConfigError
from ..weights import checkpoint
from ..weights.recipe import FILE as TRAINED
from ..weights.recipe import Trained
from . import checkpoints as training_checkpoint
from . import config as train_config
from . import log as training_log
from . import mixup as mixing
from . import optim
from .checkpoints import Checkpoints, SaveError
from .config import TrainConfig
from .metrics import Diverged, Measured, Meter
from .output_dir import output_folder
from .setup import (
    SHAPE,
    Objective,
    build_model,
    gather_full_model,
    parallelize,
    read_data,
    resume_model,
    training_loader,
)

FEW_STEPS, SMALL_MOVE = 100, 0.01  # a run of fewer steps, whose learning rates sum to less, says that it hardly trains


def train(config: TrainConfig, *, fresh: bool = False) -> Path:
    """One training run, from the start or from the newest checkpoint in the output folder.

    Args:
        fresh: start over. If the output folder is taken, the run gets a new folder beside it.

    Returns:
        the output folder. Its folders ``best`` and ``last`` hold weights for ``XCLIP.from_pretrained``.

    Raises:
        ConfigError: before the first step, if the configuration, the data and the weights do not fit each other.
        Diverged: if the loss or the gradient is not finite.
        SaveError: if a checkpoint or the weights cannot be written.
    """
    try:
        device = find_device(config.device)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    with join_processes(device) as process, contextlib.ExitStack() as held:
        return _train(config, process, fresh, held)


def _train(config: TrainConfig, process: Process, fresh: bool, held: contextlib.ExitStack) -> Path:
    # 1. Data, model, and the checkpoint to go on from, if the output folder has one.
    device, rank, world = process.device, process.rank, process.world
    batch_size, grad_accum_steps = train_config.accumulation(config.optim, world)
    data = read_data(config.data, config.seed)
    folder, resume = output_folder(config, fresh, process, held)
    if resume is not None:
        model = resume_model(folder, config.seed)
    else:
        size, templates = config.data.size, config.text_templates
        model = build_model(config.model, data.texts, seed=config.seed, size=size, templates=templates)
    model.checkpoint_activations(config.activation_checkpointing)
    tune_before(model.config, len(data.train) * config.optim.epochs, device, training=True)
    model.to(device).train()
    optim.freeze(model, config.train_towers, config.optim.also_new)
    objective = Objective(model, data.texts, device, bf16=config.precision == "bf16", templates=config.text_templates)
    loader = training_loader(config.data, config.seed, data.train, model.config, batch_size, process)
    epoch_steps = math.ceil(len(loader) / grad_accum_steps)
    steps = epoch_steps * config.optim.epochs
    warmup = round(epoch_steps * config.optim.warmup_epochs)
    last = min(steps, config.stop_after or steps)
    trained = Trained(
        dict(zip(data.train.classes, data.texts, strict=True)),
        config.data.frames or model.config.num_frames,
        config.data.sampling,
        config.data.stride,
        config.text_templates,
    )
    if rank == 0:
        write_text(folder / SHAPE, json.dumps(model.config.to_dict(), indent=1) + "\n")

    # 2. Processes, optimizer, moving average. A resumed run reads their state.
    net = parallelize(objective, process, config.strategy, config.compile, recompute=config.activation_checkpointing)
    optimizer = optim.optimizer(objective, config.optim)
    ema = optim.start_ema(objective) if config.optim.ema is not None else None
    tensors = training_checkpoint.state(objective, optimizer, ema)
    checkpoints = Checkpoints(folder / "checkpoints", config.checkpoint.keep_last)
    fingerprint = loader.state_dict()["fingerprint"]
    counted: dict[str, Any] = {"step": 0, "best": None, "epoch_steps": epoch_steps, "data": fingerprint}
    if resume is not None:
        counted = training_checkpoint.resumed(resume, counted)
        training_checkpoint.load(resume, tensors)
        optim.set_step(optimizer, counted["step"])
    step, best, saved = counted["step"], counted["best"], counted["step"]
    if rank == 0:
        training_log.cut(folder, step)
    records = training_log.Log(folder, config.log, steps, silent=rank > 0)
    records.say(
        f"{f'going on after step {step}' if step else 'starting'}, {steps} steps of {config.optim.batch_size} videos "
        f"({batch_size} videos x {grad_accum_steps} accumulation steps x {world} processes), "
        f"{len(data.train.usable)} videos, "
        f"{len(data.texts)} classes"
    )
    if steps < FEW_STEPS and steps * config.optim.lr < SMALL_MOVE and not step:
        records.say(
            f"note: {steps} steps at a learning rate of {config.optim.lr:g} change little, because a step of AdamW "
            "moves a weight by about the learning rate. If accuracy does not rise, raise optim.lr or optim.epochs"
        )
    meter = Meter(
        records,
        process,
        data.train.name,
        step=step,
        steps=steps,
        epoch_steps=epoch_steps,
        log_every=config.log.every,
        save_minutes=config.checkpoint.every_minutes,
        with_norm=config.optim.clip_grad is not None,
    )

    def save() -> None:
        nonlocal saved
        meter.read_all()  # raises Diverged: a run whose loss is not finite saves nothing
        checkpoints.save(tensors, counted | {"step": step, "best": best})
        saved = step
        meter.saved()

    # 3. Epochs, steps, accumulation steps.
    try:
        with handle_signals(meter):
            told_bad: set[int] = set()
            while step < last and not meter.stop:
                epoch, done = divmod(step, epoch_steps)
                loader.seek(epoch, done * grad_accum_steps)
                batches = iter(loader)
                for step_in_epoch in range(done, min(epoch_steps, done + last - step)):
                    torch.manual_seed(step_seed(config.seed, step, rank))  # for drop path
                    measured = Measured(step, optim.set_rate(optimizer, config.optim, step, steps, warmup))
                    count = min(grad_accum_steps, len(loader) - step_in_epoch * grad_accum_steps)
                    for part in range(count):
                        batch = measured.wait(batches)
                        key = (config.seed, step, part * world + rank)
                        frames, targets_BK = mixing.mix(batch.frames, batch.labels, len(data.texts), config.mixing, key)
                        with optim.reduce_gradients(net, part == count - 1):
                            losses_B, correct_B = net(frames, targets_BK)
                            # divided by the full batch size: a short batch weighs less, and processes may differ
                            (losses_B.sum() * (world / config.optim.batch_size)).backward()
                        measured.add(losses_B, correct_B, batch.samples)
                    if config.strategy == "fsdp2":
                        optim.reduce_scalars(objective, world)
                    if config.optim.clip_grad is not None:
                        measured.norm = optim.clip_gradients(objective.parameters(), config.optim.clip_grad)
                    optimizer.step()
                    optimizer.zero_grad(set_to_none=True)
                    if ema is not None and config.optim.ema is not None:
                        optim.update_ema(ema, objective, config.optim.ema, step)
                    step += 1
                    meter.take(measured.send(device, world, meter.wishes()))
                    every = config.checkpoint.every_steps
                    if meter.save or meter.stop or (every and step % every == 0):
                        save()
                    checkpoints.poll()
                    if meter.stop:
                        break

                # 4. The end of an epoch: validate, keep the best, save.
                if meter.stop or step % epoch_steps:
                    break
                meter.read_all()
                if loader.report.bad.keys() - told_bad:  # once, not after every epoch
                    told_bad = set(loader.report.bad)
                    records.say(f"epoch {epoch + 1}: {loader.report.summary()}")
                    loader.quarantined().write(folder / f"quarantined{rank or ''}.jsonl")
                if data.val is not None and ((epoch + 1) % config.validation.every_epochs == 0 or step == steps):
                    whole = gather_full_model(objective, ema, device)
                    found = validate(whole, data.val, config, trained)
                    records.write({"kind": "validation", "step": step, "epoch": epoch + 1, **found})
                    score = training_log.rank(found, config.checkpoint.metric)
                    if best is None or score > tuple(best["score"]):
                        best = {"score": score, "epoch": epoch + 1, "step": step}
                        keep(whole, folder / "best", trained, found | best, rank)
                    del whole
                every = config.checkpoint.every_epochs
                if step == steps or (every and (epoch + 1) % every == 0):
                    save()
                meter.restart()
            if saved != step:
                save()
            checkpoints.finish()
    except Diverged as error:
        checkpoints.finish()
        good = training_checkpoint.latest(folder / "checkpoints")
        raise Diverged(f"{error}. The last good checkpoint is {good or 'none'}") from None
    finally:
        records.close()
        loader.close()
    if meter.stop:
        print(f"ended by a signal and saved after step {step}; run the same command to go on", file=sys.stderr)
        raise SystemExit(128 + (meter.signal or signal.SIGTERM))
    if step < steps:  # stop_after
        return folder

    # 5. The last weights and a report.
    whole = gather_full_model(objective, ema, device)
    keep(whole, folder / "last", trained, {"step": step}, rank)
    if data.val is None:
        keep(whole, folder / "best", trained, {"step": step}, rank)
    if rank == 0:
        about = {
            "videos": f"{len(data.train.usable)} of {len(data.train)}, {len(data.texts)} classes",
            "parameters": f"{sum(parameter.numel() for parameter in whole.parameters()) / 1e6:.1f} million",
            "steps": f"{steps}, {epoch_steps} an epoch, of {config.optim.batch_size} videos",
            "processes": f"{world}, on {torch.cuda.get_device_name(device) if device.type == 'cuda' else 'CPU'}",
        }
        report = training_log.report(folder, config, about)
        print(f"done: weights in {folder / 'best'}, report in {report}", file=sys.stderr)
    return folder


def step_seed(seed: int, step: int, rank: int) -> int:
    return int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0] >> np.uint64(1))


@contextlib.contextmanager
def handle_signals(meter: Meter) -> Iterator[None]:
    """SIGTERM (from a scheduler) and Ctrl-C end the run after a checkpoint. A second signal ends it at once."""
    before: dict[int, Any] = {}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def handle(number: int, _: Any) -> None:
        meter.signal = number
        restore()
        print("saving a checkpoint, then ending; a second signal ends at once, without a checkpoint", file=sys.stderr)

    if threading.current_thread() is threading.main_thread():  # no other may set them
        for number in (signal.SIGTERM, signal.SIGINT):
            before[number] = signal.signal(number, handle)
    try:
        yield
    finally:
        restore()


def validate(model: XCLIP, videos: Manifest, config: TrainConfig, trained: Trained) -> dict[str, Any]:
    """Top-1, top-5 and loss on the videos, as a log record has them. Each process takes its part of the videos."""
    result = evaluate(
        model,
        videos,
        clips=config.validation.clips,
        crops=config.validation.crops,
        labels=trained.labels,
        **trained.choose(),
        batch_size=config.validation.batch_size or config.optim.device_batch,
        dtype=torch.bfloat16 if config.precision == "bf16" else None,
        workers=config.data.workers,
    )
    top5 = result.top5 if len(result.labels) > 5 else math.nan  # with five classes or fewer it is always 100 %
    figures = {"top1": result.top1, "top5": top5, "loss": result.loss}
    found = {key: value if math.isfinite(value) else None for key, value in figures.items()}
    return {**found, "predicted": len(result.predictions), "failed": len(result.failed)}


def keep(model: XCLIP, folder: Path, trained: Trained, about: dict[str, Any], rank: int) -> None:
    """Writes weights for ``XCLIP.from_pretrained``, with the recipe that they were trained with."""
    if rank:
        return
    try:
        files = {TRAINED: trained.to_json(), "metrics.json": json.dumps(about) + "\n"}
        checkpoint.write(model.state_dict(), model.config, folder, overwrite=True, beside=files)
    except OSError as error:
        raise SaveError(f"the weights could not be written: {error}") from error
