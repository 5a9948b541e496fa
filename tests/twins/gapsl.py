"""GAPSL's algorithms 1 and 2 with flat gradient vectors, in one process."""

import math

import numpy as np
import torch
from torch.nn import functional

from twins.loop import Answer, Moment


def gapsl(
    eta=0.0, k_min=20.0, k_max=80.0, lam=5e-4, loss_reduction="sum",
    excluded_clients="own_gradient", lgi="on", gda="on", active_alignment="none",
):  # fmt: skip
    """Return the twin of GAPSL with these parameters."""
    nu_min, nu_max = math.inf, -math.inf

    def step(moment: Moment) -> Answer:
        nonlocal nu_min, nu_max
        clients = list(moment.smashed)
        size = len(clients)
        losses, vectors, cut = {}, {}, {}
        for i in clients:
            s = moment.smashed[i].clone().requires_grad_()
            loss = functional.cross_entropy(moment.server(s), moment.labels[i])
            *server, q = torch.autograd.grad(loss, [*moment.parameters, s])
            losses[i], cut[i] = loss.item(), q
            vectors[i] = torch.cat([g.flatten() for g in server]).double().numpy()

        # Algorithm 1: the leader.
        theta = {
            i: sum(angle(vectors[i], vectors[j]) for j in clients if j != i) / (size - 1)
            for i in clients
        }
        nu = float(np.std(list(theta.values())))
        nu_min, nu_max = min(nu_min, nu), max(nu_max, nu)
        ratio = 0.0 if nu_max == nu_min else (nu_max - nu) / (nu_max - nu_min)
        k = k_min + moment.progress * ratio * (k_max - k_min)
        count = max(math.ceil(k / 100 * size - 1e-9), 1)
        chosen = sorted(clients, key=lambda i: theta[i])[:count]
        if lgi == "off":
            chosen = clients
        if lgi == "random":
            chosen = [clients[n] for n in moment.rng.choice(size, count, replace=False)]
        lead = sum(vectors[i] for i in chosen) / len(chosen)

        # Algorithm 2: who is kept.
        theta_lead = {i: angle(vectors[i], lead) for i in clients}
        all_angles = np.array(list(theta_lead.values()))
        threshold = max(min(all_angles.mean() - eta * all_angles.std(), math.pi / 2), 0.0)
        kept = [i for i in clients if theta_lead[i] <= threshold + 1e-6]
        kept = kept or [min(clients, key=lambda i: theta_lead[i])]
        if gda == "off":
            kept = [i for i in clients if i in chosen]
        if gda == "random":
            kept = [clients[n] for n in sorted(moment.rng.choice(size, len(kept), replace=False))]

        total = 0.0
        for i in kept:
            g = vectors[i]
            if active_alignment == "projection":
                unit, to_lead = g / np.linalg.norm(g), lead / np.linalg.norm(lead)
                cosine = math.cos(theta_lead[i])
                g = g + lam * np.linalg.norm(g) * (to_lead - cosine * unit)
            total = total + g / (1 if loss_reduction == "sum" else len(kept))
        reported = sum(losses[i] + lam * (1 - math.cos(theta_lead[i])) for i in kept)
        notes = {
            "loss": reported / (1 if loss_reduction == "sum" else len(kept)),
            "dispersion": nu,
            "k-percent": k,
            "threshold": threshold,
            "kept": len(kept),
        }
        notes |= {f"angle.{i}": theta_lead[i] for i in clients}
        notes |= {f"kept.{i}": float(i in kept) for i in clients}
        if excluded_clients == "skip":
            cut = {i: q if i in kept else None for i, q in cut.items()}
        return Answer(unflatten(total, moment.parameters), cut, notes=notes)

    return step


def angle(u, v) -> float:
    cosine = float(u @ v) / (math.sqrt(float(u @ u)) * math.sqrt(float(v @ v)))
    return math.acos(min(max(cosine, -1.0), 1.0))


def unflatten(vector, parameters):
    pieces = torch.from_numpy(vector).float().split([p.numel() for p in parameters])
    return [piece.view_as(p) for piece, p in zip(pieces, parameters, strict=True)]
