"""Fixtures that several test files share: a tiny Llama with its own tokenizer, and the real data
folder when it is there.
"""

import contextlib
import gc
import hashlib
import inspect
import multiprocessing
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path

import pytest
from tests.families import DENSE
from tests.launch import Forks

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")

PROJECT = Path(__file__).resolve().parents[1]
NF4 = (
    "quantization={load_in_4bit: true, bnb_4bit_quant_type: nf4, bnb_4bit_compute_dtype: bfloat16}"
)
TINY_TEXT = (
    PROJECT / "recipes" / "quickstart" / "data" / "instructions.jsonl",
    PROJECT / "LICENSE",
)


@pytest.fixture(scope="module", autouse=True)
def imports_are_not_searched_for_garbage() -> None:
    """Every training, merge and evaluation collects garbage to free memory. With all libraries
    imported one collection takes 0.4 s; frozen, what is imported costs nothing.
    """
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    """Let go of what was frozen: Triton reports what the end of a process leaves. End the workers
    that load rows: they outlive a training in this process, and no SIGTERM ends them.
    """
    gc.unfreeze()
    for worker in multiprocessing.active_children():
        worker.kill()


@pytest.fixture(scope="session")
def forks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forks]:
    """Starts trainings, on one or several ranks, as forks of one process (tests/launch.py)."""
    server = Forks(tmp_path_factory.mktemp("forks"))
    yield server
    server.close()


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder with the real data sets; tests that need it skip where it is absent."""
    folder = Path(os.environ.get("RECIPES_SHARED_DATA", PROJECT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"real data not found at {folder} (set RECIPES_SHARED_DATA)")
    return folder


def kept_tiny_model(config: pytest.Config, vocabulary: int) -> Path:
    """Return the folder of a tiny model that pytest's cache keeps: building it imports torch and
    trains a tokenizer, which would be most of the time of a single quick test.
    """
    made_of = [inspect.getsource(build_tiny_model), str(DENSE), str(vocabulary)]
    made_of += [version(name) for name in ("torch", "transformers", "tokenizers")]
    made_of += [path.read_text(encoding="utf-8") for path in TINY_TEXT if path.is_file()]
    key = hashlib.sha256("\0".join(made_of).encode()).hexdigest()[:16]
    kept = config.cache.mkdir("tiny-models") / key
    if not kept.is_dir():
        # built beside its place: several pytest workers may build it at one time
        building = Path(tempfile.mkdtemp(dir=kept.parent))
        build_tiny_model(building, vocabulary=vocabulary)
        with contextlib.suppress(OSError):  # another worker was first; its bytes are the same
            building.rename(kept)
    return kept


@pytest.fixture(scope="session")
def tiny_model_dir(pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a randomly initialised 2-layer Llama (hidden 64) and a 512-token BPE tokenizer
    with <s>, </s> and a chat template.

    A small vocabulary, because TRL's loss scores every position over the whole vocabulary.
    """
    folder = tmp_path_factory.mktemp("tiny") / "tiny-llama"
    shutil.copytree(kept_tiny_model(pytestconfig, vocabulary=512), folder)
    return folder


def build_tiny_model(folder: Path, seed: int = 0, vocabulary: int = 512) -> None:
    """Write the tiny model and its tokenizer; the same seed gives the same bytes."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    specials = ["<unk>", "<s>", "</s>", "<|user|>", "<|assistant|>", "<|system|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    corpus = [path.read_text(encoding="utf-8") for path in TINY_TEXT if path.is_file()] + [
        "### Instruction: ### Context: ### Response: Answer the question."
    ]
    bpe.train_from_iterator(corpus, trainer)
    bpe.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    tokenizer.chat_template = (
        "{{ bos_token }}{% for message in messages %}<|{{ message['role'] }}|>\n{{"
        " message['content'] }}{{ eos_token }}\n{% endfor %}{% if add_generation_prompt"
        " %}<|assistant|>\n{% endif %}"
    )
    tokenizer.save_pretrained(folder)
    torch.manual_seed(seed)
    sizes = {**DENSE, "intermediate_size": 128, "vocab_size": len(tokenizer)}
    config = LlamaConfig(**sizes, tie_word_embeddings=False)
    LlamaForCausalLM(config).save_pretrained(folder)


@pytest.fixture(scope="session")
def other_tiny_model_dir(
    pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The tiny model again, with other tokens: its tokenizer has 400."""
    folder = tmp_path_factory.mktemp("tiny") / "other-tokens"
    shutil.copytree(kept_tiny_model(pytestconfig, vocabulary=400), folder)
    return folder


@pytest.fixture(scope="session")
def tiny_tokenizer(tiny_model_dir: Path):
    """The tiny model's tokenizer."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_model_dir)


TINY_RECIPE = """\
# yaml-language-server: $schema=recipe.schema.json
model: {{name_or_path: {model}, dtype: float32}}
data: {{source: {rows}, prompt_format: dolly}}
lora: {{r: 4, lora_alpha: 8, lora_dropout: 0.0, target_modules: [q_proj, v_proj]}}
train:
  bf16: false
  learning_rate: 1.0e-2
  max_length: 192
  max_steps: 8
  per_device_train_batch_size: 4
  per_device_eval_batch_size: 8
  logging_steps: 1
  eval_strategy: steps
  eval_steps: 4
  save_steps: 2
  seed: 42
  optim: adamw_torch
run: {{global_batch_size: 8, name: tiny}}
launch: {{accelerate: cpu}}
"""


@pytest.fixture(scope="session")
def tiny_recipe_text() -> Callable[[Path], str]:
    """The tiny recipe as text, for a model folder."""
    rows = PROJECT / "recipes" / "quickstart" / "data" / "instructions.jsonl"
    return lambda model: TINY_RECIPE.format(model=model, rows=rows)


@pytest.fixture
def tiny_recipe(tiny_model_dir, tiny_recipe_text, tmp_path, monkeypatch) -> Path:
    """A recipe that trains the tiny model for 8 steps; its runs go to <tmp_path>/runs."""
    monkeypatch.setenv("RECIPES_RUNS_ROOT", str(tmp_path / "runs"))
    path = tmp_path / "tiny.yaml"
    path.write_text(tiny_recipe_text(tiny_model_dir), encoding="utf-8")
    return path


@pytest.fixture
def recipes(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """A function that runs a verb and returns exit code, stdout and stderr."""
    from recipes_lib.cli import main

    def run(*words: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main([str(word) for word in words])
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def said(recipes: Callable[..., tuple[int, str, str]]) -> Callable[..., str]:
    """A function that runs a verb and returns its stdout, or its stderr when it must fail."""

    def run(*words: str, code: int = 0) -> str:
        found, out, err = recipes(*words)
        assert found == code, err
        return err if code else out

    return run
