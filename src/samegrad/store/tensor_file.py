"""Tensors to and from one safetensors file, each piece of memory once, one tensor on the host at a time.

The file is written here because safetensors' own writer wants all tensors on the host, refuses shared memory, and
reports a full disk without its errno. It is read by safetensors, which checks every offset.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import safetensors
import torch
from torch import Tensor

from samegrad.errors import UsageError
from samegrad.store.durable import DurableFile
from samegrad.store.manifest import Damaged, View

_DTYPE_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.uint64: "U64", torch.uint32: "U32", torch.uint16: "U16", torch.uint8: "U8", torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
}  # fmt: skip
_REAL_OF_COMPLEX = {torch.complex64: torch.float32, torch.complex128: torch.float64}
_PIECE_ELEMENTS = 4 * 2**20


@dataclass(frozen=True, kw_only=True)
class TensorFile:
    """What one file will hold: ``stored`` tensors in file order, ``views`` on them, and the file's exact size."""

    header: bytes
    stored: Mapping[str, Tensor]
    views: tuple[View, ...]
    complex_names: tuple[str, ...]
    size_bytes: int


def lay_out(tensors: Mapping[str, Tensor], *, entry: str) -> TensorFile:
    """The plan of a file that gives every name of ``tensors`` back; reads no values.

    A tensor whose elements all lie within a contiguous one of the same storage and dtype becomes a view on it.
    Raises UsageError naming a tensor that cannot be stored (sparse, quantized, on the meta device).
    """
    for name, tensor in tensors.items():
        _check_storable(name, tensor, entry)
    owners, views = _share_memory(tensors)
    # Wide dtypes first keeps every tensor aligned to its element, as safetensors' own writer does.
    order = sorted(owners, key=lambda name: (-_real(owners[name].dtype).itemsize, name))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in order:
        tensor = owners[name]
        size_bytes = tensor.numel() * tensor.element_size()
        shape = [*tensor.shape, 2] if tensor.is_complex() else [*tensor.shape]
        header[name] = {
            "dtype": _DTYPE_NAMES[_real(tensor.dtype)], "shape": shape, "data_offsets": [end, end + size_bytes],
        }  # fmt: skip
        end += size_bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return TensorFile(
        header=len(text).to_bytes(8, "little") + text,
        stored={name: owners[name] for name in order},
        views=views,
        complex_names=tuple(name for name in order if owners[name].is_complex()),
        size_bytes=8 + len(text) + end,
    )


def _real(dtype: torch.dtype) -> torch.dtype:
    return _REAL_OF_COMPLEX.get(dtype, dtype)


def _check_storable(name: str, tensor: Tensor, entry: str) -> None:
    if not isinstance(tensor, Tensor):
        found = f"a {type(tensor).__name__}, not a tensor"
    elif name == "__metadata__":
        found = "a name that the safetensors format keeps for itself"
    elif tensor.layout is not torch.strided or tensor.is_quantized or tensor.device.type == "meta":
        found = f"a {tensor.dtype} tensor of layout {tensor.layout} on the {tensor.device.type} device"
    elif _real(tensor.dtype) not in _DTYPE_NAMES:
        found = f"dtype {tensor.dtype}, which safetensors does not have"
    else:
        return
    raise UsageError(
        asked=f"save tensors[{entry!r}][{name!r}]", found=found, do="give ordinary dense tensors with values"
    )


