"""Whether an example was among the training data, from the segment and what was recorded."""

import torch
from torch import Tensor

from flsplit.privacy.label_inference import auc, flat_rows


def loss_membership(members: Tensor, others: Tensor) -> float:
    """Return the AUC of telling members by their smaller loss.

    Yeom et al. 2018 (https://arxiv.org/abs/1709.01604). The attacker has the whole model and the
    candidates with their labels. It fails where the model generalises.

    Parameters
    ----------
    members, others : torch.Tensor
        Losses ``(n,)`` and ``(m,)`` of examples that were trained on, and that were not.
    """
    return _auc_of(-members, -others)


def nearest_membership(members: Tensor, others: Tensor, recorded: Tensor) -> float:
    """Return the AUC of telling members by how near their smashed data is to what was recorded.

    The attacker has the client segment at the end, the smashed data of some steps near the end,
    and candidate inputs without labels. There is no published attack that is quite this one:
    it is the nearest-neighbour test of Hilprecht et al. 2019 (https://doi.org/10.2478/popets-2019-0067)
    on smashed data. It finds exact inputs, and fails where steps that were recorded are far from
    the end, where inputs are augmented, and where noise is larger than the distance between rows.

    Parameters
    ----------
    members, others : torch.Tensor
        Smashed data ``(n, ...)`` and ``(m, ...)`` of the candidates, by the segment at the end.
    recorded : torch.Tensor
        ``(k, ...)``, as it was seen.
    """
    seen = flat_rows(recorded)
    near, far = (torch.cdist(flat_rows(one), seen).min(1).values for one in (members, others))
    return _auc_of(-near, -far)


def _auc_of(members: Tensor, others: Tensor) -> float:
    positive = torch.arange(len(members) + len(others)) < len(members)
    return auc(torch.cat([members, others]), positive)
