"""The training script, run for real on a tiny model in this process: what it writes, when it
refuses, how it stops.
"""

import datetime
import hashlib
import json
import os
import shutil
import signal
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from tests.conftest import NF4

from recipes_lib.core.errors import ExitCode
from recipes_lib.train import main

ADAPTER = "adapter_model.safetensors"


def run_of(recipe: Path, name: str = "tiny") -> Path:
    return recipe.parent / "runs" / name


def run_json(recipe: Path, name: str = "tiny") -> dict[str, Any]:
    return json.loads((run_of(recipe, name) / "run.json").read_text())


def adapter(recipe: Path, name: str = "tiny") -> bytes:
    return (run_of(recipe, name) / "adapter" / ADAPTER).read_bytes()


def metrics(recipe: Path, name: str = "tiny") -> list[dict[str, Any]]:
    text = (run_of(recipe, name) / "metrics.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def losses(recipe: Path, name: str) -> list[float]:
    return [line["loss"] for line in metrics(recipe, name) if "loss" in line]


def logged(recipe: Path, name: str, *keys: str) -> list[list[Any]]:
    return [[line.get(key) for key in keys] for line in metrics(recipe, name)]


def stop_at(monkeypatch: pytest.MonkeyPatch, call: int, *words: Any) -> None:
    """Train, and stop at the n-th time that the ranks agree, the end of step n - 1."""
    from recipes_lib.training.stopping import StopRequest

    calls = iter(range(1, 10_000))
    with monkeypatch.context() as patch:
        patch.setattr(StopRequest, "_asked_by_file", lambda self: next(calls) >= call)
        assert main([*map(str, words)]) == ExitCode.PREEMPTED


def test_a_run_directory_holds_recipe_metrics_and_adapter_and_is_trained_once(
    tiny_recipe, capsys
) -> None:
    assert main([str(tiny_recipe)]) == 0
    run = run_of(tiny_recipe)
    expected = "recipe.yaml resolved.yaml command.txt environment.json run.json splits.json"
    expected += " supervision.json metrics.jsonl checkpoints adapter"
    assert {path.name for path in run.iterdir()} - {".lock"} == {*expected.split()}
    state = run_json(tiny_recipe)
    assert (state["state"], state["exit_code"], state["summary"]["steps"]) == ("finished", 0, 8)
    assert state["weights_check"]["tensors"] == 8
    lines = metrics(tiny_recipe)
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 9))
    assert [line["step"] for line in lines if "eval_loss" in line] == [4, 8]
    keys = "step epoch loss learning_rate grad_norm tokens tokens_per_second peak_memory_gib"
    assert {*keys.split()} <= lines[0].keys()
    assert lines[-2]["loss"] < lines[0]["loss"]
    card = (run / "adapter" / "README.md").read_text()
    assert "LoRA (r 4" in card and yaml.safe_load(card.split("---")[1])["library_name"] == "peft"
    # nothing names the directory itself, so that it can be moved
    shutil.rmtree(run / "checkpoints")
    for path in run.rglob("*.json"):
        assert path.name == "environment.json" or str(run) not in path.read_text(), path

    # finished, it is not trained again, and refuses other settings
    written = (run / "adapter" / ADAPTER).stat().st_mtime_ns
    capsys.readouterr()
    assert main([str(tiny_recipe)]) == 0
    assert "already finished" in capsys.readouterr().out
    assert main([str(tiny_recipe), "train.learning_rate=1e-3"]) == ExitCode.USAGE
    assert "train.learning_rate" in capsys.readouterr().err
    assert (run / "adapter" / ADAPTER).stat().st_mtime_ns == written
    assert run_json(tiny_recipe)["state"] == "finished"

    # made again by its resolved recipe, it keeps the recipe as it was written
    shutil.rmtree(run / "adapter")
    assert main([str(run / "resolved.yaml")]) == 0
    assert (run / "recipe.yaml").read_text() == tiny_recipe.read_text()


WAYS = {
    "bf16-weights": ["model.dtype=bfloat16", "train.bf16=true"],
    "qlora-nf4": [NF4.replace("}", ", bnb_4bit_use_double_quant: true}"), "train.bf16=true"],
    "8 bits": ["quantization={load_in_8bit: true}", "train.max_steps=2"],
    "full": ["lora=null"],
    "best": ["train.load_best_model_at_end=true", "train.save_steps=4", "train.save_total_limit=1"],
    "chat": ["data.prompt_format=chat"],
    "warm-up alone": ["train.max_steps=1", "train.warmup_steps=0.1"],
}


