"""Classes: their order, their names, and what is refused."""

from __future__ import annotations

import pytest

from cxr.errors import UserError
from cxr.task import KAGGLE, Task, slug


def test_of_two_classes_the_second_or_the_named_one_is_positive() -> None:
    assert Task.of(["b", "a", "b"]).positive == "b"
    assert Task.of(["b", "a"], positive="a") == Task(("b", "a"))
    assert Task.of(["b", "a"], classes="b, a").positive == "a"
    assert Task.of(["c", "b", "a"]).positive is None


def test_names_in_columns_and_parameters() -> None:
    assert slug("Pleural effusion (left)") == "pleural_effusion_left"
    assert Task(("R&D", "x")).keys == ("r_d", "x")
    assert KAGGLE.keys == KAGGLE.classes


@pytest.mark.parametrize(
    ("names", "options", "says"),
    [
        (["a"], {}, "a: a classifier needs 2 to 50 classes"),
        ([str(n) for n in range(60)], {}, "and 55 more: a classifier needs"),
        (["a!", "a?"], {}, "no metrics could be named after them"),
        (["!", "a"], {}, "no metrics could be named after them"),
        (["opacity", "opacity low"], {}, "no metrics could be named after them"),
        (["a", "b"], {"classes": "a,c"}, "c not in the data; b in the data and not listed"),
        (["a", "b", "c"], {"positive": "a"}, "must name one of the two classes; the data has a, b, c"),
    ],
)
def test_names_that_cannot_be_classes_are_refused(names: list[str], options: dict[str, str], says: str) -> None:
    with pytest.raises(UserError) as refused:
        Task.of(names, **options)
    assert says in str(refused.value)
