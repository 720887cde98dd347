"""The README's table from the paper to the code names what exists, and the README holds it."""

import ast
import dataclasses
import importlib
from pathlib import Path

import architectures
import paper_items
import pytest
from paper_items import ITEMS

ROOT = Path(__file__).parents[1]


def resolve(name: str) -> object:
    """`losses.prior_loss`, `nn.encoder.EncoderConfig.down`: the longest module under ulx, then attributes or fields."""
    parts = name.split(".")
    module, rest = importlib.import_module("ulx"), parts
    for count in range(1, len(parts) + 1):
        try:
            module, rest = importlib.import_module(".".join(["ulx", *parts[:count]])), parts[count:]
        except ModuleNotFoundError:
            break
    value: object = module
    for attribute in rest:
        if dataclasses.is_dataclass(value) and attribute in {field.name for field in dataclasses.fields(value)}:
            return attribute
        value = getattr(value, attribute)
    return value


def defined_in(file: Path) -> set[str]:
    definitions = ast.parse(file.read_text()).body
    return {node.name for node in definitions if isinstance(node, ast.FunctionDef | ast.ClassDef)}


@pytest.mark.parametrize("item", ITEMS, ids=lambda item: item.paper)
def test_what_the_table_names_exists(item):
    for name in item.code:
        if "/" in name:
            assert (ROOT / name).is_file(), name
        else:
            assert resolve(name) is not None
    for test in item.tests:
        file, _, name = test.partition("::")
        assert name.startswith(("test_", "Test"))
        assert name in defined_in(ROOT / "tests" / file), test
    # An item is built and tested, or says what it lacks.
    assert item.missing or (item.code and item.tests)


def test_a_name_that_is_gone_is_noticed():
    for name in ("losses.prior_lost", "nn.encoder.EncoderConfig.stride", "prior"):
        with pytest.raises(AttributeError):
            resolve(name)


def test_the_paper_s_items_are_all_there():
    listed = {item.paper for item in ITEMS}
    wanted = [f"Eq. {n}" for n in range(1, 6)] + ["Alg. 1", "Alg. 2", "Fig. 3"] + [f"Tab. {n}" for n in range(2, 7)]
    assert {*wanted, "App. B"} <= listed


def test_the_readme_holds_the_table():
    text = paper_items.README.read_text()
    assert text == paper_items.with_table(text), "run `python benchmarks/paper_items.py`"


def test_the_table_of_sizes_is_the_presets():
    text = (ROOT / "benchmarks" / "results" / "architectures.md").read_text()
    assert text == architectures.page(), "run `python benchmarks/architectures.py`"
