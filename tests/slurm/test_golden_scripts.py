"""The scripts of jobs, and the lines that submit them, byte for byte as they were.

UPDATE_GOLDEN=1 writes them anew; the diff then shows what a change means for a site.
"""

import os
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from tests.study.study_files import write_tiny_study

PROJECT = Path(__file__).resolve().parents[2]
GOLDEN = Path(__file__).with_name("golden")
Recipes = Callable[..., tuple[int, str, str]]
PROFILES = {
    "plain": {"sbatch": {"partition": "cpu", "time": "01:00:00", "cpus-per-task": "{processes}"}},
    "full": {
        "sbatch": {"partition": "gpu", "gres": "gpu:h100:{gpus}", "constraint": "h100&nvlink"},
        "stages": {"report": {"partition": "cpu", "constraint": None}, "eval": {"mem": "64G"}},
        "setup": ["module load cuda", "source .venv/bin/activate"],
        "prefix": ["apptainer", "exec", "--nv", "my image.sif"],
        "env": {"TMPDIR": "/tmp/{job}", "NCCL_SOCKET_IFNAME": "ib0", "ODD": "it's {job}"},
        "vllm": "/opt/vllm/bin/vllm",
        "signal_lead_s": 120,
        "max_requeues": 3,
        "max_concurrent_arms": 2,
    },
}
LAUNCHES = {
    "recipe": ("plain", "quickstart/lora-r8 --accelerate cpu"),
    "nodes": (
        "plain",
        "quickstart/lora-r8 --stages train --accelerate ddp_cpu --nodes 2 --gpus 2"
        ' train.per_device_train_batch_size=2 "run.notes=it\'s \\$HOME" --resume-anyway',
    ),
    "gpus": ("full", f"llama2-7b-dolly/qlora-r8 --evals {PROJECT}/evals/mt_bench.yaml"),
    "study": ("full", "study/tiny.yaml"),
    "sizes": ("plain", "study/sizes.yaml"),
}


@pytest.mark.parametrize("name", LAUNCHES)
def test_the_scripts_of_a_launch_are_what_they_were(
    name: str, recipes: Recipes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RECIPES_RUNS_ROOT", str(tmp_path / "runs"))
    monkeypatch.setenv("RECIPES_CACHE", str(tmp_path / "cache"))
    (tmp_path / "no-model").mkdir()
    study = write_tiny_study(tmp_path / "study", tmp_path / "no-model")
    two = "{recipe: r8.yaml, accelerate: ddp_cpu, gpus: 2, overrides: [run.global_batch_size=8]}"
    text = study.read_text().replace("r8: r8.yaml", f"r8: {two}").replace("[42]", "[42, 43]")
    study.with_name("sizes.yaml").write_text(text)
    profile_name, words = LAUNCHES[name]
    profile = tmp_path / "site.yaml"
    profile.write_text(yaml.safe_dump(PROFILES[profile_name]))
    command = ["launch", *shlex.split(words), "--profile", "site.yaml"]
    code, lines, err = recipes(*command, "--dry-run")
    assert code == 0, err
    assert recipes(*command, "--prepare")[0] == 0
    parts = [lines]
    for script in sorted((tmp_path / "runs").glob("*/slurm/*.sbatch")):
        parts += [f"\n==== {script.name}\n", script.read_text()]
    said = "".join(parts)
    for path, word in ((tmp_path, "HERE"), (sys.executable, "PYTHON"), (PROJECT, "PROJECT")):
        said = said.replace(str(path), word)
    golden = GOLDEN / f"{name}.txt"
    if os.environ.get("UPDATE_GOLDEN"):
        golden.write_text(said)
    assert said == golden.read_text()
