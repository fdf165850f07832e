"""Config files are read strictly, and what is wrong with one is said with its line."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from samegrad.cli.config_files import LARGEST_FILE_BYTES, read_config
from samegrad.cli.values import Kind
from samegrad.errors import UsageError


def wrong(path: Path) -> str:
    with pytest.raises(UsageError) as caught:
        read_config(path)
    assert caught.value.file == str(path)
    return caught.value.found


def test_yaml_scalars_mean_what_the_same_words_mean_as_flags(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("lr: 1e-4\nmode: no\nt: 12:30\non: yes\nquoted: '5'\nlist: [1, x]\nnothing: null\nflag: true\n")
    found = {name: (w.text, w.kind) for name, w in read_config(path).items()}
    assert found == {
        "lr": ("1e-4", Kind.FLOAT),
        "mode": ("no", Kind.WORD),
        "t": ("12:30", Kind.WORD),
        "on": ("yes", Kind.WORD),
        "quoted": ("5", Kind.TEXT),
        "list": ("", Kind.LIST),
        "nothing": ("null", Kind.NULL),
        "flag": ("true", Kind.BOOL),
    }


def test_every_value_knows_its_line_in_yaml_and_json(tmp_path: Path) -> None:
    yaml, json = tmp_path / "a.yaml", tmp_path / "a.json"
    yaml.write_text("# first\nrows: 3\n\noptim:\n  name: adam\n")
    json.write_text('{\n\t"rows": 3,\n\t"optim": {\n\t\t"name": "adam"}}\n')
    assert {n: w.where for n, w in read_config(yaml).items()} == {"rows": f"{yaml}:2", "optim.name": f"{yaml}:5"}
    assert {n: w.where for n, w in read_config(json).items()} == {"rows": f"{json}:2", "optim.name": f"{json}:4"}


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("a.yaml", "rows: 1\nx: 2\nrows: 3\n", ["a.yaml:3", "a.yaml:1", "'rows'"]),
        ("a.yaml", "num-rows: 1\nnum_rows: 3\n", ["a.yaml:2", "a.yaml:1"]),
        ("a.json", '{"rows": 1,\n"rows": 3}', ["a.json:2", "a.json:1"]),
        ("a.json", '{"x": 1,\n"rows": NaN}', ["a.json:2", "NaN is not JSON"]),
        ("a.json", '{"rows": -Infinity}', ["a.json:1", "-Infinity is not JSON"]),
        ("a.json", '{"rows": 1,}', ["a.json:1", "not JSON"]),
        ("a.yaml", "x: 1\nrows: !!python/object/apply:os.system ['touch canary']\n", ["a.yaml:2", "python"]),
        ("a.yaml", "x: &a [1]\nrows: *a\n", ["a.yaml:1", "anchors"]),
        ("a.yaml", "x:\n\trows: 1\n", ["a.yaml:2"]),
        ("a.yaml", "", ["empty"]),
        ("a.yaml", "# only a comment\n", ["empty"]),
        ("a.yaml", "- 1\n- 2\n", ["list at top level"]),
        ("a.yaml", "just words\n", ["single value at top level"]),
        ("a.yaml", "rows: [1, {a: 2}]\n", ["a.yaml:1", "mapping in a list"]),
        ("a.yaml", "? [a, b]\n: 1\n", ["a.yaml:1", "option's name"]),
        ("a.yaml", "a: 1\n---\nb: 2\n", ["a.yaml"]),
        ("a.yaml", "rows: " + "[" * 5000, ["a.yaml:1", "nested deeper"]),
        ("a.json", '{"rows": ' + "[" * 5000 + "]" * 5000 + "}", ["nested deeper"]),
        ("a.json", '{"rows": ' + "[" * 60_000, ["nested deeper"]),
    ],
)
def test_a_config_that_is_not_plain_options_is_refused(tmp_path: Path, name: str, text: str, says: list[str]) -> None:
    path = tmp_path / name
    path.write_text(text)
    start = time.perf_counter()
    found = wrong(path)
    assert time.perf_counter() - start < 2
    assert [part for part in says if part not in found] == []
    assert not Path("canary").exists()


def test_a_key_that_stands_twice_is_told_with_each_place_once(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("rows: 1\n\nrows: 3\n")
    with pytest.raises(UsageError) as caught:
        read_config(path)
    assert caught.value.found == f"{path}:3: 'rows' stands here and at {path}:1"


def test_an_alias_bomb_is_refused_before_it_grows(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    levels = "\n".join(f"l{i}: &l{i} [{', '.join([f'*l{i - 1}'] * 9)}]" for i in range(1, 9))
    path.write_text(f"l0: &l0 [x, x]\n{levels}\n")
    assert "anchors and aliases" in wrong(path)


def test_text_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_bytes("rows: 3\n".encode("utf-16"))
    assert "not UTF-8" in wrong(path)


def test_a_huge_file_is_refused_without_being_read(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    with path.open("wb") as file:
        file.truncate(2**30)
    start = time.perf_counter()
    assert str(LARGEST_FILE_BYTES) in wrong(path)
    assert time.perf_counter() - start < 0.5


def test_a_missing_file_and_a_folder_are_named(tmp_path: Path) -> None:
    assert "No such file" in wrong(tmp_path / "none.yaml")
    assert "not a file" in wrong(tmp_path)
