"""Weight files: safetensors, ``torch.save`` and TorchScript archives, whole or in shards. None of their code runs.

torch's ``weights_only`` reader reads a ``torch.save`` file. Classes that it does not know are replaced by stand-ins
that do nothing: harmless classes always, others only if the caller allows it. A reader of our own, which knows nothing
but tensors, reads a TorchScript archive.
"""

from __future__ import annotations

import errno
import pickle
import re
import stat
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..console import first_line
from ..files import read_json, require_regular
from .layouts import CheckpointError, State
from .wrappers import unwrap

SLACK = 64 << 20  # bytes by which the tensors of a file may exceed the file: shared or expanded ones


class _Empty:
    """Stands for a class that is never imported. Its objects are empty OrderedDicts."""

    def __new__(cls, *args: object) -> Any:
        return OrderedDict()


class _Blank:
    """Stands for a class whose pickled state is not a dictionary (a NumPy array). The state is dropped."""

    def __init__(self, *args: object) -> None: ...

    def __setstate__(self, state: object) -> None: ...


# Classes that training scripts store beside the weights, by exact name.
_BUILTINS = (
    *("list", "dict", "set", "frozenset", "tuple", "int", "float", "str", "bool", "complex", "bytearray"),
    *("object", "slice", "range"),
)
_HARMLESS: dict[str, type] = {
    **{f"{module}.{name}": _Empty for module in ("builtins", "__builtin__") for name in _BUILTINS},
    **{f"{module}._reconstructor": _Empty for module in ("copyreg", "copy_reg")},
    **{
        f"pathlib{part}.{pure}{system}Path": _Empty
        for part in ("", "._local")
        for pure in ("", "Pure")
        for system in ("", "Posix", "Windows")
    },
    **dict.fromkeys(("argparse.Namespace", "types.SimpleNamespace", "collections.defaultdict"), _Empty),
    **dict.fromkeys(
        ("_codecs.encode", "datetime.datetime", "datetime.date", "datetime.timedelta", "uuid.UUID"), _Empty
    ),
    **dict.fromkeys(("numpy.dtype", "numpy.ndarray"), _Blank),
    **{
        f"numpy.{core}.multiarray.{name}": kind
        for core in ("core", "_core")
        for name, kind in (("scalar", _Empty), ("_reconstruct", _Blank))
    },
}


def read_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file; an empty one if the file does not exist."""
    if not path.exists():
        return {}
    try:
        return read_json(path)
    except ValueError as error:
        raise CheckpointError(str(error)) from error


def read_weights(path: Path, drop_config: bool) -> dict[str, Any]:
    """The state dict of a file, or of all shards that an index (``.json``) names. See ``_read_file``."""
    if path.suffix != ".json":
        return _read_file(path, drop_config)
    shards = read_object(path).get("weight_map", {})
    if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
        raise CheckpointError(f"{path}: weight_map must be an object from tensor names to file names")
    names = sorted(set(shards.values()))
    if bad := [name for name in names if Path(name).name != name or not (path.parent / name).exists()] or not names:
        raise CheckpointError(
            f"{path}: {f'these shards are not in the folder: {bad}' if names else 'it names no shards'}"
        )
    return {name: tensor for shard in names for name, tensor in _read_file(path.parent / shard, drop_config).items()}


def _read_file(path: Path, drop_config: bool) -> dict[str, Any]:
    """The state dict of one file, with the names that it has.

    Raises:
        CheckpointError: if the file is damaged or of another kind, whatever its bytes are.
        OSError: if the file cannot be read.
    """
    from safetensors.torch import load_file

    try:
        require_regular(path)
    except ValueError as error:
        raise CheckpointError(str(error)) from error
    with path.open("rb") as file:
        head = file.read(9)
    try:
        if head[8:] == b"{":
            return load_file(path)
        if head[:2] in (b"PK", b"\x80\x02"):  # torch.save since 1.6, and before
            found = _read_torch(path, drop_config)
            if not isinstance(found, dict):
                raise CheckpointError(f"{path}: a state dict is wanted, {type(found).__name__} found")
            return _own(unwrap(found, path), path)
    except CheckpointError:
        raise
    except Exception as error:  # damaged bytes raise errors of many kinds in the readers
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise CheckpointError(f"{path}: is damaged or incomplete; download it again ({first_line(error)})") from error
    raise CheckpointError(f"{path}: is neither a safetensors nor a PyTorch file (it begins with {head!r})")


def write_weights(state: Mapping[str, Tensor], path: Path) -> None:
    """Writes a safetensors file. Raises OSError if the disk refuses."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    path.touch()
    mode = stat.S_IMODE(path.stat().st_mode)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    try:
        save_file(tensors, path, metadata={"format": "pt"})
        path.chmod(mode)  # safetensors makes it private
    except SafetensorError as error:
        number = errno.ENOSPC if f"code: {errno.ENOSPC}," in str(error) else errno.EIO
        raise OSError(number, f"{path}: could not be written: {error}") from error


