"""``xclip_fast.info`` tells the truth about what is here, and never fails over what is not."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from xclip_fast.kernels import dispatch
from xclip_fast.kernels.cpu import library
from xclip_fast.kernels.dispatch import OPS
from xclip_fast.kernels.dispatch.parts import PARTS
from xclip_fast.kernels.dispatch.support import Backend

from xclip_fast import backend, info
from xclip_fast.inference.placement import placed


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to put fake packages into; what they import is forgotten afterwards."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "flash_attn", raising=False)
    return tmp_path


def test_collect_is_json_and_covers_every_op():
    found = info.collect()
    assert json.loads(json.dumps(found)) == found
    assert found["versions"]["torch"]["version"] == torch.__version__
    assert found["versions"]["av"]["version"]
    assert {name for name in found["ops"] if not name.startswith(" ")} == set(OPS)
    assert {name.strip() for name in found["ops"]} - set(OPS) == set(PARTS)
    for op in OPS:
        choice = found["ops"][op]["cpu"]
        assert choice["chosen"] in choice["backends"]
        assert choice["backends"][choice["chosen"]] is None
        assert choice["backends"]["reference"] is None, op
    assert found["ops"]["cct_block"]["cpu"]["chosen"] == "reference"
    attention = found["ops"]["  attention"]["cpu"]["backends"]
    assert "flash-attn" in attention["flash_attn"] or "not measured" in attention["flash_attn"]
    assert bool(found["cuda"]["devices"]) == torch.cuda.is_available()
    assert (found["cuda"]["reason"] is None) == torch.cuda.is_available()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_typical_arguments_are_what_the_ops_take(dtype):
    """They run, and give a block's shapes."""
    arguments = info.typical_arguments("cpu", dtype)
    assert set(arguments) == set(OPS)
    shapes = {
        "cct_block": (8, 198, 768),
        "patch_embed": (8, 198, 768),
        "layer_norm": (8, 197, 768),
        "quick_gelu": (8, 197, 3072),
        "cosine_logits": (1, 16),
    }
    with torch.inference_mode():
        for name, args in arguments.items():
            result = OPS[name](*args)
            result = result[0] if isinstance(result, tuple) else result
            assert tuple(result.shape) == shapes.get(name, tuple(result.shape)), name


def test_refusals_and_the_forced_backend_are_told(monkeypatch, capsys):
    op, other = OPS["quick_gelu"], OPS["cct_block"]
    gpu_only = Backend("cudnn", op.reference, device_types=("cuda",))
    monkeypatch.setattr(op, "backends", (gpu_only, op.backends[-1]))
    monkeypatch.setattr(op, "names", ("cudnn", "reference"))
    monkeypatch.setattr(other, "backends", other.backends[-1:])
    monkeypatch.setattr(other, "names", ("reference",))
    choice = info.collect()["ops"]["quick_gelu"]["cpu"]
    assert choice["chosen"] == "reference"
    assert choice["backends"]["cudnn"].startswith("device cpu is not cuda")
    assert choice["backends"]["reference"] is None
    with backend("cudnn"):
        found = info.collect()
        assert found["forced_backend"] == "cudnn"
        assert found["ops"]["quick_gelu"]["cpu"]["chosen"] is None  # forced, and refused
        assert found["ops"]["cct_block"]["cpu"]["chosen"] == "reference"  # has no such backend
        info.show()
    out = capsys.readouterr().out
    lines = out.splitlines()
    assert "backend\tcudnn" in lines
    assert "ops\tquick_gelu\tcudnn, reference\tnone" in lines
    assert all(line.split("\t")[0] in ("versions", "devices", "backend", "ops", "refused") for line in lines)
    assert "device cpu is not cuda" in out