def _share_memory(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], tuple[View, ...]]:
    owners: dict[str, Tensor] = {}
    views: list[View] = []
    bases_of: dict[tuple[object, ...], list[str]] = {}
    # Contiguous before others, large before small: a base is met before the windows on it.
    order = sorted(tensors, key=lambda name: (not tensors[name].is_contiguous(), -tensors[name].numel(), name))
    for name in order:
        tensor = tensors[name].detach()
        # Conjugate and negative views share memory but not values.
        if tensor.numel() == 0 or tensor.is_conj() or tensor.is_neg():
            owners[name] = tensor
            continue
        key = (tensor.device, tensor.untyped_storage().data_ptr(), tensor.dtype)
        bases = bases_of.setdefault(key, [])
        base = next((b for b in bases if _lies_within(tensor, owners[b])), None)
        if base is not None:
            first = int(tensor.storage_offset() - owners[base].storage_offset())
            views.append(
                View(name=name, of=base, shape=tuple(tensor.shape), stride=tensor.stride(), first_element=first)
            )
            continue
        owners[name] = tensor
        if tensor.is_contiguous():
            bases.append(name)
    return owners, tuple(views)


def _lies_within(tensor: Tensor, base: Tensor) -> bool:
    first = tensor.storage_offset() - base.storage_offset()
    return first >= 0 and first + _extent(tensor.shape, tensor.stride()) <= base.numel()


def _extent(shape: Sequence[int], stride: Sequence[int]) -> int:
    """Elements from the first to past the last one of a window."""
    return 1 + sum((size - 1) * step for size, step in zip(shape, stride)) if all(shape) else 0


def write_tensors(file: DurableFile, plan: TensorFile) -> tuple[str, ...]:
    """Write ``plan`` to ``file``; the names of the stored tensors that hold NaN or an infinity.

    Only one tensor at a time is copied to the host. Raises OSError.
    """
    file.write(plan.header)
    not_finite = []
    for name, tensor in plan.stored.items():
        flat = tensor.resolve_conj().resolve_neg().cpu().contiguous().reshape(-1)
        if flat.is_complex():
            flat = torch.view_as_real(flat).reshape(-1)
        if not _is_finite(flat):
            not_finite.append(name)
        file.write(flat.view(torch.uint8).numpy().data)
    return tuple(not_finite)


def _is_finite(flat: Tensor) -> bool:
    if not flat.is_floating_point():
        return True
    for piece in torch.split(flat, _PIECE_ELEMENTS):
        if piece.numel() == 0:
            continue
        # NaN spreads into both ends; an infinity is one of them. No temporary as large as the piece.
        ends = torch.stack(torch.aminmax(piece if piece.element_size() > 1 else piece.float()))
        if not bool(torch.isfinite(ends).all()):
            return False
    return True


def read_tensors(path: Path, *, views: Sequence[View], complex_names: Sequence[str]) -> dict[str, Tensor]:
    """Every tensor that was saved, on the host, by name; views share memory with what they are views on.

    Raises Damaged for a file that is not sound safetensors, or a view that does not fit what it is a view on.
    """
    try:
        with safetensors.safe_open(path, framework="pt", device="cpu") as file:
            # Copied, because what safetensors gives is a window on the file.
            loaded: dict[str, Tensor] = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except (safetensors.SafetensorError, ValueError, KeyError) as error:
        raise Damaged(path, f"not a sound safetensors file ({error})") from None
    for name in complex_names:
        if name not in loaded or loaded[name].shape[-1:] != (2,) or not loaded[name].is_floating_point():
            raise Damaged(path, f"{name!r} is not the pairs of reals of a complex tensor")
        loaded[name] = torch.view_as_complex(loaded[name])
    windows: dict[str, Tensor] = {}
    for view in views:
        if view.name in loaded or view.name in windows:
            raise Damaged(path, f"{view.name!r} is there twice")
        windows[view.name] = _window(path, view, loaded.get(view.of))
    return loaded | windows


def _window(path: Path, view: View, base: Tensor | None) -> Tensor:
    if base is None:
        raise Damaged(path, f"{view.name!r} is a view on {view.of!r}, which is not there")
    fits = len(view.shape) == len(view.stride) and min((*view.shape, *view.stride, view.first_element)) >= 0
    if not fits or view.first_element + _extent(view.shape, view.stride) > base.numel():
        raise Damaged(path, f"{view.name!r} is a view that does not fit inside {view.of!r}")
    return base.as_strided(view.shape, view.stride, view.first_element)
