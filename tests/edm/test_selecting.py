"""Selection while drawing, with drawn images whose score is written in their pixels."""

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from pipeline.balls import BALLS
from pipeline.batches import to_tensor
from pipeline.deepfool import DeepFoolParams
from pipeline.edm.selecting import (
    ATTEMPT,
    PILOT,
    ClassAgreement,
    MarginSelection,
    Selector,
    TopConfidence,
    account,
    given_thresholds,
    pilot_thresholds,
    scorer,
)
from pipeline.images import Images, Labels
from pipeline.manifest import prune
from pipeline.margins import MarginsSection, as_table, measure
from pipeline.params import InputError
from pipeline.pruning import Strategy
from tests.conftest import digits, untrained

CPU = torch.device("cpu")
MARGIN: dict[str, Any] = {"kind": "margin", "norm": "linf", "keep": 0.7}


def drawn(rows: NDArray[np.int64], _: Labels) -> Images:
    """One pixel of a value that is a function of the row, as uniform as random ones."""
    values = [np.random.default_rng(int(row)).integers(0, 256) for row in rows]
    return np.array(values, np.uint8).reshape(-1, 1, 1, 1)


def brightness(images: Images, _: Labels) -> NDArray[np.float32]:
    return images[:, 0, 0, 0].astype(np.float32)


def selected(start: int, stop: int, *, cuts: list[float], batch_size: int = 8, tries: int = 1000) -> tuple[Any, Any, Any]:
    selector = Selector(drawn, brightness, cuts, tries)
    images, labels = zip(*selector.images(start, stop, batch_size), strict=True)
    return np.concatenate(images)[:, 0, 0, 0], np.concatenate(labels), np.concatenate(selector.attempts)


def test_a_row_is_the_first_of_its_attempts_that_is_accepted() -> None:
    values, labels, attempts = selected(0, 30, cuts=[100, 200])
    assert labels.tolist() == [row % 2 for row in range(30)]
    for row, value in enumerate(values):
        tries = [int(drawn(np.array([row + k * ATTEMPT]), labels)[0, 0, 0, 0]) for k in range(attempts[row])]
        cut = [100, 200][row % 2]
        assert tries[-1] == value >= cut
        assert all(other < cut for other in tries[:-1])
    assert attempts[1::2].sum() > attempts[::2].sum() > 15


def test_rows_do_not_depend_on_the_shards() -> None:
    whole, _, attempts = selected(0, 20, cuts=[128])
    for start, stop in ((0, 8), (3, 5), (7, 17), (19, 20)):
        values, _, tries = selected(start, stop, cuts=[128])
        assert values.tolist() == whole[start:stop].tolist()
        assert tries.tolist() == attempts[start:stop].tolist()


@pytest.mark.parametrize("borders", [(0, 20), (0, 7, 20), (0, 8, 16, 20), (0, 3, 5, 19, 20)])
def test_all_that_is_drawn_is_counted_and_belongs_to_a_row_that_is_wanted(borders: tuple[int, ...]) -> None:
    named: list[int] = []

    def noted(rows: NDArray[np.int64], labels: Labels) -> Images:
        named.extend(rows.tolist())
        return drawn(rows, labels)

    attempts = []
    for start, stop in pairwise(borders):
        selector = Selector(noted, brightness, [128], 1000)
        list(selector.images(start, stop, 8))
        attempts += selector.attempts
    assert len(named) == np.concatenate(attempts).sum() > 20
    assert np.bincount(np.array(named) % ATTEMPT).tolist() == np.concatenate(attempts).tolist()


def test_a_row_that_is_never_accepted_ends_in_an_error_that_names_its_class() -> None:
    with pytest.raises(InputError, match=r"row 1 of class 1 was not accepted in 50 attempts; raise keep"):
        selected(0, 4, cuts=[0, 256], tries=50)


def test_a_score_that_is_no_number_is_not_accepted() -> None:
    scores = iter([np.array([np.nan], np.float32), np.array([-np.inf], np.float32), np.array([1], np.float32)])
    selector = Selector(drawn, lambda *_: next(scores), [0.0], 5)
    list(selector.images(0, 1, 1))
    assert selector.attempts[0].tolist() == [3]


