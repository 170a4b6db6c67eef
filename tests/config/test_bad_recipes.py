"""Bad recipes through the real entry: exit code 2, file and line, the key and what to do."""

import codecs

from tests.test_bad_inputs import missing_words

# (section, line written into it, words of the answer); the sections' first keys stand on these
# lines.
LINES = {"model": 2, "data": 4, "lora": 6, "train": 8, "run": 10}
BAD_LINES = [
    ("train", "learning_rte: 1e-4", "did you mean train.learning_rate?"),
    ("train", "max_seq_length: 512", "train.max_length TRL 1 recipes migrate"),
    ("train", "warmup_ratio: 0.03", "train.warmup_steps"),
    ("train", "deepspeed: x", "launch accelerate: fsdp"),
    ("train", "learning_rate: fast", "train.learning_rate number fast"),
    ("train", "learning_rate: .nan", "finite .nan"),
    ("train", f"max_length: {'9' * 5000}", "train.max_length integer"),
    ("train", "num_train_epochs: true", "train.num_train_epochs number true"),
    ("train", "dataloader_num_workers: -1", "train.dataloader_num_workers"),
    ("train", "neftune_noise_alpha: -5", "train.neftune_noise_alpha"),
    ("train", "adam_beta2: 1.0", "train.adam_beta2 less than 1"),
    ("train", "learning_rate: 1.0e+38", "train.learning_rate less than or equal to 100"),
    ("train", "dataloader_num_workers: 200", "train.dataloader_num_workers or equal to 64"),
    ("train", "torch_compile_backend: inductr", "recipes explain train.torch_compile_backend"),
    ("lora", "lora_alpha: 0", "lora.lora_alpha"),
    ("data", "template_date: today", "data.template_date"),
    ("train", f"data_seed: {2**40}", "train.data_seed"),
    ("lora", "eva_config: {rho: 3}", "its own config"),
    ("train", "lr_scheduler_type: cosin", "train.lr_scheduler_type 'cosine' cosin"),
    ("train", "optim: adamw_torchh", "recipes explain train.optim adamw_torchh"),
    ("train", "metric_for_best_model: accuracy", "train.metric_for_best_model 'loss'"),
    ("train", "logging_nan_inf_filter: true", "False"),
    ("train", "output: !!python/object/apply:os.system [ls]", "tags are not allowed"),
    # upstream takes these, and they would do nothing
    ("train", "dataloader_drop_last: true", "train.dataloader_drop_last own data loader"),
    ("train", "eval_packing: false", "train.eval_packing validation is this project's own"),
    ("train", "bf16_full_eval: true", "train.bf16_full_eval train.bf16"),
    ("train", "length_column_name: len", "train.length_column_name prepared rows"),
    ("train", "torch_compile_mode: reduce-overhead", "train.torch_compile_mode CUDA graphs"),
    ("train", "torch_compile_mode: max-autotune", "max-autotune-no-cudagraphs"),
    ("train", "hub_token: abc", "train.hub_token recipes export"),
    ("run", "notes: use hf_abcdefghijklmnopqrstuvwx", "secret"),
    ("run", "name: ../x", "run.name cannot be a folder name"),
]  # fmt: skip
GOOD = "model:\n  name_or_path: a/b\ndata:\n  source: rows.jsonl\n"
EIGHT = "quantization:\n  load_in_8bit: true\n"
WRAPPED = "train: {packing: true, packing_strategy: wrapped}\n"
BOTH = "lora: {r: 8}\nquantization:\n  load_in_8bit: true\n  load_in_4bit: true\n"
NINES = "".join(f"x{n}: &x{n} [{', '.join([f'*x{n - 1}'] * 9)}]\n" for n in range(1, 9))
NONE_OUT = "  split: {method: none}\ntrain: {eval_strategy: epoch}\n"
# (content, line or None, words)
BAD_FILES = [
    (GOOD + "lora:\n\tr: 8\n", 6, "spaces tabs"),
    (GOOD + f"train: {{seed: {2**32}}}\n", 5, "train.seed less than 4294967296"),
    (GOOD + EIGHT, 5, "adapter lora"),
    (GOOD + BOTH, 6, "one of load_in_4bit load_in_8bit"),
    (GOOD + NONE_OUT, 6, "train.eval_strategy no validation rows"),
    (GOOD + "lora: {r: 8}\nquantization: {}\n", 6, "one of load_in_4bit"),
    (GOOD.replace("rows.jsonl", "[]"), 4, "data.source string List at least 1 item got"),
    (GOOD.replace("rows.jsonl", "[{source: a, wieght: 2}]"), 4, "data.source.0.weight"),
    (GOOD.replace("b\nd", "b\n  attn_implementation: varlen\nd") + WRAPPED, 3, "wrapped sdpa"),
    (GOOD + "run: {global_batch_size: 10}\n", 5, "10 8 per device x 1 processes = 8"),
    # what keeps the experiment comes before another batch
    (GOOD + "run: {global_batch_size: 10}\n", 5, "train_batch_size: 2, or set it to 16"),
    (GOOD + "launch: {gpus: 4}\n", 5, "single_gpu starts one process, but 4"),
    (GOOD + "launch: {accelerate: dpp}\nrun: {global_batch_size: 3}\n", 5, "1 error mean ddp?"),
    (GOOD + "train:\n", 5, "train is a section, not a value"),
    (GOOD + "lora: {init_lora_weights: eva}\n", 5, "lora.init_lora_weights pissa got eva"),
    (GOOD + "lora: {init_lora_weights: pissa_niter_4}\n", 5, "pissa got pissa_niter_4"),
    (GOOD + "train: {packing: true, max_length: null}\n", 5, "train.packing train.max_length null"),
    (GOOD + "train: {save_strategy: best}\n", 5, "train.save_strategy steps"),
    (GOOD.replace("a/b", "./models/nowhere"), 2, "'./models/nowhere' is not a folder"),
    (GOOD.replace("a/b", "a b"), 2, "cannot be a Hub name"),
    ("data: {source: rows.jsonl}\n", None, "model is missing"),
    ("", None, "is empty"),
    ("- a\n- b\n", None, "is not a mapping"),
    (codecs.BOM_UTF16_LE + GOOD.encode("utf-16-le"), 1, "UTF-8"),
    (GOOD.encode() + b"run:\n  notes: a\0b\n", 1, "control characters"),
    (GOOD.encode() + b"run:\n  notes: caf\xe9\n", 6, "not UTF-8"),
    ("model_name_or_path: a/b\nlearning_rate: 1e-4\n", None, "flat TRL config recipes migrate"),
    ("base_model: a/b\nsequence_len: 3\n", None, "axolotl"),
    (GOOD.replace("model:\n  name_or_path:", "model:"), 1, "model is a section, not a value"),
    (GOOD + "train:\n  seed: 1\n bf16: true\n", 7, "block mapping"),
    (GOOD + "train: {seed: 1\nrun: {name: a}\n", 5, "flow mapping"),
    (GOOD + "x: &a [*a]\n", 5, "nested too deeply"),
    (GOOD + f"x0: &x0 {[1] * 9}\n" + NINES, 5, "too many values"),
    ("colour: blue\n", None, "unknown kind colour"),
]  # fmt: skip


