from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from recipes_lib.core.errors import RecipeError, RecipeErrors
from recipes_lib.slurm.profile import load_profile, profile_schema, seconds_of, time_of

PROFILES = sorted((Path(__file__).parents[2] / "launch" / "profiles").glob("*.yaml"))


@pytest.mark.parametrize("path", PROFILES, ids=lambda path: path.stem)
def test_every_shipped_profile_loads_and_is_commented(path: Path) -> None:
    profile = load_profile(str(path))
    assert profile.values.cpus_per_gpu >= 1
    assert path.read_text().startswith(
        "# yaml-language-server: $schema=../../schema/profile.schema.json\n# "
    )


def test_six_values_are_a_profile(profile_file) -> None:
    assert load_profile(str(profile_file())).values.signal_lead_s == 300


def test_the_original_cluster_has_its_values() -> None:
    values = load_profile("nus-soc").values
    assert (values.of_stage("partition", "train"), values.of_stage("partition", "eval")) == (
        "gpu",
        "gpu-long",
    )
    assert (values.gres, values.cpus_per_gpu, values.memory_gib_per_gpu) == (
        "gpu:h100-47:{gpus}",
        8,
        32,
    )
    assert values.environment.conda == "ml"


# (lines that replace those of the good profile, words of the answer)
BAD_PROFILES = [
    (["partitoin: gpu"], ["unknown key 'partitoin'", "did you mean partition?"]),
    (["time: 24:00:00"], ["time must be text", 'write "24:00:00"']),
    (['time: "tomorrow"'], ["time is no time limit: tomorrow"]),
    (['time: {train: "01:00:00"}'], ["time.eval is missing", "time.report is missing"]),
    (["gres: gpu:2"], ["gres must contain {gpus}"]),
    (["gres: --gres=gpu:{gpus}"], ["gres must be one word that is no flag"]),
    (['partition: "gpu long"'], ["partition must be one word that is no flag, got 'gpu long'"]),
    (["account: a b"], ["account must be one word"]),
    (["gpu: h100-800gb"], ["gpu: there is no card 'h100-800gb'", "did you mean h100-80gb?"]),
    (
        ["directories: {runs: '/scratch/{usr}'}"],
        ["directories.runs: {usr} is not filled in", "what is: {user}"],
    ),
    (["directories: {hub: '/scratch/{job}'}"], ["directories.hub: {job} is not filled in"]),
    (["cpus_per_gpu: 0"], ["cpus_per_gpu must be a whole number >= 1"]),
    (["cpus_per_gpu: true"], ["cpus_per_gpu must be a whole number >= 1"]),
    (
        ["memory_gib_per_gpu: 32G"],
        ["memory_gib_per_gpu must be a whole number >= 1 or null, got '32G'"],
    ),
    (["environment:"], ["environment must be a mapping", "environment: {}"]),
    (["environment: {conda: a, venv: b}"], ["both conda and venv"]),
    (["environment: {cnda: a}"], ["did you mean environment.conda?"]),
    (["extra_sbatch: [--array=3]"], ["--array is set by recipes launch"]),
    (["extra_sbatch: [-p, gpu]"], ["--partition has a key of its own", "'gpu' is no flag"]),
    (
        ["extra_sbatch: [-c8, -n4]"],
        ["--cpus-per-task has a key of its own: cpus_per_gpu", "--ntasks is set by recipes launch"],
    ),
    (
        ["extra_sbatch: [--mem-per-gpu=4G]"],
        ["--mem-per-gpu has a key of its own: memory_gib_per_gpu"],
    ),
    (["variables: {NCCL_DEBUG: 1}"], ["variables.NCCL_DEBUG must be text", 'quote it: "1"']),
    (["variables: {A-B: x}"], ["'A-B' is no name of an environment variable"]),
    (['time: "00:05:00"'], ["asked to stop before it is halfway"]),
    (["variables: {WANDB_API_KEY: abc}"], ["looks like a secret"]),
    (["account: ${USER}"], ["no interpolation"]),
]


@pytest.mark.parametrize(
    ("lines", "words"),
    BAD_PROFILES,
    ids=lambda value: value[0] if isinstance(value, list) and ":" in value[0] else "",
)
def test_a_wrong_value_is_answered_at_its_line(
    profile_file, lines: list[str], words: list[str]
) -> None:
    path = profile_file(*lines)
    with pytest.raises(RecipeErrors) as caught:
        load_profile(str(path))
    text = str(caught.value)
    assert all(word in text for word in words), text
    assert f"{path}:" in text


@pytest.mark.parametrize(
    "key", ["partition", "time", "gres", "cpus_per_gpu", "memory_gib_per_gpu", "environment"]
)
def test_a_missing_value_is_one_line_that_says_what_it_is(profile_file, key: str) -> None:
    path = profile_file()
    path.write_text(
        "".join(
            line for line in path.read_text().splitlines(keepends=True) if not line.startswith(key)
        )
    )
    with pytest.raises(RecipeErrors) as caught:
        load_profile(str(path))
    assert str(caught.value).startswith(f"{path}: {key} is missing: ") and "\n" not in str(
        caught.value
    )
    assert "cPU" not in str(caught.value)


def test_an_unknown_profile_names_the_nearest_and_all() -> None:
    with pytest.raises(RecipeError) as caught:
        load_profile("nus-sco")
    assert "did you mean nus-soc?" in str(
        caught.value
    ) and "example, local-sandbox, nus-soc" in str(caught.value)


def test_a_recipe_is_no_profile() -> None:
    with pytest.raises(RecipeError, match="is a recipe, not a site profile"):
        load_profile("recipes/quickstart/lora-r8.yaml")


def test_the_committed_schema_is_the_generated_one() -> None:
    committed = json.loads(
        (PROFILES[0].parents[2] / "schema" / "profile.schema.json").read_text(encoding="utf-8")
    )
    assert committed == profile_schema()


@given(st.integers(min_value=60, max_value=10**7))
def test_a_time_limit_is_written_as_slurm_reads_it(seconds: int) -> None:
    assert 0 <= seconds_of(time_of(seconds)) - seconds < 60
