"""The examples in docstrings are true. Only modules that have one are imported."""

import doctest
import importlib
from pathlib import Path

SOURCE = Path(__file__).resolve().parents[1] / "src"


def test_the_examples_of_every_module_give_what_they_show():
    files = [path for path in SOURCE.rglob("*.py") if ">>> " in path.read_text(encoding="utf-8")]
    assert files
    for path in files:
        name = ".".join(path.relative_to(SOURCE).with_suffix("").parts)
        result = doctest.testmod(importlib.import_module(name.removesuffix(".__init__")))
        assert result.attempted > 0 and result.failed == 0, name
