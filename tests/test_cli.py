"""`recipes VERB`: what every verb shares: words, errors, exit codes, and a quick start."""

import json
import os
import subprocess
import sys

from recipes_lib import cli
from recipes_lib.core.errors import DataError, ExitCode
from recipes_lib.core.project import project_root

HEAVY = (
    *("torch", "transformers", "tokenizers", "datasets", "peft", "trl", "numpy", "pandas", "rich"),
    *("accelerate", "huggingface_hub"),
)
RECIPE = str(project_root() / "recipes/quickstart/lora-r8.yaml")
LIGHT = [
    *([], ["--help"], ["--version"], ["ls"], ["status"], ["check", "recipes"]),
    *(["explain", "train"], ["show", RECIPE], ["show", RECIPE, "--diff", RECIPE]),
    *([verb, "--help"] for verb in cli.VERBS),
    *(["help", verb] for verb in cli.VERBS),
    *([verb, "nonsense"] for verb in ("plan", "train", "chat", "merge")),
    *(["plan", RECIPE, "--gpu", "nonsense"], ["study", "status", "quickstart"]),
]


def python(program: str, **options) -> subprocess.CompletedProcess[str]:
    """Run a program in a fresh interpreter."""
    environment = {**os.environ, "PYTHONPATH": str(project_root() / "src")}
    options = {"stdout": subprocess.PIPE, "cwd": project_root()} | options
    options["env"] = environment | options.get("env", {})
    command = [sys.executable, "-c", program]
    return subprocess.run(command, stderr=subprocess.PIPE, text=True, timeout=60, **options)


def test_light_verbs_and_every_help_import_nothing_heavy():
    done = python(f"""
import sys
from recipes_lib.cli import main
for words in ([], ["--help"], ["help"], ["--version"], ["chek"]):
    main(words)
slow = ("filelock", "importlib.metadata", "pydantic", "yaml")
assert not [name for name in slow if name in sys.modules]
main(["check", {RECIPE!r}])  # it imports only what the kind of its file needs
others = ("analysis", "evals", "slurm", "study")
assert not [name for name in others if f"recipes_lib.{{name}}" in sys.modules]
for argv in {LIGHT!r}:
    assert main(argv) == 2 * ("nonsense" in argv), argv
    heavy = [name for name in {HEAVY!r} if name in sys.modules]
    assert not heavy, (argv, heavy)
""")
    assert done.returncode == 0, done.stderr


def test_without_arguments_the_verbs_are_listed_in_groups_and_each_documents_itself(said):
    out = said()
    assert "\nstart here\n  new " in out and "\nmore\n  ls " in out
    assert out.splitlines()[-1] == "next: recipes ls"
    for verb, (_, text) in cli.VERBS.items():
        printed = " ".join(said(verb, "--help").split())
        assert text[1:] in printed  # names keep their capitals
        takes_values = verb not in ("migrate", "ls", "status", "doctor", "explain")
        assert takes_values or "section.key=value" not in printed, verb


def test_help_is_a_spelling_of_the_flag_before_and_behind_a_verb_and_an_action(said):
    for same in (["help"], ["-h"], ["--help"], ["help", "help"], ["help", "--help"]):
        assert said(*same) == said(), same
    for verb in cli.VERBS:
        wanted = said(verb, "--help")
        for words in (["help", verb], ["--help", verb], [verb, "help"], ["--debug", "help", verb]):
            assert said(*words) == wanted, words
    for words in (["help", "study", "run"], ["study", "help", "run"], ["study", "run", "help"]):
        assert said(*words) == said("study", "run", "--help"), words
    assert "did you mean recipes check?" in said("help", "chek", code=2)
    as_a_name = said("plan", "help", "train.seed=1", code=2)
    assert "help: no such file or recipe" in as_a_name
    assert "takes files, not overrides" in said("check", "quickstart/lora-r8", "lora.r=4", code=2)


def test_verbs_and_flags_are_listed_for_tools(said):
    value = json.loads(said("--help", "--json"))
    verbs = {row["verb"]: row for row in value["verbs"]}
    assert {verb.partition(" ")[0] for verb in verbs} == {*cli.VERBS} and "study run" in verbs
    flags = {row["name"]: row for row in verbs["new"]["arguments"]}
    assert flags["--from"]["required"] and flags["--method"]["choices"] == ["lora", "qlora", "full"]
    assert not verbs["train"]["arguments"][-1]["takes_value"] and verbs["train"]["takes_overrides"]
    assert value["exit_codes"]["data"] == 4


