"""A checkpoint is used only when it is whole, and when what is resumed shares with its beginning
every key of SFTConfig but those that decide what is written, shown or sent.
"""

from pathlib import Path

from recipes_lib.config.recipe import TrainSection, load_recipe
from recipes_lib.training import resume_guard as checkpoints
from recipes_lib.training.resume_guard import FREE_KEYS, guarded_values

FILES = ("adapter_model.safetensors", "optimizer.pt", "rng_state.pth", "trainer_state.json")


def make_checkpoint(folder: Path, step: int, complete: bool = True, without: str = "") -> Path:
    checkpoint = folder / f"checkpoint-{step}"
    checkpoint.mkdir(parents=True)
    for name in {*FILES} - {without}:
        (checkpoint / name).write_bytes(name.encode() * 10)
    if complete:
        checkpoints.mark_complete(checkpoint, guard={"step": step})
    return checkpoint


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.is_dir())


def test_the_newest_complete_checkpoint_is_used_by_step_number_not_by_name(tmp_path) -> None:
    for step in (8, 100, 20):
        make_checkpoint(tmp_path, step)
    (tmp_path / "checkpoint-200").touch()  # a file of that name is none
    assert checkpoints.find_newest(tmp_path) == (tmp_path / "checkpoint-100", {})
    marker = checkpoints.read_marker(tmp_path / "checkpoint-100")
    assert marker["guard"] == {"step": 100} and marker["files"] == {
        name: len(name) * 10 for name in FILES
    }


def test_a_damaged_file_makes_the_checkpoint_incomplete_and_names_it(tmp_path) -> None:
    for name in FILES:
        content = name.encode() * 10
        for number, damaged in enumerate((None, content[:-3], b"x" + content[1:])):
            folder = tmp_path / f"{name}-{number}"
            good, bad = make_checkpoint(folder, 5), make_checkpoint(folder, 10)
            if damaged is None:
                (bad / name).unlink()
            else:
                (bad / name).write_bytes(damaged)
            newest, broken = checkpoints.find_newest(folder)
            assert newest == good and [*broken] == [bad] and name in broken[bad]


def test_a_missing_or_torn_marker_makes_the_checkpoint_incomplete(tmp_path) -> None:
    checkpoint = make_checkpoint(tmp_path, 5, complete=False)
    assert checkpoints.what_is_wrong(checkpoint)
    for content in ("", "{}", "[1]", '{"files": 3}', "[" * 100_000, '{"files": {}, "sha257": {}}'):
        (checkpoint / checkpoints.MARKER).write_text(content)
        assert checkpoints.what_is_wrong(checkpoint), content[:30]
        assert checkpoints.find_newest(tmp_path)[0] is None, content[:30]


def test_files_above_the_limit_are_known_by_their_size(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(checkpoints, "HASHED_UP_TO", 200)
    checkpoint = make_checkpoint(tmp_path, 5)
    assert FILES[0] not in checkpoints.read_marker(checkpoint)["sha256"]  # 250 bytes
    assert checkpoints.what_is_wrong(checkpoint, hashes=True) is None


def test_rotation_never_deletes_the_newest_the_best_or_an_incomplete_checkpoint(tmp_path) -> None:
    for step in (2, 4, 6, 8):
        make_checkpoint(tmp_path, step)
    make_checkpoint(tmp_path, 10, complete=False)
    checkpoints.rotate(tmp_path, keep=None, best=None)
    assert len(names(tmp_path)) == 5
    checkpoints.rotate(tmp_path, keep=2, best=None)
    assert names(tmp_path) == ["checkpoint-10", "checkpoint-6", "checkpoint-8"]
    checkpoints.rotate(tmp_path, keep=0, best=str(tmp_path / "checkpoint-6"))
    assert names(tmp_path) == ["checkpoint-10", "checkpoint-6", "checkpoint-8"]
    checkpoints.rotate(tmp_path, keep=0, best=None)
    assert names(tmp_path) == ["checkpoint-10", "checkpoint-8"]


# ---- values ----

FREE = """
    dataloader_num_workers dataloader_persistent_workers dataloader_pin_memory
    dataloader_prefetch_factor dataset_num_proc disable_tqdm include_for_metrics
    include_num_input_tokens_seen log_level log_level_replica log_on_each_node logging_first_step
    logging_nan_inf_filter logging_steps logging_strategy project report_to
    restore_callback_states_from_checkpoint skip_memory_metrics trackio_bucket_id
    trackio_space_id trackio_static_space_id
"""


def test_exactly_the_keys_that_change_no_result_may_change_between_attempts() -> None:
    """A key that a new version of TRL brings is guarded until somebody decides otherwise here."""
    keys = list(TrainSection.model_fields)
    assert "weight_decay" in keys
    free = {key for key in keys if FREE_KEYS.match(key)}
    assert free <= {*FREE.split()}, free - {*FREE.split()}


def test_what_a_validation_decides_by_is_guarded_where_it_chooses_the_weights_or_the_rate(
    tiny_recipe,
) -> None:
    for words, guarded in (
        ([], False),
        (["train.load_best_model_at_end=true", "train.save_steps=4"], True),
        (["train.lr_scheduler_type=reduce_lr_on_plateau"], True),
    ):
        values = guarded_values(load_recipe(tiny_recipe, words), "rows", 1, "one process", {})
        assert ("train.eval_steps" in values) is ("train.save_steps" in values) is guarded
