"""Bad data, models, machines and command lines, given to the real entry points: exit code, place
and key words of the answer. One case of a kind; the others are in the tests of each package.
"""

import json
import os
import shutil
from pathlib import Path

import pytest

from recipes_lib.cli import main as recipes
from recipes_lib.train import main as train

CONFIGS = Path(__file__).resolve().parents[1] / "accelerate_configs"


def missing_words(said: str, words: str) -> list[str]:
    return [word for word in words.split() if word not in said] + said.split("Traceback")[1:]


def change_config(folder: Path, **values: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **values}))


def truncate_shard(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def bigger_vocabulary(folder: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([f"<extra_{number}>" for number in range(8)])
    tokenizer.save_pretrained(folder)


def without_tokenizer(folder: Path) -> None:
    for file in folder.glob("tokenizer*"):
        file.unlink()


def deep_config(folder: Path) -> None:
    (folder / "config.json").write_text('{"a":' * 100_000 + "1" + "}" * 100_000)


def as_it_is(folder: Path) -> None:
    """The fault is in the recipe."""


MODELS = {
    "tokenizer larger than the embeddings": (
        bigger_vocabulary, "", 2, "520 512 model.resize_embeddings"),
    "an encoder": (
        lambda folder: change_config(folder, model_type="bert", architectures=["BertModel"]),
        "", 2, "BertModel"),
    "remote code without leave": (
        lambda folder: change_config(folder, auto_map={"AutoModelForCausalLM": "modeling_own.X"}),
        "model.trust_remote_code=true", 2, "--trust-remote-code"),
    "a model without a tokenizer": (without_tokenizer, "", 2, "tokenizer"),
    "a config.json nested too deeply": (deep_config, "", 2, "config.json"),
    "truncated shard": (truncate_shard, "", 2, "model.safetensors damaged"),
    "attention kernel that is not installed": (
        as_it_is, "model.attn_implementation=flash_attention_2;model.dtype=bfloat16",
        5, "flash_attention_2 cannot be used"),
    "attention that is misspelt": (
        as_it_is, "model.attn_implementation=sdpaa",
        2, "model.attn_implementation sdpa| got sdpaa"),
    "targets that are all excluded": (
        as_it_is, "lora.exclude_modules=[q_proj,v_proj]", 2, "exclude_modules"),
    "a target module that the model has not": (
        as_it_is, "lora.target_modules=[q_prj]", 2, "q_prj"),
}  # fmt: skip


@pytest.mark.parametrize("case", MODELS)
def test_a_model_that_cannot_be_trained_is_refused(
    case, tiny_recipe, tiny_model_dir, tmp_path, capsys
):
    damage, overrides, code, words = MODELS[case]
    folder = Path(shutil.copytree(tiny_model_dir, tmp_path / "model"))
    damage(folder)
    own = [word for word in overrides.split(";") if word]
    assert train([str(tiny_recipe), f"model.name_or_path={folder}", *own]) == code
    said = capsys.readouterr().err
    assert not missing_words(said, words), said


@pytest.mark.parametrize("damage", [without_tokenizer, deep_config])
def test_a_model_that_cannot_be_read_is_one_line(
    damage, tiny_recipe, tiny_model_dir, tmp_path, said
):
    folder = Path(shutil.copytree(tiny_model_dir, tmp_path / "model"))
    damage(folder)
    tiny_recipe.write_text(tiny_recipe.read_text().replace(str(tiny_model_dir), str(folder)))
    for verb in (["check", "--full"], ["data"], ["plan"] if damage is deep_config else ["data"]):
        answer = said(*verb, tiny_recipe, code=2)
        assert "tiny.yaml:2: " in answer and "internal error" not in answer, answer


def rows(*changes: dict[str, object], count: int = 20) -> str:
    """Rows of the dolly columns; the first ones are changed."""
    lines = []
    for number in range(count):
        row = {"instruction": f"Say hello {number}.", "context": "", "response": "Hello!"}
        row |= changes[number] if number < len(changes) else {}
        lines.append(json.dumps(row))
    return "\n".join(lines) + "\n"


def chat(*messages: dict[str, str]) -> str:
    return json.dumps({"messages": messages}) + "\n"


CHAT, RAW = "data.prompt_format=chat", "data.prompt_format=raw"
HELLO = ({"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"})
TEXTS = "".join(json.dumps({"text": f"a b {number}"}) + "\n" for number in range(20))
LONG = [{"instruction": "word " * 300}] * 3
DATA = {
    "dolly columns under another format": (
        rows(), RAW, 4, "columns are instruction, context data.prompt_format: dolly"),
    "unknown columns": ('{"ask": "a", "tell": "b"}\n', "", 4, "ask, tell data.columns"),
    "an empty file": ("", "", 4, "rows.jsonl 0 rows"),
    "prompts longer than max_length": (
        rows(), "train.max_length=4", 4, "20/20 rows max_length=4 longest prompt has"),
    "too many prompts longer than max_length": (
        rows(*LONG), "", 4, "3/20 rows data.filters.max_tokens max_length=192"),
    "null as response": (rows({}, {"response": None}), "", 4, "rows.jsonl:2: 'response' None"),
    "a torn line": (rows() + '{"instruction": "a", \n', "", 4, "rows.jsonl:21"),
    "messages and no chat template": (
        chat(*HELLO) * 20, f"{CHAT};model.name_or_path=plain",
        4, "chat template data.chat_template"),
    "the assistant is not last": (chat(HELLO[0]), CHAT, 4, "rows.jsonl:1: assistant"),
    "a tool's answer without a call": (
        chat(*HELLO, {"role": "tool", "content": "3"}), CHAT, 4, "rows.jsonl:1: tool"),
    "loss on the completion of texts": (
        TEXTS, f"{RAW};train.completion_only_loss=true",
        4, "command line: train.completion_only_loss"),
    "a validation loss without held-out rows": (
        rows(), "data.split.validation=0",
        2, "tiny.yaml: train.eval_strategy data.split.validation"),
}  # fmt: skip


@pytest.mark.parametrize("case", DATA)
def test_unusable_data_is_refused(case, tiny_recipe, tiny_model_dir, tmp_path, capsys, monkeypatch):
    """The audit and the training give the same answer."""
    content, overrides, code, words = DATA[case]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text(content)
    shutil.copytree(tiny_model_dir, "plain")
    Path("plain/chat_template.jinja").unlink()
    own = [word.replace("=plain", "=./plain") for word in overrides.split(";") if word]
    argv = [str(tiny_recipe), f"data.source={tmp_path / 'rows.jsonl'}", *own]
    for entry in (lambda: recipes(["data", *argv]), lambda: train(argv)):
        assert entry() == code
        said = capsys.readouterr().err
        assert not missing_words(said, words), said
        assert not (tmp_path / "runs" / "tiny" / "checkpoints").exists()


def test_a_folder_whose_files_differ_in_columns_is_refused(tiny_recipe, tmp_path, said):
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / "a.jsonl").write_text(rows())
    (tmp_path / "parts" / "b.jsonl").write_text('{"text": "x"}\n')
    answer = said("data", tiny_recipe, f"data.source={tmp_path / 'parts'}", code=4)
    assert not missing_words(answer, "b.jsonl column")


def test_a_defect_is_one_message_and_a_kept_traceback(tiny_recipe, tmp_path, monkeypatch, capsys):
    from recipes_lib.training import build

    def break_it(*args: object, **words: object) -> None:
        raise ZeroDivisionError("nobody expected this")

    monkeypatch.setattr(build, "load_model", break_it)
    assert train([str(tiny_recipe)]) == 1
    said, file = capsys.readouterr().err, tmp_path / "runs" / "tiny" / "traceback.txt"
    assert said.count("internal error: ZeroDivisionError: nobody expected this") == 1
    assert str(file) in said and "Traceback" not in said and "break_it" in file.read_text()
    with pytest.raises(ZeroDivisionError):
        train([str(tiny_recipe), "--debug"])


NO_FOLDER = ("../../etc", "/abs", "", "x" * 300, "dot.", "a\nb", "--foo", "$(touch x)")
# words of a command line after `recipes`; exit code; words of the answer
LINES: list[tuple[list[str], int, str]] = [
    (["train", "tiny.yaml", "run.global_batch_size=9"], 2, "9 4 per device x 1 12"),
    (["train", "tiny.yaml", "data.source=nobody/nothing"], 4, "Hub nobody/nothing/train.jsonl"),
    (["train", "tiny.yaml", "model.name_or_path=nobody/nothing"],
     5, "offline nobody/nothing hf download"),
    (["train", "tiny.yaml", "model.name_or_path=./nowhere"], 2, "./nowhere"),
    (["train", "tiny.yaml", "train.report_to=swanlab"], 5, "swanlab is not installed"),
    *((["train", "tiny.yaml", f"run.name={name!r}"], 2, "run.name cannot be a folder name")
      for name in NO_FOLDER),
    (["train", "tiny.yaml", "--accelerate", "sharded.yaml"],
     2, "sharded.yaml:12: FULL_STATE_DICT"),
    (["train", "tiny.yaml", "--learning_rate=1e-4"], 2, "unknown key 'learning_rate'"),
    (["check", "--ful", "tiny.yaml"], 2, "--full"),
    (["train", "tiny.yaml", "--accelerate", "dpp_cpu"], 2, "ddp_cpu"),
    (["status", "nothing"], 2, "no run named 'nothing'"),
    (["compare", "."], 2, "holds no results lm-eval"),
    (["chat", "nothing", "--prompt", "x"], 2, "no run named 'nothing'"),
    (["train", "nowhere.yaml"], 2, "nowhere.yaml"),
    (["data", "tiny.yaml", "data.source=pipe.jsonl"], 4, "pipe.jsonl: no data file"),
    (["launch", "nowhere"], 2, "--profile is missing"),
    (["judge", "audit"], 2, "required: --judge, --labels"),
    (["train", str(CONFIGS / "ddp.yaml")], 2, "accelerate config"),
]  # fmt: skip


@pytest.mark.parametrize("first", range(0, len(LINES), 4))
def test_a_bad_command_line_gets_one_answer(first, tiny_recipe, capfd, monkeypatch):
    """The training that `recipes train` starts runs in this process."""
    here = lambda command, *_: train(command[command.index("recipes_lib.train") + 1 :])  # noqa: E731
    monkeypatch.setattr("recipes_lib.commands.train.supervise", here)
    monkeypatch.chdir(tiny_recipe.parent)
    fsdp = (CONFIGS / "fsdp_cpu.yaml").read_text().replace("num_processes: 2", "num_processes: 1")
    Path("sharded.yaml").write_text(fsdp.replace("FULL_STATE_DICT", "SHARDED_STATE_DICT"))
    Path("empty.jsonl").touch()
    os.mkfifo("pipe.jsonl")
    Path("rows.jsonl").write_text('{"instruction": "a"}\n')
    wrong = []
    for argv, code, words in LINES[first : first + 4]:
        answer, said = recipes(argv), capfd.readouterr().err
        if answer != code or missing_words(said, words):
            wrong.append((argv, answer, said))
    assert not wrong and not Path("x").exists()


def test_a_runs_folder_that_cannot_be_made_is_exit_5(tiny_recipe, tmp_path, monkeypatch, capsys):
    """A file is in the way; a read-only or vanished disk takes the same path."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("RECIPES_RUNS_ROOT", str(tmp_path / "file"))
    assert train([str(tiny_recipe)]) == 5
    said = capsys.readouterr().err
    assert "Not a directory" in said and str(tmp_path / "file" / "tiny") in said
    assert "internal error" not in said


def test_a_grown_vocabulary_without_padding_trains(tiny_recipe, tiny_model_dir, tmp_path):
    """The padding token becomes the end token, which keeps its loss."""
    folder = Path(shutil.copytree(tiny_model_dir, tmp_path / "model"))
    bigger_vocabulary(folder)
    words = [f"model.name_or_path={folder}", "model.resize_embeddings=true", "train.max_steps=1"]
    assert train([str(tiny_recipe), *words]) == 0
    audit = json.loads((tmp_path / "runs" / "tiny" / "supervision.json").read_text())
    assert not audit["places"]["without_end_token"] and audit["end_tokens"]["</s>"] > 0
