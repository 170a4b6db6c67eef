"""What was asked of the launcher and what is running must be the same."""

from types import SimpleNamespace

import psutil
import pytest

from recipes_lib.config.launch import Active
from recipes_lib.config.recipe import load_recipe
from recipes_lib.core.errors import RecipeError
from recipes_lib.training.launch_check import check_launch, check_request, what_runs

ALONE = Active(1, "one process", "cpu")


def test_what_is_not_what_was_asked_for_is_refused(monkeypatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert check_launch(ALONE) == "one process, world size 1, cpu"
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RecipeError, match="each of them would train alone"):
        check_launch(ALONE)
    with pytest.raises(RecipeError, match=r"(?s)FSDP was requested, but DDP is active.*fsdp_cpu"):
        check_launch(Active(2, "DDP", "cpu"))
    met = SimpleNamespace(distributed_type="MULTI_CPU", num_processes=2, device="cpu")
    monkeypatch.setattr("accelerate.PartialState", lambda: met)
    monkeypatch.setenv("FSDP_VERSION", "1")
    with pytest.raises(RecipeError, match=r"(?s)but FSDP1 is active.*fsdp_version: 2"):
        check_launch(what_runs())
    for upstream, ours in {"MULTI_CPU": "DDP", "MULTI_GPU": "DDP", "FSDP": "FSDP"}.items():
        state = SimpleNamespace(distributed_type=upstream, num_processes=2, device="cpu")
        assert what_runs(state).distributed_type == ours


def test_a_precision_of_the_launcher_that_the_recipe_does_not_have_is_refused(
    tiny_recipe, monkeypatch
) -> None:
    none, bf16 = (load_recipe(tiny_recipe, [f"train.bf16={word}"]) for word in ("false", "true"))
    check_request(none, 0)
    for asked, recipe in (("bf16", none), ("FP16", bf16), ("fp8", bf16), ("fp8", none)):
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", asked)
        with pytest.raises(RecipeError, match=f"launcher asks for mixed_precision {asked}"):
            check_request(recipe, 0)
    for asked in ("bf16", "no"):
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", asked)
        check_request(bf16, 0)


def test_more_processes_than_gpus_and_other_backends_are_refused(tiny_recipe, monkeypatch) -> None:
    recipe = load_recipe(tiny_recipe)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    said = "4 processes on this machine, but each of them sees 1 GPU.*--gpus.*MIG"
    with pytest.raises(RecipeError, match=rf"(?s){said}"):
        check_request(recipe, 1)
    for num_gpus in (4, 0):
        check_request(recipe, num_gpus)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    check_request(recipe, 1)
    for backend in ("PARALLELISM_CONFIG", "MEGATRON_LM", "DEEPSPEED"):  # by a flag or a shell
        monkeypatch.setenv(f"ACCELERATE_USE_{backend}", "true")
        with pytest.raises(RecipeError, match=f"{backend} was requested.*cannot be used"):
            check_request(recipe, 1)


def test_more_workers_than_a_machine_can_run_are_refused(tiny_recipe, monkeypatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    check_request(load_recipe(tiny_recipe, ["train.dataloader_num_workers=16"]), 0)
    many = load_recipe(tiny_recipe, ["train.dataloader_num_workers=60"])
    with pytest.raises(RecipeError, match=r"60 processes would load rows here; 16 is the most"):
        check_request(many, 0)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    two_ranks = load_recipe(tiny_recipe, ["train.dataloader_num_workers=9"])
    with pytest.raises(RecipeError, match="18 processes"):
        check_request(two_ranks, 0)


def test_what_is_not_what_the_command_line_of_accelerate_asks_for_is_refused(
    monkeypatch, tmp_path
) -> None:
    """`--cpu --num_processes 2` starts one process."""
    multi_cpu, ddp = tmp_path / "multi.yaml", tmp_path / "ddp.yaml"
    multi_cpu.write_text("distributed_type: MULTI_CPU\nnum_processes: 2\nuse_cpu: true\n")
    ddp.write_text("distributed_type: MULTI_GPU\nnum_processes: 2\nuse_cpu: true\n")
    two = Active(2, "DDP", "cpu")
    cases = [
        (["--cpu", "--num_processes", "2"], ALONE, "2 processes were requested.*started 1"),
        (["--cpu", "--num-processes", "2"], ALONE, "2 processes were requested.*started 1"),
        (["--config_file", str(ddp), "--num_processes=4"], two, "4 processes .* started 2"),
        (["--config_file", str(multi_cpu)], ALONE, "MULTI_CPU"),
        (["--config_file", str(ddp)], two, None),
    ]
    for words, active, said in cases:
        command = ["python", "/bin/accelerate", "launch", *words, "-m", "recipes_lib.train"]
        monkeypatch.setattr(psutil.Process, "cmdline", lambda self, command=command: command)
        monkeypatch.setenv("WORLD_SIZE", str(active.world_size))
        if said is None:
            assert check_launch(active)
            continue
        with pytest.raises(RecipeError, match=said):
            check_launch(active)
