"""Running a study on this machine: one runner, arms that fail alone, runs of other settings moved
away. Trainings are stand-ins here.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest

from recipes_lib.cli import main
from recipes_lib.compare.design import Study, load_study
from recipes_lib.config.recipe import Recipe
from recipes_lib.core.errors import EnvironmentFault, ExitCode, RecipeError
from recipes_lib.core.run_directory import RunDirectory
from recipes_lib.core.run_lock import run_lock
from recipes_lib.study import conclusion, leaks, runner, steps, trainings
from recipes_lib.study.evaluation import set_results_aside
from recipes_lib.study.runner import run_study, study_lock
from recipes_lib.study.steps import build_graph

# What `recipes train` leaves behind, in a hundredth of its time. Its words are those of the real
# one.
TRAIN = textwrap.dedent("""
    import os, pathlib, shutil, sys, time
    from recipes_lib.core.run_directory import RunDirectory
    name = next(word for word in sys.argv if word.startswith("run.name=")).partition("=")[2]
    run = RunDirectory(name)
    run.write_state("running")
    shutil.copy(os.environ["RECIPES_HANDED_RECIPE"], run.path / "recipe.json")
    print("training", name, flush=True)
    time.sleep(float(os.environ.get("TRAIN_SECONDS", "0")))
    failing = os.environ.get("FAIL", "")
    if name.endswith(failing) and failing:
        code = int(os.environ.get("CODE", "1"))
        run.write_state("preempted" if code == 75 else "failed", exit_code=code, error="out of memory")
        sys.exit(code)
    (run.path / "adapter").mkdir()
    (run.path / "adapter" / "adapter_model.safetensors").write_bytes(b"weights of " + " ".join(sys.argv[1:]).encode())
    run.write_state("finished", exit_code=0, guard={"prompt_format_hash": "abc"}, summary={"seconds": 12.5})
