"""The lines of metrics.jsonl: a resumed run has those of an uninterrupted one."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from tests.training.test_train import logged, run_of, stop_at

from recipes_lib.train import main
from recipes_lib.training import metrics

VALUES = ("step", "epoch", "loss", "eval_loss", "grad_norm", "learning_rate", "tokens")
DAMAGES: dict[str, Callable[[bytes], bytes | None]] = {
    "absent": lambda text: None,
    "empty": lambda text: b"",
    "first half": lambda text: text[: len(text) // 2],
    "second half": lambda text: text[len(text) // 2 :],
    "a line less": lambda text: text.replace(text.splitlines(keepends=True)[1], b""),
    "a line twice": lambda text: text.splitlines(keepends=True)[0] + text,
    "another digit": lambda text: text.replace(b'"loss": 5.', b'"loss": 6.', 1),
    "zeros": lambda text: b"\0" * 40 + text[40:],
    "no JSON": lambda text: text.replace(b"{", b"", 1),
}


@pytest.fixture
def logged_run(tmp_path) -> tuple[Path, Path]:
    """A metrics.jsonl of six steps, as the callback writes it, and a checkpoint of step 4."""
    path = tmp_path / "metrics.jsonl"
    callback = metrics.MetricsCallback(path)
    state = SimpleNamespace(
        log_history=[], global_step=0, epoch=0, max_steps=6, is_world_process_zero=True
    )
    callback.on_train_begin(None, state, None)
    checkpoint = tmp_path / "checkpoint-4"
    checkpoint.mkdir()
    for step in range(1, 7):
        state.global_step = step
        logs = [{"loss": 5.1234567 / step, "grad_norm": 0.5, "num_tokens": 100.0 * step}]
        if step % 2 == 0:
            logs.append({"eval_loss": 5.5 / step, "eval_runtime": 0.1})
        for row in logs:
            row["epoch"] = step / 3
            state.log_history.append({**row, "step": step})
            callback.on_log(None, state, None, row)
        if step == 4:
            history = json.dumps({"global_step": 4, "log_history": state.log_history})
            (checkpoint / "trainer_state.json").write_text(history)
    return path, checkpoint


def test_lines_after_the_checkpoint_go_and_the_others_stay_as_they_are(logged_run) -> None:
    path, checkpoint = logged_run
    before = path.read_bytes().splitlines()
    assert metrics.restore_lines(path, checkpoint) == 0
    assert path.read_bytes().splitlines() == before[:6]
    assert metrics.restore_lines(path, None) == 0
    assert path.read_bytes() == b""


@pytest.mark.parametrize("damage", DAMAGES)
def test_lines_that_are_missing_or_damaged_come_from_the_checkpoint(logged_run, damage) -> None:
    path, checkpoint = logged_run
    whole = [json.loads(line) for line in path.read_bytes().splitlines()[:6]]
    damaged = DAMAGES[damage](path.read_bytes())
    if damaged is None:
        path.unlink()
    else:
        path.write_bytes(damaged)
    num_anew = metrics.restore_lines(path, checkpoint)
    lines = [json.loads(line) for line in path.read_bytes().splitlines()]
    assert [[line.get(key) for key in VALUES] for line in lines] == [
        [line.get(key) for key in VALUES] for line in whole
    ]
    assert sum("peak_memory_gib" not in line for line in lines) == num_anew
    assert (num_anew == 0) is (damage == "a line twice")


def test_a_resume_after_lost_lines_has_all_lines_and_says_so(
    tiny_recipe, monkeypatch, capsys
) -> None:
    assert main([str(tiny_recipe), "run.name=whole"]) == 0
    stop_at(monkeypatch, 6, tiny_recipe)
    (run_of(tiny_recipe) / "metrics.jsonl").write_text("")
    capsys.readouterr()
    assert main([str(tiny_recipe)]) == 0
    said = "metrics.jsonl: 6 lines missing or damaged, written anew from checkpoint-5"
    assert said in capsys.readouterr().out
    assert logged(tiny_recipe, "whole", *VALUES) == logged(tiny_recipe, "tiny", *VALUES)
