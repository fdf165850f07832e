"""A checkpoint that is whole or not there, and the rule by which older ones go.

1. Free space is checked before the first byte is written.
2. Files, then the manifest, each fsynced; the folder fsynced; renamed; the parent fsynced; only then is the save
   acknowledged (the call returns) and are older ones removed.
3. Any failure before the rename removes the temporary folder and leaves every checkpoint as it was.
4. A checkpoint with values that are not finite is not a good one: it removes no good one, and resume passes it by.
5. A checkpoint of a later step stems from a future that this run has left (it went back): it is set aside, so that
   the next resume continues this run.
"""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from samegrad.errors import EnvironmentProblem, UsageError
from samegrad.json_record import SCHEMA_VERSION
from samegrad.store import faults
from samegrad.store.durable import (
    DurableFile,
    disk_problem,
    free_bytes,
    remove_folder,
    sync_folder,
    temporary_name,
    unique_name,
)
from samegrad.store.manifest import (
    MANIFEST,
    REPLACED,
    STATE,
    Damaged,
    FileEntry,
    Found,
    Manifest,
    Quality,
    check_contents,
    is_file_name,
    judge,
    list_checkpoints,
    manifest_text,
    read_manifest,
    step_name,
)
from samegrad.store.plain_state import to_plain
from samegrad.store.tensor_file import TensorFile, lay_out, write_tensors
from samegrad.units import format_bytes

_SPACE_FACTOR = 1.1
_NAMED_NOT_FINITE = 5
_FREE_SPACE = "free space there, or save elsewhere; earlier checkpoints are as they were"


@dataclass(frozen=True, kw_only=True)
class _Content:
    """Everything a checkpoint will hold, laid out but not yet copied."""

    step: int
    plans: Mapping[str, TensorFile]
    state: bytes

    @property
    def size_bytes(self) -> int:
        views = sum(len(plan.views) for plan in self.plans.values())
        return sum(plan.size_bytes for plan in self.plans.values()) + len(self.state) + 4096 + 256 * views


def save_checkpoint(
    folder: Path,
    *,
    step: int,
    tensors: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, Any],
    keep: int = 2,
) -> Path:
    """The folder of the new checkpoint, ``folder/step-00000120``, on the disk when this returns.

    tensors: by entry ("model", "optimizer", …), one safetensors file each; any device, dtype and strides, copied to
    the host one at a time; tied tensors and views are stored once and come back sharing memory.
    state: plain Python values, kept exactly (see ``plain_state``).
    keep: how many good checkpoints stay, this one included.
    A constant that is not finite by design (an attention mask of -inf) belongs in a non-persistent buffer: rule 4
    cannot tell it from a diverged weight.
    Raises EnvironmentProblem with path, needed and free bytes when the disk refuses, UsageError for what cannot be
    saved; then nothing has changed. Only the process that holds the run lock may save into a folder.
    """
    content = _content(step=step, tensors=tensors, state=state, keep=keep)
    target = folder / step_name(step)
    asked = f"save the checkpoint of step {step}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _check_space(folder, content, asked)
        finite = _write_and_publish(target, content)
    except OSError as error:
        raise disk_problem(error, asked=asked, path=folder, do=_FREE_SPACE, needed_bytes=content.size_bytes) from error
    try:
        _retain(folder, step=step, finite=finite, keep=keep)
    except OSError as error:
        raise disk_problem(
            error, asked="remove older checkpoints", path=folder,
            do=f"remove them by hand; the checkpoint of step {step} is saved",
        ) from error  # fmt: skip
    return target


def _content(
    *, step: int, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any], keep: int
) -> _Content:
    wrong = [f"step={step}"] if step < 0 else []
    wrong += [f"keep={keep}"] if keep < 1 else []
    wrong += [f"tensors has an entry {name!r}" for name in tensors if not is_file_name(name)]
    if wrong:
        raise UsageError(
            asked="save a checkpoint",
            found=", ".join(wrong),
            do="give step >= 0, keep >= 1, and entries named with letters, digits, _ . -",
        )
    document = {"schema_version": SCHEMA_VERSION, "step": step, "state": to_plain(dict(state), place="state")}
    return _Content(
        step=step,
        plans={f"{entry}.safetensors": lay_out(part, entry=entry) for entry, part in tensors.items()},
        state=(json.dumps(document, indent=1, allow_nan=False) + "\n").encode(),
    )


