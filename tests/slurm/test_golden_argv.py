"""Every shipped recipe and study with every profile: the sbatch lines, and what the scripts ask
Slurm for and run, without Slurm.

After a wanted change: UPDATE_GOLDEN=1 pytest tests/slurm/test_golden_argv.py, and read the
diff.
"""

from __future__ import annotations

import os
import re
import shlex
import sys
from pathlib import Path

import pytest

from recipes_lib import cli
from recipes_lib.slurm.profile import profile_names

PROJECT = Path(__file__).resolve().parents[2]
GOLDEN = Path(__file__).parent / "golden"
RECIPES = sorted(
    path
    for path in (PROJECT / "recipes").glob("*/*.yaml")
    if not path.name.startswith("_") and path.parent.name != "studies"
)
STUDIES = sorted(
    path
    for path in (PROJECT / "recipes" / "studies").glob("*.yaml")
    # two grids of 16 arms of one recipe, whose jobs differ in two numbers
    if not path.name.startswith(("_", "published", "rank-by-learning-rate"))
)


@pytest.mark.parametrize("profile", profile_names())
def test_the_jobs_of_every_recipe_and_study_are_the_recorded_ones(
    profile: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("RECIPES_RUNS_ROOT", str(tmp_path / "runs"))
    monkeypatch.chdir(PROJECT)
    monkeypatch.setattr(
        "recipes_lib.slurm.jobs.planned_seconds",
        lambda recipe, launch, site: 5400 if site.values.gpu else None,
    )
    lines = []
    for path in [*RECIPES, *STUDIES]:
        words = ["launch", str(path.relative_to(PROJECT)), "--profile", profile, "--dry-run"]
        code, said = cli.main(words), capsys.readouterr()
        lines += [f"## {path.relative_to(PROJECT)}", *plain(said.out, tmp_path)]
        if code:  # a cluster without GPUs is no place for a recipe that needs them
            tunes = path.stem == "lora-rank-tuned" and "tunes its arms" in said.err
            assert code == 2 and (tunes or profile == "local-sandbox"), said.err
            lines.append(said.err.splitlines()[0])
    assert not (tmp_path / "runs").exists()  # a dry run touches nothing
    file = GOLDEN / f"{profile}.txt"
    if os.environ.get("UPDATE_GOLDEN"):
        file.parent.mkdir(exist_ok=True)
        file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    assert file.read_text(encoding="utf-8").splitlines() == lines


def plain(said: str, tmp_path: Path) -> list[str]:
    """Return the jobs' lines without this machine's folders and interpreter, each command on one
    line; a study's steps are its own.
    """
    text = re.sub(r" \\\n(# )?\s*", " ", said)
    text = re.sub(r"^#     ", "    ", text, flags=re.M)
    text = re.sub(r"^(?=\w+=\$)", "$ ", text, flags=re.M)
    text = (
        text.replace(sys.executable, "PYTHON")
        .replace(str(tmp_path / "runs"), "RUNS")
        .replace(str(PROJECT), "PROJECT")
    )
    return [
        line
        for line in text.splitlines()
        if not line.startswith(("# next:", "# warning:", "recipes launch", "# bash takes"))
        and " study run " not in line
    ]


@pytest.mark.parametrize("profile", profile_names())
def test_a_recorded_job_asks_for_what_the_profile_says(profile: str) -> None:
    jobs = re.findall(
        r"^\$ \w+=\$\(sbatch (.*) \| tee .*\)\n((?:    .*\n)*)",
        (GOLDEN / f"{profile}.txt").read_text(encoding="utf-8"),
        re.M,
    )
    assert len(jobs) > 50 or profile == "local-sandbox"
    for line, script in jobs:
        *waits, file = shlex.split(line.removeprefix("--parsable "))
        assert not waits or (
            waits[0].startswith(("--dependency=afterok:", "--dependency=afterany:"))
            and waits[1] == "--kill-on-invalid-dep=yes"
        )
        stage = Path(file).stem.partition("-")[0]
        asked = [
            word
            for asks in re.findall(r"^    #SBATCH (.*)", script, re.M)
            for word in shlex.split(asks)
        ]
        flags = {word.partition("=")[0]: word.partition("=")[2] for word in asked}
        assert len(flags) == len(asked) and "--requeue" in flags  # none twice
        assert flags["--signal"].startswith("B:USR2@") and flags["--job-name"].endswith(
            f".{Path(file).stem}"
        )
        if profile == "nus-soc":
            assert flags["--partition"] == ("gpu-long" if stage == "eval" else "gpu")
            gres, _, gpus = flags.get("--gres", "gpu:h100-47:1").rpartition(":")
            assert (gres, flags["--cpus-per-task"], flags["--mem"]) == (
                "gpu:h100-47",
                str(8 * int(gpus)),
                f"{32 * int(gpus)}G",
            )
            assert stage != "report" or "--gres" not in flags
