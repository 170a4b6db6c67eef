"""A judge, asked in both orders over a store, and the suites that it decides.

The judge is a model in this process or a server. In mode `logits` the verdict is the token after
the lead-in `[RESULT]`, with which the judge's turn starts.
"""

from __future__ import annotations

import json
import math
import os
import re
import time
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from recipes_lib.config.preflight import local_folder
from recipes_lib.config.recipe import ModelSection
from recipes_lib.core.errors import EnvironmentFault, RecipesError, one_line
from recipes_lib.core.files import Row, hash_of, model_fingerprint, write_json
from recipes_lib.core.project import runs_root
from recipes_lib.core.run_directory import run_lock
from recipes_lib.core.terminal import bare_address, count
from recipes_lib.data.conversations import Message
from recipes_lib.evals.answers import Answers
from recipes_lib.evals.asking import ServerGone, ask_missing, not_asked
from recipes_lib.evals.audit import audit, audit_banner, audit_note, by_item, probe_items, sample_of
from recipes_lib.evals.engines import Engines
from recipes_lib.evals.engines.base import (
    REFUSED,
    TOO_LONG,
    Completion,
    Engine,
    Request,
    Sampling,
    Target,
)
from recipes_lib.evals.items import Item
from recipes_lib.evals.log import (
    EvalLog,
    JudgeFacts,
    JudgmentRow,
    Scorecard,
    Store,
    log_file,
    text_hash,
)
from recipes_lib.evals.models import bare_recipe
from recipes_lib.evals.prompts import (
    VERDICTS,
    build_prompt,
    fence_code,
    parse_verdict,
    token_bound,
    verdict_row,
)
from recipes_lib.evals.questions import TURNED, Question, pair_texts, read_labels
from recipes_lib.evals.recipe import JudgeSection, load_judge_file
from recipes_lib.evals.suites import Suite, metric_of
from recipes_lib.models.families import ready_to_answer
from recipes_lib.weights.load import free_memory, load_base, load_tokenizer, model_path

_FINGERPRINT = {
    *("model", "revision", "dtype", "engine", "extra_body", "mode", "prompt_style"),
    *("temperature", "max_new_tokens"),
}
_JUDGE_START_S = 1800  # the limit of launch/with_judge.sh where JUDGE_START_S does not say another
_SCRIPT_ENDS_S = 60  # what the script may take beyond its limit, to stop the server and to end
_JUDGE_LOG_HINT = "the server's log stands beside the job's; run the same command to continue"
LEAD_IN = "[RESULT]"  # of mode logits: the judge's turn starts with it


@dataclass(frozen=True)
class JudgeRequest:
    """One question to the judge about an item in an order."""

    row: Row  # what is stored of it; without a verdict, unless it needs no judge
    answers: tuple[str, ...]  # in the prompt's order, before they are cut
    prompt: str

    @property
    def allowed(self) -> tuple[str, ...]:
        """The verdicts that there are."""
        return VERDICTS[len(self.answers)]


# ---- asking ----


def ask(items: Sequence[Item], judge: Judge, store: Store, name: str = "") -> list[Row]:
    """Return the judgments of items; ask for those not stored, and store each as it arrives.

    Args:
        items: all to be compared, or all to be graded.
        name: stands beside the progress bar.
    """
    requests = {request.row["key"]: request for request in build_requests(items, judge)}
    store.append(request.row for request in requests.values() if "status" in request.row)

    def read(request: JudgeRequest, reply: Completion) -> Row:
        return request.row | read_reply(request, reply, judge.section.mode)

    ask_missing(store, requests, judge.complete, read, "judgment", name)
    return [row for key in requests if (row := store.get(key))]


