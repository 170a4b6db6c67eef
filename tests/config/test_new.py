"""`recipes new`: a recipe for the user's own rows, from every shipped one, that holds wherever it
lies.
"""

import json
from pathlib import Path

import pytest
import yaml
from tests.pairs import write_pairs

from recipes_lib.config.recipe import load_recipe
from recipes_lib.core.project import project_root
from recipes_lib.slurm.profile import load_profile

QUICKSTART = "quickstart/lora-r8"
SHIPPED = project_root() / "recipes"


def messages(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}, {"role": "assistant", "content": text}]


ROWS = {
    "pairs": lambda number: {"question": f"a {number}", "answer": "b"},
    "chat": lambda number: {"messages": messages(f"a {number}")},
    "halves": lambda number: {"prompt": f"a {number}", "completion": "b"},
    "texts": lambda number: {"text": f"a {number}"},
}


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def write_rows(kind: str, number: int, name: str = "mine.jsonl") -> None:
    rows = [json.dumps(ROWS[kind](index)) for index in range(number)]
    Path(name).write_text("\n".join(rows), encoding="utf-8")


@pytest.fixture
def new(said):
    """A function that runs `recipes new` and returns what it says."""
    return lambda name, *words, code=0: said("new", name, *words, code=code)


def test_every_shipped_recipe_takes_rows_of_ones_own(recipes):
    """The origin's columns, split and filters stayed with rows that have none of them: 8 of 36
    recipes failed, and rows that were no conversations failed with each recipe that has a template.
    """
    origins = [path for path in sorted(SHIPPED.glob("*/*.yaml")) if path.name[0] != "_"]
    origins = [path for path in origins if path.parent.name != "studies"]
    origins = [path for path in origins if "published-sweep" not in path.name]
    origins.remove(SHIPPED / "quickstart" / "lora-r8-dpo.yaml")
    assert len(origins) > 25
    wrong = []
    for kind in ROWS:
        write_rows(kind, 300)
        of_each_folder = {path.parent: path for path in origins}.values()
        for origin in origins if kind == "pairs" else of_each_folder:
            short = f"{origin.parent.name}/{origin.stem}"
            name = f"{kind}--{short.replace('/', '--')}"
            for command in (
                ["new", name, "--from", short, "--data", "mine.jsonl"],
                ["check", f"{name}.yaml"],
            ):
                code, _, err = recipes(*command)
                if code:
                    wrong.append((short, kind, err))
    assert not wrong


def test_a_recipe_of_preference_tuning_takes_pairs_of_answers(new, said):
    write_pairs(Path("mine.jsonl"))
    new("x", "--from", "quickstart/lora-r8-dpo", "--data", "mine.jsonl")
    said("check", "x.yaml")
    assert load_recipe("x.yaml").stage == "dpo"


def test_a_folder_is_read_whatever_split_the_origin_reads(new):
    Path("mine").mkdir()
    write_rows("chat", 300, "mine/train.jsonl")
    new("x", "--from", "mistral-7b-ultrachat/lora-r16", "--data", "mine")
    assert load_recipe("x.yaml").data.source_split == "train"


def test_what_is_written_outside_of_a_checkout_holds_no_path_into_the_package(new, said):
    """It held the path of the environment's site-packages, which goes with the next Python."""
    write_rows("pairs", 20)
    new("mine", "--from", QUICKSTART, "--data", "mine.jsonl")
    Path("flat.yaml").write_text("model_name_or_path: a/b\ndataset_name: c/d\n")
    said("migrate", "flat.yaml", "--output", "migrated.yaml")
    new("again", "--from", "mine.yaml")
    for file in ("mine.yaml", "migrated.yaml", "again.yaml"):
        text = Path(file).read_text(encoding="utf-8")
        assert "../" not in text and str(project_root()) not in text, text
    assert yaml.safe_load(Path("mine.yaml").read_text())["extends"] == QUICKSTART
    assert load_recipe("again.yaml").lora == load_recipe(QUICKSTART).lora


