"""Every recipe in the repository trains two steps on a tiny model of its own architecture, with its
model's chat template, on rows of its data's shape, with its own hyperparameters, launched as its
CPU twin.
"""

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.families import build_family

from recipes_lib.config.launch import load_accelerate_config
from recipes_lib.config.recipe import Recipe, load_recipe, trl_templates
from recipes_lib.data.sources import listed_sources

PROJECT = Path(__file__).resolve().parents[2]
RECIPES = sorted(
    path
    for path in (*PROJECT.glob("recipes/*/*.yaml"), *PROJECT.glob("examples/*/*-r*.yaml"))
    if not path.name.startswith("_") and path.parent.name != "studies"
)
ROWS = PROJECT / "recipes" / "quickstart" / "data" / "instructions.jsonl"
TIME_LIMIT_S = 200
# Those that are trained with every commit; the others are slow, to keep that short.
QUICK = {"llama2-7b-dolly", "smollm2-135m-dolly", "quickstart"}

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# SmolLM3's reads what the rows of its data say, as the real one does.
SMOLLM3 = (
    CHATML
    + "{% if enable_thinking or custom_instructions or xml_tools or python_tools %}{% endif %}"
)
# Model of the recipe: its architecture, the template its tokenizer has (TRL's copy of it; SmolLM3's
# and Olmo 3's are not among them, and are ChatML in their simplest form), and what ends a turn.
# Llama-2, SmolLM2 and whatever brings data.chat_template take the tiny tokenizer's own.
MODELS = {
    "meta-llama/Llama-3.2-1B": ("llama", None, None),
    "meta-llama/Llama-3.2-3B": ("llama", None, None),
    "meta-llama/Llama-3.1-8B": ("llama", None, None),
    "Qwen/Qwen3-8B": ("qwen3", "trl:qwen3", "<|im_end|>"),
    "Qwen/Qwen3.5-4B": ("qwen3_5", "trl:qwen3_5_nothink", "<|im_end|>"),
    "HuggingFaceTB/SmolLM3-3B": ("smollm3", SMOLLM3, "<|im_end|>"),
    "google/gemma-3-4b-pt": ("gemma3", None, None),
    "openai/gpt-oss-20b": ("gpt_oss", "trl:gptoss", "<|return|>"),
    "mistralai/Mistral-7B-v0.1": ("mistral", None, None),
    "allenai/Olmo-3-7B-Instruct": ("olmo3", CHATML, "<|im_end|>"),
}


def twin(name: str) -> str:
    """The config with which a machine without GPUs runs the same code."""
    kind = load_accelerate_config(name).distributed_type
    return {"NO": "cpu", "MULTI_GPU": "ddp_cpu", "FSDP": "fsdp_cpu"}[kind]


@pytest.fixture(scope="module")
def model_for(
    tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[Recipe], Path]:
    """A function that builds the tiny model of a recipe, once for all recipes of that model."""
    built: dict[str, Path] = {}

    def build(recipe: Recipe) -> Path:
        name = recipe.model.name_or_path
        if name not in MODELS:
            return tiny_model_dir
        if name not in built:
            built[name] = tiny(recipe, tiny_model_dir, tmp_path_factory.mktemp("model"))
        return built[name]

    return build


def tiny(recipe: Recipe, tiny_model_dir: Path, folder: Path) -> Path:
    """Write a tiny model of the recipe's architecture, whose tokenizer has the model's template and
    the special tokens in it.
    """
    from transformers import AutoTokenizer

    family, template, end = MODELS[recipe.model.name_or_path]
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    text = template or recipe.data.chat_template or ""
    text = trl_templates()[text].read_text() if text in trl_templates() else text
    # the end of turns that a recipe sets itself, for a base whose own token ends a document
    # and the token that the tokenizer class of Qwen adds by itself
    ends = [end, "<|endoftext|>", recipe.train.get("eos_token")]
    ends += re.findall(r"<\|?[a-z_]+\|?>", text)
    tokens = sorted({token for token in ends if token} - set(tokenizer.all_special_tokens))
    tokenizer.add_special_tokens({"additional_special_tokens": tokens})
    tokenizer.chat_template = text if template else None
    if template:
        tokenizer.eos_token = end
    tokenizer.save_pretrained(folder / "tokenizer")
    sizes = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id}
    return build_family(family, folder / "model", folder / "tokenizer", **sizes)


def rows_of(recipe: Recipe, folder: Path) -> str:
    """Write rows of the shape that the recipe's data set has."""
    tasks = [json.loads(line) for line in ROWS.read_text(encoding="utf-8").splitlines()[:60]]
    name = listed_sources(recipe.data)[0].source
    path = folder / "rows.jsonl"
    shape = SHAPES.get(name)
    if shape is None:
        own = ROWS.with_name(Path(name).name)
        return str(own if own.is_file() else ROWS)
    path.write_text(
        "".join(json.dumps(shape(number, task)) + "\n" for number, task in enumerate(tasks))
    )
    return str(path)


def conversation(task: dict[str, str], **thought: str) -> list[dict[str, str]]:
    answer = {"role": "assistant", "content": task["response"], **thought}
    return [{"role": "user", "content": task["instruction"]}, answer]


def multi_turn(task: dict[str, str]) -> list[dict[str, str]]:
    again = [{"role": "user", "content": "Go on."}, {"role": "assistant", "content": "I am done."}]
    return [*conversation(task), *again]


