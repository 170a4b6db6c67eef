"""Large libraries are imported without a search for garbage among their objects."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
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
    with importing():
        kept = [[] for _ in range(1000)]  # type: ignore[var-annotated]
    searched = {id(one) for one in gc.get_objects()}  # what is frozen is not among them
    assert searched.issuperset(map(id, kept))


def test_what_was_imported_is_let_go_when_the_process_ends(tmp_path: Path) -> None:
    """Triton prints hundreds of lines about what it finds left."""
    (tmp_path / "large_library.py").write_text(
        "import os\n"
        "class Held:\n"
        "    def __init__(self): self.own = self\n"
        "    def __del__(self, write=os.write): write(1, b'let go')\n"
        "held = Held()\n"
    )
    code = (
        "from recipes_lib.core.libraries import importing\nwith importing(): import large_library"
    )
    paths = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stdout == "let go"
