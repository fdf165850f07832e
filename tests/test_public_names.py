"""The public names, and that importing them does nothing else."""

from __future__ import annotations

import ast
import importlib.metadata
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import samegrad


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("name", samegrad.__all__)
def test_every_public_name_is_there(name: str) -> None:
    value = getattr(samegrad, name)
    assert name == "__version__" or inspect.getdoc(value)


def test_the_public_names_are_sorted_unique_and_what_dir_shows() -> None:
    names = samegrad.__all__
    assert names == ["__version__", *sorted(names[1:])] and len(set(names)) == len(names)
    assert dir(samegrad) == sorted(names)


def test_the_typed_names_are_the_public_names() -> None:
    stub = ast.parse(Path(samegrad.__file__).with_suffix(".pyi").read_text())
    imports = [node for node in stub.body if isinstance(node, ast.ImportFrom)]
    typed = {alias.asname or alias.name for node in imports for alias in node.names}
    assert typed - {"annotations"} == set(samegrad.__all__) - {"__version__"}


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="ghost"):
        _ = samegrad.ghost  # type: ignore[attr-defined]


def test_every_public_function_and_method_is_annotated() -> None:
    for name in samegrad.__all__[1:]:
        value = getattr(samegrad, name)
        members = [value] if inspect.isfunction(value) else [f for k, f in vars(value).items() if not k.startswith("_")]
        for member in filter(inspect.isfunction, members):
            signature = inspect.signature(member)
            assert signature.return_annotation is not inspect.Signature.empty, (name, member)
            assert all(
                p.annotation is not p.empty for k, p in signature.parameters.items() if k not in ("self", "cls")
            ), (name, member)


# One process for each set of parts: what one imported would hide what another imports.
@pytest.mark.parametrize("parts", ["samegrad", "samegrad.errors, samegrad.units, samegrad.records, samegrad.report"])
def test_importing_brings_no_torch(parts: str) -> None:
    assert run(f"import sys, {parts}; print([m for m in ('torch', 'numpy') if m in sys.modules])") == "[]"


def test_a_name_without_torch_is_loaded_without_it() -> None:
    names = "Budget, Plan, Footprint, Verdict, StepResult, BadInput, render_report"
    assert run(f"import sys; from samegrad import {names}; print('torch' in sys.modules)") == "False"


def test_importing_changes_nothing_global() -> None:
    code = """
import os, random, warnings, logging, torch, numpy
def state():
    return (
        torch.get_default_dtype(), torch.get_num_threads(), torch.get_num_interop_threads(), torch.is_grad_enabled(),
        torch.get_rng_state().tolist(), random.getstate(), numpy.random.get_state()[1].tolist(), dict(os.environ),
        torch.are_deterministic_algorithms_enabled(), torch.backends.mha.get_fastpath_enabled(),
        len(warnings.filters), logging.getLogger().handlers[:], torch.cuda.is_initialized(),
    )
before = state()
import samegrad
for name in samegrad.__all__: getattr(samegrad, name)
print(before == state())
"""
    assert run(code) == "True"


def test_the_version_is_the_package_metadata() -> None:
    assert samegrad.__version__ == importlib.metadata.version("samegrad")
