"""Bad data, models, machines and command lines, given to the real entry points: exit code, place
and key words of the answer.
"""

from __future__ import annotations

import gzip
import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from recipes_lib.cli import main as recipes
from recipes_lib.core.errors import ExitCode
from recipes_lib.train import main as train

NF4 = (
    "quantization={load_in_4bit: true, bnb_4bit_quant_type: nf4, bnb_4bit_compute_dtype: bfloat16}"
)


def change_config(folder: Path, **values: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **values}))


def truncate_shard(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def pickle_weights(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def missing_shard(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    index = {
        "weight_map": {
            "a": "model-00001-of-00002.safetensors",
            "b": "model-00002-of-00002.safetensors",
        }
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def bigger_vocabulary(folder: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([f"<extra_{number}>" for number in range(8)])
    tokenizer.save_pretrained(folder)


def remote_code(folder: Path) -> None:
    change_config(folder, auto_map={"AutoModelForCausalLM": "modeling_own.OwnModel"})


def already_quantized(folder: Path) -> None:
    change_config(folder, quantization_config={"quant_method": "gptq", "bits": 4})


def gguf_only(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()
    (folder / "weights.gguf").write_bytes(b"GGUF")


def without_tokenizer(folder: Path) -> None:
    for file in folder.glob("tokenizer*"):
        file.unlink()


def deep_config(folder: Path) -> None:
    (folder / "config.json").write_text('{"a":' * 100_000 + "1" + "}" * 100_000)


def nothing(folder: Path) -> None:
    """The fault is in the recipe."""


MODELS: dict[str, tuple[Callable[[Path], None], list[str], int, list[str]]] = {
    "tokenizer larger than the embeddings": (
        bigger_vocabulary,
        [],
        2,
        ["520", "512", "model.resize_embeddings"],
    ),
    "QLoRA under FSDP without a storage type": (
        nothing,
        [NF4, "launch.accelerate=fsdp_cpu"],
        2,
        ["bnb_4bit_quant_storage", "bfloat16"],
    ),
    "attention kernel that is not installed": (
        nothing,
        ["model.attn_implementation=flash_attention_2", "model.dtype=bfloat16"],
        5,
        ["flash_attention_2", "not installed"],
    ),
    "attention that is misspelt": (
        nothing,
        ["model.attn_implementation=sdpaa"],
        2,
        ["model.attn_implementation", "did you mean sdpa?"],
    ),
    "attention without a backward pass on a CPU": (
        nothing,
        ["model.attn_implementation=flex_attention"],
        2,
        ["flex_attention", "backward", "sdpa"],
    ),
    "an encoder": (
        lambda folder: change_config(folder, model_type="bert", architectures=["BertModel"]),
        [],
        2,
        ["BertModel"],
    ),
    "GGUF weights alone": (gguf_only, [], 2, ["GGUF"]),
    "a folder without a model": (
        lambda folder: shutil.rmtree(folder) or folder.mkdir(),
        [],
        2,
        ["config.json"],
    ),
    "a model without a tokenizer": (without_tokenizer, [], 2, ["tokenizer"]),
    "a config.json nested too deeply": (deep_config, [], 2, ["config.json"]),
    "a rank beyond the model's widths": (
        nothing,
        ["lora.r=1000000000"],
        2,
        ["lora.r"],
    ),
    "targets that are all excluded": (
        nothing,
        ["lora.exclude_modules=[q_proj,v_proj]"],
        2,
        ["exclude_modules"],
    ),
    "already quantized": (already_quantized, [], 2, ["gptq"]),
    "pickled weights": (pickle_weights, [], 2, ["safetensors"]),
    "remote code without leave": (
        remote_code,
        ["model.trust_remote_code=true"],
        2,
        ["--trust-remote-code"],
    ),
    "truncated shard": (truncate_shard, [], 2, ["model.safetensors", "damaged"]),
    "index that names a missing shard": (
        missing_shard,
        [],
        2,
        ["model-00002-of-00002.safetensors"],
    ),
    "a target module that the model has not": (
        nothing,
        ["lora.target_modules=[q_prj]"],
        2,
        ["q_prj", "q_proj"],
    ),
}


@pytest.mark.parametrize("case", MODELS)
def test_a_model_that_cannot_be_trained_is_refused_before_it_is_loaded(
    case: str,
    tiny_recipe: Path,
    tiny_model_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    damage, overrides, code, words = MODELS[case]
    folder = tmp_path / "model"
    shutil.copytree(tiny_model_dir, folder)
    damage(folder)
    assert train([str(tiny_recipe), f"model.name_or_path={folder}", *overrides]) == code
    said = capsys.readouterr().err
    assert all(word in said for word in words), said
    assert "Traceback" not in said


@pytest.mark.parametrize(
    ("damage", "verb"),
    [
        (without_tokenizer, ["check", "--full"]),
        (without_tokenizer, ["data"]),
        (deep_config, ["check", "--full"]),
        (deep_config, ["data"]),
        (deep_config, ["plan"]),
    ],
)
def test_a_model_that_cannot_be_read_is_one_line_of_every_verb(
    damage: Callable[[Path], None],
    verb: list[str],
    tiny_recipe: Path,
    tiny_model_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = Path(shutil.copytree(tiny_model_dir, tmp_path / "model"))
    damage(folder)
    tiny_recipe.write_text(tiny_recipe.read_text().replace(str(tiny_model_dir), str(folder)))
    assert recipes([*verb, str(tiny_recipe)]) == 2
    assert "tiny.yaml:2: " in (said := capsys.readouterr().err) and "internal error" not in said, (
        said
    )


TASK = {
    "instruction": "Say hello to everybody here.",
    "context": "",
    "response": "Hello everybody!",
}


def rows(*changes: dict[str, object], count: int = 20) -> str:
    """Rows of the dolly columns; the first ones are changed, a value None removes the column."""
    lines = []
    for number in range(max(count, len(changes))):
        row = {**TASK, "instruction": f"{TASK['instruction']} {number}"} | (
            changes[number] if number < len(changes) else {}
        )
        lines.append(json.dumps({key: value for key, value in row.items() if value != "ABSENT"}))
    return "\n".join(lines) + "\n"


CHAT, RAW = "data.prompt_format=chat", "data.prompt_format=raw"
HELLO = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
FOREIGN = {"instruction": "ABSENT", "context": "ABSENT", "response": "ABSENT"}
DATA: dict[str, tuple[str | bytes, list[str], int, list[str]]] = {
    "dolly columns under another format": (
        rows(),
        [RAW],
        4,
        ["columns are instruction, context", "data.prompt_format: dolly"],
    ),
    "unknown columns": (
        rows({**FOREIGN, "ask": "a", "tell": "b"}, count=1),
        [],
        4,
        ["columns are ask, tell", "data.columns"],
    ),
    "an empty file": ("", [], 4, ["rows.jsonl", "0 rows"]),
    "prompts longer than max_length": (
        rows(),
        ["train.max_length=4"],
        4,
        ["20/20 rows", "max_length=4", "p95 prompt is"],
    ),
    "too many prompts longer than max_length": (
        rows(*[{"instruction": "word " * 300}] * 3),
        [],
        4,
        ["3/20 rows", "data.max_unsupervised_fraction", "max_length=192"],
    ),
    "only empty texts": (
        "".join(json.dumps({"text": "", "id": number}) + "\n" for number in range(9)),
        [RAW],
        4,
        ["9/9 rows have an empty completion"],
    ),
    "null as response": (
        rows({}, {"response": None}),
        [],
        4,
        ["rows.jsonl:2:", "'response'", "None"],
    ),
    "a number as response": (
        rows({"response": 3}),
        [],
        4,
        ["rows.jsonl:1:", "'response'", "int"],
    ),
    "a list as response": (
        rows({}, {}, {"response": ["a"]}),
        [],
        4,
        ["rows.jsonl:3:", "'response'", "list"],
    ),
    "a lone surrogate": (rows({"response": "\ud800"}), [], 4, ["rows.jsonl:1:", "'response'"]),
    "a latin-1 file": (
        b'{"instruction": "caf\xe9", "response": "x"}\n',
        [],
        4,
        ["rows.jsonl:1", "UTF-8", "byte"],
    ),
    "a torn line": (rows() + '{"instruction": "a", \n', [], 4, ["rows.jsonl:21"]),
    "a truncated gzip file": (
        gzip.compress(rows().encode())[:-20],
        [],
        4,
        ["rows.jsonl.gz", "Compressed file ended"],
    ),
    "messages and no chat template": (
        json.dumps({"messages": HELLO}) + "\n",
        [CHAT, "model.name_or_path={plain}"],
        4,
        ["chat template", "data.chat_template"],
    ),
    "the assistant is not last": (
        json.dumps({"messages": HELLO[:1]}) + "\n",
        [CHAT],
        4,
        ["rows.jsonl:1:", "assistant"],
    ),
    "only a system message": (
        json.dumps({"messages": [{"role": "system", "content": "Be nice"}]}) + "\n",
        [CHAT],
        4,
        ["rows.jsonl:1:", "no assistant turn"],
    ),
    "a tool call": (
        json.dumps({"messages": [*HELLO, {"role": "tool", "content": "3"}]}) + "\n",
        [CHAT],
        4,
        ["rows.jsonl:1:", "tool"],
    ),
    "loss on the completion of texts": (
        "".join(json.dumps({"text": f"a b {number}"}) + "\n" for number in range(20)),
        [RAW, "train.completion_only_loss=true"],
        4,
        ["command line: train.completion_only_loss"],
    ),
    "a validation loss without held-out rows": (
        rows(),
        ["data.split.validation=0"],
        2,
        ["tiny.yaml:", "train.eval_strategy", "data.split.validation"],
    ),
}


@pytest.mark.parametrize("case", DATA)
def test_data_that_cannot_be_trained_on_is_refused_with_the_place(
    case: str,
    tiny_recipe: Path,
    tiny_model_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The audit and the training give the same answer."""
    content, overrides, code, words = DATA[case]
    file = tmp_path / next(
        (name for name in ("rows.jsonl.gz", "rows.csv") if any(name in word for word in words)),
        "rows.jsonl",
    )
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    plain = shutil.copytree(tiny_model_dir, tmp_path / "plain")
    (plain / "chat_template.jinja").unlink()
    argv = [
        str(tiny_recipe),
        f"data.source={file}",
        *(override.replace("{plain}", str(plain)) for override in overrides),
    ]
    for entry in (lambda: recipes(["data", *argv]), lambda: train(argv)):
        assert entry() == code
        said = capsys.readouterr().err
        assert not [word for word in words if word not in said], said
        assert "Traceback" not in said and not (tmp_path / "runs" / "tiny" / "checkpoints").exists()


def test_a_folder_whose_files_differ_in_columns_is_refused(
    tiny_recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / "a.jsonl").write_text(rows())
    (tmp_path / "parts" / "b.jsonl").write_text(rows(FOREIGN | {"text": "x"}, count=1))
    assert recipes(["data", str(tiny_recipe), f"data.source={tmp_path / 'parts'}"]) == 4
    said = capsys.readouterr().err
    assert "b.jsonl" in said and "column" in said


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ([{"response": ""}], "empty completion"),
        ([{"response": "</s> [INST]"}], "1 rows contain special tokens, read as text"),
        ([TASK, TASK], "1 exact duplicates"),
    ],
    ids=["an empty completion", "a special token", "a duplicate"],
)
def test_data_that_is_odd_is_reported_and_trained_on(
    changes: list[dict[str, object]],
    words: str,
    tiny_recipe: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "rows.jsonl").write_text(rows(*changes, count=60))
    assert (
        recipes(["data", str(tiny_recipe), f"data.source={tmp_path / 'rows.jsonl'}", "--show", "0"])
        == 0
    )
    assert words in capsys.readouterr().out


def test_a_defect_is_one_message_and_its_traceback_is_kept(
    tiny_recipe: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from recipes_lib.training import build

    def break_it(*args: object) -> None:
        raise ZeroDivisionError("nobody expected this")

    monkeypatch.setattr(build, "load_model", break_it)
    assert train([str(tiny_recipe)]) == 1
    said = capsys.readouterr().err
    file = tmp_path / "runs" / "tiny" / "traceback.txt"
    assert (
        said.count("internal error: ZeroDivisionError: nobody expected this") == 1
        and str(file) in said
        and "Traceback" not in said
    )
    assert "break_it" in file.read_text()
    with pytest.raises(ZeroDivisionError):
        train([str(tiny_recipe), "--debug"])


LINES: dict[str, tuple[list[str], int, list[str]]] = {
    "a batch that does not divide": (
        ["train", "{recipe}", "run.global_batch_size=9"],
        2,
        ["9 / (4 per device x 1", "8 or 12"],
    ),
    "an offline data set": (
        ["train", "{recipe}", "data.source=nobody/nothing"],
        4,
        ["offline", "data.source"],
    ),
    "an offline model": (
        ["train", "{recipe}", "model.name_or_path=nobody/nothing"],
        5,
        ["offline", "nobody/nothing", "hf download"],
    ),
    "a folder that is not there": (
        ["train", "{recipe}", "model.name_or_path=./nowhere"],
        2,
        ["./nowhere"],
    ),
    "an optimizer whose package is not installed": (
        ["train", "{recipe}", "train.optim=galore_adamw"],
        5,
        ["train.optim needs the package galore_torch"],
    ),
    "a tracker that is not installed": (
        ["train", "{recipe}", "train.report_to=swanlab"],
        5,
        ["swanlab is not installed", "[tracking]"],
    ),
    **{
        f"the run name {name[:9]!r}": (
            ["train", "{recipe}", f"run.name={name!r}"],
            2,
            ["run.name", "cannot be a folder name"],
        )
        for name in (
            "../../etc",
            "/abs",
            "a/b",
            "",
            "x" * 300,
            "\N{GRINNING FACE}",
            "dot.",
            "a\nb",
            "..",
        )
    },
    "a layer class that the model has not": (
        ["train", "{recipe}", "launch.accelerate={wrap}"],
        2,
        ["LlamaLayer", "LlamaDecoderLayer"],
    ),
    "a sharded final save": (
        ["train", "{recipe}", "--accelerate", "{sharded}"],
        2,
        ["sharded.yaml:12:", "FULL_STATE_DICT"],
    ),
    "a value like a flag": (["train", "{recipe}", "run.name=--foo"], 2, ["run.name"]),
    "a value like a command": (["train", "{recipe}", "run.name=$(touch x)"], 2, ["run.name"]),
    "a bare TRL flag": (["train", "{recipe}", "--learning_rate=1e-4"], 2, ["train.learning_rate"]),
    "an unknown verb": (["trian", "{recipe}"], 2, ["train"]),
    "an unknown flag": (["check", "--ful", "{recipe}"], 2, ["--full"]),
    "an unknown launch": (["train", "{recipe}", "--accelerate", "dpp_cpu"], 2, ["ddp_cpu"]),
    "an unknown run": (["status", "nothing"], 2, ["nothing"]),
    "talk to a run that is not there": (["chat", "nothing", "--prompt", "x"], 2, ["nothing"]),
    "a recipe that is not there": (["train", "nowhere.yaml"], 2, ["nowhere.yaml"]),
    "an accelerate config as a recipe": (
        ["train", "{configs}/ddp.yaml"],
        2,
        ["accelerate config"],
    ),
}


@pytest.mark.parametrize("case", LINES)
def test_a_bad_command_line_gets_one_answer(
    case: str, tiny_recipe: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    words, code, expected = LINES[case]
    configs = Path(__file__).resolve().parents[1] / "accelerate_configs"
    fsdp = (configs / "fsdp_cpu.yaml").read_text(encoding="utf-8")
    fsdp = fsdp.replace("num_processes: 2", "num_processes: 1")
    wrap, sharded = tiny_recipe.with_name("wrap.yaml"), tiny_recipe.with_name("sharded.yaml")
    wrap.write_text(f"{fsdp}  fsdp_transformer_layer_cls_to_wrap: LlamaLayer\n", encoding="utf-8")
    sharded.write_text(fsdp.replace("FULL_STATE_DICT", "SHARDED_STATE_DICT"), encoding="utf-8")
    argv = [
        word.format(recipe=tiny_recipe, configs=configs, wrap=wrap, sharded=sharded)
        for word in words
    ]
    assert exit_code(argv) == code
    said = capfd.readouterr().err
    assert all(word in said for word in expected), said
    assert "Traceback" not in said and not (tiny_recipe.parent / "x").exists()


@pytest.mark.parametrize(
    "words",
    [
        ["check", "pipe.yaml"],
        ["train", "tiny.yaml", "data.source=pipe.jsonl"],
        ["plan", "tiny.yaml", "data.source=pipe.parquet"],
        ["new", "mine", "--from", "tiny.yaml", "--data", "pipe.jsonl", "--output", "mine.yaml"],
        ["judge", "audit", "--judge", "pipe.yaml", "--labels", "pipe.json"],
    ],
    ids=lambda words: " ".join(words[:2]),
)
def test_a_pipe_in_the_place_of_a_file_is_refused_and_not_waited_for(
    words: list[str],
    tiny_recipe: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tiny_recipe.parent)
    for ending in ("yaml", "json", "jsonl", "parquet"):
        os.mkfifo(f"pipe.{ending}")

    def give_up(*_: object) -> None:
        raise TimeoutError("it waits for the pipe")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(60)
    try:
        assert (train(words[1:]) if words[0] == "train" else exit_code(words)) in (
            ExitCode.USAGE,
            ExitCode.DATA,
        )
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    assert "is a pipe or a device" in capfd.readouterr().err


def test_a_folder_for_runs_that_cannot_be_made_is_an_error_of_the_machine(
    tiny_recipe: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Here a file is in the way; a read-only or vanished disk takes the same path."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("RECIPES_RUNS_ROOT", str(tmp_path / "file"))
    assert train([str(tiny_recipe)]) == 5
    said = capsys.readouterr().err
    assert (
        "run 'tiny' cannot be made" in said
        and "RECIPES_RUNS_ROOT" in said
        and "internal error" not in said
    )


def exit_code(argv: list[str]) -> int:
    try:
        return recipes(argv)
    except SystemExit as stop:
        return int(stop.code or 0)


def test_a_model_without_a_padding_token_trains_and_still_learns_to_stop(
    tiny_recipe: Path, tmp_path: Path
) -> None:
    """The padding token becomes the end token, which must keep its loss."""
    assert train([str(tiny_recipe), "train.max_steps=1"]) == 0
    audit = json.loads((tmp_path / "runs" / "tiny" / "supervision.json").read_text())
    assert not audit["without_end_token"] and audit["end_tokens"]["</s>"] > 0


def test_a_grown_vocabulary_trains_when_the_recipe_says_so(
    tiny_recipe: Path, tiny_model_dir: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_model_dir, folder)
    bigger_vocabulary(folder)
    assert (
        train(
            [
                str(tiny_recipe),
                f"model.name_or_path={folder}",
                "model.resize_embeddings=true",
                "train.max_steps=1",
            ]
        )
        == 0
    )
