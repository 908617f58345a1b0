"""Pruning by margin where all is known: a teacher perceptron on Gaussian data, and students trained on what is kept.

x ~ N(0, I_d), y = sign(t . x), |t| = 1, an L2 adversary of radius eps. For a linear student the worst case is exact
(the margin y w . x falls by eps |w|), so no attack is run: training and both accuracies have closed forms.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Annotated, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt
from scipy.optimize import minimize
from scipy.special import expit, ndtr, ndtri, owens_t
from threadpoolctl import threadpool_limits

from pipeline.params import InputError, Section

Floats = NDArray[np.float64]

MOST_GRADIENT = 1e-4  # of the training loss at a student that counts as trained


class PerceptronSection(Section):
    """`fractions` are pruned, `alphas` are kept samples per dimension; `probe_angle_deg` turns the perceptron that
    measures the margins away from the teacher (0: the margins are the true ones)."""

    dimension: Annotated[int, Field(ge=2)]
    eps: PositiveFloat
    fractions: Annotated[tuple[Annotated[float, Field(gt=0, lt=1)], ...], Field(min_length=1)]
    alphas: Annotated[tuple[PositiveFloat, ...], Field(min_length=1)]
    num_seeds: Annotated[int, Field(ge=2)]
    num_examples: PositiveInt
    weight_decay: PositiveFloat
    probe_angle_deg: Annotated[float, Field(ge=0, lt=90)]
    seed: NonNegativeInt


@dataclass(frozen=True)
class Rule:
    """Which samples go, and whether those that stay are attacked with min(eps, margin) instead of eps."""

    prunes: Literal["nothing", "random", "easy", "hard"]
    lowers_eps: bool = False


RULES = {
    "none": Rule("nothing"),
    "random": Rule("random"),
    "prune_easy": Rule("easy"),
    "prune_hard": Rule("hard"),
    "adaptive_eps": Rule("nothing", lowers_eps=True),
    "puma": Rule("easy", lowers_eps=True),
}


@dataclass(frozen=True)
class Share:
    """Share of the kept samples that an attack can push over the true boundary; the standard error is binomial."""

    rule: str
    fraction: float
    exact: float
    monte_carlo: float
    standard_error: float
    num_kept: int

    @property
    def setting(self) -> str:
        return name_setting(self.rule, self.fraction)


@dataclass(frozen=True)
class Point:
    """One point of the learning curves: accuracies (num_seeds,) of the students of one rule at one alpha."""

    rule: str
    fraction: float
    alpha: float
    num_kept: int
    num_pool: int
    clean: Floats
    robust: Floats
    num_collapsed: int

    @property
    def setting(self) -> str:
        return name_setting(self.rule, self.fraction)


def name_setting(rule: str, fraction: float) -> str:
    return rule if RULES[rule].prunes == "nothing" else f"{rule} {100 * fraction:g}%"


def settings(fractions: Sequence[float]) -> Iterator[tuple[str, float]]:
    """Every rule with every pruned fraction; the rules that prune nothing once, with fraction 0."""
    for name, rule in RULES.items():
        for fraction in (0.0,) if rule.prunes == "nothing" else fractions:
            yield name, fraction


def exact_share(rule: Rule, fraction: float, eps: float) -> float:
    """Share of the kept samples with margin |t . x| below their own radius, from F = 2 Phi(eps) - 1."""
    crossing = float(2 * ndtr(eps) - 1)
    if rule.lowers_eps:
        return 0.0
    if rule.prunes == "easy":
        return min(1.0, crossing / (1 - fraction))
    if rule.prunes == "hard":
        return max(0.0, crossing - fraction) / (1 - fraction)
    return crossing


def measure_shares(
    rng: np.random.Generator, *, dimension: int, eps: float, fractions: Sequence[float], num_examples: int
) -> list[Share]:
    """Exact shares beside those of num_examples drawn samples.

    Samples are pruned at the quantile of the distribution, not of the draw: only then is the count binomial.
    """
    teacher = random_unit(rng, dimension)
    margin = np.concatenate([np.abs(rng.standard_normal((n, dimension)) @ teacher) for n in pieces(num_examples, 10_000)])
    lot = rng.random(num_examples)
    shares = []
    for name, fraction in settings(fractions):
        rule = RULES[name]
        kept = {
            "nothing": np.ones(num_examples, bool),
            "random": lot >= fraction,
            "easy": margin <= ndtri(1 - fraction / 2),
            "hard": margin > ndtri((1 + fraction) / 2),
        }[rule.prunes]
        num_kept = int(kept.sum())
        if num_kept == 0:
            raise InputError(
                f"perceptron.num_examples: {num_examples} are too few to keep any with {fraction} pruned; raise it"
            )
        crosses = margin[kept] < allowed_eps(rule, margin[kept], eps)
        found = float(crosses.mean())
        error = float(np.sqrt(found * (1 - found) / num_kept))
        shares.append(Share(name, fraction, exact_share(rule, fraction, eps), found, error, num_kept))
    return shares


def pieces(total: int, size: int) -> Iterator[int]:
    """Sizes of at most size that add up to total."""
    for first in range(0, total, size):
        yield min(size, total - first)


def random_unit(rng: np.random.Generator, dimension: int) -> Floats:
    direction = rng.standard_normal(dimension)
    return direction / np.linalg.norm(direction)


def allowed_eps(rule: Rule, margin: Floats, eps: float) -> Floats:
    """Radius (n,) of the training attack on samples of signed margin (n,)."""
    return np.clip(margin, 0, eps) if rule.lowers_eps else np.full(len(margin), eps)


def choose(rule: Rule, margin: Floats, num_kept: int, rng: np.random.Generator) -> NDArray[np.intp]:
    """Positions (num_kept,) of the samples that a rule keeps of a pool with signed margins (n,)."""
    if rule.prunes == "random":
        return rng.permutation(len(margin))[:num_kept]
    order = np.argsort(margin, kind="stable")
    return order[len(margin) - num_kept :] if rule.prunes == "hard" else order[:num_kept]


def adversarial_loss(w: Floats, z: Floats, eps: Floats, weight_decay: float) -> tuple[float, Floats]:
    """Mean logistic loss of the worst-case margins z . w - eps |w| plus weight_decay / 2 |w|^2, and its gradient (d,).

    z = y x (n, d), eps (n,). Convex in w; differentiable but at w = 0.
    """
    length = np.linalg.norm(w)
    margin = z @ w - eps * length
    pull = expit(-margin) / len(z)
    loss = np.logaddexp(0, -margin).mean() + weight_decay / 2 * length**2
    return float(loss), -(pull @ z) + (pull @ eps) * w / length + weight_decay * w


def train_student(z: Floats, eps: Floats, weight_decay: float) -> Floats:
    """Weights (d,) that minimise `adversarial_loss`: exactly zero where the attack outweighs the data.

    0 lies in the subdifferential at w = 0 exactly when |mean z| <= mean eps: no direction has a positive mean margin.
    """
    start = z.mean(axis=0)
    if np.linalg.norm(start) <= eps.mean():
        return np.zeros_like(start)
    loss = partial(adversarial_loss, z=z, eps=eps, weight_decay=weight_decay)
    found = minimize(loss, start, method="L-BFGS-B", jac=True, options={"maxiter": 2000, "gtol": 1e-7, "ftol": 1e-15})
    if not np.abs(found.jac).max() < MOST_GRADIENT:
        raise RuntimeError(f"the student did not converge: gradient {np.abs(found.jac).max():.3g} after {found.nit} iterations")
    return np.asarray(found.x, dtype=np.float64)


def clean_accuracy(overlap: float) -> float:
    """P(y w . x > 0) = 1 - arccos(R) / pi, R the cosine between student and teacher."""
    return float(1 - np.arccos(overlap) / np.pi)


def robust_accuracy(overlap: float, eps: float) -> float:
    """P(y w . x > eps |w|) = Phi(-eps) + 2 T(eps, R / sqrt(1 - R^2)), T of Owen, R as above.

    y w . x / |w| has the skew normal density 2 phi(s) Phi(a s), a = R / sqrt(1 - R^2), and its distribution function
    is Phi(s) - 2 T(s, a) (Azzalini 1985).
    """
    sine = np.sqrt(1 - overlap**2)
    slope = overlap / sine if sine > 0 else np.copysign(np.inf, overlap)
    return float(ndtr(-eps) + 2 * owens_t(eps, slope))


def accuracies(w: Floats, teacher: Floats, eps: float) -> tuple[float, float]:
    """Clean and robust accuracy of a student; one that collapsed to zero says one class always, which no attack changes."""
    length = np.linalg.norm(w)
    if length == 0:
        return 0.5, 0.5
    overlap = float(np.clip(w @ teacher / length, -1, 1))
    return clean_accuracy(overlap), robust_accuracy(overlap, eps)


def teacher_and_probe(rng: np.random.Generator, dimension: int, angle_deg: float) -> tuple[Floats, Floats]:
    """Two unit vectors (d,) with the given angle between them."""
    teacher, other = random_unit(rng, dimension), random_unit(rng, dimension)
    across = other - (other @ teacher) * teacher
    angle = np.deg2rad(angle_deg)
    return teacher, np.cos(angle) * teacher + np.sin(angle) * across / np.linalg.norm(across)


@dataclass(frozen=True)
class Pool:
    """One seed's teacher (d,), its samples z = y x (n, d) and the signed margins (n,) that rules prune by."""

    teacher: Floats
    z: Floats
    margin: Floats

    @classmethod
    def draw(cls, num_samples: int, *, dimension: int, probe_angle_deg: float, seed: tuple[int, int]) -> "Pool":
        """Equal seeds mean equal teachers and pools that begin alike."""
        rng = np.random.default_rng(seed)
        teacher, probe = teacher_and_probe(rng, dimension, probe_angle_deg)
        z = rng.standard_normal((num_samples, dimension))
        z *= np.sign(z @ teacher)[:, None]
        return cls(teacher, z, z @ probe)


