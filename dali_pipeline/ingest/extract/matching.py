"""Match an answer with reference answers, after the normalisation of SQuAD (Rajpurkar et al. 2016)."""

from __future__ import annotations

import re
import string
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, get_args

from dali_pipeline.errors import UsageError, needs_extra

Rule = Literal["contains", "exact", "rouge-l", "none"]
ARTICLES = ("a", "an", "the")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def words_of(text: str) -> list[str]:
    """Return the words of a text in lower case, without ASCII punctuation and without articles.

    A text of nothing but articles keeps them, so that the choice `A` remains one.
    """
    words = text.lower().translate(_PUNCTUATION).split()
    return [word for word in words if word not in ARTICLES] or words


@dataclass(frozen=True)
class Match:
    """When an answer counts as right.

    Attributes:
        rule: "contains" if a reference occurs in the answer, at the begin of a word: `kidney` in `kidneys`, but neither `ion`
            in `companion` nor `1` in `10`. "exact" if the answer is a reference. "rouge-l" if the F-measure of ROUGE-L (Lin
            2004) with a reference reaches the threshold. "none" if nothing is compared.
        threshold: Least F-measure, for "rouge-l".
    """

    rule: Rule = "contains"
    threshold: float = 0.0

    @classmethod
    def parse(cls, text: str) -> Match:
        """Return the match of a text such as `contains`, `exact`, `rouge-l:0.3` or `none`; raise UsageError for others."""
        rule, colon, threshold = text.partition(":")
        if rule not in get_args(Rule) or bool(colon) != (rule == "rouge-l"):
            raise UsageError(f"match is {text!r}; expected contains, exact, rouge-l:0.3 or none")
        try:
            value = float(threshold or 0)
        except ValueError:
            value = -1.0
        if rule == "rouge-l":
            if not 0 < value <= 1:
                raise UsageError(f"match is {text!r}; expected a threshold above 0 and up to 1, as in rouge-l:0.3")
            with needs_extra("extract", "--match rouge-l"):
                import rapidfuzz  # noqa: F401
        return cls(rule, value)  # type: ignore[arg-type]

    def __str__(self) -> str:
        return f"rouge-l:{self.threshold:g}" if self.rule == "rouge-l" else self.rule

    def is_right(self, answer: str, references: Iterable[str]) -> bool:
        """Return whether an answer matches one of the references; an empty answer matches none."""
        return any(self._agrees(answer, reference) for reference in references)

    def _agrees(self, answer: str, reference: str) -> bool:
        expected, given = words_of(reference), words_of(answer)
        if not expected or not given:
            return False
        if self.rule == "exact":
            return given == expected
        if self.rule == "rouge-l":
            return rouge_l(given, expected) >= self.threshold
        if all(word in ARTICLES for word in expected):
            given = answer.lower().translate(_PUNCTUATION).split()
        text = " ".join(expected)
        end = r"(?!\d)" if text[-1].isdigit() else ""
        return re.search(rf"(?<![a-z0-9]){re.escape(text)}{end}", " ".join(given)) is not None


def rouge_l(given: list[str], expected: list[str]) -> float:
    """Return the F-measure of the longest common subsequence of two lists of words: 2 LCS / (m + n)."""
    from rapidfuzz.distance import Indel

    return float(Indel.normalized_similarity(given, expected))
