"""When an answer counts as right: SQuAD's normalisation, and three rules."""

from __future__ import annotations

import pytest

import dali_pipeline as dp
from dali_pipeline.ingest.extract.matching import Match, words_of


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("The  Cat's\tpyjamas!", "cats pyjamas"),  # examples of SQuAD's evaluation script
        ("an apple, a day", "apple day"),
        ("U.S.A.", "usa"),
        ("1,000", "1000"),
        ("theatre", "theatre"),
        ("A", "a"),
        ("the", "the"),
        ("?!", ""),
        ("Straße – ÄÖ", "straße – äö"),
    ],
)
def test_normalisation(text: str, words: str) -> None:
    assert " ".join(words_of(text)) == words


@pytest.mark.parametrize(
    ("rule", "answer", "reference", "right"),
    [
        ("contains", "It is the Eiffel Tower.", "Eiffel tower", True),
        ("contains", "a Tower of Eiffel", "Eiffel tower", False),
        ("contains", "two kidneys", "the kidney", True),
        ("contains", "companion", "ion", False),
        ("contains", "10", "1", False),
        ("contains", "in 1990", "1990", True),
        ("contains", "", "x", False),
        ("contains", "the answer is A", "A", True),
        ("contains", "B", "A", False),
        ("contains", "首都は東京です", "東京", True),
        ("contains", "c plus plus", "c (plus)", True),
        ("exact", "The Eiffel Tower!", "eiffel tower", True),
        ("exact", "It is the Eiffel Tower", "eiffel tower", False),
        ("rouge-l:0.5", "one two three four", "one three", True),  # 2 * 2 / 6
        ("rouge-l:0.7", "one two three four", "one three", False),
        ("rouge-l:0.5", "three one", "one three", True),
        ("rouge-l:0.51", "three one", "one three", False),
        ("rouge-l:1", "The one.", "one", True),
        ("rouge-l:0.1", "", "one", False),
    ],
)
def test_rules(rule: str, answer: str, reference: str, right: bool) -> None:
    if rule.startswith("rouge"):
        pytest.importorskip("rapidfuzz")
    match = Match.parse(rule)
    assert match.is_right(answer, ["never", reference]) == right
    assert not match.is_right(answer, [])
    assert Match.parse(str(match)) == match


def test_rouge_l_is_that_of_a_table_of_common_subsequences() -> None:
    pytest.importorskip("rapidfuzz")
    import numpy as np

    from dali_pipeline.ingest.extract.matching import rouge_l

    rng = np.random.default_rng(0)
    for _ in range(50):
        one, other = ([str(word) for word in rng.choice(list("abcd"), rng.integers(1, 12))] for _ in range(2))
        table = np.zeros((len(one) + 1, len(other) + 1), int)
        for i, left in enumerate(one):
            for j, right in enumerate(other):
                table[i + 1, j + 1] = table[i, j] + 1 if left == right else max(table[i, j + 1], table[i + 1, j])
        precision, recall = table[-1, -1] / len(one), table[-1, -1] / len(other)
        expected = 2 * precision * recall / (precision + recall) if precision else 0.0
        assert rouge_l(one, other) == pytest.approx(expected)


@pytest.mark.parametrize("text", ["", "includes", "rouge-l", "rouge-l:", "rouge-l:0", "rouge-l:2", "rouge-l:x", "exact:0.3"])
def test_other_rules_are_named(text: str) -> None:
    with pytest.raises(dp.UsageError, match=r"^match is .*; expected"):
        Match.parse(text)