WRONG = [
    (["chek"], ["unknown verb 'chek'", "did you mean recipes check?"]),
    (["show"], ["recipes show: ", "RECIPE", "usage:"]),
    (["show", RECIPE, "--dif", "x"], ["'--dif' is not section.key=value"]),
    (["ls", "x", "--diff"], ["unknown arguments: x --diff"]),
    (["plan", "--gpus", "0"], ["--gpus: expected a whole number >= 1"]),
    (["study", "plan", "--gpus=1"], ["recipes study plan: ", "required: STUDY"]),
    (["explain", "train", "train.seed=1"], ["unknown arguments: train.seed=1"]),
    (["show", RECIPE, "foo.bar=1"], ["command line: unknown key 'foo'"]),
    (["show", "README.md"], ["README.md: is not YAML", "recipes ls"]),
    (["show", "recipes"], ["recipes: is not a file", "recipes ls"]),
    (["study", "plan", "quickstar"], ["did you mean quickstart?"]),
    (["data", RECIPE, "--against", "nope.yaml"], ["nope.yaml: no such file", "evals/"]),
    (["show", RECIPE, "--origins"], ["command line: '--origins' is not section.key=value"]),
    (["show", RECIPE, "train.sed=3"], ["command line: unknown key", "did you mean train.seed?"]),
    (
        ["eval", "quickstart/house_style", "base"],
        ["did you mean evals/quickstart/house_style.yaml"],
    ),
    (["export", "my-first"], ["required: --to", "usage:"]),
    (["new"], ["required: NAME, --from"]),
    (["prefetch"], ["required: FILE"]),
    (["data", RECIPE, "--show=1.5"], ["--show: expected a whole number"]),
    (["data", RECIPE, "--show=-1"], ["--show: expected a whole number"]),
]


def test_wrong_usage_is_one_message_and_exit_2(said):
    for argv, words in WRONG:
        err = said(*argv, code=2)
        assert "Traceback" not in err and all(word in err for word in words), argv


def test_an_error_ends_with_its_own_exit_code_and_words(monkeypatch, recipes, said):
    errors: list[BaseException] = []

    def fail() -> int:
        raise errors[-1]

    monkeypatch.setattr("recipes_lib.commands.overview.run_ls", fail)
    for error, code, words in (
        (DataError("no rows", "add some", file="a.jsonl", line=3), 4, "a.jsonl:3: no rows\n  add "),
        (KeyboardInterrupt(), 130, "interrupted; the same command continues\n"),
        (FileNotFoundError(2, "No file", "rows"), 5, "cannot read, write or allocate: [Errno 2] "),
        (OSError(28, "No space left on device"), 5, "cannot read, write or allocate: [Errno 28] "),
        (RuntimeError("broken\ndeep down"), 1, "internal error: RuntimeError: broken deep down\n"),
    ):
        errors.append(error)
        found, out, err = recipes("ls")
        assert found == code and not out
        assert err.startswith(words) and "Traceback" not in err
    assert "Traceback" in said("ls", "--debug", code=1)
    err = said("show", "nowhere.yaml", "--debug", code=2)
    assert "Traceback" in err and "nowhere.yaml: no such file" in err


def test_an_output_that_is_closed_is_not_an_error(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)  # `recipes ls >&-`
    assert cli.main(["ls"]) == ExitCode.DONE
    reader, writer = os.pipe()
    os.close(reader)
    main = "import sys\nfrom recipes_lib.cli import main\nsys.exit(main({}))"
    done = python(main.format(["explain", "train"]), stdout=writer)
    os.close(writer)
    assert (done.stderr, done.returncode) == ("", 0)


def test_an_interrupt_while_modules_load_ends_without_a_traceback():
    done = python("""
import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run behind &
class Interrupting:
    def find_spec(self, name, *_):
        if name == "recipes_lib.core.errors":
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Interrupting())
import recipes_lib.cli
""")
    assert (done.returncode, done.stderr) == (-2, "")


def test_training_sends_no_telemetry_unless_somebody_allows_it(monkeypatch):
    monkeypatch.delenv("HF_HUB_DISABLE_TELEMETRY", raising=False)
    ask = (
        "import recipes_lib.train; from huggingface_hub import constants;"
        " print(constants.HF_HUB_DISABLE_TELEMETRY)"
    )
    said = [python(ask, env=more).stdout for more in ({}, {"HF_HUB_DISABLE_TELEMETRY": "0"})]
    assert said == ["True\n", "False\n"]


def test_the_retries_of_the_hub_are_not_told_one_by_one() -> None:
    import huggingface_hub

    from recipes_lib.core.environment import quiet_libraries

    huggingface_hub.logging.set_verbosity_warning()
    quiet_libraries()
    assert huggingface_hub.logging.get_verbosity() == huggingface_hub.logging.ERROR
