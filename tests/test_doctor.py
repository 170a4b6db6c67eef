"""`recipes doctor` names what is missing, with the remedy, and its exit code tells."""

import sys

from recipes_lib import doctor
from recipes_lib.core.environment import describe_devices, quiet_libraries


def test_each_topic_has_its_line_and_no_token_is_printed(monkeypatch, said):
    monkeypatch.setenv("HF_TOKEN", "hf_plantedplantedplanted")
    out = said("doctor")
    for word in (" versions ", " device ", "a token is set", "GiB free"):
        assert word in out
    assert "planted" not in out and out.splitlines()[-1] == "next: recipes ls"


def test_torch_is_announced_before_it_loads_and_threads_are_counted(monkeypatch, capsys):
    import torch

    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert describe_devices()[0].endswith(" 1 thread")
    monkeypatch.delitem(sys.modules, "torch")
    quiet_libraries()
    assert capsys.readouterr().err == "loading torch ...\n"


def test_a_check_that_crashes_is_a_finding_with_exit_code_5(monkeypatch, recipes):
    def check_broken():
        raise ImportError("libtorch.so is damaged")

    monkeypatch.setattr(doctor, "DOCTOR_CHECKS", (check_broken, doctor.check_disk))
    code, out, _ = recipes("doctor")
    assert code == 5 and "GiB free" in out
    assert "fail  broken        ImportError: libtorch.so is damaged -> make setup" in out


def test_what_would_stop_or_change_a_training_is_found(tmp_path, monkeypatch):
    installed = doctor.installed_version
    old = {"peft": "0.0.1"}
    monkeypatch.setattr(doctor, "installed_version", lambda name: old.get(name, installed(name)))
    (other,) = doctor.check_versions()
    assert other[0] == doctor.WARN and "peft 0.0.1" in other[1]
    for name in ("WORLD_SIZE", "ACCELERATE_USE_FSDP", "FSDP_VERSION"):
        monkeypatch.setenv(name, "2")
        ((level, text, remedy),) = doctor.check_env()
        assert level == doctor.WARN and name in text and remedy.startswith("unset ")
    monkeypatch.setenv("RECIPES_RUNS_ROOT", str(tmp_path / "runs"))
    monkeypatch.setattr(doctor.os, "access", lambda place, mode: place != tmp_path)
    assert next(iter(doctor.check_disk()))[0] == doctor.FAIL
