"""EPSL, our readings E1 and E2, row by row, in one process."""

import copy
import math

import torch
from torch.nn import functional

from twins.loop import Answer, Moment


def epsl(phi: float, aggregation: str = "replay"):
    """Return the twin of EPSL with these parameters."""

    def step(moment: Moment) -> Answer:
        clients = list(moment.smashed)
        b = {i: len(s) for i, s in moment.smashed.items()}
        total = sum(moment.sizes.values())
        lam = {i: moment.sizes[i] / total for i in clients}
        a = {i: lam[i] / b[i] for i in clients}  # the weight of one row
        m = math.ceil(phi * max(b.values()) - 1e-9)

        s = {i: smashed.clone().requires_grad_() for i, smashed in moment.smashed.items()}
        outputs = moment.server(torch.cat([s[i] for i in clients]))
        logits = dict(zip(clients, outputs.detach().split([b[i] for i in clients]), strict=True))
        # Softmax and cross-entropy: the gradient of a row's loss is p - onehot.
        z = {
            i: logits[i].softmax(1) - functional.one_hot(moment.labels[i], logits[i].shape[1])
            for i in clients
        }
        at = {j: [i for i in clients if j < b[i]] for j in range(m)}
        weight = {j: sum(a[i] for i in at[j]) for j in at}

        if aggregation == "replay":
            rows = [sum(a[i] * moment.smashed[i][j] for i in at[j]) / weight[j] for j in at]
            injected = [sum(a[i] * z[i][j] for i in at[j]) for j in at]
            for i in clients:
                rows += list(moment.smashed[i][m:])
                injected += [a[i] * row for row in z[i][m:]]
            # Its BatchNorm statistics are not kept: a copy takes them.
            replay, server = torch.stack(rows).requires_grad_(), copy.deepcopy(moment.server)
            found = torch.autograd.grad(
                server(replay), [*server.parameters(), replay], torch.stack(injected)
            )
            gradients, by_row = found[:-1], list(found[-1])
            mean = {j: by_row[j] / weight[j] for j in at}
            rest = iter(by_row[m:])
            own = {i: {j: next(rest) for j in range(m, b[i])} for i in clients}
            num_rows = len(rows)
        else:
            zbar = {j: sum(a[i] * z[i][j] for i in at[j]) / weight[j] for j in at}
            injected = [
                a[i] * (zbar[j] if j < m else z[i][j]) for i in clients for j in range(b[i])
            ]
            found = torch.autograd.grad(
                outputs, [*moment.parameters, *(s[i] for i in clients)], torch.stack(injected)
            )
            gradients = found[: len(moment.parameters)]
            q = dict(zip(clients, found[len(moment.parameters) :], strict=True))
            mean = {j: sum(q[i][j] for i in at[j]) / weight[j] for j in at}
            own = {i: dict(enumerate(q[i])) for i in clients}
            num_rows = sum(b.values())
        # A client's rows are of the size of a gradient of its own mean loss.
        cut = {
            i: torch.stack([mean[j] / b[i] if j < m else own[i][j] / lam[i] for j in range(b[i])])
            for i in clients
        }
        return Answer(list(gradients), cut, notes={"rows": num_rows})

    return step