def build_requests(items: Sequence[Item], judge: Judge) -> Iterator[JudgeRequest]:
    """Yield the requests of each item, in both orders of a pair; arguments as for `ask`."""
    if not items:
        return
    section = judge.section
    template = section.template("absolute" if items[0].opponent is None else "relative")
    rubrics = [section.rubric_of(by_reference) for by_reference in (False, True)]
    for item in items:
        answers = (item.answer,) if item.opponent is None else (item.answer, item.opponent)
        for order in item.orders:
            shown = answers[::-1] if order == "BA" else answers
            decided = None
            if item.unanswered:
                decided = verdict_row("refused", f"there is no answer: {item.unanswered}")
            elif not item.probe:
                decided = rule_verdict(shown)
            prompt = build_prompt(
                template,
                rubrics[item.reference is not None],
                item.instruction,
                shown,
                item.reference,
                code=fence_code(item.name, shown),
                # what a rule decides is not sent, so its prompt may be too long
                count_tokens=None if decided else judge.count_tokens,
                max_tokens=section.max_prompt_tokens,
            )
            # the prompt may have its answers cut
            hashes = text_hash(prompt.text), [*map(text_hash, shown)]
            decides = [item.name, order, judge.fingerprint, *hashes]
            if item.unanswered:  # an empty answer that was written loses by rule
                decides.append(item.unanswered)
            row = {
                "key": text_hash(json.dumps(decides)),
                "question_id": item.name,
                "question": item.question_id or item.name,
                "order": order,
                "probe": item.probe,
                "judge": judge.fingerprint,
                "source": "rule" if decided else "judge" if prompt.fits else "limit",
                "cut": prompt.cut,
            }
            if decided:
                row |= decided
            elif not prompt.fits:
                reason = "the prompt does not fit the judge, even with its answers cut"
                row |= verdict_row("truncated", reason)
            yield JudgeRequest(row, shown, prompt.text)


def rule_verdict(answers: Sequence[str]) -> Row | None:
    """Return the verdict that needs no judge: an empty answer loses, identical ones tie."""
    first, *others = (answer.strip() for answer in answers)
    if others and first == others[0]:
        return verdict_row("ok", "identical answers", "tie")
    if first and all(others):
        return None
    return verdict_row("ok", "empty answer", ("A" if first else "B") if others else "1")


def read_reply(request: JudgeRequest, reply: Completion, mode: str) -> Row:
    """Return the stored form of a reply: its verdict and its text or probabilities."""
    allowed, shares = request.allowed, reply.probabilities
    if reply.finish_reason == TOO_LONG:
        reason = "prompt too long: it is longer than the judge's context"
        return verdict_row("truncated", reason) | {"finish_reason": TOO_LONG}
    if reply.finish_reason == REFUSED:
        reason = f"refused by the server: {reply.refusal}"
        return verdict_row("refused", reason) | {"finish_reason": REFUSED}
    if shares is None:
        verdict = parse_verdict(reply.text, allowed, reply.finish_reason, mode == "json")
        return verdict | {"finish_reason": reply.finish_reason, "raw": reply.text}
    best, second, *_ = sorted(allowed, key=lambda verdict: -shares[verdict])
    verdict = verdict_row("unparsed", "no verdict is the most likely")  # nor where one is no number
    if shares[best] > shares[second] and all(map(math.isfinite, shares.values())):
        verdict = verdict_row("ok", value=best)
    raw = ", ".join(f"{name} {share:.4f}" for name, share in shares.items())
    return verdict | {"probabilities": shares, "raw": raw}


# ---- the judge ----


