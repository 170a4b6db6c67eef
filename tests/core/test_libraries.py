"""Large libraries are imported without a search for garbage among their objects."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest

from recipes_lib.core.libraries import importing


def test_what_an_import_makes_is_never_searched_for_garbage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "large_library.py").write_text(
        "import gc\ncollecting = gc.isenabled()\nobjects = [[] for _ in range(1000)]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    frozen = gc.get_freeze_count()

    with importing():
        import large_library  # type: ignore[import-not-found]

    assert not large_library.collecting
    assert gc.get_freeze_count() >= frozen + 1000
    assert gc.isenabled()


def test_garbage_is_still_found_where_nothing_was_imported() -> None:
    frozen = gc.get_freeze_count()
    with importing():
        kept = [[] for _ in range(1000)]  # type: ignore[var-annotated]
    assert gc.get_freeze_count() == frozen
    assert kept
