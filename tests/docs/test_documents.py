"""README and docs cannot lie: commands parse, files exist, verbs are the program's own, light commands really run."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from recipes_lib import cli
from recipes_lib.recipe.accelerate_config import load_accelerate_config
from recipes_lib.recipe.recipe import load_recipe

PROJECT = Path(__file__).resolve().parents[2]
DOCUMENTS = [PROJECT / "README.md", *sorted((PROJECT / "docs").glob("*.md"))]
RUN = {"ls", "check", "show", "diff", "explain"}  # quick, and they write nothing
PARSED = {"doctor", "new", "data", "train", "status", "chat", "merge", "verify", "export", "eval", "judge", "migrate"}
OWN_FILES = re.compile(r"my-first|my\.jsonl|NAME|RECIPE|FILE|RUN|DIR|runs/|OLD|PATH")


def commands(document: Path) -> list[str]:
    """The lines of the document's bash blocks, without comments."""
    blocks = re.findall(r"```bash\n(.*?)```", document.read_text(encoding="utf-8"), re.DOTALL)
    lines = [line.split("  #")[0].strip() for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


CASES = [(document, line) for document in DOCUMENTS for line in commands(document)]


@pytest.mark.parametrize(("document", "line"), CASES, ids=[f"{document.stem}: {line[:60]}" for document, line in CASES])
def test_every_command_is_one_that_works(document: Path, line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(PROJECT)
    words = shlex.split(line.removeprefix("$ "))
    if words[0] == "make":
        targets = re.findall(r"^([a-z-]+):", (PROJECT / "Makefile").read_text(), re.MULTILINE)
        assert set(words[1:]) <= set(targets)
    elif words[:2] == ["accelerate", "launch"]:
        load_accelerate_config(words[words.index("--config_file") + 1])
        module = words.index("-m")
        assert words[module + 1] in {"recipes_lib.train", "recipes_lib.evaluate"}
        if words[module + 1] == "recipes_lib.train":
            load_recipe(words[module + 2], words[module + 3 :])
    elif words[0] == "recipes":
        assert words[1] in RUN | PARSED, line
        if words[1] in RUN and not OWN_FILES.search(line):
            assert cli.main(words[1:]) == 0
    else:
        assert words[0] in {".", "python", "pip", "touch", "hf", "launch/vllm_server.sh", "bash", "cd", "git"}, line
        if words[0] == "python" and words[1].endswith(".py"):
            assert (PROJECT / words[1]).is_file()


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.stem)
def test_every_link_and_every_named_file_of_the_project_exists(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        if "://" not in target:
            assert (document.parent / target).exists(), target
    for name in re.findall(r"`((?:tests|recipes|accelerate_configs|schema)/[\w./-]+\.(?:py|yaml|json))`", text):
        if "my-first" not in name:
            assert (PROJECT / name).exists(), name


def test_the_verbs_of_the_readme_are_those_of_the_program() -> None:
    table = (PROJECT / "README.md").read_text(encoding="utf-8").split("## Verbs")[1].split("## ")[0]
    named = set(re.findall(r"`([a-z]+)`", " ".join(row.split("|")[1] for row in table.splitlines() if row.startswith("| `"))))
    existing = {path.stem for path in (PROJECT / "src" / "recipes_lib" / "commands").glob("*.py") if path.stem != "__init__"}
    assert named == existing