class Judge:
    """A judge that can be asked.

    Attributes:
        fingerprint: hash of weights (or served model), decoding and verdict mode.
        weights: hash of its weights, None where they are not here.
    """

    def __init__(self, section: JudgeSection, fetch: bool = True) -> None:
        self.section = section
        self.is_served = section.is_served
        self.weights: str | None = None
        self._gone: ServerGone | None = None
        model = ModelSection(
            name_or_path=section.model, revision=section.revision, dtype=section.dtype
        )
        self._recipe = bare_recipe(model)
        self._target = Target(
            name=section.model,
            recipe=self._recipe,
            load_tokenizer=lambda: self.tokenizer,
            using=self._using,
        )
        self._network: Any = None
        self._engines = Engines([self._target])
        self._engine: Engine | None = None
        if not self.is_served:
            if fetch and local_folder(self._recipe) is None:
                self.count_tokens("")  # which fetches it: the fingerprint has its commit
            self.weights = model_fingerprint(model_path(model), section.revision)
        self.fingerprint = hash_of(self.weights, section.model_dump(include=_FINGERPRINT))

    @cached_property
    def tokenizer(self) -> Any:
        """The judge's tokenizer; None where it is on the server's machine alone."""
        if not self.is_served:
            return load_tokenizer(self._recipe)
        # The server is not asked (/tokenize): what is cut, and so the key of a stored judgment,
        # would depend on whether it answers just now.
        try:
            if local_folder(self._recipe) is None:
                return None
            return load_tokenizer(self._recipe)
        except RecipesError:  # a path on the server's machine, or a folder without a tokenizer
            return None

    def facts(self) -> JudgeFacts:
        """Return what a log says about the judge."""
        address = None
        if self.is_served:  # as the recipe has it: with_judge.sh takes another port each time
            address = bare_address(str(self.section.base_url))
        return JudgeFacts(
            name=self.section.model,
            fingerprint=self.fingerprint,
            engine=self.section.engine,
            address=address,
            server=self._engine.facts().server if self._engine else None,
            weights=self.weights,
            model=self.section.model,
            mode=self.section.mode,
            weak=self.section.weak,
        )

    def count_tokens(self, text: str) -> int:
        """Return the tokens of a text; at most so many where only the server has the tokenizer."""
        if self.tokenizer is None:
            return token_bound(text)
        return len(self.tokenizer.encode(text))

    def complete(self, requests: Iterable[JudgeRequest]) -> Generator[Completion]:
        """Return the replies to requests of one kind as they arrive."""
        section = self.section
        if self._gone:
            raise not_asked(self._gone)
        if self._engine is None:
            self._engine = self._open()
        sampling = Sampling(max_new_tokens=section.max_new_tokens, temperature=section.temperature)
        if section.mode != "logits":
            return self._engine.complete(map(self._render, requests), sampling)
        requests = [*requests]
        lead_ids, tokens = verdict_tokens(self.tokenizer, LEAD_IN, requests[0].allowed)
        rendered = [replace(it, ids=(*it.ids, *lead_ids)) for it in map(self._render, requests)]
        return self._engine.weigh(rendered, tokens)

    def give_up(self, error: ServerGone) -> None:
        """Ask nothing more; what is stored is still read."""
        self._gone = error

    def close(self) -> None:
        """Let go of its weights, or of its server."""
        self._engine = None
        self._network = None
        self._engines.close()
        free_memory()

    def _open(self) -> Engine:
        """Return its engine, once launch/with_judge.sh has started its server where it does."""
        wanted = os.environ.get("RECIPES_JUDGE_WANTED")
        if wanted and self.section.served_here:
            _wait_for_server(Path(wanted))
        return self._engines.engine(self.section, self._target)

    @contextmanager
    def _using(self) -> Iterator[Any]:
        """Give its network in this process."""
        if self._network is None:
            self._network = ready_to_answer(load_base(self._recipe, self.tokenizer))
        yield self._network

    def _render(self, request: JudgeRequest) -> Request:
        """Return a request as its engine takes it: ids here, text or a message for a server."""
        text, ids = request.prompt, list[int]()
        key = request.row["key"]
        if self.section.prompt_style == "prometheus":
            text = f"[INST] {text} [/INST]"
            ids = ids if self.is_served else self.tokenizer.encode(text)
            return Request(key=key, prompt=text, ids=tuple(ids))
        messages = (Message(role="user", content=text),)  # some templates have no system role
        if not self.is_served:
            try:
                template = self.tokenizer.apply_chat_template
                ids = template(messages, add_generation_prompt=True, return_dict=False)
            except Exception as error:  # templates raise what they like
                what = f"the judge's chat template refuses the prompt: {one_line(error)}"
                hint = "a judge without a chat template: judge.prompt_style: prometheus"
                raise EnvironmentFault(what, hint) from None
        result = {"type": "string", "enum": list(request.allowed)}
        schema = {
            "type": "object",
            "properties": {"feedback": {"type": "string"}, "result": result},
            "required": ["feedback", "result"],
            "additionalProperties": False,
        }
        schema_if_json = schema if self.section.mode == "json" else None
        return Request(key=key, messages=messages, ids=tuple(ids), schema=schema_if_json)


