"""`recipes merge`: the merged model answers like the adapter, and what cannot is refused."""

import json
import shutil
import weakref
from pathlib import Path

import pytest
import torch
from tests.families import build_family
from transformers import AutoModelForCausalLM, GenerationConfig

from recipes_lib.core.run_directory import open_run
from recipes_lib.train import main as train
from recipes_lib.weights import merge as merging
from recipes_lib.weights.merge import logits_on
from recipes_lib.weights.runs import BASE, Family, families, finished_run, merge_record

ROWS = [[1, 20, 40, 60, 80], [1, 9, 8, 7]]


def merged_logits(run: Path) -> torch.Tensor:
    return logits_on(AutoModelForCausalLM.from_pretrained(run / "merged", dtype="float32"), ROWS)


def test_a_merged_model_answers_like_the_adapter_and_is_not_made_twice(runs, recipes) -> None:
    run = runs("lora")
    code, out, _ = recipes("merge", "lora")
    record = json.loads((run / "merged" / "merge.json").read_text())
    assert code == 0 and "already" not in out
    assert record["difference"] < 1e-3 * record["effect"]
    family = Family([finished_run(open_run("lora"))])
    with family.answering("lora") as model:
        torch.testing.assert_close(merged_logits(run), logits_on(model, ROWS), atol=1e-5, rtol=0)
    with family.answering(BASE) as model:
        assert (merged_logits(run) - logits_on(model, ROWS)).abs().max() > 1e-3
    assert "already merged" in recipes("merge", "lora")[1]
    assert not (run / "merged" / "adapter_config.json").exists()


def test_the_old_model_is_freed_before_the_merged_one_is_read(runs, recipes, monkeypatch) -> None:
    runs("lora")
    alive: list[int] = []
    old: list[weakref.ref[torch.nn.Parameter]] = []
    attach, load_saved = merging.attach, merging.load_saved

    def attach_and_watch(*args):
        model = attach(*args)
        old.extend(map(weakref.ref, model.parameters()))
        return model

    def count_and_load(*args, **options):
        alive.append(sum(parameter() is not None for parameter in old))
        return load_saved(*args, **options)

    monkeypatch.setattr(merging, "attach", attach_and_watch)
    monkeypatch.setattr(merging, "load_saved", count_and_load)
    assert recipes("merge", "lora")[0] == 0
    assert old and alive == [0]


@pytest.mark.slow
def test_a_quantized_base_is_dequantised_and_the_merged_model_needs_no_bitsandbytes(
    runs, recipes
) -> None:
    run = runs("qlora")
    code, out, _ = recipes("merge", "qlora", "--dtype", "float32")
    assert code == 0 and "is dequantised first" in out
    assert "quantization_config" not in json.loads((run / "merged" / "config.json").read_text())
    record = json.loads((run / "merged" / "merge.json").read_text())
    assert record["dtype"] == "float32"
    assert record["difference"] < 1e-3 * record["effect"]


def test_what_changed_since_is_merged_again(runs, recipes) -> None:
    run = runs("lora")
    assert recipes("merge", "lora")[0] == 0
    trained = finished_run(open_run("lora"))
    assert merge_record(trained) is not None
    for file in ("merged/model.safetensors", "merged/merge.json"):
        content = (run / file).read_bytes()
        (run / file).write_bytes(content[:-2] + b"xx")
        assert merge_record(trained) is None, file
        (run / file).write_bytes(content)
    assert "already" not in recipes("merge", "lora", "--dtype", "bfloat16")[1]


def test_a_merge_that_is_not_the_adapter_is_refused_and_kept_apart(
    runs, recipes, monkeypatch
) -> None:
    run, honest = runs("lora"), merging.logits_on
    calls = iter(range(9))

    def other(model, rows):
        return honest(model, rows) * (9 if next(calls) == 2 else 1)

    monkeypatch.setattr(merging, "logits_on", other)
    code, _, err = recipes("merge", "lora")
    assert code == 1 and "merging loses" in err and "--dtype float32" in err
    assert not list(run.glob("merged*"))


def test_a_merged_model_ends_its_answers_as_the_run_learned_to(
    tiny_recipe, tiny_tokenizer, recipes
) -> None:
    of_base, of_run = tiny_tokenizer.eos_token_id, tiny_tokenizer.unk_token_id
    words = ["train.max_steps=2", f"train.eos_token={tiny_tokenizer.unk_token}"]
    assert train([str(tiny_recipe), *words]) == 0 and recipes("merge", "tiny")[0] == 0
    folder = tiny_recipe.parent / "runs/tiny/merged"
    assert GenerationConfig.from_pretrained(folder).eos_token_id == [of_run, of_base]


def test_what_cannot_be_merged_is_refused_and_leaves_nothing(
    runs, recipes, tiny_recipe, tiny_model_dir, tmp_path
) -> None:
    runs("full")
    code, _, err = recipes("merge", "full")
    assert code == 2 and "nothing to merge" in err

    folder = build_family("qwen3", tmp_path / "qwen3", tiny_model_dir)  # its embeddings are tied
    embeddings = [f"model.name_or_path={folder}", "lora.target_modules=[q_proj, embed_tokens]"]
    for words in (embeddings, ["lora.layer_replication=[[0, 2], [1, 2]]"]):
        assert train([str(tiny_recipe), "train.max_steps=2", "run.name=shared", *words]) == 0
        code, _, err = recipes("merge", "shared")
        assert code == 2 and "shares its weight" in err, words
        assert not list((tmp_path / "runs/shared").glob("merged*"))
        shutil.rmtree(tmp_path / "runs/shared")


def test_runs_of_one_base_share_it_and_others_do_not(runs) -> None:
    names = ["lora", "lora.chat", "qlora", "full"]
    runs(*names)
    groups = families([finished_run(open_run(name)) for name in names])
    assert [len(group) for group in groups] == [2, 1, 1]
    family, seen = Family(groups[0]), []
    for name in family.names:
        with family.answering(name) as model:
            seen.append(logits_on(model, ROWS))
    assert all((seen[i] - seen[j]).abs().max() > 1e-3 for i, j in ((0, 1), (0, 2), (1, 2)))
