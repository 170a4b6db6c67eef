"""A row of the tested table."""

from dataclasses import dataclass
from typing import Any

from recipes_lib.stats import ALPHA, Comparison, Limits


@dataclass(kw_only=True)
class TableRow:
    """Two arms on one metric, filled while the table is built."""

    metric: str
    label: str
    eval: str
    suite: str
    first: str
    second: str
    unit: str
    higher_is_better: bool | None
    opponent: str | None = None
    head_to_head: bool = False
    first_value: float | None = None
    second_value: float | None = None
    first_length: float | None = None  # median characters of the first arm's answers
    second_length: float | None = None
    test: Comparison | None = None
    by_seed: tuple[float, ...] = ()  # the difference of each pair of trainings
    n: int = 0
    trainings: tuple[int, int] = (0, 0)  # of each arm; 0 of a model not trained here
    why_not: str = ""  # why it has no verdict
    aside: str = ""  # why it is shown and not tested
    is_stopped: bool = False  # by an error among the findings: it can have no verdict
    primary: bool = False
    margin: float | None = None
    alpha: float = ALPHA  # the level that all tests of the table have together
    p: float | None = None  # corrected over the table and over looks: 5% is the limit
    p_margin: Limits | None = None  # the same of not being worse, and of not being better
    mde: Limits | None = None  # the range of the difference that it finds with 80% probability
    seeds_left: int = 0  # until the last look
    chance: float | None = None  # that the last look shows anything; None at the last look
    tests: int = 0
    flags: tuple[str, ...] = ()
    files: tuple[str, ...] = ()

    @property
    def arms(self) -> tuple[str, str]:
        """Both arms."""
        return self.first, self.second

    @property
    def is_tested(self) -> bool:
        """Whether the row has a test that could carry a verdict."""
        return self.test is not None and not self.why_not and not self.aside

    @property
    def is_counted(self) -> bool:
        """Whether the row is one of the tests that are corrected together."""
        return self.is_tested and not self.is_stopped

    @property
    def has_several_trainings(self) -> bool:
        """Whether each trained arm of the row was trained at least twice, and one was trained.

        How far apart two seeds lie is known from two trainings on. A base was never trained here,
        so beside a trained arm it needs none. Of two models not trained here nobody knows.
        """
        trained = [number for number in self.trainings if number > 0]
        return bool(trained) and min(trained) > 1

    @property
    def difference(self) -> float | None:
        """The first arm minus the second; head to head its win rate minus one half."""
        return self.test.resolved.value if self.test else None

    @property
    def interval(self) -> Limits | None:
        """The interval of the difference: of 95%, at a look of the look's level."""
        return self.test.interval(self.alpha) if self.test else None

    def to_dict(self) -> dict[str, Any]:
        """Return the row as plain values."""
        values = dict(vars(self))
        test = values.pop("test")
        low, high = self.interval or (None, None)
        return values | {
            "difference": self.difference,
            "low": low,
            "high": high,
            "p_alone": test.p if self.is_tested else None,
            "questions": test.resolved.questions if test else None,
            "unresolved": test.unresolved if test else None,
        }
