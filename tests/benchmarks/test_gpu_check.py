"""The GPU check runs here on a CPU with a tiny model, every case of it, so that it works on the day
a GPU is there.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

PROJECT = Path(__file__).resolve().parents[2]


# Takes packages away from a process: a machine with a GPU may have torch, transformers and PEFT
# alone.
HIDDEN = ("trl", "datasets", "bitsandbytes", "matplotlib", "alpaca_eval", "lm_eval")
HIDING = f"""import sys
from importlib.machinery import PathFinder
class Hiding(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in {HIDDEN} else PathFinder.find_spec(name, path, target)
sys.meta_path[sys.meta_path.index(PathFinder)] = Hiding
"""  # noqa: E501


def start(*arguments: str, path: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.gpu_check", *arguments]
    environment = {
        **os.environ,
        "PYTHONPATH": f"{PROJECT / 'src'}{os.pathsep}{path}",
        "CUDA_VISIBLE_DEVICES": "",
    }
    return subprocess.run(
        command, cwd=PROJECT, env=environment, capture_output=True, text=True, timeout=240
    )


def test_every_case_is_measured_on_a_tiny_model(tmp_path: Path) -> None:
    done = start("--tiny", "--json", str(tmp_path / "gpu.json"))
    assert done.returncode == 0, done.stderr[-2000:]
    record = json.loads((tmp_path / "gpu.json").read_text(encoding="utf-8"))
    missing = {
        row["case"]: row["not_measured"] for row in record["rows"] if not row.get("tokens_per_s")
    }
    assert missing == {
        "attention flash_attention_2": "needs a GPU",
        "attention torch_varlen": "needs a GPU",
    }
    settings = [row["setting"] for row in record["rows"] if "setting" in row]
    assert {setting["batching"] for setting in settings} == {"padded", "padding-free", "packed"}
    assert {setting["bits"] for setting in settings} == {None, 4}
    assert {setting["attention"] for setting in settings} >= {"sdpa", "eager", "sdpa_by_document"}
    assert any(setting["fsdp"] for setting in settings) and any(
        setting["checkpointing"] for setting in settings
    )
    assert any(row["case"].startswith("generation") for row in record["rows"])
    assert (tmp_path / "gpu.md").read_text(encoding="utf-8").count("\n") > len(record["rows"])
    assert "tokens/s" in done.stdout
    cases = {row["case"] for row in record["rows"]}
    assert {
        case.removeprefix("QLoRA: ") for case in cases
    } <= cases  # each has its bf16 row to be compared with


@pytest.mark.slow
def test_a_library_that_is_not_there_costs_its_rows_alone(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(HIDING, encoding="utf-8")
    done = start("--tiny", "--json", str(tmp_path / "gpu.json"), path=str(tmp_path))
    assert done.returncode == 0, done.stderr[-2000:]
    rows = json.loads((tmp_path / "gpu.json").read_text(encoding="utf-8"))["rows"]
    missing = [
        row for row in rows if not row.get("tokens_per_s") and row["not_measured"] != "needs a GPU"
    ]
    assert {row["case"].partition(":")[0] for row in missing} == {"QLoRA"}
    assert {row["not_measured"] for row in missing} == {
        "ModuleNotFoundError: No module named 'bitsandbytes'"
    }


def test_pytorchs_own_variable_length_kernel_gets_what_it_wants(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It exists on GPUs alone: a stand-in with its signature, made of plain attention, gives the
    loss of example-by-example attention.
    """
    torch = pytest.importorskip("torch")
    from torch.nn.attention import varlen

    monkeypatch.syspath_prepend(str(PROJECT / "benchmarks"))
    import gpu_model

    calls: list[tuple[int, ...]] = []

    def plain(
        query: Any,
        key: Any,
        value: Any,
        bounds: Any,
        _: Any,
        longest: int,
        __: int,
        *,
        scale: float,
        window_size: Any,
    ) -> Any:
        assert bounds.dtype == torch.int32 and window_size == (-1, 0) and query.is_contiguous()
        calls.append(tuple(query.shape))
        parts = [
            part.transpose(0, 1).split(bounds.diff().tolist(), 1) for part in (query, key, value)
        ]
        assert longest == max(part.shape[1] for part in parts[0])
        attention = torch.nn.functional.scaled_dot_product_attention
        return torch.cat(
            [attention(*each, is_causal=True, scale=scale) for each in zip(*parts, strict=True)], 1
        ).transpose(0, 1)

    monkeypatch.setattr(varlen, "varlen_attn", plain)
    model = gpu_model.build_model(gpu_model.TINY, "cpu").float()
    losses = []
    for attention in (gpu_model.VARLEN, "sdpa_by_document"):
        case = gpu_model.Case("x", "padding-free", 4, attention, dropout=0.0)
        gpu_model.set_up(model, case)
        batch = next(gpu_model.micro_batches(case, gpu_model.TINY, "cpu", 64))
        del batch["num_tokens"]
        losses.append(model(**batch, loss_scale=1.0, use_cache=False)[0].item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert calls == [(batch["input_ids"].numel(), 4, 16)] * 2


def test_cases_that_the_time_does_not_allow_say_so(tmp_path: Path) -> None:
    done = start("--tiny", "--minutes", "0", "--json", str(tmp_path / "gpu.json"))
    rows = json.loads((tmp_path / "gpu.json").read_text(encoding="utf-8"))["rows"]
    assert done.returncode == 0 and {row["not_measured"] for row in rows} == {
        "no time left",
        "needs a GPU",
    }


def test_without_a_gpu_it_says_what_can_be_done() -> None:
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    done = start()
    assert done.returncode == 5 and "--tiny" in done.stderr and "Traceback" not in done.stderr


def test_the_kernels_of_a_cuda_build_keep_what_is_planned(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    command = [
        sys.executable,
        "-W",
        "ignore",
        str(PROJECT / "benchmarks/cuda_shapes.py"),
        "--layers",
        "1",
        "--json",
        str(tmp_path / "kept.json"),
    ]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, timeout=240)
    if not torch.backends.cuda.is_built():
        assert (
            done.returncode == 5
            and "built without CUDA" in done.stderr
            and "Traceback" not in done.stderr
        )
        pytest.skip("this torch is built without CUDA")
    assert done.returncode == 0, done.stderr[-2000:]
    rows = json.loads((tmp_path / "kept.json").read_text(encoding="utf-8"))["rows"]
    for row in rows:
        assert row["planned_gib"] == pytest.approx(row["kept_gib"], rel=0.05), row


def test_the_recorded_figures_of_a_cuda_build_are_those_of_the_plan(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(str(PROJECT / "benchmarks"))
    import cuda_shapes
    import gpu_model

    record = json.loads(
        (PROJECT / "benchmarks/results/cuda_shapes.json").read_text(encoding="utf-8")
    )
    config = gpu_model.LLAMA_2_7B | {"num_hidden_layers": record["layers"]}
    for row in record["rows"]:
        planned = cuda_shapes.planned_bytes(config, *cuda_shapes.CASES[row["case"]]) / 2**30
        assert planned == pytest.approx(row["kept_gib"], rel=0.01), row
