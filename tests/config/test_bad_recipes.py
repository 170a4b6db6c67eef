"""Bad recipes through the real entry: exit code, file, line and the words
that must appear.
"""

from __future__ import annotations

import codecs
from pathlib import Path

import pytest

from recipes_lib.cli import main

# (section, line written into it, line number in the answer, words of the answer)
BAD_LINES = [
    (
        "train",
        "learning_rte: 1e-4",
        8,
        ["unknown key 'train.learning_rte'", "did you mean train.learning_rate?"],
    ),
    (
        "train",
        "learning-rate: 1e-4",
        8,
        ["train.learning-rate", "did you mean train.learning_rate?"],
    ),
    ("train", "max_seq_length: 512", 8, ["train.max_length", "TRL 1", "recipes migrate"]),
    ("model", "torch_dtype: bfloat16", 2, ["model.dtype", "transformers 5"]),
    ("train", "warmup_ratio: 0.03", 8, ["train.warmup_steps", "fraction"]),
    ("train", "overwrite_output_dir: true", 8, ["was removed in transformers 5"]),
    ("train", "evaluation_strategy: steps", 8, ["train.eval_strategy"]),
    ("train", "group_by_length: true", 8, ["train.train_sampling_strategy"]),
    ("train", "seed: 2", 9, ["duplicate key 'train.seed'", "lines 8 and 9"]),
    ("train", "learning_rate: fast", 8, ["train.learning_rate must be a number", "'fast'"]),
    ("train", "learning_rate: '1e-4'", 8, ["must be a number", "remove the quotes: 1e-4"]),
    (
        "train",
        "max_steps: '100'",
        8,
        ["train.max_steps must be -1 or", "remove the quotes: 100"],
    ),
    ("train", "learning_rate: [1, 2]", 8, ["must be a number", "[1, 2]"]),
    ("train", "learning_rate:", 8, ["must be a number", "null"]),
    ("train", "learning_rate: .nan", 8, ["must be a number > 0", ".nan"]),
    ("train", "learning_rate: .inf", 8, ["must be a number > 0", ".inf"]),
    ("train", "learning_rate: -1e-4", 8, ["must be a number > 0", "-0.0001"]),
    ("train", "learning_rate: 0", 8, ["must be a number > 0"]),
    ("train", "save_steps: .inf", 8, ["must be a number > 0", ".inf"]),
    ("train", "max_length: 1024.5", 8, ["must be a whole number >= 1", "1024.5"]),
    ("train", "max_length: 1024.0", 8, ["must be a whole number >= 1", "1024.0"]),
    ("train", "max_length: [1024]", 8, ["must be a whole number >= 1"]),
    ("train", "max_length: -5", 8, ["must be a whole number >= 1", "-5"]),
    ("train", "packing: 7", 8, ["train.packing must be true or false", "7"]),
    ("train", "packing: maybe", 8, ["train.packing must be true or false", "'maybe'"]),
    (
        "train",
        "num_train_epochs: true",
        8,
        ["train.num_train_epochs must be a number > 0", "got true"],
    ),
    ("train", "per_device_train_batch_size: 0", 8, [">= 1", "got 0"]),
    ("train", "per_device_train_batch_size: 4.5", 8, ["a whole number", "4.5"]),
    ("train", "gradient_accumulation_steps: 0", 8, [">= 1"]),
    ("run", "global_batch_size: 0", 10, [">= 1"]),
    ("lora", "lora_alpha: 8.5", 6, ["lora.lora_alpha must be a whole number >= 1", "8.5"]),
    ("lora", "target_modules: []", 6, ["lora.target_modules is empty", "all-linear"]),
    (
        "lora",
        "target_modules: q_proj",
        6,
        ["lora.target_modules must be a list", "write [q_proj]"],
    ),
    ("train", "lr_scheduler_type: cosin", 8, ["did you mean cosine?"]),
    (
        "train",
        "optim: adamw_torchh",
        8,
        ["did you mean adamw_torch?", "recipes explain train.optim"],
    ),
    ("train", "loss_type: nlll", 8, ["did you mean nll?"]),
    ("train", "truncation_mode: keep_middle", 8, ["keep_end, keep_start"]),
    ("train", "report_to: wnadb", 8, ["did you mean wandb?"]),
    ("train", "report_to: null", 8, ["none", "tensorboard", "got null"]),
    (
        "train",
        "load_best_model_at_end: true",
        8,
        ["eval_strategy is no, save_strategy steps", "save_strategy: best"],
    ),
    ("model", "dtype: bf16", 2, ["use bfloat16"]),
    (
        "model",
        "kwargs: {torch_dtype: bfloat16}",
        2,
        ["model.kwargs.torch_dtype", "write model.dtype"],
    ),
    ("model", "kwargs: {device_map: auto}", 2, ["model.kwargs.device_map", "launcher"]),
    (
        "train",
        "activation_checkpointing_kwargs: {use_reentrnt: true}",
        8,
        ["unknown key", "use_reentrant?"],
    ),
    ("run", "name: NO", 10, ["run.name must be text", "warning", 'quote it: "NO"']),
    ("run", "notes: 1:30", 10, ["is read as 90", 'quote it: "1:30"']),
    (
        "train",
        "output: !!python/object/apply:os.system [ls]",
        8,
        ["tags are not allowed in recipes"],
    ),
    ("train", "seed2: !!int 7", 8, ["tags are not allowed in recipes"]),
    ("data", "revision: ${REVISION}", 4, ["data.revision", "no interpolation"]),
    ("model", "kwargs: {token: abc}", 2, ["model.kwargs.token", "secret"]),
    ("train", "hub_token: abc", 8, ["train.hub_token", "secret"]),
    ("run", "notes: use hf_abcdefghijklmnopqrstuvwx", 10, ["run.notes", "secret"]),
    ("data", "revision: sk-abcdefghijklmnopqrstuv", 4, ["data.revision", "secret"]),
    ("run", "tags: []  # hf_abcdefghijklmnopqrstuvwx", 10, ["secret"]),
]

