"""samegrad: train inside a memory budget; same gradients, checked.

Names are loaded on first use (PEP 562), so importing samegrad imports no torch and changes nothing global.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "BadInput": "errors",
    "BestWeights": "execute.best_weights",
    "Budget": "records",
    "BudgetTooSmall": "errors",
    "CannotSplit": "errors",
    "Category": "records",
    "DeclaredStep": "declared",
    "EnvironmentProblem": "errors",
    "Exactness": "records",
    "FalseNormalise": "errors",
    "Footprint": "records",
    "GradientsDiffer": "errors",
    "KnobOrigin": "records",
    "NonFinite": "errors",
    "OverBudget": "errors",
    "Picture": "report",
    "Plan": "records",
    "Rows": "data.rows",
    "SamegradError": "errors",
    "Step": "step",
    "StepResult": "records",
    "Story": "report",
    "UsageError": "errors",
    "Verdict": "records",
    "check_rows": "data.readers",
    "choose_plan": "plan.choose",
    "count_bytes": "measure.counting",
    "find_device": "measure.counters",
    "format_bytes": "units",
    "measure_step": "settle",
    "open_rows": "data.readers",
    "over": "exact.over",
    "render_markdown": "report",
    "render_report": "report",
    "rowwise": "exact.rowwise",
    "settle_plan": "settle",
    "train": "execute.run",
    "verify_step": "verify.gradients",
}

__all__ = ["__version__", *sorted(_HOMES)]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'samegrad' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"samegrad.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
