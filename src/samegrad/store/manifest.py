"""What a checkpoint folder holds: its manifest, its name, and whether every file is there and unchanged.

step-00000120/            one checkpoint: <entry>.safetensors …, state.json, manifest.json
step-00000120.replaced/   the older checkpoint of a step that is being saved again
abandoned-…-step-…/       a later checkpoint that a run which went back to an earlier step left behind
.tmp-…/                   not finished, or being removed
"""

from __future__ import annotations

import enum
import hashlib
import json
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from samegrad.errors import BadInput
from samegrad.json_record import SCHEMA_VERSION, Record
from samegrad.units import format_bytes

MANIFEST = "manifest.json"
STATE = "state.json"
REPLACED = ".replaced"
_STEP_NAME = re.compile(r"step-([0-9]{8,})(\.replaced)?")
_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
# A manifest holds some 200 bytes a tied tensor; anything near this is not one.
_LARGEST_MANIFEST_BYTES = 64 * 2**20


class Damaged(Exception):
    """A checkpoint that is not as it was saved; becomes a BadInput where the way out is known."""

    def __init__(self, file: Path, found: str) -> None:
        self.file, self.found = file, found
        super().__init__(f"{file}: {found}")


@dataclass(frozen=True, kw_only=True)
class FileEntry(Record):
    size_bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class View(Record):
    """A tensor stored as a window on another one: tied weights, a transpose. Counted in elements, not bytes."""

    name: str
    of: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    first_element: int


@dataclass(frozen=True, kw_only=True)
class Manifest(Record):
    """Written last, so that its presence means the checkpoint is complete.

    ``finite``: no tensor holds NaN or an infinity; only then is the checkpoint a good one. ``not_finite``: the
    first tensors that do. ``views`` and ``complex_names`` are by entry: tensors that are windows on stored ones,
    and complex tensors stored as pairs of reals.
    """

    step: int
    finite: bool
    not_finite: tuple[str, ...]
    files: Mapping[str, FileEntry]
    views: Mapping[str, tuple[View, ...]]
    complex_names: Mapping[str, tuple[str, ...]]


@dataclass(frozen=True, kw_only=True)
class Found:
    """A checkpoint folder as its name tells it; ``replaced``: an older version of its step."""

    step: int
    path: Path
    replaced: bool


def step_name(step: int) -> str:
    return f"step-{step:08d}"


def is_file_name(name: str) -> bool:
    """Whether ``name`` is a plain, visible name inside a folder, on any system."""
    return _FILE_NAME.fullmatch(name) is not None


def list_checkpoints(folder: Path) -> list[Found]:
    """The checkpoint folders in ``folder``, newest step first; a replaced version after the one that replaced it."""
    if not folder.is_dir():
        return []
    found = []
    for path in folder.iterdir():
        match = _STEP_NAME.fullmatch(path.name)
        if match is not None and path.is_dir():
            found.append(Found(step=int(match[1]), path=path, replaced=match[2] is not None))
    return sorted(found, key=lambda one: (-one.step, one.replaced))


def manifest_text(manifest: Manifest) -> str:
    body = manifest.to_dict()
    return json.dumps(body | {"sha256": _digest(body)}, sort_keys=True, separators=(",", ":"))


def _digest(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def read_manifest(checkpoint: Path) -> Manifest | None:
    """The manifest of the folder ``checkpoint``, or None where there is none. Raises Damaged."""
    path = checkpoint / MANIFEST
    if checkpoint.is_symlink():
        raise Damaged(checkpoint, f"a link to {checkpoint.resolve()}, not a folder of this run")
    size_bytes = file_size(checkpoint, MANIFEST)
    if size_bytes is None:
        return None
    if size_bytes == 0:
        raise Damaged(path, "the file is empty")
    if size_bytes > _LARGEST_MANIFEST_BYTES:
        raise Damaged(path, f"{format_bytes(size_bytes)} is not the size of a manifest")
    try:
        body = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise Damaged(path, f"not JSON ({error})") from None
    if not isinstance(body, dict):
        raise Damaged(path, f"a {type(body).__name__} where an object is needed")
    version = body.get("schema_version")
    if isinstance(version, int) and version > SCHEMA_VERSION:
        raise Damaged(
            path,
            f"schema version {version} is newer than this samegrad reads ({SCHEMA_VERSION}): a newer samegrad wrote it",
        )
    written = body.pop("sha256", None)
    if (found := _digest(body)) != written:
        raise Damaged(path, f"sha256 of the manifest's content: expected {written}, found {found}")
    try:
        return Manifest.from_dict(body)
    except BadInput as error:
        raise Damaged(path, error.found) from None


def file_size(checkpoint: Path, name: str) -> int | None:
    """Bytes of the file ``name`` of a checkpoint, or None where there is none.

    Raises Damaged for a name or a link that leads out of the folder, and for what is not a plain file.
    """
    path = checkpoint / name
    if not is_file_name(name):
        raise Damaged(checkpoint / MANIFEST, f"names {name!r}, which is not a plain file name in its folder")
    if not path.resolve().is_relative_to(checkpoint.resolve()):
        raise Damaged(path, f"a link to {path.resolve()}, outside the checkpoint")
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    if not stat.S_ISREG(status.st_mode):
        raise Damaged(path, "not a plain file")
    return status.st_size


def missing_file(checkpoint: Path, manifest: Manifest | None) -> str | None:
    """The first file whose absence makes ``checkpoint`` incomplete, or None. Raises Damaged."""
    if manifest is None:
        return MANIFEST
    return next((name for name in manifest.files if file_size(checkpoint, name) is None), None)


def check_sizes(checkpoint: Path, manifest: Manifest) -> None:
    """Raises Damaged where a file has another size than the manifest says."""
    for name, entry in manifest.files.items():
        size_bytes = file_size(checkpoint, name)
        if size_bytes is None:
            raise Damaged(checkpoint / name, "the file is missing")
        if size_bytes != entry.size_bytes:
            what = "the file is empty" if size_bytes == 0 else f"{size_bytes} bytes"
            raise Damaged(checkpoint / name, f"{what}; the manifest says {entry.size_bytes} bytes")


def check_contents(checkpoint: Path, manifest: Manifest) -> None:
    """Raises Damaged where a file has another size or other bytes than when it was saved."""
    check_sizes(checkpoint, manifest)
    for name, entry in manifest.files.items():
        with open(checkpoint / name, "rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != entry.sha256:
            raise Damaged(checkpoint / name, f"sha256: expected {entry.sha256}, found {found}")


class Quality(enum.Enum):
    """What a checkpoint is worth, judged without reading its tensors."""

    GOOD = "complete, finite, of the right sizes"
    NOT_FINITE = "complete, but with values that are not finite"
    UNSOUND = "incomplete or damaged"


def judge(checkpoint: Path) -> Quality:
    try:
        manifest = read_manifest(checkpoint)
        if manifest is None:
            return Quality.UNSOUND
        check_sizes(checkpoint, manifest)
    except Damaged:
        return Quality.UNSOUND
    return Quality.GOOD if manifest.finite else Quality.NOT_FINITE