@pytest.mark.parametrize("way", WAYS)
def test_every_way_to_train_ends_with_weights_that_reload(tiny_recipe, way, capsys) -> None:
    assert main([str(tiny_recipe), *WAYS[way]]) == 0
    said = capsys.readouterr().out
    assert ("quantized in 14 layers" in said) is (way in ("qlora-nf4", "8 bits"))
    state = run_json(tiny_recipe)
    assert state["state"] == "finished" and state["weights_check"]["sha256"]
    assert (run_of(tiny_recipe) / ("model" if way == "full" else "adapter")).is_dir()
    assert all(loss > 0 for loss in losses(tiny_recipe, "tiny"))


def test_a_run_resumed_after_midnight_keeps_the_date_of_its_first_day(
    tiny_recipe, tiny_tokenizer, monkeypatch
) -> None:
    from recipes_lib.data import prompts

    template = tiny_recipe.with_name("dated.jinja")
    template.write_text("{{ strftime_now('%Y-%m-%d') }}" + tiny_tokenizer.chat_template)
    words = [str(tiny_recipe), "data.prompt_format=chat", f"data.chat_template={template}"]
    for day in (1, 2):
        with monkeypatch.context() as patch:
            today = SimpleNamespace(today=lambda day=day: datetime.date(2031, 1, day))
            clock = SimpleNamespace(date=today, datetime=datetime.datetime)
            patch.setattr(prompts, "datetime", clock)
            if day == 1:
                assert main([*words, "run.name=whole"]) == 0
                stop_at(monkeypatch, 5, *words)
            else:
                assert main(words) == 0
    for name in ("whole", "tiny"):
        resolved = (run_of(tiny_recipe, name) / "resolved.yaml").read_text()
        assert "template_date: '2031-01-01'" in resolved
    assert adapter(tiny_recipe, "whole") == adapter(tiny_recipe)


REQUESTS = {"SIGTERM": 75, "SIGUSR2": 75, "SIGINT": 130, "STOP": 75}


def test_a_request_during_a_step_ends_in_a_checkpoint_that_resumes_to_the_same_bytes(
    tiny_recipe, monkeypatch
) -> None:
    from recipes_lib.training.sft import SupervisedTrainer

    words, step = [str(tiny_recipe), "lora.lora_dropout=0.3"], SupervisedTrainer.training_step
    assert main([*words, "run.name=whole"]) == 0
    for request, code in REQUESTS.items():
        stop = run_of(tiny_recipe, request) / "STOP"

        def interrupted(self: SupervisedTrainer, *args: Any, name=request, stop=stop) -> Any:
            if self.state.global_step == 2 and not self.stop.requested:
                stop.touch() if name == "STOP" else os.kill(os.getpid(), getattr(signal, name))
            return step(self, *args)

        with monkeypatch.context() as patch:
            patch.setattr(SupervisedTrainer, "training_step", interrupted)
            assert main([*words, f"run.name={request}"]) == code
        state = run_json(tiny_recipe, request)
        assert (state["state"], state["exit_code"]) == ("stopped", code)
        assert (stop.parent / "checkpoints/checkpoint-3/COMPLETE.json").is_file()
        assert not stop.exists() and not (stop.parent / "adapter").exists()
        assert main([*words, f"run.name={request}"]) == 0
        assert adapter(tiny_recipe, "whole") == adapter(tiny_recipe, request)
        keys = ("step", "loss", "eval_loss", "grad_norm", "learning_rate", "tokens")
        assert logged(tiny_recipe, "whole", *keys) == logged(tiny_recipe, request, *keys)


def test_a_signal_while_the_weights_are_saved_stops_nothing(
    tiny_recipe, monkeypatch, capfd
) -> None:
    from recipes_lib.training import attempt

    honest = attempt.write_card

    def interrupted(*args: Any) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        honest(*args)

    monkeypatch.setattr(attempt, "write_card", interrupted)
    assert main([str(tiny_recipe), "train.max_steps=2"]) == 0
    assert "or the weights are saved" in capfd.readouterr().err
    assert run_json(tiny_recipe)["state"] == "finished"