@pytest.mark.parametrize("reason", [None, "it is an older one: install again"])
def test_the_cpu_library_and_its_instructions_are_named(monkeypatch, capsys, caplog, reason):
    sets = {torch.float32: "avx512", torch.bfloat16: None}
    monkeypatch.setattr(library, "instruction_set", sets.get)
    monkeypatch.setattr(library, "load", lambda name: (None, reason))
    monkeypatch.setattr(dispatch, "_logged", set())
    info.show()
    told = "with the CPU library: avx512 for float32;" if reason is None else f"without the CPU library: {reason};"
    assert told in capsys.readouterr().out
    for _ in range(2):
        placed("cpu", "float32")  # what every command calls
    assert len(caplog.records) == (reason is not None)
    assert (reason or "") in caplog.text


def test_missing_packages_are_named_with_the_command_that_installs_them(monkeypatch, capsys):
    monkeypatch.setattr(info, "_exists", lambda module: False)
    monkeypatch.setattr(info, "_distribution_version", lambda name: None)
    versions = info.collect()["versions"]
    assert versions["flash-attn"] == {
        "version": None,
        "note": "not installed; pip install 'xclip-fast[flash-attn]'",
    }
    assert versions["av"]["note"] == "not installed; pip install av"
    info.show()
    assert "pip install 'xclip-fast[dali]'" in capsys.readouterr().out


def test_a_package_that_does_not_import_is_told_so(site):
    (site / "flash_attn.py").write_text("raise OSError('undefined symbol: abc\\nmore')")
    found = info._versions()["flash-attn"]
    assert found["version"] == "unknown"
    assert found["note"] == "installed, but its import fails: OSError: undefined symbol: abc"


def test_why_there_is_no_cuda_device(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    assert info.collect_cuda() == {"devices": [], "reason": "this torch is built without CUDA"}
    monkeypatch.setattr(torch.version, "cuda", "13.0")

    def no_driver() -> None:
        raise RuntimeError("Found no NVIDIA driver on your system.\nPlease check")

    monkeypatch.setattr(torch.cuda, "init", no_driver)
    assert info.collect_cuda() == {"devices": [], "reason": "Found no NVIDIA driver on your system."}
    monkeypatch.setattr(torch.cuda, "init", lambda: None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert info.collect_cuda() == {"devices": [], "reason": "the driver reports no device"}


def test_a_gpu_that_others_have_filled(monkeypatch, capsys):
    gpu = SimpleNamespace(name="Some GPU", major=9, minor=0, total_memory=80 * 2**30, multi_processor_count=132)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "init", lambda: None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: gpu)
    real = info.typical_arguments

    def arguments(device, dtype):
        if device != "cpu":
            raise RuntimeError("CUDA out of memory.\nTried")
        return real(device, dtype)

    monkeypatch.setattr(info, "typical_arguments", arguments)
    found = info.collect()
    assert [device["index"] for device in found["cuda"]["devices"]] == [0, 1]
    assert list(found["ops"]["cct_block"]) == ["cpu", "cuda:0"]  # one of each kind
    choice = found["ops"]["cct_block"]["cuda:0"]
    assert (choice["dtype"], choice["chosen"]) == ("bfloat16", None)
    assert choice["backends"]["reference"] == "cuda:0 cannot be used: CUDA out of memory."
    info.show()
    out = capsys.readouterr().out
    assert "Some GPU" in out
    assert "sm_90, 80.0 GiB, 132 SMs" in out


@pytest.mark.gpu
def test_on_a_gpu_every_op_has_a_backend():
    found = info.collect()
    assert found["cuda"]["devices"][0]["name"] == torch.cuda.get_device_name(0)
    assert all(places["cuda:0"]["chosen"] for places in found["ops"].values())


def test_as_a_module_in_a_pipe():
    """A line for each fact, however long, and no escape codes."""
    process = subprocess.run([sys.executable, "-m", "xclip_fast", "info"], capture_output=True, text=True, check=True)
    assert process.stderr == ""
    assert "\x1b" not in process.stdout
    assert any(line.split("\t")[1:3] == ["torch", torch.__version__] for line in process.stdout.splitlines())
    assert any(line.split("\t")[:2] == ["ops", "cct_block"] for line in process.stdout.splitlines() if line)
