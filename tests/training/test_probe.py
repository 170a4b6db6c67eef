"""The probe before the first step: it leaves nothing, and says what a step takes."""

import re

import pytest
import torch

from recipes_lib.core.errors import ExitCode
from recipes_lib.train import main
from recipes_lib.training import build, metrics, trainer
from recipes_lib.training.sft import SupervisedTrainer

SHORT = ["train.max_steps=3", "train.eval_strategy='no'", "train.save_strategy='no'"]
LOGGED = re.compile(r'"(?:loss|grad_norm|tokens)": [^,]*')


@pytest.mark.parametrize(
    "words",
    [["lora.lora_dropout=0.3"], ["lora=null", "train.neftune_noise_alpha=5"]],
    ids=["lora with dropout", "full with noise"],
)
def test_a_training_with_the_probe_is_the_training_without(
    tiny_recipe, monkeypatch, words, capsys
) -> None:
    runs = tiny_recipe.parent / "runs"
    assert main([str(tiny_recipe), *SHORT, *words, "run.name=probed"]) == 0
    line = r"^probe: .*4 rows, 768 tokens.* s and \d\.\d GiB; training .*about"
    assert re.search(line, capsys.readouterr().out, re.M)
    monkeypatch.setattr(trainer, "probe", lambda *_: "")
    assert main([str(tiny_recipe), *SHORT, *words, "run.name=plain"]) == 0
    lines = [(runs / name / "metrics.jsonl").read_text() for name in ("probed", "plain")]
    probed, plain = map(LOGGED.findall, lines)
    assert probed == plain and len(probed) == 9
    probed, plain = (
        {file.name: file.read_bytes() for file in (runs / name).glob("*/*.safetensors")}
        for name in ("probed", "plain")
    )
    assert probed == plain != {}


def test_memory_that_does_not_suffice_is_one_line_with_what_to_change(
    tiny_recipe, monkeypatch, capsys
) -> None:
    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(SupervisedTrainer, "training_step", full)
    assert main([str(tiny_recipe), *SHORT, "run.name=full"]) == ExitCode.ENVIRONMENT
    error = capsys.readouterr().err
    assert "out of GPU memory" in error and "internal error" not in error
    assert "train.per_device_train_batch_size" in error


def test_the_probe_waits_for_the_gpu_before_it_looks_at_the_clock(tiny_recipe, monkeypatch) -> None:
    """A GPU has only been told what to compute when a step returns."""
    events: list[str] = []
    step = SupervisedTrainer.training_step

    def training_step(self: SupervisedTrainer, *args: object) -> object:
        events.append("step")
        return step(self, *args)

    def clock() -> float:
        events.append("clock")
        return float(len(events))

    def probe_alone(*args: object) -> str:
        with monkeypatch.context() as patch:
            patch.setattr(metrics, "_wait_for_device", lambda device: events.append("wait"))
            patch.setattr(metrics.time, "monotonic", clock)
            patch.setattr(SupervisedTrainer, "training_step", training_step)
            return metrics.probe(*args)

    monkeypatch.setattr(trainer, "probe", probe_alone)
    assert main([str(tiny_recipe), *SHORT]) == 0
    assert events == ["wait", "clock", "step", "wait", "clock"] * 2  # two micro-batches


def test_the_probe_of_compiled_blocks_does_not_time_their_compilation(
    tiny_recipe, monkeypatch, capsys
) -> None:
    words = ["train.torch_compile_backend=eager", "run.global_batch_size=4", "train.max_steps=1"]
    passes: list[int] = []
    step = SupervisedTrainer.training_step

    def training_step(self: SupervisedTrainer, *args: object) -> object:
        passes.append(self.state.global_step)
        return step(self, *args)

    monkeypatch.setattr(SupervisedTrainer, "training_step", training_step)
    with monkeypatch.context() as patch:
        patch.setattr(build, "compile_blocks", lambda *_: None)  # compiling takes ten seconds
        assert main([str(tiny_recipe), *SHORT, *words]) == 0
    assert len(passes) == 3  # one that compiles, one that is timed, and the step
    words[0] = "train.torch_compile_backend=inductr"
    assert main([str(tiny_recipe), *SHORT, *words, "run.name=typo"]) == ExitCode.USAGE
    assert "train.torch_compile_backend" in capsys.readouterr().err


def test_only_the_gpu_of_a_rank_keeps_its_random_state(monkeypatch) -> None:
    asked: list[object] = []
    monkeypatch.setattr(torch.random, "fork_rng", lambda devices: asked.append(devices))
    metrics.keep_random_state(torch.device("cpu"))
    metrics.keep_random_state(torch.device("cuda:3"))
    assert asked == [[], [torch.device("cuda:3")]]
