"""What the report says of AutoAttack's warnings."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipeline.reporting.flags import flag_sentences
from pipeline.reporting.runs import Run, read_runs
from tests.reporting.conftest import SEEDS

FINE = {"random_outputs": 0, "probability_outputs": False, "zero_gradients": 0, "square_stronger": False}


@pytest.fixture
def runs(made: Path) -> list[Run]:
    found = read_runs(made / "manifests", made / "evaluations", ["none"], SEEDS)
    return [replace(run, flags=FINE, version="standard") for run in found]


def test_nothing_found_is_said_of_every_check(runs: list[Run]) -> None:
    told = flag_sentences(runs)
    assert len(told) == 1 + len(FINE)
    assert all(sentence.startswith("Checked in 2 of 2 runs: ") for sentence in told[1:])


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("random_outputs", 3, "change from call to call"),
        ("probability_outputs", True, "probabilities, not logits"),
        ("zero_gradients", 1, "gradients are zero"),
        ("square_stronger", True, "gradients may be masked"),
    ],
)
def test_a_warning_names_the_run(runs: list[Run], key: str, value: Any, words: str) -> None:
    found = flag_sentences([runs[0], replace(runs[1], flags=FINE | {key: value})])
    warned = [sentence for sentence in found if sentence.startswith("Warning")]
    assert len(warned) == 1
    assert words in warned[0]
    assert warned[0].endswith("(none-1).")


def test_what_was_run_is_told_and_evaluations_without_checks_are_passed_over(runs: list[Run]) -> None:
    whole = [replace(run, attacks=dict.fromkeys(("apgd-ce", "apgd-t", "fab-t", "square"), 0.5)) for run in runs]
    assert flag_sentences(whole)[0] == "AutoAttack, standard: apgd-ce, apgd-t, fab-t, square."
    few = [replace(run, attacks={"apgd-ce": 0.5, "fab-t": 0.5, "square": 0.5}) for run in runs]
    assert "fewer than four classes: apgd-ce, fab-t, square" in flag_sentences(few)[0]
    assert flag_sentences([replace(run, version="custom") for run in runs])[0].startswith(
        "AutoAttack in part: apgd-ce, apgd-t."
    )
    assert flag_sentences([replace(run, flags={}) for run in runs]) == []
