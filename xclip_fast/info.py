"""What this machine has, which backend each op would use here, and why not the others: ``xclip-fast info [--json]``.

``collect`` gathers plain data and ``show`` prints it. A missing package or device never raises: it is reported.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import json
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from . import __version__
from .console import first_line, print_rows
from .kernels import BackendError, Block, cuda_library, dispatch
from .kernels.cct_block.plans import case_of
from .kernels.common.example import Maker, Sizes
from .kernels.cpu import library as cpu_library
from .kernels.dispatch.parts import PARTS
from .kernels.linear import NATIVE_ON_CPU

# Name as shown, module, distributions that contain it, how to install it (empty: xclip-fast requires it).
_PACKAGES = (
    ("triton", "triton", ("triton", "pytorch-triton", "triton-windows"), "pip install 'xclip-fast[gpu]'"),
    ("transformers", "transformers", ("transformers",), "pip install 'xclip-fast[hf]'"),
    ("flash-attn", "flash_attn", ("flash-attn",), "pip install 'xclip-fast[flash-attn]'"),
    ("xformers", "xformers", ("xformers",), "pip install 'xclip-fast[xformers]'"),
    (
        "DALI",
        "nvidia.dali",
        ("nvidia-dali-cuda130", "nvidia-dali-cuda120", "nvidia-dali-cuda110"),
        "pip install 'xclip-fast[dali]'",
    ),
    ("av", "av", ("av",), ""),
    ("tokenizers", "tokenizers", ("tokenizers",), ""),
    ("safetensors", "safetensors", ("safetensors",), ""),
    ("numpy", "numpy", ("numpy",), ""),
)
_NOT_IMPORTED = {"transformers"}  # pure Python and slow to import: its metadata is enough
_INSTRUCTIONS = {  # torch's functions that tell
    "AVX2": "_is_avx2_supported",
    "AVX512": "_is_avx512_supported",
    "AVX512-BF16": "_is_avx512_bf16_supported",
    "AMX": "_is_amx_tile_supported",
    "AMX-FP16": "_is_amx_fp16_supported",
}


def collect() -> dict[str, Any]:
    """Everything ``show`` prints, as JSON-ready data.

    Returns:
        ``python``; ``platform``; ``versions``: name -> ``{version, note}``, with version None for a missing package;
        ``cpu``; ``cuda``: ``{devices, reason}``, with reason None if there are devices; ``forced_backend``;
        ``ops``: op -> device -> ``{dtype, chosen, backends}``, where ``backends`` gives for each backend why it refuses
        typical arguments (B/16, 8 frames), or None if it takes them.
    """
    cuda = collect_cuda()
    places: list[tuple[str, torch.dtype]] = [("cpu", torch.float32)]
    kinds = {device["name"]: f"cuda:{device['index']}" for device in reversed(cuda["devices"])}
    places += [(place, torch.bfloat16) for place in sorted(kinds.values())]  # one GPU of each kind
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": _versions(),
        "cpu": _cpu(),
        "cuda": cuda,
        "forced_backend": dispatch.forced_backend(),
        "ops": _ops(places),
    }


def show(as_json: bool = False) -> None:
    """Print ``collect()`` on standard output, for people or as one JSON object."""
    found = collect()
    if as_json:
        print(json.dumps(found, indent=2))
        return

    def table(title: str, rows: Sequence[Sequence[str]], *header: str) -> None:
        in_terminal = sys.stdout.isatty()
        print_rows(title if in_terminal else title.partition(" ")[0].lower(), header, rows)
        if in_terminal:
            print()

    table("Versions", [(name, item["version"] or "-", item["note"]) for name, item in found["versions"].items()])
    cpu, cuda = found["cpu"], found["cuda"]
    products = [f"{dtype} {'native' if on else 'products in float32'}" for dtype, on in cpu["native_gemm"].items()]
    instructions = ", ".join(cpu["instructions"]) or "no vector instructions known"
    threads = f"{cpu['threads']} thread" + "s" * (cpu["threads"] != 1)
    sets = ", ".join(f"{name} for {dtype}" for dtype, name in cpu["library_instructions"].items())
    library = f"without the CPU library: {cpu['library']}" if cpu["library"] else f"with the CPU library: {sets}"
    devices = [("cpu", cpu["model"], f"{threads}, {instructions}; {library}; {', '.join(products)}")]
    for gpu in cuda["devices"]:
        size = f"sm_{gpu['capability'].replace('.', '')}, {gpu['memory_gib']} GiB, {gpu['multiprocessors']} SMs"
        devices.append((f"cuda:{gpu['index']}", gpu["name"], size))
    if cuda["reason"]:
        devices.append(("cuda", "none", cuda["reason"]))
    table("Devices", devices)
    places = list(next(iter(found["ops"].values())))
    rows = []
    refusals: dict[tuple[str, str, str], list[str]] = {}
    for op, by_place in found["ops"].items():
        names = list(dict.fromkeys(name for place in by_place.values() for name in place["backends"]))
        rows.append((op, ", ".join(names), *(by_place[place]["chosen"] or "none" for place in places)))
        for place, choice in by_place.items():
            for name, reason in choice["backends"].items():
                if reason:
                    refusals.setdefault((place, name, reason), []).append(op.strip())
    heads = [f"{place} {next(iter(found['ops'].values()))[place]['dtype']}" for place in places]
    if not sys.stdout.isatty():
        print_rows("backend", (), [(found["forced_backend"],)])
    table(f"Ops (XCLIP_FAST_BACKEND: {found['forced_backend']})", rows, "op", "backends", *heads)
    if refusals:
        lines = [(place, name, reason, ", ".join(ops)) for (place, name, reason), ops in refusals.items()]
        table("Refused", lines, "device", "backend", "reason", "ops")


def _versions() -> dict[str, dict[str, str | None]]:
    found: dict[str, dict[str, str | None]] = {
        "xclip_fast": {"version": __version__, "note": str(Path(__file__).parent)},
        "torch": {"version": torch.__version__, "note": ""},
        "CUDA": {"version": torch.version.cuda, "note": "that this torch is built for" if torch.version.cuda else ""},
    }
    if torch.version.cuda is None:
        hip = getattr(torch.version, "hip", None)
        found["CUDA"]["note"] = f"this torch is built for ROCm {hip}" if hip else "this torch is built without CUDA"
    library, reason = cuda_library.load(cuda_library.path())
    version = None if library is None else f"interface {cuda_library.ABI}"
    found["CUDA library"] = {"version": version, "note": reason or str(cuda_library.path())}
    for name, module, distributions, install in _PACKAGES:
        found[name] = _package(module, distributions, install, name not in _NOT_IMPORTED)
    return found


def _package(module: str, distributions: tuple[str, ...], install: str, try_it: bool) -> dict[str, str | None]:
    version = next((found for name in distributions if (found := _distribution_version(name))), None)
    if not _exists(module):
        note = f"not installed; {install or 'pip install ' + distributions[0]}"
        return {"version": None, "note": f"{distributions[0]} {version} has no module {module}" if version else note}
    note = ""
    if try_it:
        try:
            loaded = importlib.import_module(module)
            version = version or getattr(loaded, "__version__", None)
        except Exception as error:  # a wheel built for another torch can raise anything
            note = f"installed, but its import fails: {type(error).__name__}: {first_line(error)}"
    return {"version": version or "unknown", "note": note}


def _distribution_version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _exists(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):  # its parent package is missing, or a stub of it is in sys.modules
        return False


def _cpu() -> dict[str, Any]:
    sets = {dtype: cpu_library.instruction_set(dtype) for dtype in (torch.float32, torch.bfloat16)}
    no_library = cpu_library.load(sets[torch.float32])[1]
    questions = {name: getattr(torch.cpu, question, None) for name, question in _INSTRUCTIONS.items()}
    return {
        "model": _cpu_model(),
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),  # the code path that torch takes
        "instructions": [name for name, ask in questions.items() if ask is not None and ask()],
        "library": no_library,  # the reason, or None: inference runs on it
        "library_instructions": {_dtype_name(dtype): name for dtype, name in sets.items() if not no_library and name},
        "native_gemm": {_dtype_name(dtype): native for dtype, native in NATIVE_ON_CPU.items()},
    }


def environment(device: str | torch.device) -> dict[str, Any]:
    """The device's name and the versions of the packages, for the files of an evaluation or a benchmark."""
    cpu = _cpu_model()
    return {
        "device": torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else cpu,
        "cpu": cpu,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "xclip_fast": __version__,
        **{name: _distribution_version(name) for name in ("torch", "triton", "transformers", "numpy", "av")},
    }


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass  # not Linux
    return platform.processor() or platform.machine() or "unknown"


