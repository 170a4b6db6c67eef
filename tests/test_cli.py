from __future__ import annotations

import os
import shlex
import subprocess
import sys

import pytest

from recipes_lib import cli
from recipes_lib.core.errors import DataError, ExitCode
from recipes_lib.core.project import project_root

HEAVY = (
    "torch",
    "transformers",
    "tokenizers",
    "datasets",
    "peft",
    "trl",
    "numpy",
    "pandas",
    "rich",
    "accelerate",
    "huggingface_hub",
)
RECIPE = str(project_root() / "recipes/quickstart/lora-r8.yaml")


def in_a_process(*argv: str, code: str = "", **options) -> subprocess.CompletedProcess[str]:
    """Run the command line in a fresh interpreter; `code` runs after it."""
    program = (
        "import sys\nfrom recipes_lib.cli import main\nstatus ="
        f" main({list(argv)!r})\n{code}\nsys.exit(status)"
    )
    environment = {**os.environ, "PYTHONPATH": str(project_root() / "src")}
    return subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=project_root(),
        env=environment,
        **options,
    )


LIGHT = [
    *([], ["--help"], ["ls"], ["status"], ["check", "recipes"], ["explain", "train"]),
    *(["show", RECIPE], ["show", RECIPE, "--diff", RECIPE]),
    *([verb, "--help"] for verb in cli.VERBS),
]


def test_light_verbs_and_every_help_import_nothing_heavy():
    code = f"""
for argv in {LIGHT!r}:
    assert main(argv) == 0, argv
    heavy = [name for name in {HEAVY!r} if name in sys.modules]
    assert not heavy, (argv, heavy)
print("LIGHT")
"""
    done = in_a_process(code=code)
    assert done.stdout.splitlines()[-1:] == ["LIGHT"], done.stderr


def test_check_imports_only_what_the_kind_of_its_file_needs():
    others = ("compare", "evals", "slurm", "study")
    code = f"print([name for name in {others!r} if f'recipes_lib.{{name}}' in sys.modules])"
    assert in_a_process("check", RECIPE, code=code).stdout.splitlines()[-1] == "[]"
    study = "recipes/studies/quickstart.yaml"
    assert "'study'" in in_a_process("check", study, code=code).stdout.splitlines()[-1]


def test_without_arguments_the_verbs_are_listed_in_groups(capsys):
    assert cli.main([]) == 0
    out = capsys.readouterr().out
    assert "\nstart here\n  new " in out and "\nmore\n  ls " in out
    assert out.splitlines()[-1] == "next: recipes ls"
    assert len(cli.VERBS) <= 21


def test_every_verb_can_be_configured_and_documents_itself(capsys):
    for verb, text in cli.VERBS.items():
        assert cli.main([verb, "--help"]) == 0
        out = capsys.readouterr().out
        assert f"recipes {verb}" in out
        assert text[1:] in " ".join(out.split()), out  # names keep their capitals


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["chek"], ["no verb 'chek'", "did you mean recipes check?"]),
        (["show"], ["recipes show: ", "RECIPE", "usage:"]),
        (["show", RECIPE, "--dif", "x"], ["unknown option '--dif'", "did you mean --diff?"]),
        (["ls", "--diff"], ["unknown option '--diff'"]),
        (["explain", "train", "train.seed=1"], ["unknown argument 'train.seed'"]),
        (["show", RECIPE, "--learning_rate", "3"], ["section.key=value"]),
        (["show", RECIPE, "--learning_rate=3"], ["write train.learning_rate"]),
        (
            ["show", RECIPE, "train.sed=3"],
            ["command line: unknown key 'train.sed'", "did you mean train.seed?"],
        ),
    ],
)
def test_wrong_usage_is_one_message_and_exit_2(argv, words, capsys):
    assert cli.main(argv) == 2
    err = capsys.readouterr().err
    assert not [word for word in words if word not in err], err
    assert "Traceback" not in err


@pytest.fixture
def failing(monkeypatch):
    """Make `recipes ls` raise."""

    def install(error: BaseException) -> None:
        import recipes_lib.commands.ls

        def run() -> int:
            raise error

        monkeypatch.setattr(recipes_lib.commands.ls, "run", run)

    return install


def test_an_error_ends_with_its_own_exit_code(failing, capsys):
    failing(DataError("rows are missing", "add some", file="rows.jsonl", line=3))
    assert cli.main(["ls"]) == ExitCode.DATA
    assert capsys.readouterr().err == "rows.jsonl:3: rows are missing\n  add some\n"


