"""`recipes train` stops where the plan cannot fit, and keeps the plan beside what is measured."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from recipes_lib.cli import main
from recipes_lib.commands import train as train_verb
from recipes_lib.config.launch import plan_launch
from recipes_lib.config.recipe import load_recipe
from recipes_lib.core.errors import EnvironmentFault, ExitCode
from recipes_lib.planning import gate
from recipes_lib.planning.cards import Card, card_named, cards_here, cpu_card, devices_here


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The commands that `recipes train` would have started."""
    commands: list[list[str]] = []
    monkeypatch.setattr(
        train_verb,
        "supervise",
        lambda command, recipe, launch: commands.append(command) or ExitCode.DONE,
    )
    return commands


@pytest.fixture
def with_free_gib(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """A function that sets the memory this machine has."""

    def set_free(gib: float) -> None:
        card = cpu_card()
        monkeypatch.setattr(gate, "cpu_card", lambda: replace(card, memory_gib=gib))

    return set_free


def test_a_training_that_cannot_fit_is_refused_with_the_arithmetic(
    tiny_recipe: Path,
    started: list[list[str]],
    with_free_gib: Callable[[float], None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    with_free_gib(0.001)
    assert main(["train", str(tiny_recipe)]) == ExitCode.ENVIRONMENT
    assert started == []
    err = capsys.readouterr().err
    assert "the plan says it cannot fit this machine" in err
    assert "outside the allocator 0.8 = 0.8 GiB, free now: 0.0 GiB" in err
    assert "or insist with --no-plan" in err
    assert main(["train", str(tiny_recipe), "--no-plan"]) == ExitCode.DONE
    assert len(started) == 1


def test_a_training_that_fits_or_cannot_be_planned_starts(
    tiny_recipe: Path,
    started: list[list[str]],
    with_free_gib: Callable[[float], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with_free_gib(64)
    assert main(["train", str(tiny_recipe)]) == ExitCode.DONE
    with_free_gib(0.001)
    assert main(["train", str(tiny_recipe), "model.name_or_path=nobody/nothing"]) == ExitCode.DONE
    monkeypatch.setattr(gate, "cards_here", lambda: (card_named("h100"),))
    assert main(["train", str(tiny_recipe), "launch.accelerate=single_gpu"]) == ExitCode.DONE
    assert len(started) == 3


def test_where_it_is_tight_on_a_cpu_it_is_said_and_not_refused(
    tiny_recipe: Path,
    started: list[list[str]],
    with_free_gib: Callable[[float], None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    with_free_gib(0.5)
    assert main(["train", str(tiny_recipe)]) == ExitCode.DONE
    assert len(started) == 1
    assert "warning: the plan needs about 0.8 GiB, and 0.5 are free now" in capsys.readouterr().out


def test_the_card_that_is_there_is_the_one_that_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    small = Card("rtx-4090-24gb", "RTX 4090 24GB", 23.5, 165, 1008, 10)
    monkeypatch.setattr(gate, "cards_here", lambda: (small,))
    recipe = load_recipe("llama2-7b-dolly/lora-bf16-r32", ["model.attn_implementation=sdpa"])
    plan = gate.plan_for_here(recipe, plan_launch(recipe.launch))
    assert plan is not None and plan.card == small
    with pytest.raises(EnvironmentFault) as caught:
        gate.refuse_what_cannot_fit(plan)
    text = str(caught.value)
    assert "weights 12.6" in text and "activations 29.5" in text and "there: 23.5 GiB" in text
    assert "lora-bf16-r32" in text or "_base.yaml:" in text


def test_a_finished_run_needs_no_plan(
    tiny_recipe: Path,
    started: list[list[str]],
    with_free_gib: Callable[[float], None],
    tmp_path: Path,
) -> None:
    from recipes_lib.core.run_directory import RunDirectory

    with_free_gib(0.001)
    run = RunDirectory("tiny")
    run.write_state("finished", attempts=1, exit_code=0, error=None)
    assert main(["train", str(tiny_recipe)]) == ExitCode.DONE
    assert len(started) == 1


def test_planned_and_measured_stand_side_by_side_in_run_json(
    tiny_recipe: Path, tmp_path: Path
) -> None:
    from recipes_lib.train import main as train

    assert (
        train([str(tiny_recipe), "train.max_steps=2", "train.eval_steps=2", "train.save_steps=2"])
        == 0
    )
    state = json.loads((tmp_path / "runs/tiny/run.json").read_text())
    planned, summary = state["planned"], state["summary"]
    assert planned["card"] == "cpu" and planned["fits"]
    assert summary["planned_seconds"] == planned["seconds"] > 0
    assert summary["planned_peak_memory_gib"] == planned["peak_memory_gib"] > 0.5
    assert summary["seconds"] > 0 and summary["peak_memory_gib"] > 0


@pytest.fixture
def nvidia_smi(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[str, str], list[Card]]]:
    """A function that puts an nvidia-smi with these answers (to the query, and to -L) first in
    PATH, and returns the cards found.
    """
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    def answer(query: str, listed: str) -> list[Card]:
        (tmp_path / "query").write_text(query)
        (tmp_path / "listed").write_text(listed)
        script = tmp_path / "nvidia-smi"
        script.write_text(
            f'#!/bin/sh\n[ "$1" = -L ] && exec /bin/cat {tmp_path}/listed\nexec /bin/cat'
            f" {tmp_path}/query\n"
        )
        script.chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path))
        cards_here.cache_clear()
        return list(cards_here())

    yield answer
    cards_here.cache_clear()


def test_the_cards_of_this_machine_are_read_from_nvidia_smi(
    nvidia_smi: Callable[[str, str], list[Card]],
) -> None:
    query = (
        "0, GPU-a, Quadro X, 8192\n1, GPU-b, NVIDIA H100 80GB HBM3, 81559\n2, GPU-c, NVIDIA"
        " A100-SXM4-40GB, 40960\n"
    )
    found = nvidia_smi(query, "GPU 0: Quadro X\nGPU 1: NVIDIA H100 80GB HBM3\n")
    assert [card.name for card in found] == ["h100-80gb", "a100-40gb", "Quadro X"]
    assert found[2].memory_gib == pytest.approx(7.6)


def test_a_mig_slice_counts_and_not_the_card_it_is_cut_from(
    nvidia_smi: Callable[[str, str], list[Card]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """nvidia-smi's query names the whole card; a plan for its 79 GiB would let a training start
    that the slice cannot hold.
    """
    slices = (
        "MIG 3g.40gb     Device  0: (UUID: MIG-1)",
        "MIG 1g.10gb+me  Device  1: (UUID: MIG-2)",
        "MIG 7g.80gb     Device  2: (UUID: MIG-3)",
    )
    listed = (
        "\n  ".join(["GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-1)", *slices])
        + "\nGPU 1: NVIDIA A100-SXM4-80GB (UUID: GPU-2)\n"
    )
    query = (
        "0, GPU-1, NVIDIA H100 80GB HBM3, [Insufficient Permissions]\n1, GPU-2, NVIDIA"
        " A100-SXM4-80GB, 81920\n"
    )
    found = nvidia_smi(query, listed)
    assert {card.name: card.memory_gib for card in found} == {
        "h100-mig-3g.40gb": 39.2,
        "a100-80gb": 79.2,
        "h100-mig-1g.10gb": 9.5,
        "NVIDIA H100 80GB HBM3 MIG 7g.80gb": 77.6,
    }
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-2")
    assert [card.name for card in nvidia_smi(query, listed)] == ["h100-mig-1g.10gb"]


@pytest.mark.parametrize(
    ("visible", "names"),
    [("0", ["Quadro X"]), ("GPU-b,0", ["h100-80gb", "Quadro X"]), ("", []), ("-1", [])],
)
def test_cards_that_the_training_will_not_see_do_not_count(
    visible: str,
    names: list[str],
    nvidia_smi: Callable[[str, str], list[Card]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    found = nvidia_smi("0, GPU-a, Quadro X, 8192\n1, GPU-b, NVIDIA H100 80GB HBM3, 81559\n", "")
    assert [card.name for card in found] == names


@pytest.mark.parametrize(
    ("visible", "words"),
    [(None, ["GPU-b", "GPU-a"]), ("1,0", ["1", "0"]), ("0,-1,1", ["0"]), ("", [])],
)
def test_the_gpus_to_share_out_are_those_that_the_process_sees(
    visible: str | None,
    words: list[str],
    nvidia_smi: Callable[[str, str], list[Card]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    nvidia_smi("0, GPU-a, Quadro X, 8192\n1, GPU-b, NVIDIA H100 80GB HBM3, 81559\n", "")
    assert devices_here() == words


def test_one_process_is_planned_for_the_first_card_and_two_for_the_smaller(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A small card beside the one that trains refuses nothing."""
    monkeypatch.setattr(
        gate, "cards_here", lambda: (card_named("h100"), Card("T400", "T400", 3.6, 100, 600, 10))
    )
    recipe = load_recipe("llama2-7b-dolly/lora-bf16-r32")
    one, two = (
        gate.plan_for_here(recipe, plan_launch(recipe.launch, name, gpus))
        for name, gpus in (("single_gpu", 1), ("ddp", 2))
    )
    assert one is not None and one.card.name == "h100-80gb" and one.fits
    assert two is not None and two.card.name == "T400" and not two.fits