def test_shipped_profiles_and_accelerate_configs_are_copied_by_name(new, said):
    """The message named launch/profiles/example.yaml, which is not there outside of a checkout."""
    with pytest.raises(Exception, match="there is no profile") as caught:
        load_profile("my-site")
    hint = caught.value.hints[-1].rpartition("recipes new ")[2]
    new(*hint.replace("MY-SITE", "my-site").split())
    assert load_profile("my-site").sbatch == load_profile("example").sbatch
    text = Path("launch/profiles/my-site.yaml").read_text(encoding="utf-8")
    assert "# A Slurm site." in text and "$schema" not in text
    new("four", "--from", "accelerate_configs/ddp")
    said("check", "launch", "accelerate_configs")
    new("four", "--from", "accelerate_configs/ddp", code=2)  # nothing is replaced


def test_a_recipe_for_few_rows_fits_them_and_says_what_it_kept(new):
    """A recipe for 939,343 rows held out 1 of 300 for validation, and trained 4 steps."""
    write_rows("chat", 300)
    printed = new("few", "--from", "llama3.1-8b-tulu3/full", "--data", "mine.jsonl")
    recipe = load_recipe("few.yaml")
    assert (recipe.data.split.validation, recipe.data.split.test) == (0.1, 0.1)
    assert recipe.run.global_batch_size == 8  # of 8 GPUs
    assert recipe.train["per_device_train_batch_size"] == 1
    assert "300 rows, about 240 of them train: 60 steps of 8 examples" in printed
    assert "fitted data.split.validation: 0.1 (was 0.0011)" in printed
    assert "kept train.learning_rate: 5.0e-06" in printed
    write_rows("chat", 30)
    printed = new("fewer", "--from", QUICKSTART, "--data", "mine.jsonl")
    assert "about 3 rows are few for data.split.validation" in printed
    assert "steps are few" in printed


def test_many_rows_change_nothing_but_their_source(new):
    write_rows("pairs", 3000)
    printed = new("many", "--from", "smollm2-135m-dolly/lora-r8", "--data", "mine.jsonl")
    assert "fitted" not in printed


def test_words_of_the_user_are_written_and_fitted_around(new):
    Path("deep").mkdir()
    write_rows("pairs", 300)
    Path("chat.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    words = ["train.learning_rate=1e-5", "run.global_batch_size=64"]
    words += ["data.chat_template=chat.jinja", "--data", "mine.jsonl", "--output", "deep/x.yaml"]
    printed = new("x", "--from", "llama3.1-8b-tulu3/lora-r64", *words)
    recipe = load_recipe("deep/x.yaml")
    assert recipe.train["learning_rate"] == 1e-5 and recipe.run.global_batch_size == 64
    assert recipe.data.chat_template == str(Path("chat.jinja").resolve())
    assert "chat_template: ../chat.jinja" in printed and "kept train.learning_rate" not in printed
    Path("odd.jsonl").write_text('{"q": "a", "a": "b"}\n' * 20)
    options = ("--from", QUICKSTART, "--data", "odd.jsonl")
    assert "data.columns={instruction: NAME, response: NAME}" in new("y", *options, code=4)
    mapping = "data.columns={instruction: q, response: a}"
    new("y", *options, mapping)
    misspelt = new("z", *options, "train.learning_rat=1", code=2)
    assert "did you mean train.learning_rate?" in misspelt
    new("z", *options, mapping, "run.global_batch_size=9", code=2)  # of 8 at a time
    assert not Path("z.yaml").exists()


def test_bad_rows_are_named_and_the_recipe_is_there_to_leave_them_out(new, said):
    """It was not written, and `new` took no data.on_bad_row: there was no way out."""
    write_rows("pairs", 300)
    with Path("mine.jsonl").open("a") as file:
        file.write('\n{"question": "a"}\n')
    options = ("--from", QUICKSTART, "--data", "mine.jsonl")
    assert "mine.jsonl:301" in new("x", *options, code=4)
    assert Path("x.yaml").exists()
    said("check", "x.yaml", code=4)
    new("y", *options, "data.on_bad_row=skip")
    said("check", "y.yaml")
    Path("mine.jsonl").write_text('{"question": "a"}\n')
    new("z", *options, code=4)
    assert not Path("z.yaml").exists()  # no row can be read