def test_a_gradient_that_explodes_stops_with_step_rate_and_examples(tiny_recipe, capsys) -> None:
    words = ["lora=null", "train.adam_epsilon=0", "train.lr_scheduler_type=constant"]
    assert main([str(tiny_recipe), *words]) == ExitCode.NUMERICS
    said = capsys.readouterr().err
    assert "at step 2, learning rate 0.01, examples" in said and "Traceback" not in said
    state = run_json(tiny_recipe)
    assert (state["state"], state["exit_code"]) == ("failed", 3)
    assert not (run_of(tiny_recipe) / "model").exists()


# ---- Resuming with something else ----


def test_a_finished_run_whose_data_file_changed_is_refused_and_not_called_done(
    tiny_recipe, tmp_path, capsys
) -> None:
    rows = tmp_path / "rows.jsonl"
    source = yaml.safe_load(tiny_recipe.read_text())["data"]["source"]
    rows.write_bytes((tiny_recipe.parent / source).read_bytes())
    words = [str(tiny_recipe), f"data.source={rows}", "train.max_steps=1"]
    assert main(words) == 0
    rows.write_text("".join(rows.read_text().splitlines(keepends=True)[:-1]))
    capsys.readouterr()
    assert main(words) == ExitCode.USAGE
    assert "is finished with other settings: data 1 rows.jsonl" in capsys.readouterr().err


def test_a_refused_resume_changes_no_record_and_other_settings_can_be_insisted_on(
    tiny_recipe, monkeypatch, capsys
) -> None:
    stop_at(monkeypatch, 4, tiny_recipe)
    run = run_of(tiny_recipe)
    (run / "checkpoints/checkpoint-3/optimizer.pt").write_bytes(b"torn")

    def records() -> dict[Path, tuple[bytes, int]]:
        held = [path for path in run.rglob("*") if path.is_file() and path.name != ".lock"]
        return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in held}

    before = records()
    other = [str(tiny_recipe), "train.learning_rate=5e-3", "train.logging_steps=2"]
    assert main(other) == ExitCode.USAGE
    assert "train.learning_rate  0.01 -> 0.005" in capsys.readouterr().err
    assert main([str(tiny_recipe), "data.max_examples=100"]) == ExitCode.USAGE
    assert records() == before
    mine = run_json(tiny_recipe)["guard"]
    for launch in ({"launch.distribution": "FSDP"}, {"launch.world_size": 2}):  # other checkpoints
        (run / "run.json").write_text(json.dumps(run_json(tiny_recipe) | {"guard": mine | launch}))
        assert main([*other, "--resume-anyway"]) == ExitCode.USAGE
        assert next(iter(launch)) in capsys.readouterr().err
    (run / "run.json").write_text(json.dumps(run_json(tiny_recipe) | {"guard": mine}))
    assert main([*other, "--resume-anyway"]) == 0
    state = run_json(tiny_recipe)
    assert state["resumed"][0]["changed"] == {"train.learning_rate": [0.01, 0.005]}
    assert state["attempts"] == 2


def test_rows_tokens_and_base_that_changed_under_the_same_names_are_refused(
    tiny_recipe, tiny_model_dir, tmp_path, monkeypatch, capsys
) -> None:
    source = yaml.safe_load(tiny_recipe.read_text())["data"]["source"]
    rows, model = tmp_path / "rows.jsonl", tmp_path / "model"
    shutil.copyfile(tiny_recipe.parent / source, rows)
    shutil.copytree(tiny_model_dir, model)
    words = [str(tiny_recipe), f"data.source={rows}", f"model.name_or_path={model}"]
    stop_at(monkeypatch, 3, *words)
    tokenizer, weights = model / "tokenizer.json", model / "model.safetensors"
    fewer = json.loads(tokenizer.read_text())
    del fewer["model"]["merges"][50:]
    for file, content, key in (
        (rows, rows.read_bytes().replace(b'", "category"', b'  ", "category"'), "tokens_hash"),
        (tokenizer, json.dumps(fewer).encode(), "tokens_hash"),
        (weights, weights.read_bytes()[:-1] + b"!", "base_weights"),
    ):
        before = file.read_bytes()
        assert content != before, file
        file.write_bytes(content)
        assert main(words) == ExitCode.USAGE, file
        assert key in capsys.readouterr().err, file
        file.write_bytes(before)
    assert main(words) == 0


