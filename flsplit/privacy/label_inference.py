"""Labels from the cut-layer gradients of a split in which they stay with somebody else."""

import torch
from scipy.cluster.vq import kmeans2
from scipy.optimize import linear_sum_assignment
from scipy.stats import mannwhitneyu
from torch import Tensor

from flsplit.errors import ConfigError


def auc(scores: Tensor, positive: Tensor) -> float:
    """Return the share of pairs (positive, negative) of which the positive has the higher score.

    0.5 is guessing. What is below 0.5 gives as much away as what is above by as much.

    Parameters
    ----------
    scores : torch.Tensor
        ``(n,)``; of equal scores half a pair counts.
    positive : torch.Tensor
        ``(n,)`` booleans, some of both kinds.

    Raises
    ------
    ConfigError
        If there are only positive or only negative ones.
    """
    values, chosen = scores.detach().cpu().double(), positive.bool().cpu()
    ones, zeros = values[chosen].numpy(), values[~chosen].numpy()
    if not len(ones) or not len(zeros):
        raise ConfigError(
            f"AUC of {len(ones)} positive and {len(zeros)} negative rows: expected some of both"
        )
    higher = mannwhitneyu(ones, zeros, method="asymptotic").statistic  # pairs; half of equal ones
    return float(higher / (len(ones) * len(zeros)))


def norm_attack(gradients: Tensor, positive: Tensor) -> float:
    """Return the AUC of telling two classes apart by the length of their cut-layer gradients.

    Li et al. 2022 (https://arxiv.org/abs/2102.08504), section 3: a rare class is predicted with
    less confidence, and its gradients are longer. The attacker sees gradients alone, of one step.
    It fails (0.5) where classes are equally frequent and learned equally well.

    Parameters
    ----------
    gradients : torch.Tensor
        ``(n, ...)``, of one step: their scale changes from step to step.
    positive : torch.Tensor
        ``(n,)`` booleans: which rows are of the rare class.
    """
    return auc(flat_rows(gradients).norm(dim=1), positive)


def cosine_attack(gradients: Tensor, positive: Tensor, *, known: int = 1) -> float:
    """Return the AUC of telling two classes apart by the direction of their gradients.

    Li et al. 2022 (https://arxiv.org/abs/2102.08504), section 3: gradients of one class point the
    same way. The attacker sees the gradients of a step, and knows ``known`` positive rows, which
    are not scored. It fails where gradients within a class differ as much as between classes.

    Parameters
    ----------
    gradients, positive : torch.Tensor
        As in :func:`norm_attack`.
    known : int
        How many positive rows the attacker knows: the first ones.

    Raises
    ------
    ConfigError
        If not more rows are positive.
    """
    rows = torch.nonzero(positive.bool()).flatten()
    if not 1 <= known < len(rows):
        raise ConfigError(f"known is {known}, expected 1 to {len(rows) - 1} of the positive rows")
    directions = _directions(gradients)
    clue = directions[rows[:known]].mean(0)
    others = torch.ones(len(directions), dtype=torch.bool)
    others[rows[:known]] = False
    return auc((directions @ clue)[others], positive.bool()[others])


def cluster_attack(
    gradients: Tensor, labels: Tensor, *, num_classes: int, restarts: int = 4, seed: int = 0
) -> float:
    """Return the share of labels found by clustering the directions of gradients.

    k-means with as many clusters as classes, the best of ``restarts``; clusters are given classes
    so that the most rows are right (Liu et al. 2022, https://arxiv.org/abs/2203.05222, cluster by
    the same similarity, with one known row of each class). So the attack's last step is granted.
    Compare with the share of the most frequent class. It fails where gradients are given noise,
    and weakly where the model is confident: what it predicts well has short, noisy gradients.

    Parameters
    ----------
    gradients : torch.Tensor
        ``(n, ...)``, of one step or of a few that follow each other.
    labels : torch.Tensor
        ``(n,)`` integers from 0.
    num_classes : int
        How many clusters.
    """
    points = _directions(gradients).double()
    if not 2 <= num_classes <= len(points):
        raise ConfigError(f"num_classes is {num_classes}, expected 2 to the {len(points)} rows")
    best: tuple[float, Tensor] | None = None
    for attempt in range(restarts):
        centres, found = kmeans2(points.numpy(), num_classes, minit="++", rng=seed + attempt)
        spread = float(
            (points - torch.from_numpy(centres)[torch.from_numpy(found).long()]).square().sum()
        )
        if best is None or spread < best[0]:
            best = spread, torch.from_numpy(found).long()
    assert best is not None
    own, classes = best[1], labels.long().cpu()
    table = torch.zeros(num_classes, max(num_classes, int(classes.max()) + 1))
    table.index_put_((own, classes), torch.ones(len(own)), accumulate=True)
    return float(table[linear_sum_assignment(table.numpy(), maximize=True)].sum()) / len(own)


def flat_rows(rows: Tensor) -> Tensor:
    """Return rows ``(n, ...)`` as ``(n, d)``, in float32 on the CPU."""
    return rows.detach().cpu().float().reshape(len(rows), -1)


def _directions(gradients: Tensor) -> Tensor:
    return torch.nn.functional.normalize(flat_rows(gradients), dim=1)