def test_a_file_that_cannot_be_written_is_reported_as_an_error_of_the_machine_not_as_a_bug(
    failing, capsys
):
    """What a verb has not foreseen about files."""
    failing(IsADirectoryError(21, "Is a directory", "a.tmp", None, "folder"))
    assert cli.main(["ls"]) == ExitCode.ENVIRONMENT
    assert "cannot read or write: Is a directory (folder)\n" in capsys.readouterr().err
    failing(FileNotFoundError(2, "No such file or directory", "rows"))
    assert cli.main(["ls"]) == ExitCode.ENVIRONMENT
    assert "cannot read or write: No such file or directory (rows)" in capsys.readouterr().err
    failing(OSError(28, "No space left on device"))
    assert cli.main(["ls"]) == ExitCode.ENVIRONMENT
    assert "disk full: No space left on device\n  free some space" in capsys.readouterr().err


def test_a_closed_output_is_not_an_error(monkeypatch):
    """`recipes ls >&-`"""
    monkeypatch.setattr(sys, "stdout", None)
    assert cli.main(["ls"]) == ExitCode.DONE


def test_a_bug_is_one_line_unless_debug_is_asked_for(failing, capsys):
    failing(RuntimeError("broken\ndeep down"))
    assert cli.main(["ls"]) == ExitCode.FAILED
    assert capsys.readouterr().err.startswith(
        "internal error: RuntimeError: broken deep down\n  this is a bug"
    )
    with pytest.raises(RuntimeError):
        cli.main(["ls", "--debug"])


def test_debug_shows_the_traceback_of_an_error_as_well(capsys):
    assert cli.main(["show", "nowhere.yaml", "--debug"]) == 2
    err = capsys.readouterr().err
    assert "Traceback" in err
    assert "nowhere.yaml: no such file" in err


def test_ctrl_c_ends_with_130_and_one_line(failing, capsys):
    failing(KeyboardInterrupt())
    assert cli.main(["ls"]) == ExitCode.INTERRUPTED
    assert capsys.readouterr() == ("", "interrupted\n")


def test_a_closed_pipe_leads_to_no_traceback():
    reader, writer = os.pipe()
    os.close(reader)
    program = "import sys\nfrom recipes_lib.cli import main\nsys.exit(main(['explain', 'train']))"
    environment = {**os.environ, "PYTHONPATH": str(project_root() / "src")}
    done = subprocess.run(
        [sys.executable, "-c", program],
        stdout=writer,
        stderr=subprocess.PIPE,
        text=True,
        timeout=60,
        env=environment,
    )
    os.close(writer)
    assert done.stderr == ""
    assert done.returncode == 0


def test_an_ascii_terminal_gets_escapes_instead_of_a_crash(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text(
        "model: {name_or_path: a}\ndata: {source: b}\nrun: {notes: 'caf\u00e9 \u2192 \\e[31m'}\n",
        encoding="utf-8",
    )
    environment = {
        **os.environ,
        "PYTHONPATH": str(project_root() / "src"),
        "PYTHONIOENCODING": "ascii",
    }
    done = subprocess.run(
        [sys.executable, "-m", "recipes_lib.cli", "show", str(path), "train.seed=1"],
        capture_output=True,
        text=True,
        timeout=60,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    assert "caf\\xe9" in done.stdout


def test_the_version_is_printed(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.strip()


def test_training_sends_no_telemetry_unless_somebody_allows_it():
    ask = (
        "import recipes_lib.train; from huggingface_hub import constants;"
        " print(constants.HF_HUB_DISABLE_TELEMETRY)"
    )
    clean = {name: value for name, value in os.environ.items() if "TELEMETRY" not in name}
    said = [
        subprocess.run(
            [sys.executable, "-c", ask],
            env=clean | more,
            capture_output=True,
            text=True,
            timeout=60,
        ).stdout.strip()
        for more in ({}, {"HF_HUB_DISABLE_TELEMETRY": "0"})
    ]
    assert said == ["True", "False"]


def test_printed_commands_keep_their_quotes(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "my files"
    folder.mkdir()
    word = "train.eval_strategy='no'"
    (folder / "study.yaml").write_text(
        f'question: q\narms:\n  a: {{recipe: {RECIPE}, overrides: ["{word}"]}}\nseeds: [1]\n'
        f"evals: [{project_root()}/evals/quickstart/house_style.yaml]\n"
    )
    for verb in (["study", "plan"], ["plan"]):
        assert cli.main([*verb, "my files/study.yaml", word]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert shlex.split(lines[-1])[-2:] == ["my files/study.yaml", word]
    assert cli.main(["check", "my files/study.yaml"]) == 0
    assert shlex.split(capsys.readouterr().out.splitlines()[-1])[-1] == "my files/study.yaml"


def test_eval_names_the_judgments_that_are_there(tmp_path):
    from recipes_lib.commands.eval import judgments_beside

    result = tmp_path / "my-results/evals/alpaca_eval/result.against-base.json"
    assert judgments_beside(result) == str(result.with_name("judgments.against-base.jsonl"))
