"""The plan of an evaluation: how much is asked, read and written, what memory that takes on one
card, and how long it takes. Nothing is loaded or fetched, and no torch.

Every number has two ends. The low one takes answers to be as long as the reference answers that
come with the questions, the high one takes all of them to reach `generation.max_new_tokens`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from recipes_lib.config.launch import plan_launch
from recipes_lib.config.loader import Origin
from recipes_lib.config.model_files import KEY as MODEL_KEY
from recipes_lib.config.model_files import local_folder
from recipes_lib.config.recipe import Recipe, load_recipe
from recipes_lib.core.errors import EnvironmentFault, RecipeError
from recipes_lib.core.json_files import object_or_none
from recipes_lib.core.project import project_root, recipe_path, shown_path
from recipes_lib.data.conversations import Message
from recipes_lib.data.prompts import generation_prompt
from recipes_lib.data.splits import TEST, VALIDATION
from recipes_lib.eval_log import REFERENCE
from recipes_lib.eval_recipe import EvalRecipe
from recipes_lib.generation.judges import ASKED_AT_ONCE
from recipes_lib.generation.targets import (
    asking_of,
    base_target,
    is_run,
    stand_in_recipe,
    targets_by_word,
)
from recipes_lib.judging.prometheus import (
    PROMETHEUS_PACKAGE,
    build_prompt,
    load_template,
    prometheus_is_here,
)
from recipes_lib.models.known import named_shape
from recipes_lib.planning.cards import Card
from recipes_lib.planning.lengths import TEMPLATE_TOKENS, TURN_TOKENS, lengths_of, text_tokens
from recipes_lib.planning.plan import FULL_PASS, card_for, model_shape
from recipes_lib.planning.settings import settings_of
from recipes_lib.suites.answer_costs import (
    AnswerBatch,
    Ends,
    EvalMemory,
    LoadedModel,
    answer_batches,
    loss_batches,
    loss_tokens,
)
from recipes_lib.suites.eval_times import (
    ANSWER_SHARE,
    FEEDBACK,
    NUM_QUESTIONS,
    REQUESTS,
    TASKS,
    limited,
)
from recipes_lib.suites.questions import (
    ASKED_HERE,
    MT_BENCH_PACKAGE,
    NEEDS_REFERENCE,
    Question,
    is_answer_file,
    load_questions,
)

PROBE_JUDGMENTS = 12  # of each pair that carries probes: six, in both orders
_BASE = "base"
_VOCABULARY = 32_000  # of a model of which nothing is known here
# Characters of every twentieth of the questions, shortest first, for a machine that has not got
# them: AlpacaEval's 805 instructions and text-davinci-003's outputs, MT-Bench's 80 questions turn
# by turn, and GPT-4's reference answers to 30 of them.
_ALPACA_EVAL = "tatsu-lab/alpaca_eval:alpaca_eval.json"
_INSTRUCTIONS = "12 31 38 44 53 60 66 74 81 93 100 109 122 139 157 177 221 254 321 519 1917"
_OUTPUTS = "1 13 35 60 93 143 181 238 294 334 380 425 469 516 572 654 748 856 1053 1337 4105"
_TURNS = (
    "38 69 83 93 103 110 126 133 163 176 186 210 221 240 292 317 385 511 684 1028 1642",
    "16 26 38 47 52 57 61 63 68 72 77 82 91 97 101 109 118 126 170 192 1117",
)
_REFERENCES = (
    "5 26 106 128 159 206 404 417 556 559 639 689 813 878 956 995 1063 1279 1335 1619 1651",
    "80 85 144 208 232 257 357 391 536 619 726 933 1076 1140 1246 1326 1369 1493 1497 1780 1809",
)
# requests that are asked together: tokens of their prompts, and of their answers
Together = tuple[list[int], list[int]]
_NUM_REFERENCES = 30


@dataclass(frozen=True, kw_only=True)
class Work:
    """What one model is asked, and what that takes.

    Args:
        what: in words: answers, judgments, forward passes.
        model: its name.
        requests: None where that is not known without fetching.
        read: tokens of all prompts.
        written: tokens of all answers.
        details: what the requests are made of, in words.
        at_once: most requests in flight, behind a server; None in this process.
        batch_tokens: padded tokens of a batch; None where another program makes the batches.
        batches: how many.
        rows: of the largest.
        step: seconds of one step of writing, in the shortest and in the longest.
        kernels: of one step.
        bound: what a step waits for.
        memory: None behind a server.
        loading: seconds until it can be asked.
        reading: seconds; None where they cannot be known.
        writing: seconds.
        unknown: what is not in the seconds, in words.
    """

    what: str
    model: str
    requests: int | None
    read: Ends
    written: Ends
    details: str = ""
    at_once: int | None = None
    batch_tokens: int | None = None
    batches: Ends | None = None
    rows: int | None = None
    step: Ends | None = None
    kernels: int | None = None
    bound: str = ""
    memory: EvalMemory | None = None
    loading: float = 0.0
    reading: Ends | None = None
    writing: Ends | None = None
    unknown: tuple[str, ...] = ()

    @property
    def seconds(self) -> Ends | None:
        """All of it; None where it cannot be known, or does not fit the card."""
        if self.reading is None or (self.memory and not self.memory.fits):
            return None
        start = Ends(self.loading, self.loading)
        return start + self.reading + (self.writing or Ends(0.0, 0.0))


@dataclass(frozen=True, kw_only=True)
class EvalPlan:
    """The plan of one evaluation of one target.

    Args:
        to_train: whether the target is a recipe that is not trained yet.
        questions: None where it is not known without fetching.
        new_tokens: the longest answer; None for a suite that writes none of its own.
        lengths: where the lengths are from, in words.
        parts: the work in its order.
        notes: what else is to be said.
    """

    recipe: EvalRecipe
    target: str
    to_train: bool
    against: str | None
    card: Card
    questions: int | None
    new_tokens: int | None
    lengths: str
    parts: tuple[Work, ...]
    notes: tuple[str, ...] = ()

    @property
    def seconds(self) -> Ends:
        """Of all parts whose time can be known."""
        return sum((part.seconds for part in self.parts if part.seconds), Ends(0.0, 0.0))

    @property
    def unknown(self) -> tuple[str, ...]:
        """What is not in the seconds, in words."""
        apart = [
            f"{part.what} ({'a server' if part.memory is None else 'they do not fit'})"
            for part in self.parts
            if part.seconds is None
        ]
        return (*apart, *(words for part in self.parts for words in part.unknown))

    @property
    def fits(self) -> bool:
        """Whether every model that is loaded here fits the card with its largest batch."""
        return all(part.memory.fits for part in self.parts if part.memory)


@dataclass(frozen=True)
class _Model:
    """A target of an eval as it will be asked.

    Args:
        trained: whether it is, or will be, a run: then it answers under its training's autocast.
        to_train: whether it is not trained yet.
    """

    name: str
    recipe: Recipe
    trained: bool
    to_train: bool = False

    def loaded(self, card: Card) -> LoadedModel:
        """Return it on a card.

        Raises:
            RecipeError: unknown model.
            EnvironmentFault: its shape cannot be had.
        """
        on_cpu, shape = card.name == "cpu", model_shape(self.recipe)
        launch = plan_launch(self.recipe.launch, "cpu" if on_cpu else "single_gpu", 1, None)
        settings = settings_of(self.recipe, launch, shape, on_cpu=on_cpu)
        return LoadedModel(settings, card, settings.half if self.trained else None)


@dataclass(frozen=True)
class _Asked:
    """A question in tokens.

    Args:
        turns: of the prompt that each turn adds.
        texts: of what stands in each turn alone.
        reference: of the reference answers, None without one.
    """

    turns: tuple[int, ...]
    texts: tuple[int, ...]
    reference: tuple[int, ...] | None
    category: str


@dataclass(frozen=True)
class _Questions:
    """The questions of an eval in a target's tokens."""

    asked: tuple[_Asked, ...]
    source: str
    draws: int
    high: int

    @cached_property
    def usual(self) -> int:
        """Tokens of a short answer to a question that has no reference."""
        known = [tokens for one in self.asked for tokens in one.reference or ()]
        if not known:
            return max(1, round(ANSWER_SHARE * self.high))
        return max(1, round(sum(known) / len(known)))

    @property
    def basis(self) -> str:
        """What the shortest answers are taken to be, in words."""
        with_one = sum(one.reference is not None for one in self.asked)
        if not with_one:
            return f"at least {self.usual} tokens on average, which is assumed"
        all_of = "" if with_one == len(self.asked) else f" of {with_one} questions"
        return f"at least as long as the reference answers{all_of} (mean {self.usual} tokens)"

    @property
    def num_answers(self) -> int:
        """Answers to all turns of all questions."""
        return self.draws * sum(len(one.turns) for one in self.asked)

    def answer(self, one: _Asked, turn: int, low: bool) -> int:
        """Return the tokens of an answer."""
        if not low:
            return self.high
        return min(self.high, one.reference[turn] if one.reference else self.usual)

    def before(self, one: _Asked, turn: int, low: bool) -> int:
        """Return the tokens of the answers before a turn."""
        return sum(self.answer(one, earlier, low) for earlier in range(turn))

    def turns(self, low: bool) -> list[Together]:
        """Return what is asked together: turn by turn."""
        found = []
        for turn in range(max(len(one.turns) for one in self.asked)):
            asked = [one for one in self.asked if len(one.turns) > turn] * self.draws
            prompts = [sum(one.turns[: turn + 1]) + self.before(one, turn, low) for one in asked]
            found.append((prompts, [self.answer(one, turn, low) for one in asked]))
        return found