def _check_space(folder: Path, content: _Content, asked: str) -> None:
    needed, free = int(content.size_bytes * _SPACE_FACTOR), free_bytes(folder)
    if needed > free:
        raise EnvironmentProblem(
            asked=asked,
            found=f"{folder}: needed {format_bytes(needed)} (1.1 times its size), free {format_bytes(free)}",
            do=_FREE_SPACE,
            file=str(folder),
        )


def _write_and_publish(target: Path, content: _Content) -> bool:
    """Whether all values are finite. The checkpoint stands under its name, on the disk (rule 2)."""
    temporary = target.with_name(temporary_name(target.name))
    try:
        temporary.mkdir()
        faults.reach("save.begun")
        finite = _write_files(temporary, content)
        sync_folder(temporary)
        faults.reach("save.folder_synced")
        _make_way(target)
        faults.reach("save.old_aside")
        temporary.rename(target)
    except BaseException:
        # Rule 3. What cannot be removed now is removed at the next start.
        shutil.rmtree(temporary, ignore_errors=True)
        _take_back(target)
        raise
    faults.reach("save.renamed")
    sync_folder(target.parent)
    faults.reach("save.parent_synced")
    return finite


def _write_files(temporary: Path, content: _Content) -> bool:
    files, not_finite = {}, []
    for name, plan in content.plans.items():
        with DurableFile(temporary / name) as file:
            found = write_tensors(file, plan)
        not_finite += [f"{name.removesuffix('.safetensors')}: {tensor}" for tensor in found]
        files[name] = FileEntry(size_bytes=file.size_bytes, sha256=file.sha256)
        faults.reach("save.file_done")
    with DurableFile(temporary / STATE) as file:
        file.write(content.state)
    files[STATE] = FileEntry(size_bytes=file.size_bytes, sha256=file.sha256)
    faults.reach("save.files_done")
    manifest = Manifest(
        step=content.step,
        finite=not not_finite,
        not_finite=tuple(not_finite[:_NAMED_NOT_FINITE]),
        files=files,
        views={name: plan.views for name, plan in content.plans.items()},
        complex_names={name: plan.complex_names for name, plan in content.plans.items()},
    )
    with DurableFile(temporary / MANIFEST) as file:
        file.write(manifest_text(manifest).encode())
    faults.reach("save.manifest_done")
    return manifest.finite


def _make_way(target: Path) -> None:
    """Free the name ``target``, keeping a sound checkpoint that stands there until the new one does."""
    if not target.exists():
        return
    if not target.is_dir():
        # Somebody's own: it is not ours to remove.
        raise NotADirectoryError(errno.ENOTDIR, f"{target.name} is no folder, and is in the way; move it away")
    if not _is_sound(target):
        remove_folder(target)
        return
    aside = _aside(target)
    if aside.exists():
        remove_folder(aside)
    target.rename(aside)


def _take_back(target: Path) -> None:
    if _aside(target).exists() and not target.exists():
        _aside(target).rename(target)


def _aside(target: Path) -> Path:
    return target.with_name(target.name + REPLACED)


def _is_sound(checkpoint: Path) -> bool:
    try:
        manifest = read_manifest(checkpoint)
        if manifest is not None:
            check_contents(checkpoint, manifest)
    except Damaged:
        return False
    return manifest is not None


def _retain(folder: Path, *, step: int, finite: bool, keep: int) -> None:
    """Remove what rules 2, 4 and 5 let go, now that the checkpoint of ``step`` is on the disk."""
    target = folder / step_name(step)
    others = [(one, judge(one.path)) for one in list_checkpoints(folder) if one.path != target]
    if finite:
        _retain_behind_good(others, step=step, keep=keep)
    else:
        _retain_behind_not_finite(others, step=step, keep=keep)
    sync_folder(folder)


def _retain_behind_good(others: list[tuple[Found, Quality]], *, step: int, keep: int) -> None:
    good_steps = {step}
    for one, quality in others:
        if quality is Quality.NOT_FINITE or one.step in good_steps:
            remove_folder(one.path)
        elif one.step > step:
            # Rule 5.
            one.path.rename(one.path.with_name(f"abandoned-{unique_name(one.path.name)}"))
        elif quality is Quality.GOOD:
            if len(good_steps) >= keep:
                remove_folder(one.path)
            good_steps.add(one.step)


def _retain_behind_not_finite(others: list[tuple[Found, Quality]], *, step: int, keep: int) -> None:
    older = [(one, quality) for one, quality in others if one.step <= step]
    not_finite = [one for one, quality in older if quality is Quality.NOT_FINITE]
    any_good = any(quality is Quality.GOOD for _, quality in others)
    # With no good one at all, the newest few are all there is.
    for one in not_finite if any_good else not_finite[keep - 1 :]:
        remove_folder(one.path)