def collect_cuda() -> dict[str, Any]:
    """The CUDA ``devices``, and the ``reason`` why there are none (None if there are some)."""
    if torch.version.cuda is None:
        return {"devices": [], "reason": "this torch is built without CUDA"}
    try:
        torch.cuda.init()
        devices = [_device(index) for index in range(torch.cuda.device_count())]
    except (RuntimeError, AssertionError) as error:  # no driver, an old driver, no visible device
        return {"devices": [], "reason": first_line(error)}
    return {"devices": devices, "reason": None if devices else "the driver reports no device"}


def _device(index: int) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(index)
    return {
        "index": index,
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "multiprocessors": properties.multi_processor_count,
    }


def _ops(places: list[tuple[str, torch.dtype]]) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {name: {} for name in dispatch.OPS}
    for device, dtype in places:
        try:
            arguments = typical_arguments(device, dtype)
        except RuntimeError as error:  # its memory is full, or another process has it for itself
            names = {name: op.names for name, op in dispatch.OPS.items()}
            for name, backends in {**names, **{f"  {name}": part.names for name, part in PARTS.items()}}.items():
                unusable = dict.fromkeys(backends, f"{device} cannot be used: {first_line(error)}")
                found.setdefault(name, {})[device] = {"dtype": _dtype_name(dtype), "chosen": None, "backends": unusable}
            continue
        for name, op in dispatch.OPS.items():
            args = arguments[name]
            try:
                chosen = op.choose(args).name
            except BackendError:
                chosen = None
            reasons = op.reasons(args)
            found[name][device] = {"dtype": _dtype_name(dtype), "chosen": chosen, "backends": reasons}
        for name, part in _parts(Block(*arguments["cct_block"]), dtype).items():
            found.setdefault(name, {})[device] = part
    return found


def _parts(block: Block, dtype: torch.dtype) -> dict[str, dict[str, Any]]:
    """The backend of each part of a block, where the block runs fused."""
    case = case_of(block, False)
    found = {}
    for name, part in PARTS.items():
        labels = name == "packed_attention"
        reasons = part.refusals(case._replace(packed=True, causal=True, length=12, frames=0) if labels else case)
        chosen = next((candidate for candidate, reason in reasons.items() if reason is None), None)
        found[f"  {name}"] = {"dtype": _dtype_name(dtype), "chosen": chosen, "backends": reasons}
    return found


def typical_arguments(device: str, dtype: torch.dtype) -> dict[str, tuple[Any, ...]]:
    """Each op's arguments for one video of 8 frames in B/16, uninitialized, by the op's name."""
    make = Maker(device, dtype, empty=True)
    return {name: op.example(Sizes(), make) for name, op in dispatch.OPS.items()}


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