def plan_eval(
    recipe: EvalRecipe, word: str, gpu: str | None = None, against: str | None = None
) -> EvalPlan:
    """Return the plan of an evaluation.

    Args:
        word: the target: a run, a recipe that is not trained yet, or a model.
        gpu: a card's name, or `cpu`; absent, as a training of the target would have it.
        against: the opponent that the command line names.

    Raises:
        RecipeError: no such target or opponent, a file that cannot be used, an unknown model.
        EnvironmentFault: questions or a model's shape are not on this machine.
    """
    opponent = recipe.opponent(against)
    target = _target(recipe, word)
    card = card_for(plan_launch(target.recipe.launch), gpu)
    if recipe.suite.name == "lm_eval":
        return _harness(recipe, target, card)
    if recipe.suite.name == "heldout_loss":
        return _heldout_loss(recipe, target, card)
    served = recipe.generation.engine == "openai"
    models = [target]
    if opponent not in (None, REFERENCE) and not is_answer_file(str(opponent)):
        models.append(_opponent(recipe, target, str(opponent)))
    questions = _questions(recipe, target)
    parts = [
        _served_answers(recipe, model, questions)
        if served
        else _answers(recipe, model.name, model.loaded(card), questions)
        for model in models
    ]
    if opponent == _BASE:  # loaded once for both
        parts[1] = replace(parts[1], loading=0.0)
    if recipe.judge is not None:
        parts.append(_judgments(recipe, questions, opponent, card))
    return EvalPlan(
        recipe=recipe,
        target=target.name,
        to_train=target.to_train,
        against=opponent,
        card=card,
        questions=len(questions.asked),
        new_tokens=questions.high,
        lengths=questions.source,
        parts=tuple(parts),
        notes=(f"answers: {questions.basis}, at most {questions.high:,} tokens each",),
    )


