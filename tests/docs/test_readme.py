"""README and docs are true: their ```bash blocks run or parse, the output they show is what is
printed, their links lead somewhere.
"""

from __future__ import annotations

import re
import shlex
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from recipes_lib import cli, train
from recipes_lib.config.batch import accumulation_steps
from recipes_lib.config.documents import read
from recipes_lib.config.launch import load_accelerate_config
from recipes_lib.config.recipe import load_recipe
from recipes_lib.core.errors import ExitCode, RecipeError
from recipes_lib.study.config import load_study
from recipes_lib.study.runs import study_trainings

PROJECT = Path(__file__).resolve().parents[2]
PAGES = [PROJECT / "README.md", *sorted((PROJECT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
# Run for real, in a copy of the folders they read. Of the others only the words are checked: they
# need a model or finished runs.
RUN = {"ls", "show", "explain", "check", "new", "migrate", "plan"}
LAUNCHER_FLAGS = {
    "--config_file",
    "--num_processes",
    "--num_machines",
    "--machine_rank",
    "--main_process_ip",
    "--main_process_port",
}


@dataclass
class Block:
    """A ```bash block, and the output shown right below it."""

    commands: list[str]
    shown: list[str] = field(default_factory=list)


def blocks(page: Path) -> list[Block]:
    text, found, end = page.read_text(encoding="utf-8"), [], -1
    for fence in FENCE.finditer(text):
        language, body = fence.groups()
        if language == "bash":
            lines = body.replace("\\\n", " ").splitlines()
            found.append(Block([line for line in lines if shlex.split(line, comments=True)]))
            end = fence.end()
        elif not language and fence.start() == end + 1:
            found[-1].shown = body.splitlines()
    return found


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What a fresh checkout holds for the commands; what they write stays here."""
    for folder in ("recipes", "accelerate_configs", "evals", "schema", "tests/config/flat_configs"):
        shutil.copytree(
            PROJECT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__")
        )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RECIPES_RUNS_ROOT", str(tmp_path / "runs"))
    monkeypatch.setenv("COLUMNS", "120")
    return tmp_path


@pytest.mark.parametrize(
    "page", [page for page in PAGES if blocks(page)], ids=lambda page: page.stem
)
def test_every_command_of_a_page_works_and_prints_what_is_shown(
    page: Path, checkout: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for block in blocks(page):
        capsys.readouterr()
        ran = [perform(shlex.split(command, comments=True), command) for command in block.commands]
        if all(ran):
            printed = [words(line) for line in capsys.readouterr().out.splitlines()]
            missing = [
                line
                for line in block.shown
                if line not in ("", "...") and words(line) not in printed
            ]
            assert not missing, f"{page.name}: {block.commands} does not print {missing}"


def test_the_study_of_the_readme_is_one(checkout: Path) -> None:
    (yaml,) = (
        body for language, body in FENCE.findall(PAGES[0].read_text("utf-8")) if language == "yaml"
    )
    (checkout / "recipes" / "my-study.yaml").write_text(yaml, encoding="utf-8")
    assert cli.main(["check", "recipes/my-study.yaml"]) == ExitCode.DONE
    assert cli.main(["study", "plan", "recipes/my-study.yaml"]) == ExitCode.DONE


def words(line: str) -> str:
    """Column widths are free."""
    return " ".join(line.split())


def perform(argv: list[str], command: str) -> bool:
    """Run a command, or check its words; return whether it was run as it stands."""
    match argv:
        case ["make", *targets]:
            makefile = (PROJECT / "Makefile").read_text(encoding="utf-8")
            assert targets and set(targets) <= set(
                re.findall(r"^([a-z-]+):.*##", makefile, re.MULTILINE)
            ), command
        case [".", ".venv/bin/activate"]:
            pass
        case ["accelerate", "launch", *rest]:
            check_launch_line(rest, command)
        case ["recipes", verb, *rest] if verb in RUN and "--full" not in rest:
            assert cli.main([verb, *rest]) == ExitCode.DONE, command
            return True
        case ["recipes", "study", "plan" | "diff" | "status" as action, *rest] if (
            "--watch" not in rest
        ):
            assert cli.main(["study", action, *rest]) == ExitCode.DONE, command
            return True
        case ["recipes", "study", action, *rest]:
            check_words("study", [action, *rest], command)
        case ["recipes", "launch", what, *rest] if what not in ("status", "cancel", "logs"):
            # Nothing is trained here, so stages that need a finished run are looked at together
            # with the training.
            flags = [
                word.replace("eval,", "train,eval,")
                for word in rest
                if word not in ("--dry-run", "--wait")
            ]
            assert cli.main(["launch", what, *flags, "--dry-run"]) == ExitCode.DONE, command
        case ["recipes", "train", *rest]:
            assert cli.main(["train", *rest, "--dry-run"]) == ExitCode.DONE, command
        case ["recipes", verb, *rest]:
            check_words(verb, rest, command)
        case _:
            pytest.fail(f"nobody knows how to check: {command}")
    return False


def check_launch_line(rest: list[str], command: str) -> None:
    """Config and recipe exist, the overrides are keys of the recipe, the flags accelerate's, and
    the batch can be divided.
    """
    start = rest.index("-m")
    flags, script = dict(zip(rest[:start:2], rest[1:start:2], strict=True)), rest[start + 1 :]
    assert flags.keys() <= LAUNCHER_FLAGS, command
    config = load_accelerate_config(flags["--config_file"])
    assert script[0] == "recipes_lib.train", command
    options, overrides = train.parse_arguments(script[1:])
    assert (
        accumulation_steps(
            load_recipe(options.recipe, overrides),
            int(flags.get("--num_processes", config.num_processes)),
        )
        > 0
    )


def check_words(name: str, rest: list[str], command: str) -> None:
    """The verb takes these arguments, and what they name exists here or was made by an earlier
    command of the page.
    """
    assert name in cli.VERBS, command
    _, words = cli.parse_words(name, rest)
    overrides = words.get("overrides", [])
    if words.get("recipe"):
        load_recipe(words["recipe"], overrides)
    if words.get("study"):
        load_study(words["study"], overrides)
    for path in [*words.get("paths", []), *filter(None, [words.get("eval")])]:
        assert Path(path).exists(), command
    runs = [*words.get("runs", []), *filter(None, [words.get("run")])]
    assert set(runs) <= runs_of_recipes(), command


def runs_of_recipes() -> set[str]:
    """The runs that training a recipe or running a study makes."""
    kinds = {path: read(path).kind for path in Path("recipes").rglob("*.yaml")}
    studies = [load_study(path) for path, kind in kinds.items() if kind == "study"]
    trained = {training.run for study in studies for training in study_trainings(study)}
    return trained | {load_recipe(path).name for path, kind in kinds.items() if kind == "recipe"}


def test_a_wrong_command_and_a_wrong_output_would_be_found(checkout: Path) -> None:
    """The checks above can fail."""
    for command in (
        "recipes shwo x",
        "make quickstrat",
        "trl sft",
        "recipes chat nobody",
        "recipes train quickstart/lora-r8 train.sed=1",
    ):
        with pytest.raises((AssertionError, RecipeError, pytest.fail.Exception)):
            perform(shlex.split(command), command)
    launch = (
        "accelerate launch --config_file accelerate_configs/{}.yaml -m recipes_lib.train"
        " recipes/quickstart/lora-r8.yaml {}"
    )
    perform(shlex.split(launch.format("cpu", "train.seed=1")), "a good one")
    for command in (
        launch.format("gpu", "train.seed=1"),
        launch.format("cpu", "train.sed=1"),
        launch.format("ddp_cpu", ""),
    ):
        with pytest.raises(RecipeError, match=r"gpu|train\.sed|cannot be made of micro-batches"):
            perform(shlex.split(command), command)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_relative_link_leads_to_a_file(page: Path) -> None:
    targets = re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8"))
    local = [target.partition("#")[0] for target in targets if not re.match(r"[a-z]+:", target)]
    assert [target for target in local if target and not (page.parent / target).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)
def test_every_file_of_the_project_that_a_page_names_exists(page: Path) -> None:
    named = re.findall(
        r"`((?:tests|recipes|accelerate_configs|schema)/[\w./-]+\.(?:py|yaml|json))`",
        page.read_text(encoding="utf-8"),
    )
    assert not [name for name in named if "my-first" not in name and not (PROJECT / name).exists()]


def test_the_exit_codes_of_the_page_are_those_of_the_program() -> None:
    page = (PROJECT / "docs" / "training.md").read_text(encoding="utf-8")
    codes = re.findall(r"^\| (\d+) \|", page.split("\n## Exit codes\n")[1], re.MULTILINE)
    assert [int(code) for code in codes] == [int(code) for code in ExitCode]


def test_every_test_that_a_promise_names_exists() -> None:
    named = re.findall(
        r"`(tests/[\w/]*\.py)`", (PROJECT / "tests" / "README.md").read_text(encoding="utf-8")
    )
    assert len(named) > 10
    assert [name for name in named if not (PROJECT / name).is_file()] == []


def test_pages_are_short_and_their_lines_fit_a_screen() -> None:
    assert len(PAGES[0].read_bytes()) <= 7_000
    assert sum(len(page.read_bytes()) for page in PAGES[1:]) <= 120_000
    assert len((PROJECT / "CONTRIBUTING.md").read_bytes()) <= 4_000
    long = [
        f"{page.name}: {line[:60]}"
        for page in PAGES
        for line in FENCE.sub("", page.read_text(encoding="utf-8")).splitlines()
        if len(line) > 140 and not line.startswith(("| ", "!["))
    ]
    assert not long


def test_every_page_begins_with_what_its_reader_can_do_afterwards() -> None:
    for page in PAGES[1:]:
        _, _, body = page.read_text(encoding="utf-8").partition("\n\n")
        assert body.startswith("After this page you "), page.name
