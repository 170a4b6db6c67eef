"""README and docs are true: their ```bash blocks run or parse, the output they show is what is
printed, their links lead somewhere.
"""

import re
import shlex
import shutil
from pathlib import Path

import pytest

from recipes_lib import cli, train
from recipes_lib.config.documents import read
from recipes_lib.config.launch import load_accelerate_config
from recipes_lib.config.recipe import accumulation_steps, load_recipe
from recipes_lib.core.errors import ExitCode
from recipes_lib.study.config import load_study
from recipes_lib.study.trainings import study_trainings

PROJECT = Path(__file__).resolve().parents[2]
DOCS = sorted((PROJECT / "docs").glob("*.md"))
PAGES = [PROJECT / "README.md", PROJECT / "AGENTS.md", *DOCS]
TEXTS = {page: page.read_text(encoding="utf-8") for page in PAGES}
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
# Run for real, in a copy of the folders they read. Of the others only the words are checked: they
# need a model or finished runs.
RUN = {"ls", "show", "explain", "check", "new", "migrate", "plan"}
LAUNCHER_FLAGS = {"--config_file", "--num_processes", "--num_machines"}
LAUNCHER_FLAGS |= {"--machine_rank", "--main_process_ip", "--main_process_port"}


def blocks(page: Path) -> list[tuple[list[str], list[str]]]:
    """The commands of each ```bash block, and the lines of the output shown right below it."""
    result: list[tuple[list[str], list[str]]] = []
    end = -1
    for fence in FENCE.finditer(TEXTS[page]):
        language, body = fence.groups()
        if language == "bash":
            lines = body.replace("\\\n", " ").splitlines()
            result.append(([line for line in lines if shlex.split(line, comments=True)], []))
            end = fence.end()
        elif not language and fence.start() == end + 1:
            result[-1][1].extend(body.splitlines())
    return result


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What a fresh checkout holds for the commands; what they write stays in it."""
    for folder in ("recipes", "accelerate_configs", "evals", "schema", "tests/config/flat_configs"):
        own = shutil.ignore_patterns("my-*")  # what a reader of the page made here
        shutil.copytree(PROJECT / folder, tmp_path / folder, ignore=own)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("recipes_lib.evals.recipe.project_root", lambda: tmp_path)
    monkeypatch.setattr("recipes_lib.config.new.project_root", lambda: tmp_path)
    monkeypatch.setenv("RECIPES_RUNS_ROOT", str(tmp_path / "runs"))
    monkeypatch.setenv("COLUMNS", "120")
    return tmp_path


@pytest.mark.parametrize("page", [*filter(blocks, PAGES)], ids=lambda page: page.stem)
def test_every_command_of_a_page_works_and_prints_what_is_shown(page, checkout, capsys):
    for commands, shown in blocks(page):
        capsys.readouterr()
        ran = [perform(shlex.split(command, comments=True), command) for command in commands]
        if all(ran):
            printed = [line.split() for line in capsys.readouterr().out.splitlines()]
            lines = [line for line in shown if line not in ("", "...")]
            missing = [line for line in lines if line.split() not in printed]  # widths are free
            assert not missing, f"{page.name}: {commands} does not print {missing}"


def test_the_study_and_the_second_stage_of_the_readme_are_recipes(checkout: Path) -> None:
    bodies = [body for language, body in FENCE.findall(TEXTS[PAGES[0]]) if language == "yaml"]
    for name, yaml in zip(("my-dpo", "my-study"), bodies, strict=True):
        (checkout / "recipes" / f"{name}.yaml").write_text(yaml, encoding="utf-8")
    # the run of the first stage and the pairs are the reader's
    assert load_recipe("recipes/my-dpo.yaml", ["model.name_or_path=org/base"]).stage == "dpo"
    for verb in (["check"], ["study", "plan"]):
        assert cli.main([*verb, "recipes/my-study.yaml"]) == ExitCode.DONE


def perform(argv: list[str], command: str) -> bool:
    """Run a command, or check its words; return whether it was run as it stands."""
    match argv:
        case ["make", *targets]:
            makefile = (PROJECT / "Makefile").read_text(encoding="utf-8")
            known = re.findall(r"^([a-z-]+):.*##", makefile, re.MULTILINE)
            assert targets and set(targets) <= set(known), command
        case [".", ".venv/bin/activate"]:
            pass
        case ["accelerate", "launch", *rest]:
            check_launch_line(rest, command)
        case ["recipes", verb, *rest] if verb in RUN and "--full" not in rest:
            assert cli.main([verb, *rest]) == ExitCode.DONE, command
            return True
        case ["recipes", "study", "plan" | "status", *_]:
            assert cli.main(argv[1:]) == ExitCode.DONE, command
            return True
        case ["recipes", "launch", what, *rest] if what not in ("status", "cancel"):
            # nothing is trained: stages that need a finished run are looked at with the training
            flags = [word.replace("eval,", "train,eval,") for word in rest]
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
    assert flags.keys() <= LAUNCHER_FLAGS and script[0] == "recipes_lib.train", command
    config = load_accelerate_config(flags["--config_file"])
    options, overrides = train.parse_arguments(script[1:])
    processes = int(flags.get("--num_processes", config.num_processes))
    assert accumulation_steps(load_recipe(options.recipe, overrides), processes) > 0


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
    # a pattern of folders that others made, as r8=out/r8-s*
    runs = [word for word in words.get("runs", []) if "*" not in word]
    runs += filter(None, [words.get("run")])
    assert set(runs) <= runs_of_recipes(), command


def runs_of_recipes() -> set[str]:
    """The runs that training a recipe or running a study makes."""
    kinds = {path: read(path).kind for path in Path("recipes").rglob("*.yaml")}
    studies = [load_study(path) for path, kind in kinds.items() if kind == "study"]
    trained = {training.run for study in studies for training in study_trainings(study)}
    recipes = (path for path, kind in kinds.items() if kind == "recipe" and path.name[0] != "_")
    return trained | {load_recipe(path).name for path in recipes}


def test_every_link_and_every_file_that_a_page_names_leads_somewhere() -> None:
    wrong = []
    for page, text in TEXTS.items():
        targets = re.findall(r"\]\(([^)\s]+)\)", text)
        local = [word.partition("#")[0] for word in targets if not re.match(r"[a-z]+:", word)]
        wrong += [(page.name, name) for name in local if not (page.parent / name).exists()]
        folders = "tests|recipes|accelerate_configs|schema"
        named = re.findall(rf"`((?:{folders})/[\w./-]+\.(?:py|yaml|json))`", text)
        wrong += [
            (page.name, name)
            for name in named
            if "my-first" not in name and not (PROJECT / name).exists()
        ]
    promises = (PROJECT / "tests" / "README.md").read_text(encoding="utf-8")
    proofs = re.findall(r"`(tests/[\w/]*\.py)`", promises)
    wrong += [("tests/README.md", name) for name in proofs if not (PROJECT / name).is_file()]
    assert len(proofs) > 10 and not wrong


def test_the_page_for_agents_names_every_verb_and_its_exit_codes() -> None:
    text = TEXTS[PROJECT / "AGENTS.md"]
    table = " ".join(re.findall(r"^\| (`.*`) \|", text, re.MULTILINE))
    assert {word.split()[0] for word in re.findall(r"`([^`]+)`", table)} == {*cli.VERBS}
    said = text.partition("Exit codes:")[2].partition("\n\n")[0]
    assert all(str(int(code)) in re.findall(r"\d+", said) for code in ExitCode)


def test_the_exit_codes_of_the_page_are_those_of_the_program() -> None:
    page = TEXTS[PROJECT / "docs" / "training.md"]
    codes = re.findall(r"^\| (\d+) \|", page.split("\n## Exit codes\n")[1], re.MULTILINE)
    assert [int(code) for code in codes] == [int(code) for code in ExitCode]


def test_pages_are_short_and_begin_with_what_their_reader_can_do_afterwards() -> None:
    readme, agents, *docs = [len(text.encode()) for text in TEXTS.values()]
    assert readme <= 7_000 and agents <= 4_000 and sum(docs) <= 110_000
    assert len((PROJECT / "CONTRIBUTING.md").read_bytes()) <= 4_000
    for page, text in TEXTS.items():
        lines = FENCE.sub("", text).splitlines()
        long = [line for line in lines if len(line) > 140 and not line.startswith(("| ", "!["))]
        assert not long, page.name
    for page in DOCS:
        assert TEXTS[page].partition("\n\n")[2].startswith("After this page you "), page.name