def _target(recipe: EvalRecipe, word: str) -> _Model:
    """Return the target of a word: a run first, then a recipe, else a model."""
    file = recipe_path(word)
    if not is_run(word) and file.suffix in (".yaml", ".yml"):
        trained = load_recipe(word)
        return _Model(trained.name, trained, trained=True, to_train=True)
    # nothing of a model's code is run
    (found,) = targets_by_word([word], asking_of(recipe, remote_code=True)).values()
    return _Model(found.word, found.recipe, found.trained is not None)


def _opponent(recipe: EvalRecipe, target: _Model, word: str) -> _Model:
    """Return the model whose answers are compared with the target's."""
    if word != _BASE:
        return _target(recipe, word)
    if not target.trained or target.recipe.lora is None:
        raise RecipeError(
            f"'{target.name}' has no base of its own to be compared with",
            "name another run or model: --against OTHER",
        )
    base = base_target(target.recipe)
    return _Model(base.word, base.recipe, False)


# ---- Questions in tokens ----


def _spread(quantiles: str, number: int) -> list[int]:
    """Return so many lengths that are distributed like the quantiles."""
    known = [int(word) for word in quantiles.split()]
    last, lengths = len(known) - 1, []
    for place in range(number):
        exact = place * last / max(number - 1, 1)
        below = min(int(exact), last - 1)
        lengths.append(round(known[below] + (known[below + 1] - known[below]) * (exact - below)))
    return lengths