GOOD = "model:\n  name_or_path: a/b\ndata:\n  source: rows.jsonl\n"
HALF = "lora: {r: 8}\nquantization: {load_in_4bit: true}\ntrain: {fp16: true, bf16: false}\n"
# (content, line or None, words)
BAD_FILES = [
    (GOOD + "lora: {r: 8.5}\n", 5, ["lora.r must be a whole number >= 1", "8.5"]),
    (GOOD + "lora: {r: -8}\n", 5, ["lora.r", "-8"]),
    (GOOD + "lora: {r: 0}\n", 5, ["lora.r", ">= 1"]),
    (
        GOOD + "train:\n  bf16: true\n  fp16: true\n",
        7,
        ["train.bf16", "train.fp16", "both true"],
    ),
    (
        GOOD.replace("a/b", "a/b\n  dtype: bfloat16") + "train:\n  fp16: true\n",
        7,
        ["train.fp16", "loss scaling", "model.dtype: float32"],
    ),
    (
        GOOD + "train:\n  gradient_checkpointing_kwargs: {use_reentrnt: true}\n",
        6,
        ["was renamed", "unknown key", "use_reentrant?"],
    ),
    (
        GOOD + "lora: {r: 8}\nquantization:\n  load_in_4bit: true\n  load_in_8bit: true\n",
        8,
        ["load_in_4bit", "both true"],
    ),
    (
        GOOD.replace("rows.jsonl", "[]"),
        4,
        ["data.source must be text or a list that is not empty"],
    ),
    (
        GOOD.replace("b\ndata", "b\n  dtype: bfloat16\ndata") + HALF,
        3,
        ["model.dtype bfloat16", "train.fp16", "dtype: float16"],
    ),
    (
        GOOD
        + "train: {eval_strategy: steps, eval_steps: 30, save_steps: 100, load_best_model_at_end:"
        " true}\n",
        5,
        ["save_steps 100 is not a multiple of train.eval_steps 30", "90 or 120"],
    ),
    (
        GOOD + "run: {global_batch_size: 10}\n",
        5,
        ["10 / (8 per device x 1 processes = 8)", "8 or 16"],
    ),
    (
        GOOD + "run: {global_batch_size: 8}\nlaunch: {accelerate: ddp, gpus: 3}\n",
        5,
        ["8 per device x 3 processes"],
    ),
    (GOOD.replace("a/b", "./models/nowhere"), 2, ["no such folder: ./models/nowhere"]),
    (GOOD.replace("a/b", "weights.gguf"), 2, ["GGUF"]),
    ("train:\n\tseed: 1\n", 2, ["a tab cannot indent", "^"]),
    ("train:\n   seed: 1\n  bf16: true\n", 3, ["indentation", "^"]),
    ('run:\n  notes: "open\n', 2, ["never closed", "^"]),
    ("lora: {r: 8\n", 1, ["never closed", "^"]),
    ("", None, ["is empty"]),
    ("# only a comment\n", None, ["is empty"]),
    ("- a\n- b\n", None, ["holds a list"]),
    ("just text\n", None, ["holds a single value"]),
    (codecs.BOM_UTF16_LE + GOOD.encode("utf-16-le"), None, ["UTF-16", "UTF-8"]),
    (GOOD.encode() + b"run:\n  notes: a\0b\n", 6, ["NUL"]),
    (GOOD.encode() + b"run:\n  notes: caf\xe9\n", 6, ["not UTF-8", "0xe9"]),
    ("distributed_type: MULTI_CPU\nnum_processes: 2\n", 1, ["MULTI_CPU", "use_cpu: true"]),
    (
        "model_name_or_path: a/b\nlearning_rate: 1e-4\n",
        None,
        ["flat TRL config", "recipes migrate"],
    ),
    ("colour: blue\n", None, ["unknown kind of file", "colour", "a recipe has model"]),
]


