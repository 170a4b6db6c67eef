"""How many processes on how many machines, and the plain command for them."""

from __future__ import annotations

import pytest

from recipes_lib.cli import main
from recipes_lib.config.launch import place_machine, plan_launch
from recipes_lib.config.sections import LaunchSection
from recipes_lib.core.errors import RecipeError


def words(launch) -> str:
    return " ".join(launch.launcher_words()[2:])


@pytest.mark.parametrize(
    ("section", "flags", "processes", "machines"),
    [
        ({"accelerate": "single_gpu"}, {}, 1, 1),
        ({"accelerate": "fsdp", "gpus": 8, "nodes": 2}, {}, 16, 2),
        ({"accelerate": "fsdp", "nodes": 2}, {}, 4, 2),
        ({"accelerate": "fsdp_multi_node"}, {}, 16, 2),
        ({"accelerate": "fsdp_multi_node"}, {"nodes": 4}, 32, 4),
        ({"accelerate": "fsdp_multi_node"}, {"nodes": 1}, 8, 1),
        ({"accelerate": "fsdp", "gpus": 8, "nodes": 2}, {"gpus": 4}, 8, 2),
        ({"accelerate": "fsdp", "gpus": 8, "nodes": 2}, {"accelerate": "ddp"}, 2, 1),
    ],
)
def test_flags_win_over_the_recipe_and_the_recipe_over_the_config(
    section, flags, processes, machines
):
    launch = plan_launch(LaunchSection(**section), **flags)
    assert (launch.world_size, launch.machines) == (processes, machines)


def test_the_launcher_is_told_what_its_config_does_not_say():
    launch = plan_launch(LaunchSection(accelerate="fsdp", gpus=8, nodes=2))
    placed = place_machine(launch, 1, "node0", None, "")
    assert (
        words(placed)
        == "--num_processes 16 --num_machines 2 --same_network --machine_rank 1 --main_process_ip"
        " node0 --main_process_port 29500"
    )
    both = place_machine(
        plan_launch(LaunchSection(accelerate="fsdp_multi_node")), 0, "node0", 4000, ""
    )
    assert words(both) == "--machine_rank 0 --main_process_ip node0 --main_process_port 4000"
    assert (
        words(plan_launch(LaunchSection(accelerate="fsdp_multi_node"), nodes=1))
        == "--num_processes 8 --num_machines 1"
    )
    assert words(plan_launch(LaunchSection(accelerate="ddp"))) == ""


@pytest.mark.parametrize(
    ("place", "expected"),
    [
        (
            (None, None, None),
            [
                "2 machines of 8 processes",
                "--machine-rank is missing",
                "TYPED --machine-rank 0",
                "--nodes 1",
            ],
        ),
        ((1, None, None), ["--main-process-ip is missing"]),
        ((2, "node0", None), ["--machine-rank 2: there are machines 0 to 1"]),
    ],
)
def test_several_machines_need_a_rank_and_an_address(place, expected):
    launch = plan_launch(LaunchSection(accelerate="fsdp_multi_node"))
    with pytest.raises(RecipeError) as error:
        place_machine(launch, *place, typed="TYPED")
    assert not [word for word in expected if word not in str(error.value)], str(error.value)


def test_a_rank_for_a_single_machine_and_several_processes_of_a_single_config_are_refused():
    with pytest.raises(RecipeError, match="this launch is for one"):
        place_machine(plan_launch(LaunchSection()), 0, None, None, "")
    with pytest.raises(RecipeError, match="single_gpu starts one process, but 4 were asked for"):
        plan_launch(LaunchSection(), gpus=4)


def test_a_recipe_for_several_processes_under_a_config_for_one_fails_the_check(write_with, capsys):
    path = write_with("launch", "gpus: 4")
    assert main(["check", str(path)]) == 2
    assert (
        f"{path}:10: launch.accelerate single_gpu starts one process, but launch.gpus is 4"
        in capsys.readouterr().err
    )


