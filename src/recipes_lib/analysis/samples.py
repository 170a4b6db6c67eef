"""The sample browser's material: questions, answers, what the judge wrote. All of it is text of
models, and stays text.

A page holds what fits into `MOST_CHARACTERS`, evenly chosen; all of it is in the runs' own files.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field

from recipes_lib.analysis.runs import Arms
from recipes_lib.core.terminal import printable
from recipes_lib.evals.log import ORDERS, Sample

MOST_CHARACTERS, LONGEST_TEXT = 330_000, 4_000


@dataclass
class Samples:
    """Samples by group (one evaluation of one run) with a table of their texts. A sample is (group,
    question, category, outcome, turned, place of the input, of the answer, of the opponent's
    answer, verdicts), a verdict (order, what was said, place of its text).
    """

    groups: list[dict[str, str]] = field(default_factory=list)
    samples: list[list[object]] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    total: int = 0
    _places: dict[str, int] = field(default_factory=dict, repr=False)

    def place(self, text: str | None) -> int | None:
        """Return the place of a text in the table, adding it; a long one is cut and says so."""
        if text is None:
            return None
        if len(text) > LONGEST_TEXT:
            text = f"{text[:LONGEST_TEXT]}\n[cut here: {len(text):,} characters in all]"
        if text not in self._places:
            self._places[text] = len(self.texts)
            self.texts.append(printable(text))
        return self._places[text]

    def add(self, group: int, sample: Sample) -> None:
        """Add a sample of a group."""
        name = sample.id
        name += f", turn {sample.turn}" * (sample.turn > 1)
        name += f", answer {sample.draw}" * (sample.draw > 1)
        orders = ORDERS if sample.opponent is not None else ("grade",)
        said = zip(orders, sample.verdicts, sample.raws, strict=False)
        graded = sample.outcome == "graded" and sample.value is not None
        self.samples.append(
            [
                group,
                printable(name),
                printable(sample.category),
                f"grade {sample.value:g}" if graded else sample.outcome,
                int(sample.flip),
                self.place(sample.input or f"question {sample.id}"),
                self.place(sample.answer or ""),
                self.place(sample.opponent),
                [[order, printable(verdict), self.place(raw)] for order, verdict, raw in said],
            ]
        )

    def json(self) -> str:
        """Return them as JSON that is safe inside a script element."""
        value = {"groups": self.groups, "texts": self.texts, "samples": self.samples}
        text = json.dumps(value, ensure_ascii=True, separators=(",", ":"))
        return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def collect_samples(arms: Arms) -> Samples:
    """Return the samples of every evaluation that has texts, comparisons between arms first."""
    browser = Samples()
    pages = []
    size = 0  # of all texts; a question stands there once for all arms
    for arm, log in sorted(
        arms.logs, key=lambda logged: arms.opponent(logged[1].against) not in arms.by_name
    ):
        # of the comparison, else of the first metric
        metrics = sorted(log.metrics, key=lambda metric: metric.opponent is None)[:1]
        samples = [each for metric in metrics for each in metric.samples]
        samples = [each for each in samples if each.answer or any(each.raws)]
        if samples:
            pages.append((arm, log, samples))
            browser.total += len(samples)
        for sample in samples:
            texts = [sample.answer, sample.opponent, *sample.raws]
            size += 80 + sum(min(len(text or ""), LONGEST_TEXT) for text in texts)
    step = max(1, -(-size // MOST_CHARACTERS))
    for group, (arm, log, samples) in enumerate(pages):
        opponent = arms.opponent(log.against) or ""
        how = f"against {opponent}" if opponent else "graded" if log.judge else "checked by rules"
        folder = "/".join(log.file.parent.parts[-3:])
        title = f"{log.eval}: {arm} {how}"
        browser.groups.append({"title": title, "arm": arm, "opponent": opponent, "folder": folder})
        for sample in samples[::step]:
            browser.add(group, sample)
    return browser
