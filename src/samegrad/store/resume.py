"""A checkpoint read back, or the reason why not; never a fresh start in silence.

1. Sizes and sha256 are checked before anything is given out.
2. An incomplete checkpoint (no manifest, or a file gone) is never the latest; what was passed by is said.
3. A damaged one is an error that names the newest good one before it.
4. Putting tensors into a model is all or nothing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from samegrad.errors import BadInput
from samegrad.store.manifest import (
    STATE,
    Damaged,
    Found,
    Manifest,
    Quality,
    check_contents,
    judge,
    list_checkpoints,
    missing_file,
    read_manifest,
)
from samegrad.store.plain_state import from_plain
from samegrad.store.tensor_file import read_tensors

_SUFFIX = ".safetensors"
_SHOWN_DIFFERENCES = 5
_WORTH = {Quality.GOOD: "", Quality.NOT_FINITE: " (not finite)", Quality.UNSOUND: " (incomplete or damaged)"}


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """What was saved: ``tensors[entry][name]`` on the host, ``state`` as it was given.

    ``warnings``: whole sentences about what was passed by, or about values that are not finite; show them.
    """

    step: int
    tensors: Mapping[str, Mapping[str, Tensor]]
    state: Mapping[str, Any]
    path: Path
    warnings: tuple[str, ...]


def load_checkpoint(folder: Path, *, step: int | None = None, strict: bool = False) -> Checkpoint:
    """The checkpoint of ``step``, or the newest complete and finite one, verified.

    strict: an error instead of a warning when the newest one has to be passed by.
    Raises BadInput: nothing there, no such step, incomplete, damaged, of a newer schema, or leading out of its
    folder; each names the file, and the newest good checkpoint before it.
    """
    found = list_checkpoints(folder)
    pool = [one for one in found if step is None or one.step == step]
    if not pool:
        raise _not_there(folder, found, step)
    try:
        chosen, manifest, passed_by = _choose(pool, step)
        if strict and passed_by:
            raise Damaged(pool[0].path, f"{'; '.join(passed_by)} (strict)")
        if chosen is None or manifest is None:
            raise Damaged(pool[0].path, "; ".join(passed_by))
        warnings = [f"{reason}; loading {chosen.path.name} instead" for reason in passed_by]
        if not manifest.finite:
            warnings.append(_not_finite(chosen, manifest))
        tensors, state = _read(chosen, manifest)
    except Damaged as damage:
        raise BadInput(
            asked=f"load the checkpoint of step {pool[0].step} in {folder}",
            found=f"{damage.file}: {damage.found}",
            do=_way_out(found, before=damage.file),
            file=str(damage.file),
        ) from None
    return Checkpoint(step=chosen.step, tensors=tensors, state=state, path=chosen.path, warnings=tuple(warnings))


def check_step(folder: Path, step: int) -> None:
    """Raises BadInput, with the steps there are, where ``folder`` holds no checkpoint of ``step``. Reads no tensors."""
    found = list_checkpoints(folder)
    if all(one.step != step for one in found):
        raise _not_there(folder, found, step)


def _choose(pool: Sequence[Found], step: int | None) -> tuple[Found | None, Manifest | None, list[str]]:
    """The first of ``pool`` to load, its manifest, and why earlier ones were passed by. Raises Damaged."""
    passed_by: list[str] = []
    for place, one in enumerate(pool):
        manifest = read_manifest(one.path)
        missing = missing_file(one.path, manifest)
        if manifest is None or missing is not None:
            passed_by.append(f"{one.path.name} is incomplete: {missing} is missing")
            continue
        better = not manifest.finite and any(judge(o.path) is Quality.GOOD for o in pool[place + 1 :])
        if better and step is None:
            passed_by.append(_not_finite(one, manifest))
            continue
        return one, manifest, passed_by
    return None, None, passed_by


def _not_finite(one: Found, manifest: Manifest) -> str:
    return f"{one.path.name} holds values that are not finite ({', '.join(manifest.not_finite)})"


def _read(one: Found, manifest: Manifest) -> tuple[dict[str, dict[str, Tensor]], Mapping[str, Any]]:
    if manifest.step != one.step:
        raise Damaged(one.path, f"the manifest is of step {manifest.step}")
    check_contents(one.path, manifest)
    tensors = {
        name.removesuffix(_SUFFIX): read_tensors(
            one.path / name,
            views=manifest.views.get(name, ()),
            complex_names=manifest.complex_names.get(name, ()),
        )
        for name in manifest.files
        if name.endswith(_SUFFIX)
    }
    if STATE not in manifest.files:
        raise Damaged(one.path / STATE, "the manifest does not name it")
    try:
        document = json.loads((one.path / STATE).read_bytes())
        state = from_plain(document["state"], place=str(one.path / STATE))
    except (ValueError, KeyError, TypeError, RecursionError, BadInput) as error:
        raise Damaged(one.path / STATE, f"not the state of a checkpoint ({type(error).__name__}: {error})") from None
    return tensors, state


def _not_there(folder: Path, found: Sequence[Found], step: int | None) -> BadInput:
    steps = {one.step: _WORTH[judge(one.path)] for one in reversed(found)}
    if steps:
        there = f"no step {step}; the steps there are {', '.join(f'{at}{worth}' for at, worth in steps.items())}"
    else:
        there = "no checkpoint in it" if folder.is_dir() else "not a folder"
    return BadInput(
        asked="load the newest checkpoint" if step is None else f"load the checkpoint of step {step}",
        found=f"{folder}: {there}",
        do="give one of these steps" if steps
        else "move away what stands there, and put the checkpoints back" if folder.exists() and not folder.is_dir()
        else "nothing was saved there: start the run, without --resume",
        file=str(folder),
    )


def _way_out(found: Sequence[Found], *, before: Path) -> str:
    """What to do about the damage at ``before``: the newest checkpoint below it whose bytes are as saved."""
    below = next((i for i, one in enumerate(found) if one.path in (before, before.parent)), -1)
    for one in found[below + 1 :]:
        if judge(one.path) is not Quality.GOOD:
            continue
        try:
            manifest = read_manifest(one.path)
            if manifest is not None:
                check_contents(one.path, manifest)
        except Damaged:
            continue
        return f"previous good: {one.path.name}; resume from it with --resume_from {one.step}"
    return "no good checkpoint before it: restore the file from a copy, or start a new run"


def model_into(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """``model`` with its parameters and buffers set to ``tensors``, all or nothing (rule 4).

    tensors: every name of ``model.state_dict()``, same shapes and dtypes, on any device.
    Raises BadInput with the first five differences and the count of the rest; the model is then untouched.
    """
    differences = differing_tensors(model.state_dict(), tensors)
    if differences:
        raise mismatch("load the model's tensors", differences)
    model.load_state_dict(dict(tensors), strict=True)


def differing_tensors(expected: Mapping[str, Any], given: Mapping[str, Tensor]) -> list[str]:
    """One sentence a name whose tensor is missing, unknown, or of another shape or dtype."""
    differences = []
    for name, here in expected.items():
        there = given.get(name)
        if not isinstance(here, Tensor):
            differences.append(f"{name} is a {type(here).__name__} here, which a checkpoint does not hold")
        elif here.device.type == "meta":
            differences.append(f"{name} is on the meta device here, so it cannot be set")
        elif there is None:
            differences.append(f"{name} is missing in the checkpoint")
        elif here.shape != there.shape:
            differences.append(f"{name} is {tuple(here.shape)} here, {tuple(there.shape)} in the checkpoint")
        elif here.dtype != there.dtype:
            differences.append(f"{name} is {here.dtype} here, {there.dtype} in the checkpoint")
    differences += [f"{name} is only in the checkpoint" for name in given if name not in expected]
    return differences


def mismatch(asked: str, differences: Sequence[str]) -> BadInput:
    """The error that lists the first five ``differences`` and counts the rest."""
    shown = list(differences[:_SHOWN_DIFFERENCES])
    if len(differences) > len(shown):
        shown.append(f"and {len(differences) - len(shown)} more")
    return BadInput(
        asked=asked,
        found="; ".join(shown),
        do="build the same model and optimizer as the run that saved it; nothing was changed here",
    )