def test_a_dry_run_on_one_of_several_machines_ends_in_one_message(capsys):
    assert main(["train", "llama2-7b-dolly/full-bf16", "launch.nodes=2", "--dry-run"]) == 2
    err = capsys.readouterr().err
    assert (
        "recipes train llama2-7b-dolly/full-bf16 launch.nodes=2 --machine-rank 0 --main-process-ip"
        " HOST_OF_RANK_0" in err
    )


def test_the_next_line_of_a_dry_run_is_the_command_without_it(capsys):
    flags = ["--accelerate", "ddp", "--gpus", "4", "--resume-anyway", "--no-plan"]
    assert main(["train", "llama2-7b-dolly/qlora-r8", "train.seed=7", *flags, "--dry-run"]) == 0
    command, following = capsys.readouterr().out.splitlines()
    assert (
        following
        == "next: recipes train llama2-7b-dolly/qlora-r8 train.seed=7 --accelerate ddp --gpus 4"
        " --resume-anyway --no-plan"
    )
    assert command.endswith(
        "-m recipes_lib.train llama2-7b-dolly/qlora-r8 train.seed=7 --resume-anyway"
    )


def test_a_launch_on_the_cpu_stays_there_where_a_gpu_is_present(monkeypatch, capsys):
    """One process is started without accelerate, whose config says use_cpu."""
    from recipes_lib.commands import train

    assert main(["train", "quickstart/lora-r8", "--dry-run"]) == 0
    assert "ACCELERATE_USE_CPU" not in capsys.readouterr().out
    monkeypatch.setattr(train, "cards_here", lambda: ("an H100",))
    assert main(["train", "quickstart/lora-r8", "--dry-run"]) == 0
    assert "$ env ACCELERATE_USE_CPU=true " in capsys.readouterr().out
    assert main(["train", "llama2-7b-dolly/qlora-r8", "--dry-run"]) == 0
    assert "ACCELERATE_USE_CPU" not in capsys.readouterr().out


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_config_of_another_precision_than_the_recipe_is_refused_by_check_train_and_launch(
    tmp_path, tiny_recipe_text, precision, capsys
):
    """Of one process accelerate is not asked, and would not have its way; of several it would win
    over the recipe.
    """
    foreign = tmp_path / "foreign.yaml"
    foreign.write_text(
        "distributed_type: 'NO'\nuse_cpu: true\nnum_processes: 1\nnum_machines:"
        f" 1\nmixed_precision: {precision}\n"
    )
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(
        tiny_recipe_text(tmp_path).replace("{accelerate: cpu}", f"{{accelerate: {foreign}}}")
    )
    said = f"asks for mixed_precision {precision}, but the recipe for none (train.bf16: false)"
    assert main(["check", str(recipe)]) == 2
    assert f"tiny.yaml:19: launch.accelerate {foreign} {said}" in capsys.readouterr().err
    recipe.write_text(tiny_recipe_text(tmp_path))
    assert main(["train", str(recipe), "--accelerate", str(foreign), "--dry-run"]) == 2
    assert said in capsys.readouterr().err
    assert (
        main(
            [
                "launch",
                str(recipe),
                "--accelerate",
                str(foreign),
                "--profile",
                "local-sandbox",
                "--stages",
                "train",
                "--dry-run",
            ]
        )
        == 2
    )
    assert said in capsys.readouterr().err


def test_a_config_of_the_recipes_own_precision_is_taken(tmp_path, tiny_recipe_text, capsys):
    foreign = tmp_path / "foreign.yaml"
    foreign.write_text(
        "distributed_type: 'NO'\nuse_cpu: true\nnum_processes: 1\nnum_machines: 1\nmixed_precision:"
        " bf16\n"
    )
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(tiny_recipe_text(tmp_path).replace("bf16: false", "bf16: true"))
    assert main(["train", str(recipe), "--accelerate", str(foreign), "--dry-run"]) == 0