def _wait_for_server(wanted: Path) -> None:
    """Ask launch/with_judge.sh for the judge's server, and return once it answers.

    Raises:
        EnvironmentFault: the script ended, or gave no answer within its own limit (JUDGE_START_S).
    """
    answers = wanted.with_name(f"{wanted.name}.answers")
    limit = float(os.environ.get("JUDGE_START_S", _JUDGE_START_S)) + _SCRIPT_ENDS_S
    wanted.touch()
    end = time.monotonic() + limit
    while not answers.exists():
        # the script removes the file when it ends
        if not wanted.exists():
            what = "launch/with_judge.sh ended before the judge's server answered"
            raise EnvironmentFault(what, _JUDGE_LOG_HINT)
        if time.monotonic() > end:
            what = f"launch/with_judge.sh started no judge that answers within {limit:.0f} s"
            raise EnvironmentFault(what, _JUDGE_LOG_HINT)
        time.sleep(0.1)


@contextmanager
def opened(section: JudgeSection) -> Iterator[Judge]:
    """Give a judge; afterwards its memory is free again."""
    judge = Judge(section)
    try:
        yield judge
    finally:
        judge.close()


def verdict_tokens(
    tokenizer: Any, lead_in: str, allowed: Sequence[str]
) -> tuple[list[int], dict[str, int]]:
    """Return the lead-in's token ids and, per verdict, the token that means it.

    A verdict follows after a space. Where the tokenizer makes the space a token of its own, before
    digits for example, or merges it with some verdicts only, it becomes part of the lead-in.
    """
    encode = partial(tokenizer.encode, add_special_tokens=False)
    spaced = {verdict: encode(f"{lead_in} {verdict}") for verdict in allowed}
    columns = enumerate(zip(*spaced.values(), strict=False))
    common = next((place for place, column in columns if len(set(column)) > 1), 0)
    lead_ids = spaced[allowed[0]][:common]
    tokens = {verdict: ids[common] for verdict, ids in spaced.items()}
    if len(set(tokens.values())) < len(allowed):
        lead_ids = encode(f"{lead_in} ")
        tokens = {verdict: encode(verdict)[0] for verdict in allowed}
    if len(set(tokens.values())) < len(allowed):
        what = f"this judge's tokenizer has no single token for each of {', '.join(allowed)}"
        raise EnvironmentFault(what, "set judge.mode: generate")
    return lead_ids, tokens


# ---- suites that a judge decides ----


class JudgedSuite(Suite):
    """A suite that a judge decides: it says how the judge is asked about an answer."""

    def item(
        self, question: Question, turn: int, answers: Answers, opponent: Answers | None
    ) -> Item:
        """Return what the judge is asked: to grade an answer, or to compare it with another."""
        raise NotImplementedError

    def items(self, answers: Answers, opponent: Answers | None = None) -> Iterator[Item]:
        """Yield what the judge is asked about all answers."""
        for question in self.chosen.questions:
            for turn, said in enumerate(question.turns, 1):
                item, place = self.item(question, turn, answers, opponent), (question.id, turn)
                sample = {
                    "turn": turn,
                    "category": question.category or "all",
                    "input": said,
                    "answer": answers.text(place),
                    "opponent": opponent.text(place) if opponent else None,
                    "cut": place in answers.cut,
                }
                unanswered = answers.unanswered.get(place, "")
                if opponent and not unanswered:
                    unanswered = opponent.unanswered.get(place, "")
                yield replace(item, question_id=question.id, sample=sample, unanswered=unanswered)

    def write(self, log: EvalLog) -> None:
        """Write files for other programs beside a log."""


