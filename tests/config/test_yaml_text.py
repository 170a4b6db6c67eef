from __future__ import annotations

import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from recipes_lib.config.yaml_text import join_lines, value_text, yaml_lines

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-1000, 1000)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(
        st.characters(codec="utf-8", exclude_categories=["Cc", "Cs", "Zl", "Zp"]), max_size=20
    )
)
VALUES = SCALARS | st.lists(SCALARS, max_size=3)


@given(
    st.dictionaries(
        st.from_regex(r"[a-z]{1,8}", fullmatch=True).filter(lambda key: yaml.safe_load(key) == key),
        VALUES,
        max_size=4,
    )
)
@example({"a": "\u00a0"})
def test_what_is_printed_is_read_back_as_the_same_values(values):
    text = join_lines(yaml_lines({"section": values}, lambda path: "from here"))
    assert yaml.safe_load(text) == {"section": values}


def test_comments_are_aligned_and_long_lines_do_not_push_the_others():
    text = join_lines([("a: 1", "x"), ("bb: 22", "y"), ("c: " + "z" * 80, "w")])
    assert text.splitlines()[:2] == ["a: 1    # x", "bb: 22  # y"]


def test_text_that_yaml_would_coerce_is_quoted():
    assert yaml.safe_load(value_text("NO")) == "NO"
    assert yaml.safe_load(value_text("1:30")) == "1:30"