def test_a_bad_line_is_answered_at_its_file_and_line_with_a_remedy(write_with, said):
    for section, line, words in BAD_LINES:
        answer = said("check", write_with(section, line), code=2)
        assert f"r.yaml:{LINES[section]}: " in answer and answer.count("r.yaml:") == 1
        assert not missing_words(answer, words) and len(answer) <= 2000, line


def test_a_bad_file_is_answered_at_its_line(write, said):
    for content, number, words in BAD_FILES:
        answer = said("check", write(content), code=2)
        place = "r.yaml: " if number is None else f"r.yaml:{number}: "
        assert place in answer and not missing_words(answer, words), content


def test_all_errors_come_at_once_in_the_order_of_lines(write, said):
    path = write(
        GOOD.replace("rows", "nowhere")
        + "train:\n  learning_rte: 1\n  seed: 1\n  seed: 2\n  max_length: 0\n  ? [a]\n  : 1\n"
        "  bf16: nein\nlora: {r: 0}\nquantization: {}\n"
    )
    for verb in ("check", "show", "plan"):
        answer = said(verb, path, code=2)
        places = [line.split(": ")[0] for line in answer.splitlines() if line.startswith("r.yaml")]
        lines = (4, 6, 8, 9, 10, 12, 13, 14)[verb != "check" :]  # others read no rows
        assert places == [f"r.yaml:{line}" for line in lines]
        assert "duplicate key 'train.seed', also at r.yaml:7" in answer