def test_a_best_checkpoint_that_is_damaged_or_gone_is_not_passed_over(
    tiny_recipe, monkeypatch, capsys
) -> None:
    keys = "load_best_model_at_end=true greater_is_better=true eval_steps=1 save_steps=1"
    words = [str(tiny_recipe), *(f"train.{key}" for key in keys.split())]  # the first is the best
    stop_at(monkeypatch, 5, *words)
    first = run_of(tiny_recipe) / "checkpoints/checkpoint-1"
    content = (first / ADAPTER).read_bytes()
    (first / ADAPTER).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert main(words) == ExitCode.ENVIRONMENT
    assert f"checkpoint-1: {ADAPTER} changed" in capsys.readouterr().err
    shutil.rmtree(first)
    assert main(words) == ExitCode.ENVIRONMENT  # from the last step, after which nothing is saved
    assert (
        "checkpoint-1" in capsys.readouterr().err and not (run_of(tiny_recipe) / "adapter").exists()
    )


def test_a_run_whose_only_checkpoint_is_torn_starts_anew_and_says_with_which_other_settings(
    tiny_recipe, monkeypatch, capsys
) -> None:
    stop_at(monkeypatch, 2, tiny_recipe)
    (run_of(tiny_recipe) / "checkpoints/checkpoint-1/optimizer.pt").write_bytes(b"torn")
    assert main([str(tiny_recipe), "train.learning_rate=5e-3"]) == 0
    said = capsys.readouterr().out
    assert "starts from the beginning, with changed settings: train.learning_rate" in said
    assert run_json(tiny_recipe)["guard"]["train.learning_rate"] == 5e-3


@pytest.mark.parametrize("file", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_checkpoint_whose_pickle_would_run_code_is_one_line_and_runs_nothing(
    file, tiny_recipe, tmp_path, monkeypatch, capsys
) -> None:
    import torch

    from recipes_lib.training import resume_guard

    class Hostile:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "ran"),)

    stop_at(monkeypatch, 4, tiny_recipe)
    checkpoint = run_of(tiny_recipe) / "checkpoints" / "checkpoint-3"
    torch.save(Hostile(), checkpoint / file)
    guard = resume_guard.read_marker(checkpoint)["guard"]
    resume_guard.mark_complete(checkpoint, guard=guard)  # with the hashes of what is there
    capsys.readouterr()
    assert main([str(tiny_recipe)]) == ExitCode.ENVIRONMENT
    said = capsys.readouterr().err
    assert "a file of checkpoint-3 is not what PyTorch saves" in said and "posix.mkdir" in said
    assert "internal error" not in said and "weights_only" not in said
    assert not (tmp_path / "ran").exists()
    shutil.rmtree(checkpoint)
    assert main([str(tiny_recipe)]) == 0


def test_tokens_and_times_of_a_resumed_run_are_of_the_same_steps(tiny_recipe, monkeypatch) -> None:
    from recipes_lib.training import resume_guard

    assert main([str(tiny_recipe), "run.name=whole"]) == 0
    stop_at(monkeypatch, 7, tiny_recipe)
    checkpoint = run_of(tiny_recipe) / "checkpoints" / "checkpoint-6"
    marker = resume_guard.read_marker(checkpoint)
    assert 0 < marker["seconds"] < 60
    resume_guard.mark_complete(checkpoint, guard=marker["guard"], seconds=1000.0)
    assert main([str(tiny_recipe)]) == 0
    summary = run_json(tiny_recipe)["summary"]
    assert summary["tokens"] == run_json(tiny_recipe, "whole")["summary"]["tokens"]
    assert 1000 < summary["seconds"] < 1060
    speed = summary["tokens"] / summary["seconds"]
    assert summary["tokens_per_second"] == pytest.approx(speed, abs=0.06)


def test_after_a_checkpoint_that_notes_no_time_no_time_is_said_and_the_speed_of_what_follows(
    tiny_recipe, monkeypatch
) -> None:
    from recipes_lib.training import resume_guard

    stop_at(monkeypatch, 7, tiny_recipe)
    checkpoint = run_of(tiny_recipe) / "checkpoints" / "checkpoint-6"
    resume_guard.mark_complete(checkpoint, guard=resume_guard.read_marker(checkpoint)["guard"])
    stop_at(monkeypatch, 2, tiny_recipe)  # what this attempt took is not the time of 7 steps
    assert resume_guard.read_marker(checkpoint.with_name("checkpoint-7"))["seconds"] is None
    before = [line["tokens"] for line in metrics(tiny_recipe) if "tokens" in line][-1]
    assert main([str(tiny_recipe)]) == 0
    summary = run_json(tiny_recipe)["summary"]
    assert summary["steps"] == 8 and summary["seconds"] is None
    assert 0 < (summary["tokens"] - before) / summary["tokens_per_second"] < 60