def _known_questions(recipe: EvalRecipe) -> list[Question] | None:
    """Return questions as long as the suite's own, which are not here; None for others."""
    data, suite = recipe.data, recipe.suite.name
    if suite == "alpaca_eval" and data.questions == _ALPACA_EVAL and not data.references:
        both = (_spread(words, NUM_QUESTIONS[suite]) for words in (_INSTRUCTIONS, _OUTPUTS))
        return [
            Question(str(number), ("x" * asked,), reference=("x" * given,))
            for number, (asked, given) in enumerate(zip(*both, strict=True))
        ]
    if suite == "mt_bench" and data.questions == MT_BENCH_PACKAGE:
        asked_turns = [_spread(words, NUM_QUESTIONS[suite]) for words in _TURNS]
        given = [_spread(words, _NUM_REFERENCES) for words in _REFERENCES]
        every = NUM_QUESTIONS[suite] / _NUM_REFERENCES
        places = {round(number * every): number for number in range(_NUM_REFERENCES)}
        found = []
        for number, sizes in enumerate(zip(*asked_turns, strict=True)):
            place, reference, category = places.get(number), None, "writing"
            if place is not None:
                reference = tuple("x" * one[place] for one in given)
                category = NEEDS_REFERENCE[0]
            texts = tuple("x" * size for size in sizes)
            found.append(Question(str(number), texts, category, reference))
        return found
    return None


def _questions(recipe: EvalRecipe, target: _Model) -> _Questions:
    """Return the questions in the target's tokens."""
    assert recipe.suite.name in ASKED_HERE
    here = True
    try:
        questions: Sequence[Question] = load_questions(recipe, fetch=False).questions
    except EnvironmentFault:
        known = _known_questions(recipe)
        if known is None:
            raise
        questions, here = known[: recipe.data.max_questions], False
    section = target.recipe.data
    if target.recipe.name == "auto" and _lacks_template(target.recipe):
        section = replace(section, prompt_format="dolly")
    chat = section.prompt_format == "chat" or recipe.generation.engine == "openai"
    texts: list[str] = []
    for one in questions:
        for turn in one.turns:
            plain = [Message(role="user", content=turn)]
            rendered = turn if chat else generation_prompt(section, None, messages=plain)
            texts += [rendered, turn]
        texts += one.reference or ()
    system = section.system_prompt or "" if chat else ""
    counted, how = _count(target.recipe, [*texts, system], tokenize=here)
    template = TEMPLATE_TOKENS + (counted[-1] if system else 0) if chat else 0
    taken, asked = iter(counted), []
    for one in questions:
        pairs = [(next(taken), next(taken)) for _ in one.turns]
        around = [template] + [2 * TURN_TOKENS if chat else 0] * (len(pairs) - 1)
        turns = tuple(size + more for (size, _), more in zip(pairs, around, strict=True))
        reference = tuple(next(taken) for _ in one.reference) if one.reference else None
        asked.append(_Asked(turns, tuple(size for _, size in pairs), reference, one.category))
    source = how if here else f"{how}; the questions are not here, their lengths are known"
    if chat:
        source += "; what the chat template adds is assumed"
    generation = recipe.generation
    return _Questions(tuple(asked), source, generation.samples, generation.max_new_tokens)


def _lacks_template(recipe: Recipe) -> bool:
    """Whether a model that is here has no chat template."""
    folder = local_folder(recipe)
    if folder is None or not (folder / "tokenizer.json").is_file():
        return False
    settings = object_or_none(folder / "tokenizer_config.json") or {}
    return not settings.get("chat_template") and not (folder / "chat_template.jinja").is_file()