""")  # noqa: E501


@pytest.fixture
def study(study_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Study:
    monkeypatch.setattr(
        trainings, "train_command", lambda words: [sys.executable, "-c", TRAIN, *words]
    )
    monkeypatch.setattr(runner, "_evaluate", lambda *args: {})
    monkeypatch.setattr(runner, "_conclude", lambda *args: {})
    return load_study(study_folder / "tiny.yaml")


def states(study: Study) -> dict[str, str]:
    return {
        name: state.state
        for name, state in build_graph(study).survey().items()
        if name.startswith("train")
    }


def test_every_arm_is_trained_once(study: Study) -> None:
    said: list[str] = []
    run_study(study, said.append, only=["train"])
    assert states(study) == {"train.r4": "fresh", "train.r8": "fresh"}
    assert sum("$ recipes train" in line for line in said) == 2
    said.clear()
    assert run_study(study, said.append, only=["train"]) == ExitCode.DONE
    assert said == []


def test_a_training_gets_the_recipe_that_the_study_resolved_whatever_its_file_says_now(
    study: Study, study_folder: Path
) -> None:
    for file in study_folder.glob("*.yaml"):
        file.write_text("edited: since\n")
    run_study(study, lambda line: None, only=["train"])
    handed = Recipe.read(RunDirectory("tiny--r4").path / "recipe.json")
    resolved = study.arm("r4").recipe
    assert resolved and (handed.name, handed.lora) == ("tiny--r4", resolved.lora)


def test_a_failing_arm_stops_no_other_and_the_end_lists_it(
    study: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAIL", "r4")
    said: list[str] = []
    assert run_study(study, said.append) == ExitCode.FAILED
    assert states(study) == {"train.r4": "missing", "train.r8": "fresh"}
    assert any("train.r4 (exit code 1): out of memory" in line for line in said)
    failure = build_graph(study).survey()["train.r4"].failure
    assert failure is not None and failure.error == "out of memory"
    monkeypatch.delenv("FAIL")
    run_study(study, said.append, only=["train"])
    assert states(study) == {"train.r4": "fresh", "train.r8": "fresh"}


def test_a_preempted_training_ends_the_study_with_its_code_and_is_no_failure(
    study: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAIL", "r4")
    monkeypatch.setenv("CODE", "75")
    assert run_study(study, lambda line: None) == ExitCode.PREEMPTED
    assert states(study) == {"train.r4": "missing", "train.r8": "missing"}
    assert build_graph(study).survey()["train.r4"].failure is None


@pytest.mark.parametrize("during", ["_clear_way", "Popen"])
def test_a_request_to_stop_while_a_training_is_being_started_is_not_lost(
    study: Study, monkeypatch: pytest.MonkeyPatch, during: str
) -> None:
    monkeypatch.setenv("TRAIN_SECONDS", "20")
    owner: Any = trainings.Trainings if during == "_clear_way" else trainings.subprocess
    begin = getattr(owner, during)

    def interrupted(*args: Any, **options: Any) -> Any:
        begun = begin(*args, **options)
        os.kill(os.getpid(), signal.SIGTERM)
        return begun

    monkeypatch.setattr(owner, during, interrupted)
    started = time.monotonic()
    assert run_study(study, lambda line: None, only=["train"]) == ExitCode.PREEMPTED
    assert time.monotonic() - started < 10
    assert states(study) == {"train.r4": "missing", "train.r8": "missing"}


def test_a_training_whose_runner_is_gone_before_it_begins_ends_at_once() -> None:
    program = "from recipes_lib.study.trainings import _die_with_parent\n_die_with_parent(1)"
    done = subprocess.run(
        [sys.executable, "-c", program], timeout=30, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (1 if sys.platform == "linux" else 0, "")


def test_two_at_a_time_write_their_output_to_files(study: Study) -> None:
    run_study(study, lambda line: None, jobs=2, only=["train"])
    logs = RunDirectory("tiny").path / "logs"
    assert {file.name: file.read_text(encoding="utf-8") for file in logs.iterdir()} == {
        f"tiny--{arm}.log": f"training tiny--{arm}\n" for arm in ("r4", "r8")
    }


GPUS = """
import json, os, pathlib, sys, time
folder = pathlib.Path(os.environ["SEEN"])
name = next(word for word in sys.argv if word.startswith("run.name=")).partition("=")[2]
mine = os.environ.get("CUDA_VISIBLE_DEVICES")
port = sys.argv[sys.argv.index("--main-process-port") + 1] if "--main-process-port" in sys.argv else None
file = folder / name
file.write_text("")
shared = [other.name for other in folder.glob("*.now") if set(other.read_text().split(",")) & set((mine or "").split(","))]
(folder / f"{name}.now").write_text(mine or "")
time.sleep(0.5)
file.write_text(json.dumps([mine, shared, port]))
(folder / f"{name}.now").unlink()
"""  # noqa: E501


def gpus_seen(
    study: Study, folder: Path, monkeypatch: pytest.MonkeyPatch, jobs: int, visible: str | None
) -> dict[str, list[Any]]:
    """Train with stand-ins that note the devices they see and with whom they share one: run ->
    [devices, shared with, port].
    """
    folder.mkdir()
    monkeypatch.setenv("SEEN", str(folder))
    (
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        if visible is not None
        else monkeypatch.delenv("CUDA_VISIBLE_DEVICES", False)
    )
    monkeypatch.setattr(
        trainings, "train_command", lambda words: [sys.executable, "-c", GPUS + TRAIN, *words]
    )
    said: list[str] = []
    run_study(study, said.append, jobs=jobs, only=["train"])
    assert len(list(folder.iterdir())) == 4, said
    return {
        file.name.removeprefix("tiny--"): json.loads(file.read_text(encoding="utf-8"))
        for file in folder.iterdir()
    }


def many_gpus(study: Study, **arms: tuple[str, int]) -> Study:
    """The study with four trainings, and arms launched on so many processes."""
    path = study.path
    text = path.read_text(encoding="utf-8").replace("seeds: [42]", "seeds: [42, 43]")
    text += "overrides: [train.per_device_train_batch_size=1]\n"
    for name, (config, gpus) in arms.items():
        text = text.replace(
            f"  {name}: {name}.yaml",
            f"  {name}: {{recipe: {name}.yaml, accelerate: {config}, gpus: {gpus}}}",
        )
    path.write_text(text, encoding="utf-8")
    return load_study(path)


def test_trainings_at_the_same_time_never_share_a_gpu(
    study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wide = many_gpus(study, r4=("single_gpu", 1), r8=("ddp", 2))
    seen = gpus_seen(wide, tmp_path / "seen", monkeypatch, jobs=3, visible="5,GPU-b,7")
    assert {name: len(devices.split(",")) for name, (devices, _, _) in seen.items()} == {
        "r4": 1,
        "r4--seed43": 1,
        "r8": 2,
        "r8--seed43": 2,
    }
    assert all(
        set(devices.split(",")) <= {"5", "GPU-b", "7"} and shared == []
        for devices, shared, _ in seen.values()
    )
    assert (seen["r4"][0], seen["r4--seed43"][0]) == ("5", "GPU-b")
    ports = [port for _, _, port in seen.values() if port]
    assert len(ports) == len(set(ports)) == 2


def test_a_launch_that_wants_more_gpus_than_there_are_has_all_of_them_alone(
    study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wide = many_gpus(study, r4=("single_gpu", 1), r8=("ddp", 4))
    seen = gpus_seen(wide, tmp_path / "seen", monkeypatch, jobs=4, visible="0,1")
    assert {seen["r8"][0], seen["r8--seed43"][0]} == {"0,1"} and all(
        shared == [] for _, shared, _ in seen.values()
    )


@pytest.mark.parametrize(
    ("jobs", "visible"),
    [(1, "0,1"), (2, ""), (2, None)],
    ids=["one at a time", "no GPU", "not said"],
)
def test_trainings_one_at_a_time_and_on_the_cpu_see_what_the_study_sees(
    jobs: int, visible: str | None, study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = gpus_seen(many_gpus(study), tmp_path / "seen", monkeypatch, jobs, visible)
    assert {devices for devices, _, _ in seen.values()} == {visible}


def test_a_run_trained_with_other_inputs_is_moved_away_and_never_lost(
    study: Study, study_folder: Path
) -> None:
    run_study(study, lambda line: None, only=["train"])
    before = (RunDirectory("tiny--r4").path / "adapter" / "adapter_model.safetensors").read_bytes()
    recipe = study_folder / "r4.yaml"
    recipe.write_text(
        recipe.read_text(encoding="utf-8").replace("1.0e-2", "2.0e-2"), encoding="utf-8"
    )
    said: list[str] = []
    changed = load_study(study_folder / "tiny.yaml")
    run_study(changed, said.append, only=["train"])
    moved = (
        RunDirectory("tiny").path
        / "replaced"
        / "tiny--r4"
        / "adapter"
        / "adapter_model.safetensors"
    )
    assert moved.read_bytes() == before
    assert any("train.learning_rate 0.01 -> 0.02" in line and "moved to" in line for line in said)
    assert states(changed) == {"train.r4": "fresh", "train.r8": "fresh"}


def test_a_training_by_older_code_and_one_whose_weights_are_gone_are_done_again(
    study: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_study(study, lambda line: None, only=["train"])
    monkeypatch.setitem(steps.VERSIONS, "train", 2)
    said: list[str] = []
    run_study(study, said.append, only=["train"])
    assert sum("$ recipes train" in line for line in said) == 2 and any(
        "tiny--r4 is out of date (code 1 -> 2)" in line for line in said
    )
    shutil.rmtree(RunDirectory("tiny--r4").path / "adapter")
    said.clear()
    run_study(study, said.append, only=["train"])
    assert sum("$ recipes train" in line for line in said) == 1 and any(
        "its weights are gone" in line for line in said
    )
    assert states(study) == {"train.r4": "fresh", "train.r8": "fresh"}


def test_answers_and_judgments_of_older_code_are_moved_away_because_what_is_stored_is_not_asked_again(  # noqa: E501
    study: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph = build_graph(study)
    folder = RunDirectory("tiny--r8").path / "evals" / "study--alpaca_eval"
    folder.mkdir(parents=True)
    made = {
        "answers.study--alpaca_eval.r8": "generations.jsonl",
        "judgments.study--alpaca_eval.r8": "result.json",
        "comparison.study--alpaca_eval.r8-vs-r4": "result.against-tiny--r4.json",
    }
    for name, file in made.items():
        (folder / file).write_text("{}\n", encoding="utf-8")
        (
            folder
            / file.replace("result", "judgments")
            .replace(".json", ".jsonl")
            .replace("jsonll", "jsonl")
        ).write_text("{}\n", encoding="utf-8")
        graph.finish(graph.steps[name], "x", [folder / file])
    for name in made:
        set_results_aside(study, graph, graph.steps[name], lambda line: None)
    assert not (runner.study_folder(study) / "replaced").exists()
    for kind in ("answers", "judgments", "comparison"):
        monkeypatch.setitem(steps.VERSIONS, kind, 2)
    newer = build_graph(study)
    for name in made:
        set_results_aside(study, newer, newer.steps[name], lambda line: None)
    away = runner.study_folder(study) / "replaced" / "tiny--r8" / "evals" / "study--alpaca_eval"
    assert sorted(file.name for file in away.iterdir()) == [
        "generations.jsonl",
        "judgments.against-tiny--r4.jsonl",
        "judgments.jsonl",
    ]
    assert not list(folder.glob("*.jsonl"))
    (folder / "generations.jsonl").write_text(
        "{}\n", encoding="utf-8"
    )  # the new code's, then killed
    set_results_aside(study, newer, newer.steps["answers.study--alpaca_eval.r8"], lambda line: None)
    assert (folder / "generations.jsonl").is_file()


def test_a_training_that_was_stopped_shows_how_far_it_came(
    study: Study, capsys: pytest.CaptureFixture[str]
) -> None:
    run = RunDirectory("tiny--r4")
    run.write_state("preempted")
    run.metrics.write_text('{"step": 7, "loss": 2.5}\n', encoding="utf-8")
    main(["study", "status", str(study.path), "--json"])
    rows = {
        row["step"]: (row["state"], row["detail"])
        for row in json.loads(capsys.readouterr().out)["steps"]
    }
    assert rows["train.r4"] == (
        "missing",
        "stopped (step 7, loss 2.500): the same command continues it",
    )


@pytest.mark.parametrize(
    ("raised", "code"), [(KeyboardInterrupt, 130), (None, 75)], ids=["Ctrl-C", "SIGTERM"]
)
def test_a_study_stopped_while_it_evaluates_says_so_and_is_no_failure(
    study: Study, monkeypatch: pytest.MonkeyPatch, raised: type[BaseException] | None, code: int
) -> None:
    def evaluating(*args: Any) -> Any:
        if raised:
            raise raised
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)

    monkeypatch.setattr(runner, "_evaluate", evaluating)
    said: list[str] = []
    assert run_study(study, said.append) == code
    assert said[-1] == "stopped; the same command continues"
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_full_disk_is_one_line_and_the_same_command_continues(
    study: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    def writing(*args: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device", "generations.jsonl")

    monkeypatch.setattr(runner, "_evaluate", writing)
    with pytest.raises(
        EnvironmentFault, match="the disk is full: No space left on device"
    ) as refused:
        run_study(study, lambda line: None)
    assert "the same command continues" in str(refused.value)
    monkeypatch.setattr(runner, "_evaluate", lambda *args: {})
    run_study(study, lambda line: None, only=["train"])
    assert states(study) == {"train.r4": "fresh", "train.r8": "fresh"}


def test_a_run_that_a_cluster_job_finished_is_taken_over_without_training(
    study: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_study(study, lambda line: None, only=["train"])
    for arm in ("r4", "r8"):
        for name in ("done.json", "started.json"):
            (build_graph(study).folder / f"train.{arm}" / name).unlink()
    monkeypatch.setattr(
        trainings, "train_command", lambda words: pytest.fail("it was trained already")
    )
    monkeypatch.setattr("recipes_lib.study.trainings.recipe_differences", lambda recipe, guard: {})
    run_study(study, lambda line: None, only=["train"])
    assert states(study) == {"train.r4": "fresh", "train.r8": "fresh"}


HOLD = (
    "import sys, time\nfrom pathlib import Path\nfrom recipes_lib.core.run_lock import run_lock\nwith"  # noqa: E501
    " run_lock(Path(sys.argv[1])):\n"
)


def test_a_second_runner_is_refused_with_host_and_process(
    study: Study, capsys: pytest.CaptureFixture[str]
) -> None:
    import socket

    program = HOLD + "    print('held', flush=True)\n    time.sleep(30)"
    other = subprocess.Popen(
        [sys.executable, "-c", program, str(RunDirectory("tiny").path)],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        with pytest.raises(EnvironmentFault) as refused, study_lock(study):
            pass
        assert f"process {other.pid} on host {socket.gethostname()}" in str(refused.value)
        assert main(["study", "run", str(study.path)]) == ExitCode.ENVIRONMENT
        assert f"process {other.pid}" in capsys.readouterr().err
        assert main(["study", "status", str(study.path)]) == ExitCode.DONE
        assert main(["study", "plan", str(study.path)]) == ExitCode.DONE
    finally:
        other.kill()
        other.wait()
    with study_lock(study):
        pass


def test_a_training_that_somebody_else_does_is_waited_for(study: Study) -> None:
    program = HOLD + "    print('held', flush=True)\n    time.sleep(1.5)"
    other = subprocess.Popen(
        [sys.executable, "-c", program, str(RunDirectory("tiny--r4").path)],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert other.stdout is not None and other.stdout.readline() == "held\n"
    said: list[str] = []
    run_study(study, said.append, only=["train"])
    assert other.wait() == 0
    assert sum(f"tiny--r4 is being trained by process {other.pid}" in line for line in said) == 1
    assert states(study) == {"train.r4": "fresh", "train.r8": "fresh"}


@pytest.mark.skipif(
    sys.platform != "linux", reason="the kernel tells children of a killed process on Linux only"
)
def test_a_killed_runner_leaves_no_training_behind(study: Study, study_folder: Path) -> None:
    stand_in = f"lambda words: [{sys.executable!r}, '-c', {TRAIN!r}, *words]"
    program = f"from recipes_lib.study import trainings\ntrainings.train_command = {stand_in}\n"
    program += (
        f"from recipes_lib.cli import main\nmain(['study', 'run', {str(study.path)!r}, '--only',"
        " 'train'])"
    )
    environment = {**os.environ, "TRAIN_SECONDS": "60"}
    process = subprocess.Popen(
        [sys.executable, "-c", program], env=environment, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    while "training tiny--r4" not in process.stdout.readline():
        pass
    process.kill()
    process.wait()
    process.stdout.read()  # ends when the last writer, the training, has ended
    assert states(study) == {"train.r4": "missing", "train.r8": "missing"}


def test_a_step_that_does_not_exist_is_refused(study: Study) -> None:
    with pytest.raises(RecipeError, match="--only trian: no such step"):
        run_study(study, lambda line: None, only=["trian"])


# ---- Verbs ----


def tree(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.mark.parametrize(
    "words",
    [
        ["plan"],
        ["plan", "--json"],
        ["status"],
        ["status", "--json"],
        ["diff"],
        ["run", "--dry-run"],
    ],
    ids=" ".join,
)
def test_plan_status_and_diff_touch_nothing_and_import_nothing_heavy(
    words: list[str], study_folder: Path, tmp_path: Path
) -> None:
    before = tree(tmp_path)
    program = "import sys\nfrom recipes_lib.cli import main\ncode = main(sys.argv[1:])\n"
    program += (
        "print('HEAVY', [name for name in ('torch', 'transformers', 'datasets', 'numpy', 'pandas',"
        " 'rich') if name in sys.modules])"
    )
    command = [
        sys.executable,
        "-c",
        program,
        "study",
        words[0],
        str(study_folder / "tiny.yaml"),
        *words[1:],
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines()[-1] == "HEAVY []", done.stdout + done.stderr
    assert tree(tmp_path) == before


def test_the_plan_counts_answers_and_judgments_and_shows_each_command(
    study: Study, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["study", "plan", str(study.path), "--json"]) == ExitCode.DONE
    plan = json.loads(capsys.readouterr().out)
    cost = {step["step"]: step["cost"] for step in plan["steps"]}
    assert cost["train.r4"].startswith("4 steps on 1 process (cpu)")
    assert cost["answers.study--alpaca_eval.r4"] == "8 answers of at most 12 tokens"
    assert cost["judgments.study--alpaca_eval.r4"] == "16 judgments and at most 12 probes"
    assert cost["comparison.study--alpaca_eval.r8-vs-r4"] == "16 judgments"
    assert cost["answers.study--mt_bench.base"] == "8 answers of at most 12 tokens"
    assert len(plan["todo"]) == len(plan["steps"]) == 24
    main(["study", "plan", str(study.path)])
    assert "run.name=tiny--r8 train.seed=42 --accelerate cpu" in capsys.readouterr().out


@pytest.mark.parametrize("arms", [2, 12])
def test_the_plan_reads_questions_and_data_as_often_for_many_arms_as_for_two(
    arms: int, study: Study, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from recipes_lib.planning import plan as planning
    from recipes_lib.study import status as shown

    text = study.path.read_text(encoding="utf-8").replace(
        "  r4: r4.yaml\n  r8: r8.yaml\n",
        "".join(
            f"  a{number}: {{recipe: r4.yaml, overrides: [lora.r={number + 1}]}}\n"
            for number in range(arms)
        ),
    )
    study.path.write_text(text, encoding="utf-8")
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 64,
        "intermediate_size": 128,
    }
    config |= {
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": 512,
        "max_position_embeddings": 512,
    }
    model = study.path.parents[1] / "no-model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(config), encoding="utf-8")
    read: list[str] = []
    for owner, name in (
        (shown, "local_questions"),
        (leaks, "search_recipe"),
        (planning, "lengths_of"),
        (steps, "data_contents"),
    ):
        real = getattr(owner, name)
        monkeypatch.setattr(
            owner, name, lambda *args, name=name, real=real: read.append(name) or real(*args)
        )
    assert main(["study", "plan", str(study.path)]) == ExitCode.DONE
    assert "about " in capsys.readouterr().out
    once = ["data_contents", "lengths_of"]
    assert sorted(read) == [*once, *["local_questions"] * 3, "search_recipe"]  # 3 evals


def test_two_data_files_of_one_name_are_both_part_of_what_a_study_depends_on(
    tmp_path: Path,
) -> None:
    from recipes_lib.config.recipe import load_recipe

    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "rows.jsonl").write_text(
            json.dumps({"instruction": folder, "response": "x"}) + "\n", encoding="utf-8"
        )
    text = (
        "model: {name_or_path: m}\ndata: {source: [{source: a/rows.jsonl}, {source:"
        " b/rows.jsonl}]}\n"
    )
    (tmp_path / "r.yaml").write_text(text, encoding="utf-8")
    before = steps.data_contents(load_recipe(tmp_path / "r.yaml"))
    assert len(before) == 2
    for folder in ("a", "b"):
        file = tmp_path / folder / "rows.jsonl"
        file.write_text(
            json.dumps({"instruction": "other " + folder, "response": "x"}) + "\n", encoding="utf-8"
        )
        assert before != (before := steps.data_contents(load_recipe(tmp_path / "r.yaml")))


def test_the_diff_says_which_differences_no_factor_declares(
    study: Study, study_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = study_folder / "r8.yaml"
    recipe.write_text(
        recipe.read_text(encoding="utf-8").replace("1.0e-2", "2.0e-2"), encoding="utf-8"
    )
    assert main(["study", "diff", str(study.path)]) == ExitCode.DONE
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["lora.r", "4", "8", "rank"] in lines
    assert ["train.learning_rate", "0.01", "0.02", "none", "declared"] in lines


def test_status_tells_waiting_from_failed(
    study: Study, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FAIL", "r4")
    run_study(study, lambda line: None)
    capsys.readouterr()
    main(["study", "status", str(study.path), "--json"])
    rows = {
        row["step"]: (row["state"], row["detail"])
        for row in json.loads(capsys.readouterr().out)["steps"]
    }
    assert rows["train.r4"] == ("failed", "out of memory")
    assert rows["check.r4"] == ("waiting", "train.r4 failed")
    assert rows["train.r8"][0] == "fresh"
    assert rows["check.r8"][0] == "missing"


def test_watching_ends_where_a_step_failed_that_all_others_need_and_nobody_works_on_it(
    study: Study, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FAIL", "r4")
    run_study(study, lambda line: None)
    graph = build_graph(study)
    for step in graph:
        if step.arm in ("base", "r8") and "r4" not in step.name:
            graph.finish(step, "r", [])
    waited: list[float] = []

    def ends(seconds: float) -> None:
        assert not waited, "it waits for ever"
        waited.append(seconds)
        busy.__exit__(None, None, None)

    monkeypatch.setattr("recipes_lib.commands.study.time.sleep", ends)
    busy = study_lock(study)
    busy.__enter__()
    assert main(["study", "status", str(study.path), "--watch"]) == ExitCode.DONE
    said = capsys.readouterr().out
    assert len(waited) == 1  # as long as somebody did something
    assert "train.r4 failed, what else is to do (10) needs that, and no process works" in said
    assert "next: recipes study run" in said


def test_watching_goes_on_while_slurm_has_a_job_of_the_study(
    study: Study, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    graph = build_graph(study)
    for step in graph:
        if step.kind == "train":
            graph.fail(step, "out of memory", 1)
        elif step.arm == "base" and "-vs-" not in step.name:
            graph.finish(step, "r", [])
    row = {"label": "train", "stage": "train", "id": "7", "tasks": ["tiny--r4"]}
    jobs = graph.folder.parent / "slurm" / "jobs.json"
    jobs.parent.mkdir(parents=True)
    jobs.write_text(json.dumps({"format_version": 1, "profile": "here", "jobs": [row]}))
    states = ["PENDING", "RUNNING", "FAILED"]
    asked: list[str] = []

    def slurm(argv: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        if argv[1] == "ping":
            return subprocess.CompletedProcess(argv, 0, "Slurmctld(primary) at here is UP", "")
        asked.append(states[len(asked)])
        record = {"job_state": [asked[-1]], "state_reason": "Resources"}
        return subprocess.CompletedProcess(argv, 0, json.dumps({"jobs": [record]}), "")

    monkeypatch.setattr("recipes_lib.slurm.watching.run_slurm", slurm)
    waited: list[float] = []

    def ends(seconds: float) -> None:
        assert len(waited) < len(states), "it waits for ever"
        waited.append(seconds)

    monkeypatch.setattr("recipes_lib.commands.study.time.sleep", ends)
    assert main(["study", "status", str(study.path), "--watch"]) == ExitCode.DONE
    assert asked == states  # the retry was waited for
    assert "and no process works" in capsys.readouterr().out


def test_nothing_is_evaluated_while_an_arm_is_trained(
    study: Study, capsys: pytest.CaptureFixture[str]
) -> None:
    def state_of_the_base() -> str:
        capsys.readouterr()
        main(["study", "status", str(study.path), "--json"])
        rows = {row["step"]: row["state"] for row in json.loads(capsys.readouterr().out)["steps"]}
        return rows["answers.study--alpaca_eval.base"]

    with study_lock(study):
        assert state_of_the_base() == "running"
        with run_lock(RunDirectory("tiny--r4").path):
            assert state_of_the_base() == "missing"


def test_a_report_takes_the_place_of_the_old_one_whole(tmp_path: Path) -> None:
    place, new = tmp_path / "report", tmp_path / ".report.tmp"
    for folder, name in (
        (place, "old.html"),
        (new, "new.html"),
        (tmp_path / ".report.replaced", "older.html"),
    ):
        folder.mkdir()
        (folder / name).write_text("x", encoding="utf-8")
    conclusion.publish(new, place)
    assert [path.relative_to(tmp_path).as_posix() for path in sorted(tmp_path.rglob("*"))] == [
        "report",
        "report/new.html",
    ]


def test_two_studies_of_one_name_do_not_undo_each_other(
    study: Study, study_folder: Path, tmp_path: Path
) -> None:
    run_study(study, lambda line: None, only=["train"])
    shutil.copytree(study_folder, tmp_path / "copy")
    with pytest.raises(RecipeError, match="belongs to another study of this name"):
        run_study(load_study(tmp_path / "copy" / "tiny.yaml"), lambda line: None)
    study.path.unlink()  # moved, not copied
    assert (
        run_study(load_study(tmp_path / "copy" / "tiny.yaml"), lambda line: None, only=["train"])
        == ExitCode.DONE
    )


def test_a_study_does_not_move_into_the_folder_of_a_run(study: Study) -> None:
    RunDirectory("tiny").write_state("finished")
    with pytest.raises(
        RecipeError, match="is a run, and the study 'tiny' would lie in the same folder"
    ):
        run_study(study, lambda line: None)


def test_where_no_arm_could_be_trained_nothing_is_evaluated(
    study: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAIL", "tiny--r")
    monkeypatch.setattr(
        trainings, "train_command", lambda words: [sys.executable, "-c", "raise SystemExit(5)"]
    )
    monkeypatch.setattr(runner, "_evaluate", lambda *args: pytest.fail("there is no model"))
    said: list[str] = []
    assert run_study(study, said.append) == ExitCode.FAILED
    assert any(
        "train.r4 (exit code 5): the training ended with exit code 5; its message is above" in line
        for line in said
    )


def test_a_study_that_does_not_exist_is_answered_with_those_that_do(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["study", "run", "nowhere"]) == ExitCode.USAGE
    assert "studies: distributed-strategy, learning-rate, lora-rank" in capsys.readouterr().err


@pytest.mark.parametrize(("number", "code"), [(2, 130), (15, 75)], ids=["Ctrl-C", "SIGTERM"])
def test_a_signal_is_handed_on_once_and_ends_the_study_with_its_code(
    number: int, code: int, study: Study
) -> None:
    handled = "import signal, sys, time\n" + "".join(
        f"signal.signal({n}, lambda *a: sys.exit({c}))\n" for n, c in ((2, 130), (15, 75))
    )
    script = handled + "print('training', flush=True)\ntime.sleep(60)"
    program = (
        "from recipes_lib.study import trainings\ntrainings.train_command = lambda words:"
        f" [{sys.executable!r}, '-c', {script!r}]\n"
    )
    program += (
        "from recipes_lib.cli import main\nraise SystemExit(main(['study', 'run',"
        f" {str(study.path)!r}]))"
    )
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    while process.stdout.readline() != "training\n":
        pass
    process.send_signal(number)
    rest = process.stdout.read()
    assert process.wait() == code
    assert "stopped; the same command continues" in rest and "failed" not in rest