def _read_torch(path: Path, drop_config: bool) -> Any:
    """The content of a ``torch.save`` file, or the state dict of a TorchScript archive. Tensors may lie in the mapped
    file.

    Args:
        drop_config: replace pickled objects of unknown classes by stand-ins instead of refusing the file.

    Raises:
        CheckpointError: if the file holds objects of unknown classes, or unpacks to more bytes than it has.
    """
    size = require_regular(path)
    zipped = zipfile.is_zipfile(path)
    if zipped:
        with zipfile.ZipFile(path) as archive:
            total = sum(entry.file_size for entry in archive.infolist())
            if total > size:
                raise CheckpointError(
                    f"{path}: its {size} bytes unpack to {total}; torch.save never compresses weights"
                )
            if any(name.endswith("/constants.pkl") for name in archive.namelist()):
                return _read_torchscript(archive)
    left_out: list[str] = []
    kinds = iter((_Empty, _Blank))
    kind = next(kinds)
    while True:
        stand_ins: Any = [(kind, name) for name, kind in (_HARMLESS | dict.fromkeys(left_out, kind)).items()]
        try:
            with torch.serialization.safe_globals(stand_ins), warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # torch's, of the pickle protocol
                return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
        except pickle.UnpicklingError as error:
            if (found := re.search(r"GLOBAL (\S+)", str(error))) is None:
                detail = str(error).split("WeightsUnpickler error:")[-1].strip().split("\n")[0]
                raise CheckpointError(
                    f"{path}: is damaged or incomplete, or holds more than tensors: {detail}"
                ) from error
            name = found[1] if "." in found[1] else f"builtins.{found[1]}"
            if "is blocked" in str(error) or name in left_out or len(left_out) == 100:
                raise CheckpointError(
                    f"{path}: holds a pickled {name}, which does not belong in a file of weights"
                ) from error
            if not drop_config:
                raise CheckpointError(
                    f"{path}: holds a pickled {name} beside the weights. To leave such objects out, run `xclip-fast "
                    f"convert {path} NEW_FOLDER --drop-config` and use the new folder. It runs no code of the file"
                ) from error
            left_out.append(name)
        except (TypeError, ValueError):  # a state that is not a dictionary
            if not left_out or (other := next(kinds, None)) is None:
                raise
            kind = other


def _own(state: dict[Any, Any], path: Path) -> dict[Any, Any]:
    """Copies the tensors out of the mapped file, which may be replaced, or be large because of optimizer state.

    Raises:
        CheckpointError: if the tensors take far more memory than the file has bytes (expanded from few numbers).
    """
    total = sum(value.numel() * value.element_size() for value in state.values() if isinstance(value, Tensor))
    size = path.stat().st_size
    if total > 2 * size + SLACK:
        raise CheckpointError(f"{path}: its {size} bytes hold tensors of {total} bytes; this is not a file of weights")
    return {name: value.clone() if isinstance(value, Tensor) else value for name, value in state.items()}


# Python's unpickler, not the one in C, in which a few bytes can ask for gigabytes (the index of a memo)
class _TorchScriptReader(pickle._Unpickler):
    """Reads the tensors of a TorchScript archive, the form of OpenAI's CLIP, without its code."""

    def __init__(self, archive: zipfile.ZipFile) -> None:
        data = next(name for name in archive.namelist() if name.endswith("/data.pkl"))
        super().__init__(archive.open(data))
        self.archive, self.root = archive, data.removesuffix("data.pkl")

    def find_class(self, module: str, name: str) -> Any:
        if module == "__torch__" or module.startswith("__torch__."):
            return _Empty
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _view
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch" and name.endswith("Storage"):
            return name
        raise pickle.UnpicklingError(f"GLOBAL {module}.{name} does not belong in a TorchScript archive of CLIP")

    def persistent_load(self, saved: Any) -> Tensor:
        _, storage, key, _, _ = saved
        dtypes = {"Float": torch.float32, "Half": torch.float16, "BFloat16": torch.bfloat16, "Long": torch.int64}
        data = bytearray(self.archive.read(f"{self.root}data/{key}"))
        return torch.frombuffer(data, dtype=dtypes[storage.removesuffix("Storage")])


def _view(storage: Tensor, offset: int, size: Any, stride: Any, *_: object) -> Tensor:
    return storage.as_strided(size, stride, offset)


def _read_torchscript(archive: zipfile.ZipFile) -> State:
    state: State = {}

    def collect(module: Any, prefix: str) -> None:
        for name, value in vars(module).items():
            if isinstance(value, Tensor):
                state[prefix + name] = value
            elif isinstance(value, OrderedDict):
                collect(value, f"{prefix}{name}.")

    collect(_TorchScriptReader(archive).load(), "")
    return state