def thinking(number: int, task: dict[str, str]) -> dict[str, Any]:
    told = "reasoning language: German\n\nAnswer shortly."
    own = {"developer": told, "user": task["instruction"], "final": task["response"]}
    # every message has the field, null where there is none, as in the columns of parquet
    messages: list[dict[str, Any]] = [
        {"role": "system", "content": told},
        *conversation(task, thinking="Das ist leicht."),
    ]
    return {
        "reasoning_language": "German",
        **own,
        "analysis": "Das ist leicht.",
        "messages": [{"thinking": None, **message} for message in messages],
    }


SHAPES: dict[str, Callable[[int, dict[str, str]], dict[str, Any]]] = {
    "allenai/tulu-3-sft-mixture": lambda number, task: {
        "id": f"row_{number}",
        "messages": multi_turn(task) if number % 3 else conversation(task),
        "source": "ai2-adapt-dev/oasst1_converted",
    },
    "HuggingFaceH4/ultrachat_200k": lambda number, task: {
        "prompt": task["instruction"],
        "prompt_id": f"{number:064x}",
        "messages": multi_turn(task),
    },
    "HuggingFaceTB/smoltalk2": lambda number, task: {
        "messages": multi_turn(task),
        "chat_template_kwargs": {"custom_instructions": "", "enable_thinking": False},
        "source": "smoltalk",
    },
    "HuggingFaceH4/Multilingual-Thinking": thinking,
    "meta-math/MetaMathQA": lambda number, task: {
        "type": "MATH_AnsAug",
        "query": task["instruction"],
        "original_question": task["instruction"],
        "response": f"{task['response']}\nThe answer is: {number}",
    },
}


def shrunk(recipe: Recipe, model: Path, folder: Path) -> list[str]:
    """Overrides that shrink batch, length and steps, and take what only a GPU can do out of the
    way.
    """
    whole = recipe.run.global_batch_size
    overrides = [
        *(f"model.name_or_path={model}", f"data.source={rows_of(recipe, folder)}"),
        *("data.max_examples=60", "run.name=shrunk", "train.max_steps=2"),
        f"train.max_length={448 if 'HuggingFaceH4/Multi' in str(recipe.data.source) else 224}",
        *("train.per_device_train_batch_size=2", "train.logging_steps=1"),
        *("train.save_steps=2", "train.eval_steps=2"),
        "run.global_batch_size=4" if whole else "train.gradient_accumulation_steps=1",
    ]
    if recipe.data.split.test < 0.01:  # of 60 rows, too
        overrides += ["data.split.validation=0.1"]
    if (recipe.launch.gpus or 1) > 2:
        overrides += ["launch.gpus=2"]  # the two ranks of this machine
    if recipe.train.get("fp16"):  # it does nothing on a CPU, so it is refused there
        overrides += ["train.fp16=false", "train.bf16=true", "model.dtype=bfloat16"]
    if recipe.lora and (experts := recipe.lora.get("target_parameters")):
        names = ", ".join(f"1.{name.partition('.')[2]}" for name in experts[:2])
        overrides += [f"lora.target_parameters=[{names}]"]  # two layers here
    return overrides


def case(path: Path) -> Any:
    marks = pytest.mark.slow if path.parent.name in QUICK else pytest.mark.nightly
    return pytest.param(path, marks=marks, id=f"{path.parent.name}/{path.stem}")


@pytest.mark.parametrize("path", [case(path) for path in RECIPES])
def test_the_recipe_trains_two_steps(path, model_for, forks, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("RECIPES_RUNS_ROOT", str(tmp_path / "runs"))
    recipe, config = load_recipe(path), twin(load_recipe(path).launch.accelerate)
    overrides = shrunk(recipe, model_for(recipe), tmp_path)
    if config == "cpu":
        from recipes_lib.train import main

        assert main([str(path), *overrides]) == 0
    else:
        code, said = forks.start([path, *overrides], config).wait(TIME_LIMIT_S)
        assert code == 0, said[-4000:]
    run = tmp_path / "runs" / "shrunk"
    state = json.loads((run / "run.json").read_text())
    check_launch(state["launch"], config)
    check_weights(run, state, recipe.lora)
    losses = [
        json.loads(line).get("loss") for line in (run / "metrics.jsonl").read_text().splitlines()
    ]
    assert [loss for loss in losses if loss is not None and math.isfinite(loss) and loss > 0]
    if recipe.quantization:
        assert state["summary"]["quantized_layers"] == 14


def check_launch(line: str, config: str) -> None:
    kinds = {"cpu": "one process", "ddp_cpu": "DDP", "fsdp_cpu": "FSDP"}
    assert line.startswith(f"{kinds[config]}, world size {1 if config == 'cpu' else 2}")


def check_weights(run: Path, state: dict[str, Any], lora: dict[str, Any] | None) -> None:
    from safetensors import safe_open

    assert state["state"] == "finished" and state["weights_check"]["sha256"]
    if lora is None:
        assert (run / "model" / "model.safetensors").is_file()
        return
    with safe_open(run / "adapter" / "adapter_model.safetensors", framework="pt") as tensors:
        names = list(tensors.keys())
    adapted = {name.split(".lora_")[0].rsplit(".", 1)[1] for name in names}
    targets = lora["target_modules"]
    if isinstance(targets, str):  # all-linear, or the pattern of one part
        assert "down_proj" in adapted and "lm_head" not in adapted
        assert not [name for name in names if "vision" in name or "visual" in name]
    elif "target_parameters" in lora:
        assert set(targets) < adapted | set(targets) and "experts" in " ".join(names)
    else:
        assert adapted == set(targets)
        parts = 3 if lora.get("use_dora") else 2  # A and B, and DoRA's magnitude
        assert len(names) == parts * 2 * len(targets)  # in each of two layers
    assert json.loads((run / "adapter" / "adapter_config.json").read_text())["r"] == lora["r"]
