"""Selection while images are generated: a row is drawn again until the guide accepts it, so that what is not wanted is never
stored, and number and classes of the images stay as asked for.

A rule gives every image a score, the higher the more it is wanted, and keeps those that reach a threshold. Thresholds that are
shares come from a pilot: images that are drawn for this alone.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from pipeline.balls import BALLS
from pipeline.batches import to_tensor
from pipeline.deepfool import DeepFoolParams, deepfool
from pipeline.edm.sampling import Draw
from pipeline.images import Chunk, Images
from pipeline.models.inference import inference_copy
from pipeline.params import InputError, Section
from pipeline.selection import extremes
from pipeline.threat import NormName

ATTEMPT = 2**40  # what the row that names the noise grows by from one attempt at a row to the next
PILOT = 2**22 * ATTEMPT  # first row of the pilot, beyond all attempts
Scores = NDArray[np.float32]


class NoSelection(Section):
    """Every image that is drawn is kept."""

    kind: Literal["none"]


class ClassAgreement(Section):
    """Keep the images in which the guide sees their label."""

    kind: Literal["class_agreement"]
    max_attempts: PositiveInt = 1000


class TopConfidence(Section):
    """Keep about the share `keep` of each class in whose label the guide is most confident: the filter of the published 1M
    set with 0.2 and a standard guide, which there is a cut of 5M images and here a threshold per class from the pilot."""

    kind: Literal["top_confidence"]
    keep: float = Field(gt=0, le=1)
    pilot_images: PositiveInt = 2000
    max_attempts: PositiveInt = 1000


class MarginSelection(Section):
    """Keep what a manifest with `score: margin` and the same `prune`, `keep` and `per_class` would keep of images that are
    not selected, by the margins of the guide in `norm`; `threshold_255` is the cut itself, in 1/255, instead of that of
    the pilot. Rows without a margin are not kept."""

    kind: Literal["margin"]
    norm: NormName
    keep: float = Field(gt=0, le=1)
    prune: Literal["highest", "lowest"] = "highest"
    per_class: bool = False
    threshold_255: float | None = None
    deepfool: DeepFoolParams = DeepFoolParams()
    pilot_images: PositiveInt = 2000
    max_attempts: PositiveInt = 1000


Rule = ClassAgreement | TopConfidence | MarginSelection
SelectParams = Annotated[NoSelection | Rule, Field(discriminator="kind")]
Score = Callable[[Images, NDArray[np.int64]], Scores]


def scorer(rule: Rule, guide: nn.Module, device: torch.device) -> Score:
    """The function of images (B, H, W, C) and labels (B,) that the rule compares: margin in 1/255 (negated where the highest
    are pruned), confidence, or whether the guide agrees; -inf where there is none."""
    fast = inference_copy(guide)

    def score(images: Images, labels: NDArray[np.int64]) -> Scores:
        x, y = to_tensor(images, device), torch.from_numpy(labels).to(device)
        values: Tensor
        if isinstance(rule, MarginSelection):
            margin = 255 * deepfool(fast, x, y, ball=BALLS[rule.norm], **rule.deepfool.model_dump()).margin
            values = (-margin if rule.prune == "highest" else margin).nan_to_num(nan=-torch.inf)
        else:
            with torch.no_grad():
                logits = fast(x)
            agrees = logits.argmax(dim=1) == y
            values = agrees.float() if isinstance(rule, ClassAgreement) else logits.softmax(dim=1).gather(1, y[:, None])[:, 0]
        return values.cpu().numpy().astype(np.float32)

    return score


def given_thresholds(rule: NoSelection | Rule, num_classes: int) -> list[float] | None:
    """Of each class; None where a pilot is to find them."""
    if isinstance(rule, TopConfidence) or (isinstance(rule, MarginSelection) and rule.threshold_255 is None):
        return None
    if isinstance(rule, MarginSelection):
        assert rule.threshold_255 is not None
        return [-rule.threshold_255 if rule.prune == "highest" else rule.threshold_255] * num_classes
    return [0.5] * num_classes


def pilot_thresholds(
    rule: TopConfidence | MarginSelection, draw: Draw, score: Score, num_classes: int, batch_size: int
) -> list[float]:
    """Of each class: the score of the last image that is kept of the pilot, whose classes come in turn.

    Raises:
        InputError: nothing of a class would be kept, so that no threshold could be reached.
    """
    numbers = np.arange(pilot_size(rule, num_classes))
    labels = numbers % num_classes
    batches = [numbers[first : first + batch_size] for first in range(0, len(numbers), batch_size)]
    scores = np.concatenate([score(draw(PILOT + batch, labels[batch]), labels[batch]) for batch in batches])
    by_class = isinstance(rule, TopConfidence) or rule.per_class
    groups = labels.astype(np.int16) if by_class else np.zeros(len(scores), np.int16)
    counts = np.bincount(groups)
    kept = np.maximum(1, np.round(rule.keep * counts)).astype(np.int64)
    known = np.isfinite(scores)
    available = np.bincount(groups[known], minlength=len(counts))
    if (available == 0).any():
        raise InputError("synthesize.select: no image of the pilot has a margin; the guide or the generator is damaged")
    _, _, cuts = extremes(scores, groups, known, np.zeros_like(kept), np.minimum(kept, available), seed=0)
    thresholds: list[float] = cuts.high.tolist()
    return thresholds if by_class else thresholds * num_classes


@dataclass
class Selector:
    """Draws rows until they are accepted: the score must reach the threshold of the class. `attempts` lists, for every image
    that was given out, how often its row was drawn."""

    draw: Draw
    score: Score
    thresholds: Sequence[float]
    max_attempts: int
    attempts: list[NDArray[np.int64]] = field(default_factory=list)

    def images(
        self, start: int, stop: int, batch_size: int, progress: Callable[[int, int], None] | None = None
    ) -> Iterator[Chunk]:
        """As `sample_images`: rows [start, stop) with the labels row % number of classes. Row r is the first accepted one of
        the images named by r, r + ATTEMPT, r + 2 ATTEMPT, ..., whatever the number of images or the shards; no other row is
        drawn. (The guide's scores are rounded in another way among other images, so that a score within about 1e-6 of its
        threshold could fall on either side of it.)

        Raises:
            InputError: a row is not accepted in max_attempts.
        """
        num_classes = len(self.thresholds)
        for first in range(start, stop, batch_size):
            rows = np.arange(first, min(first + batch_size, stop))
            labels = rows % num_classes
            images, attempts = self.fill(rows, labels)
            self.attempts.append(attempts)
            yield images, labels
            if progress is not None:
                progress(int(rows[-1]) + 1 - start, stop - start)

    def fill(self, rows: NDArray[np.int64], labels: NDArray[np.int64]) -> tuple[Images, NDArray[np.int64]]:
        """The accepted images of one batch of rows (B,) and how often each was drawn (B,)."""
        cuts = np.array(self.thresholds, np.float32)[labels]
        pending, attempts = np.arange(len(rows)), np.zeros(len(rows), np.int64)
        images: Images | None = None
        for attempt in range(self.max_attempts):
            found = self.draw(rows[pending] + attempt * ATTEMPT, labels[pending])
            images = np.empty((len(rows), *found.shape[1:]), np.uint8) if images is None else images
            images[pending] = found
            attempts[pending] += 1
            pending = pending[~(self.score(found, labels[pending]) >= cuts[pending])]
            if not len(pending):
                return images, attempts
        raise InputError(
            f"synthesize.select: row {rows[pending[0]]} of class {labels[pending[0]]} was not accepted in {self.max_attempts} "
            "attempts; raise keep, set per_class, change the threshold, or look at the guide and the generator"
        )


def account(
    rule: Rule, guide: str, thresholds: Sequence[float], attempts: NDArray[np.int64], classes: tuple[str, ...], evaluations: int
) -> dict[str, Any]:
    """The selection for the record: the rule, the digest of the guide, what was kept and what that cost. `attempts` (n,) of
    the rows, whose classes come in turn; `evaluations` of the generator's network for each image drawn."""
    labels, total = np.arange(len(attempts)) % len(classes), int(attempts.sum())
    pilot = 0 if given_thresholds(rule, 1) else pilot_size(rule, len(classes))
    drawn, kept = np.bincount(labels, attempts, len(classes)), np.bincount(labels, minlength=len(classes))
    return {
        "rule": rule.model_dump(mode="json"),
        "guide": guide,
        "thresholds": list(thresholds),
        "kept": len(attempts),
        "drawn": total,
        "drawn_for_pilot": pilot,
        "acceptance": len(attempts) / total,
        "acceptance_by_class": {name: float(kept[k] / drawn[k]) for k, name in enumerate(classes) if drawn[k]},
        "network_evaluations": (total + pilot) * evaluations,
    }


def pilot_size(rule: Rule, num_classes: int) -> int:
    """At least one image of each class."""
    return 0 if isinstance(rule, ClassAgreement) else max(rule.pilot_images, num_classes)
