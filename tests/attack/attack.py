"""What the attacks share: mutants by seed, and a process that tries them under limits of time and memory.

`XCLIP_FAST_ATTACK=20` makes twenty times as many mutants as a plain run.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import resource
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

TIMES = int(os.environ.get("XCLIP_FAST_ATTACK", "1"))
SECONDS = 20.0  # a case
MEMORY = 3 << 30  # bytes that a case may add


def mutant(data: bytes, seed: int) -> bytes:
    """One of six kinds of damage, at places that the seed draws."""
    rng = random.Random(seed)
    found = bytearray(data)
    kind = rng.randrange(6)
    at, length = rng.randrange(len(found)), rng.choice((1, 2, 4, 16, 200))
    if kind == 0:
        return bytes(found[: rng.randrange(len(found))])
    if kind == 1:
        for _ in range(rng.choice((1, 3, 20))):
            found[rng.randrange(len(found))] = rng.choice((0, 1, 127, 128, 255, rng.randrange(256)))
    elif kind == 2:
        found[at : at + length] = rng.choice((b"\0", b"\xff")) * length
    elif kind == 3:
        del found[at : at + length]
    elif kind == 4:
        start = rng.randrange(len(found))
        found[at:at] = found[start : start + 4 * length]
    else:  # the head is where sizes and counts lie
        for _ in range(rng.choice((1, 2, 5))):
            found[rng.randrange(min(len(found), 600))] = rng.choice((0, 1, 127, 128, 255, rng.randrange(256)))
    return bytes(found)


def _serve(connection: Any, attempt: Callable[[Any], str]) -> None:
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    while True:
        case = connection.recv()
        try:
            connection.send(attempt(case))
        except BaseException as error:
            connection.send(f"wrong: {type(error).__name__}: {error}")


def outcomes(cases: Iterable[Any], attempt: Callable[[Any], str]) -> tuple[Counter[str], list[str]]:
    """Counts of what `attempt` says of each case, and a line for each that is not as it should be.

    `attempt` returns "right" or "error"; whatever else it says or raises, a death and a case that takes longer than
    SECONDS are the lines.
    """
    context = multiprocessing.get_context("fork")
    counts: Counter[str] = Counter()
    wrong: list[str] = []
    process = connection = None
    for case in cases:
        if process is None:
            connection, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, attempt), daemon=True)
            process.start()
            theirs.close()
        connection.send(case)
        try:
            told = connection.recv() if connection.poll(SECONDS) else f"slow: longer than {SECONDS:g} s"
        except EOFError:
            process.join(5)
            told = f"died: exit status {process.exitcode}"
        if told not in ("right", "error"):
            wrong.append(f"{case}: {told}")
        if told.startswith(("slow", "died")):
            process.kill()
            process = None
        counts[told.split(":")[0]] += 1
    if process is not None:
        process.kill()
    return counts, wrong
