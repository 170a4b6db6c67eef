"""What is not installed is named with the extra that brings it, and the base needs no extra."""

import ast
import json
import subprocess
import sys
from importlib.metadata import requires
from pathlib import Path
from types import SimpleNamespace

import pytest
from packaging.requirements import Requirement

from recipes_lib import doctor
from recipes_lib.core import extras
from recipes_lib.core.environment import require_extra
from recipes_lib.core.errors import ExitCode, missing_extra

PROJECT = Path(__file__).resolve().parents[2]
RECIPE = str(PROJECT / "recipes/quickstart/lora-r8.yaml")
# Modules whose distribution has another name, or is brought by one that is required.
OTHER_NAMES = {"yaml": "pyyaml", "markupsafe": "jinja2"}

OURS = {extras.DISTRIBUTION: "0.1.0"}
Monkeypatch = pytest.MonkeyPatch


@pytest.fixture(scope="module")
def metadata(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the metadata that setup.py gives now; those of the environment may be older."""
    folder = tmp_path_factory.mktemp("metadata")
    words = [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", str(folder)]
    subprocess.run(words, cwd=PROJECT, check=True, capture_output=True, timeout=60)
    return folder


@pytest.fixture(autouse=True)
def extras_of_now(metadata: Path, monkeypatch: Monkeypatch) -> None:
    monkeypatch.syspath_prepend(str(metadata))


def uninstall(monkeypatch: Monkeypatch, *packages: str) -> None:
    """Let these packages be absent: their metadata, and their modules at the next import."""
    installed = extras.installed_version

    def version(package: str) -> str | None:
        return None if package in packages else installed(package)

    monkeypatch.setattr(extras, "installed_version", version)
    names = {package.replace("-", "_") for package in packages}
    for module in [name for name in sys.modules if name.partition(".")[0] in names]:
        monkeypatch.delitem(sys.modules, module)
    for name in names:
        monkeypatch.setitem(sys.modules, name, None)


def third_party_modules() -> set[str]:
    found = set()
    for path in (PROJECT / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                found.add(str(node.module).partition(".")[0])
    return found - set(sys.stdlib_module_names) - {"recipes_lib"}


def test_what_the_source_imports_is_required_by_the_base_or_by_an_extra() -> None:
    lines = requires(extras.DISTRIBUTION) or []
    required = {Requirement(line).name.lower() for line in lines}
    modules = third_party_modules()
    assert {"torch", "numpy", "openai"} <= modules
    packages = {OTHER_NAMES.get(name, name.replace("_", "-")) for name in modules}
    assert packages <= required


def brought_by(module: str) -> str | None:
    """Return the pip line that the error of a missing module names."""
    fault = missing_extra(ModuleNotFoundError(name=module))
    return fault.hints[0].rpartition(": ")[2] if fault else None


def test_a_missing_module_is_named_with_the_smallest_extra_that_brings_it(monkeypatch) -> None:
    assert brought_by("torch._C") is None  # it is installed, and may be damaged
    monkeypatch.setattr(extras, "installed_version", lambda name: OURS.get(name))
    expected = {
        "torch.nn": "train",
        "trl": "train",
        "huggingface_hub": "train",
        "pyarrow.parquet": "parquet",
        "openai": "eval",
        "lm_eval.tasks": "eval",
        "math_verify": "chat-evals",
        "gguf": "quickstart",
        "alpaca_eval": "alpaca-eval",
        "zipfile_zstd": "inspect",
        "pytest": "dev",
    }
    for module, extra in expected.items():
        assert brought_by(module) == f"pip install -e '{PROJECT}[{extra}]'"
    assert brought_by("of_nobody") is None
    monkeypatch.setattr(extras, "_CHECKOUT", PROJECT / "nowhere")  # installed from a wheel
    wheel = "file:///downloads/recipes_lib-0.1.0-py3-none-any.whl"
    repository = {"url": "https://host/us/recipes", "vcs_info": {"vcs": "git", "commit_id": "abc"}}
    for origin, source in (
        (None, ""),
        ({"url": wheel, "archive_info": {}}, f" @ {wheel}"),
        (repository, " @ git+https://host/us/recipes@abc"),
    ):
        text = json.dumps(origin) if origin else None
        installed = SimpleNamespace(read_text=lambda name, text=text: text)
        with monkeypatch.context() as patch:
            patch.setattr(extras.importlib.metadata, "distribution", lambda name, it=installed: it)
            assert brought_by("openai") == f"pip install 'recipes-lib[eval]{source}'"


@pytest.mark.parametrize("verb", ["data", "plan", "train", "prefetch", "study run"])
def test_a_verb_without_its_extra_says_which_before_it_begins(verb, monkeypatch, recipes) -> None:
    uninstall(monkeypatch, "trl", "bitsandbytes")
    word = "quickstart" if verb == "study run" else RECIPE
    code, out, err = recipes(*verb.split(), word)
    assert code == ExitCode.ENVIRONMENT and not out
    assert err.splitlines()[0] == "not installed: trl, bitsandbytes"
    assert err.splitlines()[1].endswith(f"pip install -e '{PROJECT}[train]'")


def test_versions_that_an_extra_does_not_take_are_a_warning(monkeypatch, capsys) -> None:
    old = {"transformers": "5.2.0"}
    monkeypatch.setattr(extras, "installed_version", lambda name: old.get(name, "999"))
    require_extra("quickstart")
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: ") and "transformers 5.2.0 (needs " in line


def test_rows_in_parquet_name_the_extra_that_reads_them(tmp_path, monkeypatch, said) -> None:
    uninstall(monkeypatch, "pyarrow")
    monkeypatch.chdir(tmp_path)
    Path("rows.parquet").write_bytes(b"PAR1")
    command = ["new", "mine", "--from", "quickstart/lora-r8", "--data", "rows.parquet"]
    err = said(*command, code=ExitCode.ENVIRONMENT)
    assert "pyarrow is not installed" in err and "[parquet]'" in err
    assert not Path("mine.yaml").exists()


@pytest.mark.skipif(sys.version_info >= (3, 14), reason="Python reads Zstandard itself")
def test_a_newer_log_of_inspect_names_the_extra_that_reads_it(monkeypatch, said) -> None:
    uninstall(monkeypatch, "zipfile-zstd")
    log = PROJECT / "tests/analysis/inspect_logs/epochs.eval"
    err = said("compare", log, code=ExitCode.ENVIRONMENT)
    assert "zipfile_zstd is not installed" in err and "[inspect]'" in err


def test_check_notes_what_it_cannot_look_at_and_checks_the_rest(monkeypatch, recipes) -> None:
    uninstall(monkeypatch, "trl")
    recipe = "llama3.1-8b-tulu3/lora-r64"
    code, out, err = recipes("check", recipe)
    assert code == ExitCode.DONE and "1 file ok" in out
    assert "note: not all is checked: trl is not installed" in err and "[train]'" in err
    code, _, _ = recipes("check", PROJECT / "recipes/quickstart", recipe)
    assert code == ExitCode.DONE


def test_what_cannot_be_prefetched_without_its_package_names_the_extra(monkeypatch, said) -> None:
    uninstall(monkeypatch, "lm-eval")
    err = said("prefetch", PROJECT / "evals/lm_eval.yaml", code=ExitCode.ENVIRONMENT)
    assert "lm_eval is not installed" in err and "[eval]'" in err


def test_doctor_says_what_is_installed_of_each_extra(monkeypatch, said) -> None:
    monkeypatch.setattr(doctor, "DOCTOR_CHECKS", (doctor.check_extras, doctor.check_device))
    uninstall(monkeypatch, "torch", "openai")
    lines = said("doctor").splitlines()
    (train,) = [line for line in lines if " train: not installed: torch ->" in line]
    assert train.startswith("note ") and train.endswith(f"pip install -e '{PROJECT}[train]'")
    assert [line for line in lines if " eval: not installed: openai ->" in line]
    assert [line for line in lines if line.startswith("note  device") and "torch" in line]
    whole = [line.split()[2] for line in lines if line.startswith("ok ")]
    assert {"alpaca-eval:", "parquet:"} <= {*whole} and "train:" not in whole
