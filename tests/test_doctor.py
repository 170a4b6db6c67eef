"""recipes doctor: every finding has a level, a line and, where something is to be done,
the remedy.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest
from packaging.requirements import Requirement
from transformers.dependency_versions_table import deps

from recipes_lib import diagnosis
from recipes_lib.cli import main
from recipes_lib.commands import doctor
from recipes_lib.core.project import project_root
from recipes_lib.diagnosis import DoctorLine


def levels(findings) -> dict[str, str]:
    return {finding.text: finding.level for finding in findings}


def one(findings) -> DoctorLine:
    (finding,) = list(findings)
    return finding


def clean(**variables: str) -> dict[str, str]:
    """An environment with nothing in it but a home that has no accelerate config."""
    return {"HF_HOME": "/nowhere", **variables}


def test_every_topic_is_reported_in_one_line_and_the_next_command_is_named(
    monkeypatch, tmp_path, capsys
):
    monkeypatch.setenv("RECIPES_RUNS_ROOT", str(tmp_path / "runs"))
    code = main(["doctor"])
    lines = capsys.readouterr().out.splitlines()
    topics = {line.split()[1] for line in lines[:-1]}
    assert topics >= {
        "python",
        "versions",
        "gpu",
        "bf16",
        "attention",
        "bitsandbytes",
        "quickstart",
        "hub",
        "disk",
        "launcher",
    }
    assert lines[-1].startswith("next: ")
    assert code in (0, 5)
    assert (code == 5) == any(line.startswith("fail") for line in lines)
    assert not (tmp_path / "runs").exists(), "the doctor only looks"


def test_a_check_that_crashes_is_a_finding_and_the_others_still_run():
    def broken():
        raise ImportError("libcuda.so.1: cannot open shared object file\nmore")

    findings = diagnosis.diagnose({"gpu": broken, "python": diagnosis.check_python})
    assert findings[0] == DoctorLine(
        "fail",
        "ImportError: libcuda.so.1: cannot open shared object file",
        diagnosis.REINSTALL,
        "gpu",
    )
    assert findings[1].topic == "python"


def test_a_failure_gives_exit_code_5_and_its_remedy_as_the_next_command(monkeypatch, capsys):
    monkeypatch.setattr(
        diagnosis, "diagnose", lambda checks: [DoctorLine("fail", "full", "free some", "disk")]
    )
    assert doctor.run(argparse.Namespace()) == 5
    assert (
        capsys.readouterr().out
        == "fail  disk          full -> free some\nnext: free some; then recipes doctor\n"
    )


def test_versions_as_tested_are_counted(tmp_path):
    constraints = tmp_path / "constraints.txt"
    constraints.write_text(
        f"# tested\ntorch>=2.9\nPyYAML=={importlib.metadata.version('pyyaml')}  #"
        " reader\nnot-installed-anywhere==1\n"
    )
    assert one(diagnosis.check_versions(constraints, required=["torch"])) == DoctorLine(
        "ok", "2 packages as tested"
    )


def test_a_version_other_than_tested_is_named_with_both_versions(tmp_path):
    constraints = tmp_path / "constraints.txt"
    constraints.write_text("PyYAML==0.1\n")
    finding = next(iter(diagnosis.check_versions(constraints, required=[])))
    assert finding.level == "warn"
    assert f"PyYAML {importlib.metadata.version('pyyaml')} (tested ==0.1)" in finding.text
    assert "constraints.txt" in finding.remedy


def test_a_required_package_that_is_missing_is_a_failure(tmp_path):
    constraints = tmp_path / "constraints.txt"
    constraints.write_text("not_installed-anywhere==1\n")
    finding = one(diagnosis.check_versions(constraints, required=["not-installed.anywhere"]))
    assert (finding.level, finding.text) == ("fail", "not installed: not_installed-anywhere")


def test_the_committed_constraints_can_be_read_and_keep_torch_a_range():
    from packaging.requirements import Requirement

    lines = (project_root() / "constraints.txt").read_text(encoding="utf-8").splitlines()
    requirements = [Requirement(text) for line in lines if (text := line.split("#")[0].strip())]
    torch = next(requirement for requirement in requirements if requirement.name == "torch")
    assert str(torch.specifier) == ">=2.9"
    assert "setuptools<82" in {str(requirement) for requirement in requirements}


def test_a_driver_without_a_torch_that_can_use_it_is_a_failure(monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(diagnosis.shutil, "which", lambda name: "/usr/bin/nvidia-smi")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    finding = one(diagnosis.check_devices())
    assert finding.level == "fail" and "torch build" in finding.remedy


def test_gpus_are_listed_with_memory_and_hidden_ones_are_mentioned(monkeypatch):
    import torch

    card = SimpleNamespace(name="H100", total_memory=80 * 1024**3, major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: card)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    found = list(diagnosis.check_devices())
    assert [finding.text for finding in found[:2]] == [
        f"{index}: H100, 80 GiB, compute capability 9.0" for index in (0, 1)
    ]
    assert "CUDA_VISIBLE_DEVICES='0,1'" in found[2].text


def test_a_gpu_without_bf16_gets_the_fp16_settings(monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    finding = one(diagnosis.check_bf16())
    assert finding.level == "warn" and "train.fp16=true" in finding.remedy


def test_a_version_of_kernels_that_transformers_does_not_take_is_named(monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.10.1")
    found = list(diagnosis.check_attention())
    assert (found[0].level, found[0].remedy) == (
        "warn",
        f"pip install '{deps['kernels']}', once PyPI has it",
    )
    assert "kernels 0.10.1" in found[0].text and "wants" in found[0].text
    wanted = Requirement(deps["kernels"]).specifier
    fitting = next(part.version for part in wanted if part.operator == ">=")
    monkeypatch.setattr(importlib.metadata, "version", lambda name: fitting)
    assert one(diagnosis.check_attention()) == DoctorLine("ok", "sdpa, kernels")


def test_packages_that_only_some_settings_need_are_named_with_the_setting(monkeypatch):
    monkeypatch.setattr(
        diagnosis, "_version", lambda name: None if name in ("wandb", "liger-kernel") else "1"
    )
    assert one(diagnosis.check_optional()).text == "not installed: wandb (train.report_to: wandb)"
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert "liger-kernel (train.use_liger_kernel)" in next(iter(diagnosis.check_optional())).text
    monkeypatch.setattr(diagnosis, "_version", lambda name: "1")
    assert not list(diagnosis.check_optional())


def test_an_extra_asks_for_no_version_that_the_stack_does_not_take(monkeypatch):
    """pip would install it, and transformers would act as if it was not there. Nor for an extra of
    upstream's, whose versions PyPI may not have: transformers 5.24's `kernels` cannot be installed.
    """
    extras = {}
    monkeypatch.setattr(
        "setuptools.setup", lambda **values: extras.update(values["extras_require"])
    )
    runpy.run_path(str(project_root() / "setup.py"))
    assert set(diagnosis.OPTIONAL) <= extras.keys()
    assert not [line for lines in extras.values() for line in lines if Requirement(line).extras]
    taken = [
        Requirement(line)
        for name in ("transformers", "trl")
        for line in importlib.metadata.requires(name) or []
    ]
    for requirement in (Requirement(line) for name in ("gpu", "tracking") for line in extras[name]):
        least = next(
            (part.version for part in requirement.specifier if part.operator == ">="), None
        )
        theirs = [other for other in taken if other.name == requirement.name]
        assert least is None or all(other.specifier.contains(least) for other in theirs), (
            requirement
        )


def test_a_real_4_bit_layer_is_run():
    finding = one(diagnosis.check_bitsandbytes())
    assert finding.level == "ok" and "NF4 layer computes on the" in finding.text


def test_a_4_bit_layer_that_computes_nonsense_is_a_failure(monkeypatch):
    import bitsandbytes

    right = bitsandbytes.nn.Linear4bit.forward
    monkeypatch.setattr(bitsandbytes.nn.Linear4bit, "forward", lambda self, x: -right(self, x))
    finding = one(diagnosis.check_bitsandbytes())
    assert finding.level == "fail" and "QLoRA recipes will not work" in finding.remedy


def test_a_missing_token_names_the_login_and_a_token_is_not_printed(monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    assert one(diagnosis.check_hub({})).remedy == "hf auth login"
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_secret")
    assert "hf_secret" not in str(list(diagnosis.check_hub({})))


@pytest.mark.parametrize(
    ("value", "offline"), [("1", True), ("true", True), ("0", False), ("", False)]
)
def test_offline_mode_is_reported_when_it_is_on(value, offline):
    found = [
        finding
        for finding in diagnosis.check_hub({"HF_HUB_OFFLINE": value})
        if "offline" in finding.text
    ]
    assert bool(found) == offline


def test_a_full_disk_and_a_folder_that_cannot_be_written_are_told_apart(tmp_path, monkeypatch):
    below = tmp_path / "not" / "there"
    assert one(diagnosis.check_disk({"runs": (below, 0)})).level == "ok"
    assert one(diagnosis.check_disk({"runs": (below, 1e9)})).level == "warn"
    monkeypatch.setattr(diagnosis.os, "access", lambda path, mode: False)
    assert one(diagnosis.check_disk({"runs": (below, 0)})).level == "fail"


def test_a_clean_environment_has_no_launcher_trap():
    assert one(diagnosis.check_launcher(clean())).level == "ok"


@pytest.mark.parametrize(
    "name",
    [
        "ACCELERATE_USE_CPU",
        "ACCELERATE_MIXED_PRECISION",
        "FSDP_VERSION",
        "WORLD_SIZE",
        "LOCAL_RANK",
    ],
)
def test_a_variable_left_by_an_earlier_launch_is_named_with_the_unset_command(name):
    finding = one(diagnosis.check_launcher(clean(**{name: "1"})))
    assert finding.level == "warn"
    assert finding.remedy == f"unset {name}"


@pytest.mark.parametrize(("threads", "level"), [("100000", "warn"), ("many", "warn")])
def test_thread_counts_that_slow_training_down_are_named(threads, level):
    finding = one(diagnosis.check_launcher(clean(OMP_NUM_THREADS=threads)))
    assert finding.level == level and finding.remedy == "unset OMP_NUM_THREADS"


def test_one_thread_on_several_cores_is_a_note(monkeypatch):
    monkeypatch.setattr(diagnosis.os, "cpu_count", lambda: 8)
    assert one(diagnosis.check_launcher(clean(OMP_NUM_THREADS="1"))).level == "note"


def test_accelerates_own_default_config_is_named(tmp_path: Path):
    config = tmp_path / "accelerate" / "default_config.yaml"
    config.parent.mkdir()
    config.write_text("distributed_type: 'NO'\n")
    finding = one(diagnosis.check_launcher({"HF_HOME": str(tmp_path)}))
    assert str(config) in finding.text and "--config_file" in finding.remedy


def test_the_default_config_is_looked_for_where_accelerate_looks(monkeypatch, tmp_path):
    from accelerate.commands.config import config_args

    cache = Path(config_args.cache_dir)
    monkeypatch.setattr(
        diagnosis.Path, "is_file", lambda path: path == cache / "default_config.yaml"
    )
    import os

    assert (
        one(
            finding for finding in diagnosis.check_launcher(os.environ) if "reads" in finding.text
        ).level
        == "note"
    )