def judge_model(
    suite: JudgedSuite, answers: Answers, opponent: Answers | None, judge: Judge, probes: list[Row]
) -> EvalLog:
    """Have a judge give every verdict on a model that is missing, audit it, and return the log.

    Args:
        opponent: whose answers the model's are compared with, where the suite does that.
        probes: the judgments of probes, which are made with the answers of the first model.
    """
    recipe, chosen, section = suite.recipe, suite.chosen, judge.section
    assert answers.run is not None
    against, name = opponent.name if opponent else None, answers.name
    items = [*suite.items(answers, opponent)]
    file = log_file(answers.run.path, recipe.name, against)
    with run_lock(file.parent, wait=True):
        judgments = file.with_name(f"judgments{file.name.removeprefix('result')}l")
        store = Store(judgments, JudgmentRow)
        rows = ask(items, judge, store, name)
        probed = [] if probes else [*probe_items(items, recipe.metrics.probe_pairs)]
        if probed:
            probes += [*rows, *ask(probed, judge, store, "probes")]
    judged = by_item(rows)
    samples = [
        sample_of(item.question_id, judged[item.name], item.orders, **item.sample) for item in items
    ]
    named = f"{suite.title} {{}}" if chosen.published else f"{{}} on {recipe.name}"
    metric = metric_of("grade", named.format("mean grade (1-5)"), samples, "grade")
    if opponent:
        metric = metric_of("win_rate", named.format("win rate"), samples, opponent=against)
    labels: dict[str, str] = {}  # what people said of these pairs, by the name of the item
    for item in items if chosen.labels else ():
        texts = pair_texts(item.instruction, item.answer, str(item.opponent))
        turned = chosen.labels.get((texts[0], texts[2], texts[1]), "")
        if label := chosen.labels.get(texts) or TURNED.get(turned, ""):
            labels[item.name] = label
    card = audit(rows, recipe.thresholds, labels, probes)
    weak = section.weak and f"Weak judge: {section.weak}."
    banners = [*filter(None, [weak, audit_banner(card)])]
    # bases included: a model that was fine-tuned from the judge counts too
    if section.model in (*answers.facts.models, *(opponent.facts.models if opponent else ())):
        banners.append(f"{section.model} judges its own answers: expect self-preference")
    notes = [*answers.notes]
    if opponent:
        notes += opponent.notes
    notes += filter(None, [audit_note(card)])
    if (bare := chosen.without_reference) and not opponent:
        num = count(len(bare), "question")
        notes.append(f"{num} graded without the reference needed: {', '.join(bare[:8])}")
    log = suite.new_log(
        [metric],
        target=name,
        against=against,
        n=len(chosen.questions),
        subset=chosen.subset,
        banners=tuple(banners),
        notes=tuple(notes),
        answers=answers.facts,
        opponent=opponent.facts if opponent else None,
        judge=judge.facts(),
        audit=card,
        file=file,
    )
    suite.write(log)
    return log


# ---- recipes judge audit ----


def audit_on_labels(
    judge: str, labels: Path, limit: int | None, probe_pairs: int
) -> tuple[Scorecard, Path]:
    """Judge labelled pairs; return the scorecard, and where the judgments are kept:
    runs/judge--<judge>/<labels>/.

    Args:
        limit: how many pairs, drawn by hash: a larger limit keeps the judged ones.
    """
    file, outcomes = load_judge_file(judge), read_labels(labels)
    ids = {text_hash("\0".join(texts))[:16]: texts for texts in outcomes}
    chosen = dict(sorted(ids.items())[:limit])
    items = [Item(name, *texts) for name, texts in chosen.items()]
    names = [re.sub(r"[^\w.-]+", "-", name) for name in (Path(judge).stem, labels.stem)]
    folder = runs_root() / f"judge--{names[0]}" / names[1]
    with run_lock(folder, wait=True), opened(file.judge) as opened_judge:
        store = Store(folder / "judgments.jsonl", JudgmentRow)
        rows = ask(items, opened_judge, store, "labelled pairs")
        probes = ask([*probe_items(items, probe_pairs)], opened_judge, store, "probes")
    known = {name: outcomes[texts] for name, texts in chosen.items()}
    card = audit(rows, file.thresholds, known, [*rows, *probes])
    write_json(folder / "judge_audit.json", asdict(card))  # compare and report read it
    return card, store.path