def refused(capsys: pytest.CaptureFixture[str], place: str, words: list[str], *argv: str) -> str:
    """Run a verb, and assert that it exits with 2 and one message at `place` that holds the words;
    return stderr.
    """
    assert main(argv) == 2
    said = capsys.readouterr()
    assert place in said.err, said.err
    assert not [word for word in words if word not in said.err], said.err
    assert "Traceback" not in said.err
    return said.err


@pytest.mark.parametrize(
    ("section", "line", "number", "words"),
    BAD_LINES,
    ids=[f"{section}: {line}" for section, line, _, _ in BAD_LINES],
)
def test_a_bad_line_is_answered_at_its_file_and_line(
    section, line, number, words, write_with, capsys
):
    said = refused(capsys, f"r.yaml:{number}: ", words, "check", str(write_with(section, line)))
    assert said.count("r.yaml:") - said.count("warning:") == 1


@pytest.mark.parametrize(
    ("content", "number", "words"),
    BAD_FILES,
    ids=[words[0] for _, _, words in BAD_FILES],
)
def test_a_bad_file_is_answered_in_one_message(content, number, words, write, capsys):
    place = "r.yaml: " if number is None else f"r.yaml:{number}: "
    refused(capsys, place, words, "check", str(write(content)))


def test_a_number_with_an_exponent_is_a_float_everywhere(write_with, capsys):
    path = write_with("train", "learning_rate: 2e-5")
    assert main(["check", str(path)]) == 0
    assert main(["show", str(path), "train.weight_decay=1e-2"]) == 0
    said = capsys.readouterr().out
    assert "learning_rate: 2.0e-05" in said
    assert "weight_decay: 0.01" in said


@pytest.mark.parametrize(
    ("line", "read_as"),
    [("packing: yes", "true"), ("bf16: off", "false"), ("max_length: 010", "8")],
)
def test_a_yaml_1_1_spelling_of_the_right_type_is_a_warning(line, read_as, write_with, capsys):
    assert main(["check", str(write_with("train", line))]) == 0
    said = capsys.readouterr().err
    assert "r.yaml:8: warning:" in said
    assert f"is read as {read_as}" in said
    assert "quote it" in said


def test_an_alias_bomb_is_one_line(write, capsys):
    bomb = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n"
    bomb += "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 9))
    said = refused(capsys, "r.yaml:", ["aliases expand"], "check", str(write(bomb)))
    assert len(said.splitlines()) == 2


def test_a_byte_order_mark_and_windows_line_ends_are_fine(write):
    assert main(["check", str(write(codecs.BOM_UTF8 + GOOD.replace("\n", "\r\n").encode()))]) == 0


def test_a_missing_file_names_similar_ones(write, capsys):
    write(GOOD, "lora-r8.yaml")
    refused(
        capsys, "lora-r9.yaml: no such file", ["did you mean lora-r8.yaml"], "check", "lora-r9.yaml"
    )
    refused(
        capsys,
        "nowhere/x.yaml: no such file",
        ["nowhere does not exist"],
        "check",
        "nowhere/x.yaml",
    )


