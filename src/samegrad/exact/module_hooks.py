"""Hooks that a model puts on its own modules while it runs, to be taken off again with the mark that they are there.

transformers models do so in their first forward when hidden states, attentions or router logits are asked for, and
remember it in an attribute. Where the attribute is put back and the hooks are not, every forward adds them once more,
and the model returns everything several times.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

# Of a module, each with the flags that stand beside its hooks.
_REGISTRIES = {
    "_forward_hooks": ("_forward_hooks_with_kwargs", "_forward_hooks_always_called"),
    "_forward_pre_hooks": ("_forward_pre_hooks_with_kwargs",),
    "_backward_hooks": (),
    "_backward_pre_hooks": (),
}


class ModuleHooks:
    """The hooks on ``parts`` as they are now, but for samegrad's own, which come and go by themselves."""

    def __init__(self, parts: Iterable[nn.Module]) -> None:
        self._parts = [vars(part) for part in parts]
        # Of most modules none, so only those are kept that are there: hooks, and flags beside them.
        self._before: dict[tuple[int, str], tuple[dict[int, Any], list[dict[int, Any]]]] = {
            (id(mine), name): (_foreign(mine[name]), [mine[flags].copy() for flags in beside])
            for mine in self._parts
            for name, beside in _REGISTRIES.items()
            # Modules of other kinds (ScriptModule) may keep theirs elsewhere.
            if mine.get(name)
        }

    def restore(self) -> None:
        for mine in self._parts:
            for name, beside in _REGISTRIES.items():
                before, flags_before = self._before.get((id(mine), name), ({}, [{} for _ in beside]))
                if name in mine and _foreign(mine[name]) != before:
                    _put_back(mine, name, before, flags_before)


def _put_back(mine: dict[str, Any], name: str, before: dict[int, Any], flags_before: list[dict[int, Any]]) -> None:
    own = {key: hook for key, hook in mine[name].items() if _is_own(hook)}
    _put(mine[name], before | own)
    for flags, flagged in zip(_REGISTRIES[name], flags_before):
        now = mine[flags].items()
        kept = {key: flag for key, flag in flagged.items() if key in before}
        _put(mine[flags], kept | {key: flag for key, flag in now if key in own})


def _foreign(hooks: dict[int, Any]) -> dict[int, Any]:
    return {key: hook for key, hook in hooks.items() if not _is_own(hook)} if hooks else {}


def _is_own(hook: Any) -> bool:
    return str(getattr(hook, "__module__", "")).partition(".")[0] == "samegrad"


def _put(registry: dict[int, Any], entries: dict[int, Any]) -> None:
    registry.clear()
    registry.update(entries)