def _count(recipe: Recipe, texts: Sequence[str], tokenize: bool) -> tuple[list[int], str]:
    """Return the tokens of texts for a model of which perhaps nothing is here."""
    shape = None
    with contextlib.suppress(RecipeError, EnvironmentFault):
        shape = named_shape(recipe.model.name_or_path)
    vocabulary = shape.vocabulary if shape else _VOCABULARY
    try:
        return text_tokens(recipe, vocabulary, texts, tokenize=tokenize)
    except RecipeError:  # a name that only a server knows
        return text_tokens(recipe, vocabulary, texts, tokenize=False)


# ---- Answers ----


def _served_answers(recipe: EvalRecipe, model: _Model, questions: _Questions) -> Work:
    ends = [questions.turns(low) for low in (True, False)]
    return Work(
        what="answers",
        model=model.name,
        requests=questions.num_answers,
        read=Ends(*(sum(sum(prompts) for prompts, _ in asked) for asked in ends)),
        written=Ends(*(sum(sum(answers) for _, answers in asked) for asked in ends)),
        at_once=recipe.generation.concurrency,
    )


def _answers(recipe: EvalRecipe, name: str, model: LoadedModel, questions: _Questions) -> Work:
    """Return a model's answers in this process, turn by turn."""
    section = recipe.generation
    work = Work(
        what="answers",
        model=name,
        requests=questions.num_answers,
        read=Ends(0, 0),
        written=Ends(0, 0),
        batch_tokens=model.batch_tokens(section.batch_tokens),
        loading=model.start_s,
    )
    ends = [questions.turns(low) for low in (True, False)]
    drawn = section.temperature > 0, section.top_p < 1
    return _written(work, model, ends, section.max_new_tokens, *drawn)


def _written(
    work: Work,
    model: LoadedModel,
    ends: Sequence[Sequence[Together]],
    max_new_tokens: int,
    sampled: bool = False,
    nucleus: bool = False,
) -> Work:
    """Return the work with what its batches take.

    Args:
        ends: with the shortest answers, and with the longest.
    """
    budget, context = work.batch_tokens or 0, model.settings.shape.positions
    found: list[tuple[list[AnswerBatch], list[float]]] = []
    for asked in ends:
        batches = [
            batch
            for prompts, answers in asked
            for batch in answer_batches(prompts, answers, max_new_tokens, budget, context)
        ]
        steps = [model.step_s(*one.middle, sampled, nucleus) for one in batches]
        found.append((batches, steps))
    longest = found[-1][0]
    if not longest:
        raise RecipeError(
            f"no prompt of the {work.what} fits the {context:,} tokens of {work.model}",
            "take a model with a longer context",
        )
    largest = max(longest, key=lambda one: one.rows * (one.width + one.steps))
    rows = max(one.rows for one in longest)
    all_steps = [step for batches, steps in found for step in steps] if max_new_tokens else []
    kernels = model.launched(rows, sampled, nucleus)
    shown = all_steps and model.on_gpu
    return replace(
        work,
        read=Ends(*(sum(sum(prompts) for prompts, _ in asked) for asked in ends)),
        written=Ends(*(sum(sum(answers) for _, answers in asked) for asked in ends)),
        batches=Ends(*sorted(len(batches) for batches, _ in found)),
        rows=rows,
        memory=model.memory(largest, model.answer_logits(rows, sampled)),
        reading=Ends(
            *(sum(model.reading_s(one.rows, one.width) for one in batches) for batches, _ in found)
        ),
        writing=Ends(
            *(
                sum(one.steps * step for one, step in zip(batches, steps, strict=True))
                for batches, steps in found
            )
        ),
        step=Ends(min(all_steps), max(all_steps)) if shown else None,
        kernels=kernels if shown else None,
        bound=model.bound(max(all_steps), kernels) if shown else "",
    )


# ---- Judgments ----