# ---- What is refused, or goes wrong ----


def test_weights_that_are_not_those_that_were_trained_are_rejected_and_kept(
    tiny_recipe, monkeypatch, capsys
) -> None:
    from recipes_lib.training.sft import SupervisedTrainer

    honest = SupervisedTrainer.save_model

    def flip_a_bit(self: Any, folder: str, **options: Any) -> None:
        honest(self, folder, **options)
        file = Path(folder) / ADAPTER
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)

    monkeypatch.setattr(SupervisedTrainer, "save_model", flip_a_bit)
    assert main([str(tiny_recipe), "train.max_steps=1"]) == ExitCode.FAILED
    said = capsys.readouterr().err
    assert "not the trained ones" in said and "weights.unchecked" in said
    run = run_of(tiny_recipe)
    assert not (run / "adapter").exists() and (run / "weights.unchecked").is_dir()
    assert run_json(tiny_recipe)["state"] == "failed"


def test_rows_are_packed_to_the_default_length(tiny_recipe) -> None:
    text = tiny_recipe.read_text().replace("  max_length: 192\n", "")
    tiny_recipe.write_text(text.replace("global_batch_size: 8", "global_batch_size: 4"))
    assert main([str(tiny_recipe), "train.packing=true", "train.max_steps=1"]) == 0


def test_fewer_rows_than_one_step_takes_are_an_error_with_the_batch_that_fits(
    tiny_recipe, capsys
) -> None:
    words = ["data.max_examples=20", "data.split.method=none", "train.eval_strategy='no'"]
    assert main([str(tiny_recipe), *words, "run.global_batch_size=32"]) == ExitCode.USAGE
    error = capsys.readouterr().err
    assert "20 training rows" in error and "run.global_batch_size to 20" in error


def test_a_4bit_base_whose_own_precision_is_not_autocasts_is_refused(
    tiny_recipe, tiny_model_dir, tmp_path, capsys
) -> None:
    half = tmp_path / "half"
    shutil.copytree(tiny_model_dir, half)
    config = json.loads((half / "config.json").read_text())
    (half / "config.json").write_text(json.dumps({**config, "dtype": "float16"}))
    words = [NF4, "train.bf16=true", "model.dtype=auto", f"model.name_or_path={half}"]
    assert main([str(tiny_recipe), *words]) == ExitCode.USAGE
    assert "the checkpoint is float16 and autocast bfloat16" in capsys.readouterr().err


def test_no_planted_secret_is_in_any_written_file(tiny_recipe, monkeypatch) -> None:
    secrets = {
        "HF_TOKEN": "hf_plantedplantedplanted",
        "OPENAI_API_KEY": "sk-plantedplantedplanted",
        "WANDB_API_KEY": "plantedwandbkey0123",
        "ACCELERATE_SECRET": "plantedaccelerate",
    }
    for name, value in secrets.items():
        monkeypatch.setenv(name, value)
    assert main([str(tiny_recipe), "train.max_steps=2"]) == 0
    written = [path for path in run_of(tiny_recipe).rglob("*") if path.is_file()]
    assert written and not any(path.name == "training_args.bin" for path in written)
    for path in written:
        content = path.read_bytes()
        assert not any(value.encode() in content for value in secrets.values()), path


# ---- The same mathematics ----


def test_validation_loss_is_per_token_and_does_not_depend_on_the_batch(tiny_recipe) -> None:
    found = []
    for size in (1, 3, 32):
        words = [f"train.per_device_eval_batch_size={size}", f"run.name=b{size}"]
        assert main([str(tiny_recipe), "train.max_steps=1", "train.eval_steps=1", *words]) == 0
        found.append(metrics(tiny_recipe, f"b{size}")[-1]["eval_loss"])
    assert max(found) - min(found) < 1e-5


@pytest.mark.filterwarnings("ignore:`label_smoothing_factor`")
def test_a_rank_whose_validation_rows_are_all_fillers_adds_nothing(
    tiny_recipe, monkeypatch
) -> None:
    from recipes_lib.training import trainer

    honest = trainer.validation_batches
    rank_1 = {"rank": 1, "world_size": 2}
    of_rank_1 = lambda rows, **words: honest(rows.select([0]), **(words | rank_1))  # noqa: E731
    monkeypatch.setattr(trainer, "validation_batches", of_rank_1)
    words = ["train.max_steps=1", "train.eval_steps=1", "train.label_smoothing_factor=0.1"]
    assert main([str(tiny_recipe), *words]) == 0
    assert metrics(tiny_recipe)[-1]["eval_loss"] == 0.0


