"""What a disk did to a run after it was written is named, and the same command goes on from the
newest checkpoint that is whole.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from recipes_lib.core.errors import ExitCode
from recipes_lib.train import main

ADAPTER = "adapter_model.safetensors"
FILES = (
    ADAPTER,
    "optimizer.pt",
    "scheduler.pt",
    "rng_state.pth",
    "trainer_state.json",
    "adapter_config.json",
    "tokenizer.json",
)


@pytest.fixture(scope="module")
def trained(
    tiny_model_dir: Path,
    tiny_recipe_text: Callable[[Path], str],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[tuple[Path, Path]]:
    """A recipe, and the finished run it made, with the checkpoints of steps 2, 4, 6 and 8."""
    folder = tmp_path_factory.mktemp("whole")
    recipe = folder / "tiny.yaml"
    recipe.write_text(tiny_recipe_text(tiny_model_dir), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RECIPES_RUNS_ROOT", str(folder / "runs"))
        assert main([str(recipe)]) == 0
    yield recipe, folder / "runs" / "tiny"


@pytest.fixture
def run(trained: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the finished run that a test may damage."""
    monkeypatch.setenv("RECIPES_RUNS_ROOT", str(tmp_path / "runs"))
    shutil.copytree(trained[1], tmp_path / "runs" / "tiny")
    return tmp_path / "runs" / "tiny"


@pytest.fixture
def killed(run: Path) -> Path:
    """The copy as a kill after the last checkpoint would have left it."""
    shutil.rmtree(run / "adapter")
    (run / "run.json").write_text(
        json.dumps({**json.loads((run / "run.json").read_text()), "state": "running"})
    )
    return run