def _judgments(recipe: EvalRecipe, questions: _Questions, opponent: str | None, card: Card) -> Work:
    """Return what the judge is asked about the target's answers."""
    assert recipe.judge is not None
    judge, metrics = recipe.judge.judge, recipe.metrics
    paired = opponent is not None
    graded, compared, probes = _judge_prompts(recipe, questions, paired, opponent == REFERENCE)
    kinds = {
        "graded": len(graded[0]),
        "in both orders": len(compared[0]),
        "probes of the judge's audit": len(probes[0]),
    }
    at_most = f"at most {metrics.probe_pairs} pairs"
    details = ", ".join(f"{number:,} {name}" for name, number in kinds.items() if number)
    details += f" ({at_most})" if probes[0] else ""
    prompts = [[*graded[end], *compared[end], *probes[end]] for end in (0, 1)]
    generates = judge.mode == "generate"
    high = judge.max_new_tokens if generates else 0
    low = min(FEEDBACK, high)
    number = len(prompts[0])
    work = Work(
        what="judgments",
        model=judge.model,
        requests=number,
        read=Ends(sum(prompts[0]), sum(prompts[1])),
        written=Ends(number * low, number * high),
        details=details,
    )
    if judge.engine == "openai":
        return replace(work, at_once=judge.concurrency)
    asked = stand_in_recipe(judge.model, dtype=judge.dtype)
    asked = replace(asked, origins={MODEL_KEY: Origin(shown_path(recipe.judge.path))})
    model = _Model(judge.model, asked, False).loaded(card)
    budget = model.batch_tokens(judge.batch_tokens)
    ends = [
        [
            (chunk, [length] * len(chunk))
            for start in range(0, number, ASKED_AT_ONCE)
            if (chunk := some[start : start + ASKED_AT_ONCE])
        ]
        for some, length in zip(prompts, (low, high), strict=True)
    ]
    return _written(replace(work, batch_tokens=budget, loading=model.start_s), model, ends, high)


def _judge_prompts(
    recipe: EvalRecipe, questions: _Questions, paired: bool, by_reference: bool
) -> tuple[list[list[int]], list[list[int]], list[list[int]]]:
    """Return the prompts of grades, comparisons and probes in tokens, for the shortest and for the
    longest answers.
    """
    assert recipe.judge is not None
    judge, metrics, turns = recipe.judge.judge, recipe.metrics, recipe.suite.name == "mt_bench"
    most = judge.max_prompt_tokens
    compares = paired and (metrics.pairwise if turns else True)
    grades = True if turns else paired and metrics.absolute
    around = _around_judged(recipe)
    found: tuple[list[list[int]], ...] = ([], [], [])
    for low in (True, False):
        graded, pairs = [], []
        for one in questions.asked * questions.draws:
            for turn in range(len(one.turns)):
                asked, before = sum(one.texts[: turn + 1]), questions.before(one, turn, low)
                answer = questions.answer(one, turn, low)
                shown = one.reference[turn] if one.reference else 0
                reference = shown if not turns or one.category in NEEDS_REFERENCE else 0
                theirs = shown if by_reference else answer + before
                graded.append(min(most, around[0] + asked + before + answer + reference))
                pairs.append(min(most, around[1] + asked + answer + before + theirs))
        orders = [size for size in pairs for _ in ("AB", "BA")]
        probed = pairs[: metrics.probe_pairs] if paired else []
        found[0].append(graded if grades else [])
        found[1].append(orders if compares else [])
        found[2].append([size for size in probed for _ in range(PROBE_JUDGMENTS)])
    return found[0], found[1], found[2]


def _around_judged(recipe: EvalRecipe) -> tuple[int, int]:
    """Return the tokens of the judge's prompt without question and answers: of a grade, and of a
    comparison. Where the authors' wording is not here they are those of ours.
    """
    assert recipe.judge is not None
    file, texts = recipe.judge, []
    for kind, answers in (("absolute", ("",)), ("relative", ("", ""))):
        published = getattr(file.judge, f"{kind}_prompt") == PROMETHEUS_PACKAGE
        ours = project_root() / f"evals/prompts/prometheus-{kind}.txt"
        unread = published and not prometheus_is_here()
        template = load_template(ours) if unread else file.template(kind)
        prompt = build_prompt(template, file.rubric(), "", answers, code="0" * 12)
        texts.append(prompt.instruct_text())
    counted, _ = _count(stand_in_recipe(file.judge.model), texts, tokenize=True)
    return counted[0], counted[1]


# ---- Suites that ask nothing of their own ----