def test_mistakes_are_placed_in_the_parent_or_on_the_command_line(write, said):
    write("train: {sed: 1}\n", "_b.yaml")
    path = write("extends: _b.yaml\n" + GOOD)
    answer = said("check", path, "_b.yaml", code=2)
    assert answer.count("_b.yaml:1: unknown key 'train.sed'") == 1 and "did you mean" in answer
    write("train: {seed: 1}\n", "_b.yaml")
    assert "command line: unknown key 'train.sed'" in said("show", path, "train.sed=1", code=2)
    for word in ("run.notes='open", "lora={r: 8", "train.optim_args={a: 1, a: 2}", "run.tags=[a"):
        answer = said("show", path, word, code=2)
        assert answer.startswith("command line: ")
        assert " line " not in answer and "None" not in answer
    said("check", "_b.yaml")  # a base needs no model
    misspelt = write("modle: {name_or_path: a}\n")
    assert "did you mean model?" in said("show", misspelt, code=2)  # what a verb expects, it is


def test_extends_that_leads_nowhere_or_in_a_circle_is_named_at_its_line(write, said):
    write("extends: _b.yaml\n", "r.yaml")
    for name, words in (
        ("r.yaml", "_b.yaml:2: circular extends: r.yaml -> _b.yaml"),
        ("_bb.yaml", "_b.yaml:2: extends a file that does not exist: _bb.yaml"),
    ):
        write(f"lora: {{r: 8}}\nextends: {name}\n", "_b.yaml")
        assert words in said("check", "r.yaml", code=2)


def test_missing_files_and_short_names_name_similar_ones_alone(write, said, tmp_path):
    write(GOOD, "lora-r8.yaml")
    (tmp_path / "empty").mkdir()
    write(GOOD.replace("rows.jsonl", "row.jsonl"), "a.yaml")
    write(GOOD.replace("rows.jsonl", "nope.jsonl"), "b.yaml")
    for path, code, words in (
        ("lora-r9.yaml", 2, "no such file did you mean lora-r8.yaml"),
        ("nowhere/x.yaml", 2, "no such file"),
        ("quickstart/lora-r9", 2, "recipes ls"),
        ("empty", 2, "holds no YAML file"),
        ("a.yaml", 4, "a.yaml:4: did you mean rows.jsonl?"),
        ("b.yaml", 4, "b.yaml:4: no such file"),
    ):
        answer = said("check", path, code=code)
        assert not missing_words(answer, words), path
        assert ("did you mean" in answer) is ("did you mean" in words), answer
    said("check", "quickstart/lora-r8")


def test_rows_that_fill_no_step_are_named_by_check(write, said):
    said("check", write(GOOD + "run: {global_batch_size: 16}\n"))
    answer = said("check", write(GOOD + "run: {global_batch_size: 24}\n"), code=4)
    assert not missing_words(answer, "r.yaml:3: of 20; a step needs 24 run.global_batch_size")


def test_a_file_that_would_take_long_is_not_read(write, said):
    large = write(GOOD + "# comment\n" * 1_100_000)
    assert "r.yaml: is larger than 10 MB" in said("check", large, code=2)


def test_what_may_never_end_is_not_read(said):
    assert "/dev/zero: is not a file" in said("train", "/dev/zero", code=2)


TAKEN = [
    ("train", "eval_strategy: no"),
    ("train", "eos_token: <|im_end|>"),
    ("train", "report_to: [wandb, tensorboard]"),
    ("run", "name: sk-baseline-lora-r8"),
    ("run", "notes: 1:30"),
    ("model", "revision: 01c7f73d771dfac7d292323805ebc428287df4f9"),
    ("model", "attn_implementation: kernels-community/flash-attn2"),
    ("lora", "init_lora_weights: pissa"),
    ("lora", "target_modules: '.*_proj'"),
]


def test_what_upstream_takes_is_taken(write_with, said):
    for section, line in TAKEN:
        said("check", write_with(section, line))
