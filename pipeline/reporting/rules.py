"""Strategies of one rule: those that differ in nothing but the share they keep."""

from pipeline.pruning import ConstantEps, MarginEps, Strategy

CONSTANT = ConstantEps()
PERCEPTRON = {  # the rules of the perceptron as strategies
    "none": Strategy(),
    "random": Strategy(score="random"),
    "prune_easy": Strategy(score="margin", prune="highest"),
    "prune_hard": Strategy(score="margin", prune="lowest"),
    "adaptive_eps": Strategy(eps=MarginEps(rule="margin")),
    "puma": Strategy(score="margin", prune="highest", eps=MarginEps(rule="margin")),
}


def plain(strategy: Strategy) -> Strategy:
    """The same without the settings that say how to prune where nothing is pruned."""
    if strategy.score is not None:
        return strategy
    return strategy.model_copy(
        update={name: getattr(Strategy(), name) for name in ("prune", "keep", "per_class", "budget", "seed")}
    )


def rule_of(strategy: Strategy) -> Strategy:
    """Equal for strategies of one rule."""
    return plain(strategy).model_copy(update={"keep": 1.0})