def _heldout_loss(recipe: EvalRecipe, target: _Model, card: Card) -> EvalPlan:
    """Return the plan of a loss: one forward pass over each row."""
    name = str(recipe.data.questions)
    split = name if name in (TEST, VALIDATION) else None
    if recipe.generation.engine == "openai":
        raise recipe.error("generation.engine", "heldout_loss needs the weights in this process")
    if split is not None and not target.trained:
        raise recipe.error(
            "data.questions",
            f"'{target.name}' has no recipe, so no {split} split",
            "name a file of rows, or a run or recipe",
        )
    model = target.loaded(card)
    rows_of = target.recipe
    if split is None:
        rows_of = rows_of.reading(str(recipe.resolve("data.questions", name)))
    lengths = lengths_of(rows_of, model.settings.shape.vocabulary)
    number = {None: lengths.train, VALIDATION: lengths.validation, TEST: lengths.test}[split]
    if not number:
        raise RecipeError(
            f"the recipe of {target.name} holds no {split} rows out",
            f"data.split.{split} is their share of the rows; or name a file of rows",
        )
    number = min(number, recipe.data.max_questions or number)
    known, cut = sorted(lengths.tokens), model.settings.max_length
    rows = [known[place * len(known) // number] for place in range(number)]
    rows = [min(size, cut or size) for size in rows]
    limit = loss_tokens(model.on_gpu)
    passes = list(loss_batches(rows, limit))
    largest = max(passes, key=lambda one: one.rows * one.width)
    seconds = sum(model.reading_s(one.rows, one.width) for one in passes)
    work = Work(
        what="held-out rows",
        model=target.name,
        requests=number,
        read=Ends(sum(rows), sum(rows)),
        written=Ends(0, 0),
        batch_tokens=limit,
        batches=Ends(len(passes), len(passes)),
        rows=max(one.rows for one in passes),
        memory=model.memory(largest, model.loss_logits(largest.rows * largest.width)),
        loading=model.start_s,
        reading=Ends(seconds, seconds),
    )
    return EvalPlan(
        recipe=recipe,
        target=target.name,
        to_train=target.to_train,
        against=None,
        card=card,
        questions=number,
        new_tokens=None,
        lengths=lengths.source,
        parts=(work,),
    )


def _harness(recipe: EvalRecipe, target: _Model, card: Card) -> EvalPlan:
    """Return the plan of lm-eval's tasks: reading alone has a time, because lm-eval chooses by
    itself how many answers it writes together.
    """
    model, suite = target.loaded(card), recipe.suite
    strange, apart, items, requests, others = [], [], 0, 0, 0
    read = written = 0.0
    for task in suite.tasks or ():
        if task in REQUESTS:
            others += limited(REQUESTS[task], suite.limit)
            apart.append(f"{task} (the lengths of its prompts are not known without its data)")
            continue
        if task not in TASKS:
            strange.append(f"{task} (its requests are not known without its data)")
            continue
        own, each, tokens, answer = TASKS[task]
        own = limited(own, suite.limit)
        items, requests = items + own, requests + own * each
        read, written = read + own * each * tokens, written + own * answer
        if answer and model.on_gpu:
            apart.append(f"what {task} writes (lm-eval chooses its batches)")
    reading, memory = 0.0, None
    if requests:
        width = round(read / requests)
        rows = max(1, FULL_PASS // width)
        reading = model.reading_s(rows, width) * requests / rows
        memory = model.memory(AnswerBatch(1, width, 0), model.answer_logits(width, False))
    writing = 0.0 if model.on_gpu else written * model.step_s(1, 0)
    known = requests + others if not strange else None
    work = Work(
        what="lm-eval's requests",
        model=target.name,
        requests=known,
        read=Ends(read, read),
        written=Ends(written, written),
        memory=memory,
        loading=model.start_s,
        reading=Ends(reading, reading),
        writing=Ends(writing, writing),
        unknown=(*strange, *apart),
    )
    return EvalPlan(
        recipe=recipe,
        target=target.name,
        to_train=target.to_train,
        against=None,
        card=card,
        questions=items + others if known else None,
        new_tokens=None,
        lengths="of each task, assumed",
        parts=(work,),
    )