def test_the_pilot_finds_the_cut_of_each_class_or_of_all_and_uses_no_row_of_the_images() -> None:
    seen: list[int] = []

    def noted(rows: NDArray[np.int64], labels: Labels) -> Images:
        seen.extend(rows.tolist())
        return drawn(rows, labels) // (1 + labels[:, None, None, None].astype(np.uint8))  # class 1 is half as bright

    per_class = pilot_thresholds(TopConfidence(kind="top_confidence", keep=0.2, pilot_images=1000), noted, brightness, 2, 300)
    assert per_class[0] == pytest.approx(205, abs=12)
    assert per_class[1] == pytest.approx(102, abs=8)
    (first, second) = pilot_thresholds(MarginSelection(**MARGIN, pilot_images=1000), noted, brightness, 2, 300)
    assert first == second
    assert min(seen) == PILOT > 1000 * ATTEMPT
    assert max(seen) < 2**63


def test_thresholds_that_are_given_need_no_pilot() -> None:
    assert given_thresholds(MarginSelection(**MARGIN, threshold_255=9.0), 3) == [-9, -9, -9]
    assert given_thresholds(MarginSelection(**MARGIN, threshold_255=9.0, prune="lowest"), 2) == [9, 9]
    assert given_thresholds(ClassAgreement(kind="class_agreement"), 2) == [0.5, 0.5]
    assert given_thresholds(MarginSelection(**MARGIN), 2) is None


def test_a_pilot_without_any_margin_is_an_error() -> None:
    with pytest.raises(InputError, match="no image of the pilot has a margin"):
        pilot_thresholds(MarginSelection(**MARGIN), drawn, lambda images, _: np.full(len(images), -np.inf, np.float32), 1, 50)


def test_scores_are_the_confidence_and_the_agreement_of_the_guide() -> None:
    images, labels = digits("train", 30)
    guide = untrained()
    with torch.no_grad():
        p = guide(to_tensor(images, CPU)).softmax(dim=1).numpy()
    confidence = scorer(TopConfidence(kind="top_confidence", keep=0.5), guide, CPU)(images, labels)
    np.testing.assert_allclose(confidence, p[np.arange(30), labels], rtol=1e-4)
    agrees = scorer(ClassAgreement(kind="class_agreement"), guide, CPU)(images, labels)
    np.testing.assert_array_equal(agrees, p.argmax(axis=1) == labels)


@pytest.mark.parametrize("end", ["highest", "lowest"])
def test_margin_selection_keeps_of_the_pilot_what_the_manifest_keeps(end: Any) -> None:
    images, labels = digits("train", 60)
    labels = np.arange(60) % 10  # the classes of drawn images come in turn
    guide, rule = untrained(), MarginSelection(**MARGIN | {"keep": 0.3}, prune=end, pilot_images=60)

    def draw(rows: NDArray[np.int64], _: Labels) -> Images:
        return images[rows - PILOT]

    score = scorer(rule, guide, CPU)
    (cut, *_) = pilot_thresholds(rule, draw, score, 10, 60)
    kept = score(images, labels) >= np.float32(cut)
    settings = MarginsSection(deepfool=DeepFoolParams(), grand=False, batch_size=60, shard_rows=60, max_not_converged=1.0)
    x, y = to_tensor(images, CPU), torch.from_numpy(labels)
    found = measure(guide, x, y, np.arange(60), "synthetic", BALLS["linf"], settings, None)
    table, _ = prune(as_table(found, "synthetic", 0), Strategy(score="margin", prune=end, keep=0.3), 0.1)
    np.testing.assert_array_equal(kept, table["kept"].to_numpy())
    assert kept.sum() == 18


def test_the_account_counts_what_was_drawn_for_what_was_kept() -> None:
    rule = TopConfidence(kind="top_confidence", keep=0.5, pilot_images=10)
    found = account(rule, "abc", [0.5, 0.25], np.array([1, 3, 1, 5]), ("a", "b"), evaluations=7)
    assert found["acceptance"] == 0.4
    assert found["acceptance_by_class"] == {"a": 1.0, "b": 0.25}
    assert (found["kept"], found["drawn"], found["drawn_for_pilot"], found["network_evaluations"]) == (4, 10, 10, 140)
    assert (found["rule"]["keep"], found["guide"], found["thresholds"]) == (0.5, "abc", [0.5, 0.25])
