"""The recipes as a folder of programs: found by name, told apart from typos, listed without torch."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

import samegrad as sg
from samegrad.cli.options import parse_call
from samegrad.recipes import find_options, find_recipe, recipe_names


def test_every_recipe_is_found_under_its_own_name() -> None:
    assert "autoencoder" in recipe_names()
    for name in recipe_names():
        recipe = find_recipe(name)
        assert recipe.name == name
        assert recipe.options is find_options(name)
        assert recipe.troubleshooting
        assert set(recipe.pins) <= set(recipe.options.__dataclass_fields__)


def test_a_mistyped_name_is_answered_with_the_nearest() -> None:
    with pytest.raises(sg.UsageError, match="did you mean 'autoencoder'"):
        find_recipe("autoencodr")


def test_listing_and_options_import_no_torch() -> None:
    program = (
        "import sys; from samegrad.recipes import find_options, recipe_names; "
        "[find_options(name)() for name in recipe_names()]; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


@pytest.mark.parametrize("name", recipe_names())
def test_the_help_names_the_number_formats_that_are_taken(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_call("toy", (find_options(name),), ["--help"])
    help_text = " ".join(line.strip(" │|") for line in capsys.readouterr().out.splitlines())
    told = help_text.partition("--dtype ")[2].partition("(default:")[0]
    formats = ("float32", "float64", "bfloat16", "float16")
    assert set(re.findall(r"\bb?float\d+", told)) == {form for form in formats if takes(name, form)}


def takes(name: str, dtype: str) -> bool:
    try:
        find_options(name)(dtype=dtype)
    except sg.UsageError:
        return False
    return True


def test_the_listed_summary_is_the_recipe_files_first_line() -> None:
    for name in recipe_names():
        module = sys.modules[find_recipe(name).build.__module__]
        assert find_recipe(name).summary == (module.__doc__ or "").splitlines()[0]
