"""What is built for PyPI works where no checkout is: everything that the verbs read is inside."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from recipes_lib.core.errors import ExitCode, explain_fault

PROJECT = Path(__file__).resolve().parents[1]
NOT_SOURCE = ("*.egg-info", ".*_cache", ".cache", ".git", ".venv", "build", "dist", "runs")
STUDY = """\
# yaml-language-server: $schema=study.schema.json
question: Does rank 8 beat rank 4?
factors: {rank: [lora.r, lora.lora_alpha]}
arms: {r4: r4.yaml, r8: r8.yaml}
seeds: [42]
evals: [heldout.yaml]
"""
HELDOUT = """\
# yaml-language-server: $schema=eval.schema.json
suite: {name: heldout_loss}
data: {questions: validation}
"""


def build(source: Path, command: str, target: Path) -> Path:
    """Build a wheel or an sdist from a folder of sources; return the file."""
    words = [sys.executable, "setup.py", "-q", command, "--dist-dir", str(target)]
    subprocess.run(words, cwd=source, check=True, capture_output=True, timeout=200)
    (file,) = target.iterdir()
    return file


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The wheel, and the sdist, of a copy of this project."""
    folder = tmp_path_factory.mktemp("built")
    source = folder / "source"
    shutil.copytree(PROJECT, source, ignore=shutil.ignore_patterns(*NOT_SOURCE))
    wheel = build(source, "bdist_wheel", folder / "wheel")
    sdist = build(source, "sdist", folder / "sdist")
    return wheel, sdist


def test_a_missing_file_of_ours_does_not_blame_the_disk() -> None:
    file = PROJECT / "src/recipes_lib/config/no-such-file.json"
    with pytest.raises(FileNotFoundError) as caught:
        file.read_text()
    fault = explain_fault(caught.value)
    assert fault is not None
    assert fault.exit_code == ExitCode.ENVIRONMENT
    assert "no-such-file.json is missing" in str(fault)
    assert "install" in str(fault)
    assert "space" not in str(fault)


@pytest.mark.slow
def test_the_source_distribution_builds_the_same_wheel(built, tmp_path) -> None:
    wheel, sdist = built
    shutil.unpack_archive(sdist, tmp_path)
    (source,) = tmp_path.iterdir()
    again = build(source, "bdist_wheel", tmp_path / "wheel")
    files = set(zipfile.ZipFile(wheel).namelist())
    assert "recipes_lib/config/upstream.json" in files
    assert files == set(zipfile.ZipFile(again).namelist())


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_an_installed_wheel_goes_from_a_new_recipe_to_a_compared_study(
    built, tmp_path, tiny_model_dir
) -> None:
    environment = tmp_path / "environment"
    subprocess.run(
        [sys.executable, "-m", "venv", "--without-pip", environment], check=True, timeout=200
    )
    site = environment / f"lib/python{sysconfig.get_python_version()}/site-packages"
    zipfile.ZipFile(built[0]).extractall(site)
    # The dependencies come from this environment, the package does not: a line of a .pth file
    # is a folder to search, and .pth files in that folder (an editable install) are not read.
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    work = tmp_path / "work"
    work.mkdir()
    variables = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    variables["RECIPES_CACHE"] = str(tmp_path / "cache")

    def recipes(*words: str) -> str:
        done = subprocess.run(
            [environment / "bin/python", "-m", "recipes_lib.cli", *words],
            cwd=work,
            env=variables,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, f"{words}: {done.stdout[-2000:]}{done.stderr[-2000:]}"
        return done.stdout

    where = "import recipes_lib; print(recipes_lib.__file__)"
    command = [environment / "bin/python", "-c", where]
    imported = subprocess.run(command, cwd=work, env=variables, capture_output=True, text=True)
    assert imported.stdout.startswith(str(site))

    assert "quickstart/lora-r8" in recipes("ls")
    assert "learning_rate" in recipes("explain", "train.learning_rate")
    recipes("new", "mine", "--from", "quickstart/lora-r8")
    assert "1 file ok" in recipes("check", "mine.yaml")
    tiny = f"model={{name_or_path: {tiny_model_dir}, dtype: float32}}"
    short = ["train.max_steps=2", "train.bf16=false", "train.eval_strategy=no"]
    recipes("train", "mine.yaml", tiny, *short, "train.save_strategy=no")
    (work / "heldout.yaml").write_text(HELDOUT)
    recipes("eval", "heldout.yaml", "mine")

    for rank in (4, 8):
        recipe = work / f"r{rank}.yaml"
        base = site / "recipes_lib/shipped/recipes/quickstart/_base.yaml"
        recipe.write_text(
            "# yaml-language-server: $schema=recipe.schema.json\n"
            f"extends: {base}\n"
            f"model: {{name_or_path: {tiny_model_dir}, dtype: float32}}\n"
            f"lora: {{r: {rank}, lora_alpha: {2 * rank}}}\n"
            "train: {max_steps: 2, bf16: false, eval_steps: 2, save_steps: 2, warmup_steps: 0}\n"
        )
    (work / "small.yaml").write_text(STUDY)
    recipes("study", "run", "small.yaml")
    report = work / "runs/small/report"
    assert (report / "report.html").is_file()
    compared = recipes("compare", "small--r4", "small--r8", "--json")
    assert json.loads(compared)

    shutil.copy(site / "recipes_lib/shipped/launch/profiles/example.yaml", work / "site.yaml")
    job = recipes("launch", "mine.yaml", "--profile", "site.yaml", "--dry-run")
    assert "sbatch" in job
