"""The base alone, from PyPI, compares results of another program: at its floors, and at the newest
versions.
"""

import os
import re
import subprocess
import sys
from importlib.metadata import Distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from tests.analysis.test_foreign import lm_eval
from tests.test_wheel import built

__all__ = ["built"]  # the wheel of this project

# numpy and scipy take 172 MB of it, 6 of every 7.
MOST_MB = 200
COMPARE = """
import importlib.util, sys
from recipes_lib.cli import main
code = main(["compare", *sys.argv[1:]])
others = ("torch", "transformers", "trl", "datasets", "pyarrow", "pandas")
assert not [name for name in others if importlib.util.find_spec(name)], "more than the base"
sys.exit(code)
"""


def base_of(wheel: Path, tmp_path: Path, at_floors: bool) -> list[str]:
    """What pip installs: the wheel, and its requirements each at the oldest version it takes."""
    words = [str(wheel)]
    if at_floors:
        subprocess.run([sys.executable, "-m", "zipfile", "-e", wheel, tmp_path / "w"], check=True)
        (info,) = (tmp_path / "w").glob("*.dist-info")
        for line in Distribution.at(info).requires or []:
            package = Requirement(line)
            if package.marker is None:
                words.append(f"{package.name}=={re.sub('[<>=]', '', str(package.specifier))}")
        assert len(words) > 5
    return words


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("versions", ["floors", "newest"])
def test_the_base_alone_compares_two_folders_of_lm_eval(versions, built, tmp_path) -> None:
    environment = tmp_path / "environment"
    python = environment / "bin/python"
    subprocess.run(
        [sys.executable, "-m", "venv", "--without-pip", environment], check=True, timeout=200
    )
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "-q", "--no-compile"]
    words = base_of(built[0], tmp_path, versions == "floors")
    done = subprocess.run([*pip, *words], capture_output=True, text=True, timeout=400)
    if done.returncode and "CI" not in os.environ:
        pytest.skip(f"pip reaches no PyPI: {done.stderr[-200:]}")
    assert done.returncode == 0, done.stderr[-2000:]
    files = (environment / "lib").rglob("*")
    size = sum(path.stat().st_size for path in files if path.is_file()) / 1e6
    assert size < MOST_MB

    first = lm_eval(tmp_path / "a", [float(n % 3 == 0) for n in range(200)])
    second = lm_eval(tmp_path / "b", [float(n % 3 != 1) for n in range(200)])
    variables = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    for command in (["-W", "error", "-c", COMPARE], ["-m", "recipes_lib.cli", "compare"]):
        compared = subprocess.run(
            [python, *command, first, second],
            cwd=tmp_path,
            env=variables,
            capture_output=True,
            text=True,
            timeout=100,
        )
        assert (compared.returncode, compared.stderr) == (0, "")
        assert "scored better than" in compared.stdout

    def recipes(*typed: str) -> tuple[int, str]:
        command = [python, "-m", "recipes_lib.cli", *typed]
        done = subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, text=True)
        return done.returncode, done.stdout + done.stderr

    for typed in (["ls"], ["explain", "train.learning_rate"], ["check", "quickstart/lora-r8"]):
        code, said = recipes(*typed)
        assert code == 0, said
    code, said = recipes("show", "quickstart/lora-r8")
    assert code == 0 and "learning_rate" in said
    code, said = recipes("doctor")
    assert code == 0 and "train: not installed: torch, transformers" in said
    for typed in (["train", "quickstart/lora-r8"], ["plan", "quickstart/lora-r8"]):
        code, said = recipes(*typed)
        assert code == 5 and "pip install 'recipes-lib[train] @ file://" in said, said