def flip(file: Path) -> None:
    """Change one bit in the middle; the size stays."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def replace(file: Path, old: str, new: str) -> None:
    """Change some letters of a text that must be in it."""
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new, 1))


def series(run: Path) -> list[tuple[int, float]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line.get("loss", line.get("eval_loss"))) for line in lines]


def assert_same(run: Path, whole: Path) -> None:
    assert json.loads((run / "run.json").read_text())["state"] == "finished"
    assert (run / "adapter" / ADAPTER).read_bytes() == (whole / "adapter" / ADAPTER).read_bytes()
    assert series(run) == series(whole)


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[] if name == ADAPTER else pytest.mark.slow) for name in FILES],
)
def test_a_flipped_bit_in_the_newest_checkpoint_is_named_and_the_one_before_it_is_resumed(
    killed: Path, trained: tuple[Path, Path], capsys: pytest.CaptureFixture[str], name: str
) -> None:
    flip(killed / "checkpoints" / "checkpoint-8" / name)
    assert main([str(trained[0])]) == 0
    said = capsys.readouterr().out
    assert (
        f"skipping checkpoint-8: {name} changed after the checkpoint was written" in said
        and "resuming checkpoint-6" in said
    )
    assert (killed / "checkpoints" / "checkpoint-8.incomplete").is_dir()
    assert_same(killed, trained[1])


def test_a_marker_of_an_older_version_without_hashes_is_still_resumed(
    killed: Path, trained: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    marker = killed / "checkpoints" / "checkpoint-8" / "COMPLETE.json"
    content = json.loads(marker.read_text())
    del content["sha256"], content["guard"]
    marker.write_text(json.dumps(content))
    assert main([str(trained[0])]) == 0
    assert "resuming checkpoint-8" in capsys.readouterr().out
    assert_same(killed, trained[1])


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (
            lambda adapter: (adapter / ADAPTER).write_bytes(
                b"\0" * (adapter / ADAPTER).stat().st_size
            ),
            f"{ADAPTER}",
        ),
        (lambda adapter: flip(adapter / ADAPTER), f"adapter/{ADAPTER} changed after the training"),
        (
            lambda adapter: flip(adapter / "tokenizer.json"),
            "adapter/tokenizer.json changed after the training",
        ),
        (
            lambda adapter: (adapter / "adapter_config.json").write_text(""),
            "adapter_config.json: is empty",
        ),
        (shutil.rmtree, "adapter/ is gone"),
    ],
    ids=["zeros", "flipped", "tokenizer", "config", "removed"],
)
def test_a_finished_run_whose_weights_are_damaged_is_finished_again_from_its_last_checkpoint(
    run: Path,
    trained: tuple[Path, Path],
    capsys: pytest.CaptureFixture[str],
    damage: Callable[[Path], None],
    words: str,
) -> None:
    damage(run / "adapter")
    there = (run / "adapter").is_dir()
    assert main([str(trained[0])]) == 0
    said = capsys.readouterr().out
    (line,) = [line for line in said.splitlines() if "is finished, but" in line]
    assert (
        words in line
        and "going on from its newest whole checkpoint" in line
        and "resuming checkpoint-8" in said
    )
    assert (run / "adapter.damaged").is_dir() == there
    assert_same(run, trained[1])
    assert (
        main([str(trained[0])]) == 0
        and "already finished, nothing to do" in capsys.readouterr().out
    )


def test_without_a_checkpoint_lost_weights_are_trained_from_the_beginning(
    run: Path, trained: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(run / "adapter")
    shutil.rmtree(run / "checkpoints")
    assert main([str(trained[0])]) == 0
    assert "resuming" not in capsys.readouterr().out
    assert_same(run, trained[1])


def test_weights_of_a_version_without_hashes_are_looked_at_for_what_is_missing_or_cut(
    run: Path,
) -> None:
    from recipes_lib.core.run_directory import RunDirectory
    from recipes_lib.weights.finished_run import weights_damage

    state = json.loads((run / "run.json").read_text())
    del state["weights_check"]["sha256"]
    (run / "run.json").write_text(json.dumps(state))
    (run / "adapter" / "weights_check.json").unlink()
    assert weights_damage(RunDirectory("tiny"), full=False) is None
    (run / "adapter" / ADAPTER).write_bytes((run / "adapter" / ADAPTER).read_bytes()[:-10])
    assert ADAPTER in (weights_damage(RunDirectory("tiny"), full=False) or "")


@pytest.mark.parametrize(
    "words",
    [
        ["export", "tiny", "--to", "given"],
        ["merge", "tiny"],
        ["chat", "tiny", "--prompt", "hi"],
        ["verify", "tiny"],
    ],
    ids=lambda words: words[0],
)
@pytest.mark.parametrize(
    "damage",
    [
        lambda adapter: flip(adapter / ADAPTER),
        shutil.rmtree,
        lambda adapter: (adapter / "adapter_config.json").write_text(""),
        lambda adapter: (adapter / "adapter_config.json").write_bytes(b'{"r": "\xff"}'),
        lambda adapter: replace(
            adapter / "adapter_config.json", '"lora_alpha": 8', '"lora_alpha": 9'
        ),
        lambda adapter: replace(adapter / "chat_template.jinja", "assistant", "assistent"),
        lambda adapter: (adapter / "tokenizer_config.json").write_text("{"),
        lambda adapter: (adapter / "weights_check.json").write_bytes(b"\0" * 400),
        lambda adapter: (adapter / "weights_check.json").write_text('{"tokens": []}'),
    ],
    ids=[
        "flipped",
        "gone",
        "settings empty",
        "settings no text",
        "settings changed",
        "template",
        "tokenizer",
        "record zeros",
        "record short",
    ],
)
def test_damaged_weights_are_neither_read_nor_given_away_and_the_command_that_helps_is_named(
    run: Path,
    recipes: Callable[..., tuple[int, str, str]],
    monkeypatch: pytest.MonkeyPatch,
    words: list[str],
    damage: Callable[[Path], None],
) -> None:
    monkeypatch.chdir(run.parent)
    (run / "command.txt").write_text(
        "/usr/bin/python -m recipes_lib.train mine.yaml 'run.tags=[a, b]'\n"
    )
    damage(run / "adapter")
    code, out, err = recipes(*words)
    assert code in (
        [ExitCode.FAILED, ExitCode.ENVIRONMENT] if words[0] == "verify" else [ExitCode.ENVIRONMENT]
    )
    assert "recipes train mine.yaml 'run.tags=[a, b]'" in out + err and "internal error" not in err
    assert not (run.parent / "given").exists() and not (run / "merged").exists()


@pytest.mark.parametrize(
    "content",
    [b"", b"\0" * 900, b"model: {na", b"\xff\xfe: 1\n"],
    ids=["empty", "zeros", "torn", "no text"],
)
def test_damaged_settings_of_a_finished_run_are_named_and_training_it_again_writes_them_anew(
    run: Path,
    trained: tuple[Path, Path],
    recipes: Callable[..., tuple[int, str, str]],
    content: bytes,
    tmp_path: Path,
) -> None:
    settings = [run / "recipe.json", run / "resolved.yaml"]
    (run / "command.txt").write_text(f"python -m recipes_lib.train {trained[0]}\n")
    (run / "environment.json").write_text('{"libraries": {"torch": "of that day"}}')
    made_by = [run / "command.txt", run / "environment.json"]
    whole = [file.read_bytes() for file in (*settings, *made_by)]
    for file in settings:
        file.write_bytes(content)
    for words in (
        ["export", "tiny", "--to", tmp_path / "given"],
        ["chat", "tiny", "--prompt", "hi"],
        ["verify", "tiny"],
    ):
        code, _, err = recipes(*words)
        assert (
            code == ExitCode.ENVIRONMENT
            and "recipe.json" in err
            and f"recipes train {trained[0]}" in err
        )
    code, _, err = recipes("compare", "tiny")
    assert (
        code == ExitCode.DATA
        and err.startswith(str(run / "resolved.yaml"))
        and "writes it anew" in err
    )
    assert main([str(trained[0])]) == 0
    assert [file.read_bytes() for file in (*settings, *made_by)] == whole
    assert recipes("compare", "tiny")[2].find("resolved.yaml") == -1


def test_a_finished_run_of_an_earlier_release_stays_as_it_was_when_it_is_trained_again(
    run: Path, trained: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    (run / "recipe.json").unlink()
    state = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({**state, "data_folders": [str(trained[0].parent)]}))
    before = {file.name: file.read_bytes() for file in run.iterdir() if file.is_file()}
    assert main([str(trained[0])]) == 0
    assert "written again" not in capsys.readouterr().out
    assert {file.name: file.read_bytes() for file in run.iterdir() if file.is_file()} == before


@pytest.mark.parametrize(
    "content",
    [b"\xff\xff", b"python -m recipes_lib.train 'torn", b"", None],
    ids=["no text", "torn", "empty", "gone"],
)
def test_without_the_command_of_a_run_the_way_on_is_named_all_the_same(
    run: Path, recipes: Callable[..., tuple[int, str, str]], content: bytes | None
) -> None:
    flip(run / "adapter" / ADAPTER)
    (run / "command.txt").unlink()
    if content is not None:
        (run / "command.txt").write_bytes(content)
    code, _, err = recipes("chat", "tiny", "--prompt", "hi")
    assert code == ExitCode.ENVIRONMENT and "recipes train RECIPE run.name=tiny" in err


def test_a_merged_model_that_a_disk_damaged_is_not_called_merged_already(
    run: Path, recipes: Callable[..., tuple[int, str, str]]
) -> None:
    assert recipes("merge", "tiny", "--dtype", "float32")[0] == 0
    for name in ("model.safetensors", "tokenizer.json"):
        flip(run / "merged" / name)
        code, _, err = recipes("export", "tiny", "--merged", "--to", run.parent / "given")
        assert (
            code == ExitCode.USAGE
            and "recipes merge tiny" in err
            and not (run.parent / "given").exists()
        )
        code, out, err = recipes("merge", "tiny", "--dtype", "float32")
        assert code == 0 and f"making merged/ again: {name} in it was changed" in out + err
    assert recipes("export", "tiny", "--merged", "--to", run.parent / "given")[0] == 0


def test_a_training_does_not_start_from_damaged_weights_of_another_run(
    run: Path, trained: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    full = [
        str(trained[0]),
        "lora=null",
        "train.learning_rate=1e-3",
        "train.max_steps=2",
        "train.save_steps=2",
        'train.eval_strategy="no"',
    ]
    assert main([*full, "run.name=full"]) == 0
    onto = [
        str(trained[0]),
        f"model.name_or_path={run.parent / 'full' / 'model'}",
        "train.max_steps=2",
        'train.eval_strategy="no"',
    ]
    assert main([*onto, "run.name=second"]) == 0
    flip(run.parent / "full" / "model" / "model.safetensors")
    capsys.readouterr()
    assert main([*onto, "run.name=third"]) == ExitCode.ENVIRONMENT
    assert "model/model.safetensors changed after the training" in capsys.readouterr().err


# ---- run.json and metrics.jsonl ----


@pytest.mark.parametrize(
    "content",
    ["", "\0" * 300, "[]", '{"state": "fin', "{}"],
    ids=["empty", "zeros", "list", "torn", "nothing in it"],
)
@pytest.mark.parametrize(
    "words",
    [["status", "tiny"], ["export", "tiny", "--to", "given"], ["compare", "tiny"]],
    ids=lambda words: words[0],
)
def test_a_damaged_run_json_is_named_with_how_to_go_on(
    run: Path, recipes: Callable[..., tuple[int, str, str]], content: str, words: list[str]
) -> None:
    (run / "run.json").write_text(content)
    code, _, err = recipes(*words)
    assert code == ExitCode.ENVIRONMENT and "internal error" not in err
    assert str(run / "run.json") in err.splitlines()[0] and f"mv {run / 'run.json'} " in err


def test_a_training_goes_on_without_its_run_json_and_still_refuses_other_settings(
    killed: Path, trained: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    (killed / "run.json").write_text("")
    assert main([str(trained[0])]) == ExitCode.ENVIRONMENT
    assert "run.json is empty" in capsys.readouterr().err
    (killed / "run.json").rename(killed / "run.json.damaged")
    assert main([str(trained[0]), "train.learning_rate=5e-3"]) == ExitCode.USAGE
    assert "train.learning_rate  0.01 -> 0.005" in capsys.readouterr().err
    assert main([str(trained[0])]) == 0
    assert "resuming checkpoint-8" in capsys.readouterr().out
    assert_same(killed, trained[1])


@pytest.mark.parametrize(
    "tail", [b'{"step": 8, "lo', b"\0" * 5000, b"\xff\xff\n"], ids=["torn", "zeros", "no text"]
)
def test_a_damaged_end_of_the_metrics_is_cut_and_no_line_before_the_checkpoint_is_lost(
    killed: Path, trained: tuple[Path, Path], tail: bytes
) -> None:
    with (killed / "metrics.jsonl").open("ab") as stream:
        stream.write(tail)
    assert main([str(trained[0])]) == 0
    assert_same(killed, trained[1])


def test_metrics_of_a_million_lines_cost_a_resume_no_time_and_no_memory(tmp_path: Path) -> None:
    import time
    import tracemalloc

    from recipes_lib.training.metrics import _tokens_at, first_and_last, forget_after

    path = tmp_path / "metrics.jsonl"
    with path.open("w") as stream:
        stream.writelines(
            f'{{"step": {step}, "loss": 1.5, "tokens": {step * 10}}}\n'
            for step in range(1, 1_000_001)
        )
    tracemalloc.start()
    started = time.perf_counter()
    forget_after(path, 999_000)
    assert _tokens_at(path, 999_000) == 9_990_000
    assert first_and_last(path, "tokens") == (10, 9_990_000)
    assert time.perf_counter() - started < 2
    assert tracemalloc.get_traced_memory()[1] < 2**22
    tracemalloc.stop()
    with path.open("rb") as stream:
        stream.seek(-60, 2)
        assert stream.read().endswith(b'{"step": 999000, "loss": 1.5, "tokens": 9990000}\n')


@pytest.mark.parametrize("name", ["run.json", "recipe.json", "resolved.yaml"])
def test_a_folder_in_the_place_of_a_file_is_named_and_is_no_bug(
    killed: Path, trained: tuple[Path, Path], capsys: pytest.CaptureFixture[str], name: str
) -> None:
    (killed / name).unlink()
    (killed / name).mkdir()
    assert main([str(trained[0])]) == ExitCode.ENVIRONMENT
    err = capsys.readouterr().err
    assert f"is in the way: Is a directory ({killed / name})" in err and "move it away" in err


@pytest.mark.parametrize("name", ["checkpoints", "adapter", "metrics.jsonl"])
def test_a_link_that_leads_out_of_the_runs_root_is_refused_and_nothing_is_written_there(
    run: Path,
    trained: tuple[Path, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
) -> None:
    outside = tmp_path / "outside"
    (run / name).rename(outside)
    before = sorted(outside.rglob("*"))
    (run / name).symlink_to(outside)
    assert main([str(trained[0])]) == ExitCode.USAGE
    assert f"{run / name} is a symbolic link that leads out of" in capsys.readouterr().err
    (run / "run.json").unlink()  # a folder that somebody prepared for a run that does not exist yet
    assert main([str(trained[0])]) == ExitCode.USAGE
    assert sorted(outside.rglob("*")) == before
