"""AutoAttack's warnings about a defence, in sentences: what was checked, in which runs something was found."""

from collections.abc import Sequence

from pipeline.reporting.runs import Run

STANDARD = ("apgd-ce", "apgd-t", "fab-t", "square")

# key in metrics.json, what is well, what is wrong
CHECKS: tuple[tuple[str, str, str], ...] = (
    (
        "random_outputs",
        "outputs do not change from call to call",
        "outputs change from call to call: attacks without expectation over randomness overestimate the robustness",
    ),
    (
        "probability_outputs",
        "outputs are logits",
        "outputs are probabilities, not logits: their gradients vanish and the attacks are too weak",
    ),
    (
        "zero_gradients",
        "no gradient is zero",
        "gradients are zero at some images: attacks that follow them are unreliable",
    ),
    (
        "square_stronger",
        "Square, which needs no gradient, finds no more than the attacks before it",
        "Square, which needs no gradient, beats the attacks before it: gradients may be masked",
    ),
)


def flag_sentences(runs: Sequence[Run]) -> list[str]:
    """What was run, then one sentence per check; none where the evaluations have no flags."""
    checked = [run for run in runs if run.flags]
    if not checked:
        return []
    return [attack_sentence(checked[0]), *(sentence(checked, key, well, wrong) for key, well, wrong in CHECKS)]


def attack_sentence(run: Run) -> str:
    names = ", ".join(run.attacks)
    if set(STANDARD) <= set(run.attacks):
        return f"AutoAttack, standard: {names}."
    if run.version == "standard":
        return f"AutoAttack, standard, as far as it is defined for fewer than four classes: {names}."
    return f"AutoAttack in part: {names}. The robust accuracy is an upper bound of that under {', '.join(STANDARD)}."


def sentence(runs: Sequence[Run], key: str, well: str, wrong: str) -> str:
    found = [run.name for run in runs if run.flags.get(key)]
    num_checked = sum(run.flags.get(key) is not None for run in runs)
    if found:
        return f"Warning: {wrong} ({', '.join(found)})."
    if not num_checked:
        why = ", because Square or what it is held against was not run" if key == "square_stronger" else ""
        return f"Not checked{why}: {well}."
    return f"Checked in {num_checked} of {len(runs)} runs: {well}."