def test_a_short_name_of_no_recipe_names_similar_recipes(write, capsys):
    write()
    assert main(["show", "quickstart/lora-r9"]) == 2
    assert (
        "did you mean quickstart/lora-r8" in (said := capsys.readouterr().err)
        and "recipes ls" in said
    )
    assert main(["show", "lora-r8"]) == 2
    assert (
        "did you mean quickstart/lora-r8 or smollm2-135m-dolly/lora-r8?" in capsys.readouterr().err
    )


def test_check_takes_the_short_name_of_a_recipe_as_the_other_verbs_do(write, capsys):
    write()
    assert main(["check", "quickstart/lora-r8"]) == 0
    assert capsys.readouterr().out.splitlines()[0] == "1 file ok"


def test_a_folder_given_as_a_recipe_is_refused(write, capsys, tmp_path):
    write(GOOD, "sub/r.yaml")
    refused(capsys, "sub: is a folder", [], "show", "sub")
    (tmp_path / "empty").mkdir()
    refused(capsys, "empty: holds no YAML file", [], "check", "empty")


def test_a_value_given_to_check_is_told_where_values_go(write, capsys):
    value = "train.seed=2"
    hint = [f"recipes show RECIPE '{value}'", f"recipes eval EVAL RUN '{value}'"]
    refused(capsys, f"'{value}' is a value, and recipes check reads files", hint, "check", value)


def test_an_unreadable_file_is_one_line(write, capsys, monkeypatch):
    path = write(GOOD)

    def denied(self):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", denied)
    refused(capsys, "r.yaml: cannot be read: permission denied", [], "check", str(path))


def test_a_circle_of_extends_is_printed_as_a_chain(write, capsys):
    write("extends: _b.yaml\n", "r.yaml")
    write("lora: {r: 8}\nextends: r.yaml\n", "_b.yaml")
    refused(capsys, "_b.yaml:2: ", ["r.yaml -> _b.yaml -> r.yaml"], "check", "r.yaml")


def test_a_missing_parent_is_named_at_the_line_of_extends(write, capsys):
    write("lora: {r: 8}\n", "_base.yaml")
    write("lora: {r: 8}\nextends: _bse.yaml\n", "r.yaml")
    refused(capsys, "r.yaml:2: ", ["_bse.yaml", "did you mean _base.yaml"], "check", "r.yaml")


def test_the_secret_itself_is_never_printed(write_with, capsys):
    secret = "hf_abcdefghijklmnopqrstuvwx"
    said = refused(
        capsys, "r.yaml:8", ["secret"], "check", str(write_with("train", f"optim: {secret}"))
    )
    assert secret not in said


@pytest.mark.parametrize(
    "line",
    [
        "eos_token: <|im_end|>",
        "include_num_input_tokens_seen: all",
        "average_tokens_across_devices: true",
        "pad_to_multiple_of: 8",
    ],
)
def test_harmless_keys_with_token_in_their_name_pass(line, write_with):
    assert main(["check", str(write_with("train", line))]) == 0


def test_a_commit_hash_is_not_taken_for_a_secret(write_with):
    assert (
        main(
            [
                "check",
                str(write_with("model", "revision: 01c7f73d771dfac7d292323805ebc428287df4f9")),
            ]
        )
        == 0
    )


def test_max_steps_beside_epochs_is_a_warning(write, capsys):
    assert (
        main(["check", str(write(GOOD + "train:\n  num_train_epochs: 3\n  max_steps: 10\n"))]) == 0
    )
    assert (
        "r.yaml:7: warning: train.max_steps wins over train.num_train_epochs"
        in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "distributed_type: 'NO'\nnum_processes: 1\n",
            ["is an accelerate config, not a recipe", "accelerate launch --config_file"],
        ),
        ("model_name_or_path: a/b\n", ["flat TRL config", "recipes migrate"]),
    ],
)
def test_a_file_of_another_kind_given_as_a_recipe_is_told_what_it_is_for(
    text, words, write, capsys
):
    refused(capsys, "r.yaml: ", words, "show", str(write(text)))


def test_all_errors_of_a_file_come_at_once_in_the_order_of_lines(write, capsys):
    path = write(GOOD + "train:\n  learning_rte: 1\n  optim: adam\n  max_length: 0\n")
    said = refused(capsys, "r.yaml:6: ", ["3 errors in 1 of 1 file"], "check", str(path))
    assert [line for line in said.splitlines() if line.startswith("r.yaml")] == sorted(
        line for line in said.splitlines() if "r.yaml:" in line
    )


