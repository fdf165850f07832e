"""What every recipe brings: options, a program built from them, and facts for people. No torch at import.

    options --build--> Program --run_epochs--> EpochResult, EpochResult, ...

A recipe is a folder with ``options.py`` (a class ``Options``, no torch), ``data.py`` and ``model.py`` (plain PyTorch,
nothing of ours) and ``recipe.py`` (a ``RECIPE``). Whoever runs a program logs and saves between two results:
nothing is called back.

Beside what is here, for whoever has torch already: ``written.py``, ``precision.py``, ``clipping.py``, ``pictures.py``,
``pinned.py``. Files that users bring are read by ``picture_files.py``, ``array_files.py`` and ``tensor_files.py``.
"""

from samegrad.recipes._recipe.asked import CommonOptions, OutOfRange
from samegrad.recipes._recipe.findings import Answer, Finding, Health, is_slow
from samegrad.recipes._recipe.installed import INSTALL, needed_for_pictures
from samegrad.recipes._recipe.program import CacheEmptying, EpochResult, Program, run_epochs
from samegrad.recipes._recipe.recipe import Cell, LongTable, Recipe

__all__ = [
    "INSTALL", "Answer", "CacheEmptying", "Cell", "CommonOptions", "EpochResult", "Finding", "Health", "LongTable",
    "OutOfRange", "Program", "Recipe", "is_slow", "needed_for_pictures", "run_epochs",
]  # fmt: skip