def test_a_lever_for_speed_or_memory_changes_no_loss(tiny_recipe) -> None:
    levers = {
        "plain": "train.max_steps=8",
        "padded": "train.padding_free=false",
        "checkpointed": "train.activation_checkpointing=true",
        "fused": "train.optim=adamw_torch_fused",
        "at-once": "train.per_device_train_batch_size=8",
        "worker": "train.dataloader_num_workers=1",
    }
    for name, lever in levers.items():
        assert main([str(tiny_recipe), f"run.name={name}", lever]) == 0
    found = {name: losses(tiny_recipe, name) for name in levers}
    plain = found.pop("plain")
    assert found == {name: pytest.approx(plain, abs=2e-5) for name in found}


def test_tokens_of_tied_embeddings_train_and_are_saved(tiny_recipe, tmp_path) -> None:
    """Without mending, TRL asks PEFT's wrapper of the head for a bias that it does not have."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = yaml.safe_load(tiny_recipe.read_text())["model"]["name_or_path"]
    tied = AutoModelForCausalLM.from_pretrained(source)
    tied.config.tie_word_embeddings = True
    tied.tie_weights()
    tied.save_pretrained(tmp_path / "tied")
    AutoTokenizer.from_pretrained(source).save_pretrained(tmp_path / "tied")
    words = [f"model.name_or_path={tmp_path / 'tied'}", "lora.trainable_token_indices=[3, 4, 5]"]
    assert main([str(tiny_recipe), *words, "train.max_steps=2"]) == 0
    assert run_json(tiny_recipe)["weights_check"]["tensors"] == 9


@pytest.mark.slow
def test_a_training_template_trains_and_the_plain_one_is_saved(
    tiny_recipe, tiny_model_dir, monkeypatch, capsys
) -> None:
    from recipes_lib.data import prepare

    model = tiny_recipe.parent / "phi"
    shutil.copytree(tiny_model_dir, model)
    folder = Path(str(find_spec("trl").origin)).parent / "chat_templates"  # type: ignore[union-attr]
    plain = (folder / "phi3.jinja").read_text(encoding="utf-8")
    (model / "chat_template.jinja").write_text(plain, encoding="utf-8")
    words = [str(tiny_recipe), "data.prompt_format=chat", f"model.name_or_path={model}"]
    stop_at(monkeypatch, 2, *words)
    said = capsys.readouterr().out
    assert said.count("chat template: trained with TRL's phi3_training.jinja") == 1
    text = (folder / "phi3_training.jinja").read_text(encoding="utf-8")
    digest = hashlib.sha256(text.encode()).hexdigest()
    assert run_json(tiny_recipe)["guard"]["training_template_hash"] == digest

    newer = ("phi3_training.jinja", text + "{# newer #}")
    with monkeypatch.context() as patch:
        patch.setattr(prepare, "training_template", lambda section, tokenizer: newer)
        assert main(words) == ExitCode.USAGE
        assert "training_template_hash" in capsys.readouterr().err
    assert main(words) == 0
    saved = tiny_recipe.parent / "runs" / "tiny" / "adapter"
    assert (saved / "chat_template.jinja").read_text(encoding="utf-8") == plain


def test_damaged_prepared_rows_train_the_same_weights_and_packing_leaves_no_file_beside_them(
    tiny_recipe, tmp_path, monkeypatch, capfd
) -> None:
    monkeypatch.setenv("RECIPES_CACHE", str(tmp_path / "cache"))
    words = [str(tiny_recipe), "train.packing=true", "train.max_steps=2"]
    words += ["train.shuffle_dataset=true"]
    assert main([*words, "run.name=first"]) == 0
    [folder] = (tmp_path / "cache" / "rows").glob("*/data")
    sealed = json.loads((folder / "files.json").read_text())["files"]
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert found == {*sealed, "files.json"}

    rows = folder / "train" / "data-00000-of-00001.arrow"
    damaged = bytearray(rows.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    rows.write_bytes(damaged)
    assert main([*words, "run.name=second"]) == 0
    assert "were made again" in capfd.readouterr().err
    assert adapter(tiny_recipe, "second") == adapter(tiny_recipe, "first")