def teach(
    rule: Rule, num_kept: int, num_pool: int, pool: Pool, *, eps: float, weight_decay: float, seed: tuple[int, int]
) -> tuple[float, float, bool]:
    """Clean and robust accuracy of a student of num_kept of the first num_pool samples, and whether it collapsed to zero."""
    margin = pool.margin[:num_pool]
    kept = choose(rule, margin, num_kept, np.random.default_rng((*seed, 1)))
    w = train_student(pool.z[kept], allowed_eps(rule, margin[kept], eps), weight_decay)
    return *accuracies(w, pool.teacher, eps), not w.any()


def learning_curves(
    *,
    dimension: int,
    eps: float,
    fractions: Sequence[float],
    alphas: Sequence[float],
    num_seeds: int,
    weight_decay: float,
    probe_angle_deg: float,
    seed: int,
) -> list[Point]:
    """Every setting at every alpha = kept samples / dimension; the pool is larger by what is pruned.

    Raises:
        InputError: an alpha keeps no sample.
    """
    if round(min(alphas) * dimension) < 1:
        raise InputError(f"perceptron.alphas: {min(alphas):g} keeps no sample in {dimension} dimensions; raise one of them")
    wanted = list(product(settings(fractions), alphas))
    sizes = [(round(alpha * dimension), round(round(alpha * dimension) / (1 - fraction))) for (_, fraction), alpha in wanted]
    students = np.empty((len(wanted), 3, num_seeds))
    with threadpool_limits(1):  # L-BFGS's own algebra is tiny: threads make it several times slower
        for index in range(num_seeds):
            own = (seed, index)
            pool = Pool.draw(max(num for _, num in sizes), dimension=dimension, probe_angle_deg=probe_angle_deg, seed=own)
            for place, (((name, _), _), (kept, num)) in enumerate(zip(wanted, sizes, strict=True)):
                student = teach(RULES[name], kept, num, pool, eps=eps, weight_decay=weight_decay, seed=own)
                students[place, :, index] = student
    return [
        Point(name, fraction, alpha, *size, clean, robust, int(collapsed.sum()))
        for ((name, fraction), alpha), size, (clean, robust, collapsed) in zip(wanted, sizes, students, strict=True)
    ]
