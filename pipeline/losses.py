"""Losses of adversarial training: logits and labels in, (B,) out; the caller reduces."""

import torch
import torch.nn.functional as F
from torch import Tensor


def cross_entropy(logits: Tensor, y: Tensor, *, label_smoothing: float = 0.0) -> Tensor:
    """-sum_k q_k log p_k (B,), with q the labels y (B,) smoothed: (1 - s) one_hot + s / K."""
    return F.cross_entropy(logits, y, reduction="none", label_smoothing=label_smoothing)


def kl_divergence(logits: Tensor, reference_logits: Tensor) -> Tensor:
    """KL(reference || prediction) (B,): sum_k p_ref (log p_ref - log p)."""
    log_p, log_ref = F.log_softmax(logits, dim=1), F.log_softmax(reference_logits, dim=1)
    return (log_ref.exp() * (log_ref - log_p)).sum(dim=1)


def cw_margin(logits: Tensor, y: Tensor) -> Tensor:
    """max_{k != y} f_k - f_y (B,): positive where misclassified (Carlini & Wagner, arXiv:1608.04644, f_6)."""
    own = logits.gather(1, y[:, None]).squeeze(1)
    others = logits.scatter(1, y[:, None], -torch.inf).amax(dim=1)
    return others - own


def trades(clean_logits: Tensor, adv_logits: Tensor, y: Tensor, *, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """CE(clean, y) + beta KL(p_clean || p_adv) (B,) (Zhang et al., arXiv:1901.08573, eq. 5).

    Gradients flow through both arguments of the KL, as in the published code."""
    return cross_entropy(clean_logits, y, label_smoothing=label_smoothing) + beta * kl_divergence(adv_logits, clean_logits)


def mart(clean_logits: Tensor, adv_logits: Tensor, y: Tensor, *, beta: float) -> Tensor:
    """Boosted CE on x_adv + beta (1 - p_y(x)) KL(p_clean || p_adv) (B,) (Wang et al., ICLR 2020, eq. 10 and 11)."""
    adv_p, clean_p = adv_logits.softmax(dim=1), clean_logits.softmax(dim=1)
    runner_up = adv_p.scatter(1, y[:, None], -1.0).amax(dim=1)
    boosted = cross_entropy(adv_logits, y) - torch.log1p(-runner_up.clamp_max(1 - 1e-6))
    own = clean_p.gather(1, y[:, None]).squeeze(1)
    return boosted + beta * (1 - own) * kl_divergence(adv_logits, clean_logits)
