"""Under FSDP2 rank 0 alone reads the weights, and what is trained is the same, bit for bit, as
where each rank reads them; on real processes (gloo on CPU).
"""

import re
import signal
import time
from pathlib import Path

import pytest
from tests.families import build_family
from tests.tiers import in_ci

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
SHIPPED = Path(__file__).resolve().parents[2] / "accelerate_configs" / "fsdp_cpu.yaml"
FULL = ["lora=null", "train.learning_rate=1e-3"]
METHODS = {
    "lora": ["train.bf16=true", "model.dtype=bfloat16", "lora.lora_dropout=0.1"],
    "full": [*FULL, "train.bf16=true", "model.dtype=bfloat16"],
    "tied": FULL,
    "saved-modules": ["lora.modules_to_save=[embed_tokens, lm_head]"],
}


@pytest.fixture(scope="module")
def each(tmp_path_factory) -> Path:
    """The shipped config, with every rank reading."""
    shipped, path = SHIPPED.read_text(encoding="utf-8"), tmp_path_factory.mktemp("each") / "f.yaml"
    assert "fsdp_cpu_ram_efficient_loading: true" in shipped
    path.write_text(shipped.replace("loading: true", "loading: false"), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def tied(tiny_model_dir, tmp_path_factory) -> Path:
    """A model whose head is its embeddings."""
    return build_family("qwen3", tmp_path_factory.mktemp("tied") / "qwen3", tiny_model_dir)


@pytest.mark.parametrize("method", in_ci(METHODS, "lora"))
def test_what_is_trained_is_the_same_whoever_reads(launcher, each, tied, method) -> None:
    """Two of the trainings that rank 0 alone reads for are killed on the way and go on."""
    words = [*METHODS[method], "train.max_steps=30", "train.save_steps=10", "train.eval_steps=10"]
    words += [f"model.name_or_path={tied}"] if method == "tied" else []
    read, buffers = {}, {}
    for name, config in (("each", each), ("once", SHIPPED)):
        words_of_run = [f"run.name={name}-{method}", *words]
        if name == "once" and method in ("lora", "full"):
            kill_after_a_checkpoint(launcher, f"{name}-{method}", words_of_run)
        code, said = launcher.start(*words_of_run, config=config, patch="reads").wait()
        assert code == 0, said[-3000:]
        found = sorted(re.findall(r"rank (\d): read (\d+) bytes; buffers (\w+); 0 empty", said))
        assert [rank for rank, *_ in found] == ["0", "1"], said[-3000:]
        read[name], buffers[name] = [int(one[1]) for one in found], [one[2] for one in found]
    whole = read["each"][0]
    assert (read["each"], read["once"]) == ([whole, whole], [whole, 0]) and whole > 0
    assert len({*buffers["each"], *buffers["once"]}) == 1
    assert launcher.weights(f"once-{method}") == launcher.weights(f"each-{method}") != {}
    assert launcher.state(f"once-{method}")["weights_check"]["tensors"] > 0
    for key in ("loss", "eval_loss", "grad_norm"):
        assert launcher.series(f"once-{method}", key) == launcher.series(f"each-{method}", key)


def kill_after_a_checkpoint(launcher, name: str, words: list[str]) -> None:
    child = launcher.start(*words, config=SHIPPED)
    launcher.wait_for_checkpoint(child, 10, launcher.run(name))
    child.signal(signal.SIGKILL)
    child.wait()
    assert launcher.state(name)["state"] != "finished"


def test_what_stops_rank_0_ends_both_and_is_said_once(launcher) -> None:
    began = time.monotonic()
    words = {"config": SHIPPED, "patch": "reads", "READS_BREAK": "recipe"}
    _, said = launcher.start("run.name=stopped", **words).wait()
    assert said.count("rank 0 cannot have this model") == 1 and "rank 0: read" not in said
    assert time.monotonic() - began < 100
    assert launcher.state("stopped")["exit_code"] in (2, 5)