def test_a_duplicate_key_is_reported_with_everything_else_in_the_order_of_lines(write, capsys):
    path = write(
        GOOD + "train:\n  learning_rte: 1\n  seed: 1\n  seed: 2\n  max_length: 0\n  ? [a]\n  : 1\n"
    )
    for argv in (["check", str(path)], ["show", str(path)], ["plan", str(path)]):
        said = refused(capsys, "r.yaml:6: ", ["unknown key 'train.learning_rte'"], *argv)
        assert [line.split(": ")[0] for line in said.splitlines() if line.startswith("r.yaml")] == [
            f"r.yaml:{n}" for n in (6, 8, 9, 10)
        ]
        assert "duplicate key 'train.seed': lines 7 and 8" in said


@pytest.mark.parametrize(
    "number", ["9" * 5000, "0x" + "f" * 5000, "-" + "9" * 30, "0x_", "9" * 400], ids=len
)
def test_a_number_that_no_computer_word_holds_is_one_error(number, write_with, capsys):
    said = refused(
        capsys,
        "r.yaml:8: train.max_length: ",
        ["64 bits"],
        "check",
        str(write_with("train", f"max_length: {number}")),
    )
    assert len(said) < 200
    refused(
        capsys,
        "command line: train.seed: ",
        ["64 bits"],
        "show",
        str(write_with("train", "optim: adafactor")),
        f"train.seed={number}",
    )


@pytest.mark.parametrize("verb", ["check", "show", "plan", "data", "train", "migrate"])
def test_a_pipe_or_a_device_is_refused_at_once(verb, tmp_path, capsys):
    """Reading one may never end."""
    import os

    os.mkfifo(tmp_path / "pipe.yaml")
    for path in (str(tmp_path / "pipe.yaml"), "/dev/zero"):
        refused(
            capsys,
            f"{path}: is a pipe or a device",
            [],
            verb,
            path,
            *(["--output", "o.yaml"] if verb == "migrate" else []),
        )


def test_a_plain_no_where_the_choice_is_called_no_is_told_to_be_quoted(write_with, capsys):
    path = write_with("train", "eval_strategy: no")
    assert main(["check", str(path)]) == 2
    said = capsys.readouterr().err
    assert "train.eval_strategy must be one of no" in said and 'quote it: "no"' in said


@pytest.mark.parametrize(
    ("value", "warned"),
    [("100", True), ("500", True), ("99", False), ("0.03", False), ("1.0", False)],
)
def test_a_warm_up_as_long_as_the_training_is_warned_about(value, warned, write_with, capsys):
    path = write_with("train", f"max_steps: 100\n  warmup_steps: {value}")
    assert main(["check", str(path)]) == 0
    assert ("train.learning_rate is never reached" in capsys.readouterr().err) == warned


def test_a_schedule_without_warm_up_is_not_warned_about(write_with, capsys):
    assert (
        main(
            [
                "check",
                str(
                    write_with(
                        "train", "max_steps: 5\n  warmup_steps: 9\n  lr_scheduler_type: constant"
                    )
                ),
            ]
        )
        == 0
    )
    assert "never reached" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "place", "words"),
    [
        ('extends: "\\0"\n', "r.yaml:1: ", "extends must be a file name"),
        ("run: text\n", "r.yaml:1: ", "section 'run' must be a mapping of keys, got 'text'"),
        ("run: [1]\n", "r.yaml:1: ", "section 'run' must be a mapping of keys, got [1]"),
    ],
)
@pytest.mark.parametrize("verb", ["check", "show", "plan"])
def test_what_a_loop_of_hostile_files_found_is_one_line(verb, text, place, words, write, capsys):
    refused(capsys, place, [words], verb, str(write(text + GOOD)))


def test_a_rank_beyond_the_widths_of_a_known_model_is_refused_without_loading_it(
    write_with, capsys
):
    path = write_with("train", "optim: adafactor")
    path.write_text(path.read_text().replace("r: 8", "r: 1000000000"))
    refused(capsys, "r.yaml:6: ", ["lora.r 1,000,000,000", "(32,000)"], "check", str(path))
