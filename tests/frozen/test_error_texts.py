"""The exact answer to every bad input that a test knows: exit code and text, frozen in
golden/errors/.

The other tests ask for the words that matter; here every word counts, so that a change of the
loaders' shape changes no message. The cases are those tests' own lists. After a wanted change:
UPDATE_GOLDEN=1 pytest tests/frozen/test_error_texts.py, and read the diff.
"""

# ruff: noqa: E402
from __future__ import annotations

import runpy
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from recipes_lib.cli import main as recipes
from recipes_lib.train import main as train

TESTS = Path(__file__).resolve().parents[1]
PROJECT = TESTS.parent
sys.path[:0] = [
    str(TESTS / folder) for folder in ("", "config", "suites", "slurm", "study", "frozen")
]

import study_files
import test_accelerate_config
import test_bad_inputs
import test_bad_recipes
import test_eval_recipe
import test_frozen

good_with = runpy.run_path(str(TESTS / "config" / "conftest.py"))["good_with"]
OVERRIDES = [
    "max_steps=1",
    "train.max_steps",
    "train.max_steps=x",
    "train.x=1",
    "x.y=1",
    "lora.r=[",
    "train.seed=1_000:30",
    "lora=7",
]


def cases_of(kind: str) -> Iterator[tuple[str, str | bytes, str]]:
    """Yield the name of a case, the text of its file, and the file's name."""
    if kind == "recipe":
        yield from (
            (f"{section}: {line}", good_with(section, line), "r.yaml")
            for section, line, _, _ in test_bad_recipes.BAD_LINES
        )
        yield from (
            (repr(content), content, "r.yaml") for content, _, _ in test_bad_recipes.BAD_FILES
        )
        yield from (
            (f"base {section}: {line}", good_with(section, line), "_r.yaml")
            for section, line, *_ in test_bad_recipes.BAD_LINES
        )
    elif kind == "eval":
        head = "# yaml-language-server: $schema=eval.schema.json\n"
        yield from (
            (repr(text), head + text, "my_eval.yaml") for text, _, _ in test_eval_recipe.BAD_EVALS
        )
    elif kind == "judge":
        yield from ((repr(text), text, "judge.yaml") for text, _, _ in test_eval_recipe.BAD_JUDGES)
    elif kind == "accelerate":
        yield from (
            (repr(text), text, "acc.yaml") for text, _ in test_accelerate_config.BAD_CONFIGS
        )


@pytest.fixture
def answered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]):
    """A function that runs an entry point in the test's folder and returns the lines of a golden
    file: the case, exit code and stderr.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RECIPES_RUNS_ROOT", str(tmp_path / "runs"))

    def run(case: str, entry, *argv: str) -> str:
        try:
            code = entry(list(argv))
        except SystemExit as stop:
            code = stop.code
        said = (
            f"## {case}\nexit"
            f" {int(code or 0)}\n{capfd.readouterr().err.replace(str(PROJECT), 'PROJECT')}".rstrip()
            + "\n"
        )
        return said.replace(str(tmp_path), "TMP").replace(
            tmp_path.name, "TMP-NAME"
        )  # pytest numbers the folder of a test

    return run


@pytest.mark.parametrize("kind", ["recipe", "eval", "judge", "accelerate"])
def test_a_bad_file_is_answered_with_the_recorded_words(
    kind: str, tmp_path: Path, answered
) -> None:
    study_files.write_tiny_study(tmp_path, tmp_path / "no-model")
    found = []
    for case, content, name in cases_of(kind):
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        found.append(answered(case, recipes, "check", name))
    test_frozen.held(f"errors/{kind}.txt", "\n".join(found))


def test_a_file_of_another_kind_and_a_bad_override_are_answered_with_the_recorded_words(
    tmp_path: Path, answered
) -> None:
    study_files.write_tiny_study(tmp_path, tmp_path / "no-model")
    others = {
        "recipe": "r4.yaml",
        "study": "tiny.yaml",
        "eval": "mt_bench.yaml",
        "judge": "judge.yaml",
    }
    verbs = {
        "recipe": ["show"],
        "study": ["plan"],
        "eval": ["eval"],
        "accelerate": ["plan", "r4.yaml", "--accelerate"],
    }
    found = [
        answered(
            f"{file} for {verb}", recipes, *words, file, *(["no-model"] if verb == "eval" else [])
        )
        for verb, words in verbs.items()
        for kind, file in others.items()
        if kind != verb
    ]
    found += [
        answered(f"override {word!r}", recipes, "show", "r4.yaml", word) for word in OVERRIDES
    ]
    test_frozen.held("errors/kinds.txt", "\n".join(found))


def test_a_bad_model_bad_rows_and_a_bad_command_line_are_answered_with_the_recorded_words(
    tiny_recipe: Path, tiny_model_dir: Path, tmp_path: Path, answered
) -> None:
    found = []
    for number, (case, (damage, overrides, _, _)) in enumerate(test_bad_inputs.MODELS.items()):
        folder = Path(
            shutil.copytree(tiny_model_dir, tmp_path / f"model{number}")
        )  # what is read of a model is kept for its folder
        damage(folder)
        found.append(answered(case, train, "tiny.yaml", f"model.name_or_path={folder}", *overrides))
    plain = shutil.copytree(tiny_model_dir, tmp_path / "plain")
    (plain / "chat_template.jinja").unlink()
    for case, (content, overrides, _, words) in test_bad_inputs.DATA.items():
        name = next(
            (name for name in ("rows.jsonl.gz", "rows.csv") if any(name in word for word in words)),
            "rows.jsonl",
        )
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        words = [override.replace("{plain}", str(plain)) for override in overrides]
        found.append(
            answered(case, recipes, "data", "tiny.yaml", f"data.source={tmp_path / name}", *words)
        )
        (tmp_path / name).unlink()
    for case, (words, _, _) in test_bad_inputs.LINES.items():
        if not any(
            "{wrap}" in word or "{sharded}" in word for word in words
        ):  # they need files of their own
            argv = [
                word.format(recipe="tiny.yaml", configs=PROJECT / "accelerate_configs")
                for word in words
            ]
            found.append(
                answered(
                    case,
                    *(
                        (train, *argv[1:])
                        if argv[0] == "train" and "--accelerate" not in argv
                        else (recipes, *argv)
                    ),
                )
            )
    test_frozen.held("errors/models_data_lines.txt", "\n".join(found))
