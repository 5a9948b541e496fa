"""FSL-SAGE and CSE-FSL written down plainly: whole models in one process, no messages.

Of flsplit it uses the seeds alone (the order of the data is part of the contract). The order in
which the server takes uploads and the place of the alignment are flsplit's reading, unless
``authors`` asks for the order of their published code; what an upload, an alignment and a local
step compute is the method.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from reference import CUT, LR, SEED, average, fresh, numbered_batches
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import Adam, Optimizer
from torch.utils.data import Dataset

from flsplit.seeds import derive_seed, seeded


def halves(model: nn.Sequential) -> tuple[nn.Sequential, nn.Sequential]:
    """Cut a Sequential after the module called CUT; names stay those of the whole model."""
    names = [name for name, _ in model.named_children()]
    at = names.index(CUT) + 1
    return model[:at], model[at:]


def linear_auxiliary(row: Sequence[int], num_classes: int, seed: int = SEED) -> nn.Module:
    """The initial auxiliary model; all clients begin with the same."""
    with seeded(derive_seed(seed, "auxiliary")):
        width = torch.Size(row).numel()
        return nn.Sequential(nn.Flatten(), nn.Linear(width, num_classes))


@dataclass
class Client:
    """One client: segment, auxiliary model, their optimizers; and its buffer on the server."""

    name: str
    data: Dataset
    segment: nn.Module
    optimizer: Optimizer
    auxiliary: nn.Module
    auxiliary_optimizer: Optimizer
    batches: object
    aligner: Optimizer
    buffer: list[tuple[Tensor, Tensor]] = field(default_factory=list)  # one sample each

    def step(self, indices: Sequence[int], trains_auxiliary: bool) -> tuple[Tensor, Tensor]:
        """One local step; returns smashed data and labels as they were in it."""
        examples = [self.data[index] for index in indices]
        inputs, labels = (torch.stack(one) for one in zip(*examples, strict=True))
        smashed = self.segment(inputs)
        at_cut = smashed.detach().requires_grad_()
        loss = cross_entropy(self.auxiliary(at_cut), labels)
        self.auxiliary_optimizer.zero_grad()
        loss.backward()  # at_cut.grad is ĝ
        self.optimizer.zero_grad()
        smashed.backward(at_cut.grad)
        self.optimizer.step()
        if trains_auxiliary:
            self.auxiliary_optimizer.step()
        return smashed.detach(), labels

    def peek(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Smashed data and labels of a batch, without a step."""
        inputs, labels = (
            torch.stack(o) for o in zip(*(self.data[i] for i in indices), strict=True)
        )
        with torch.no_grad():
            return self.segment(inputs), labels


@dataclass
class Twin:
    """A run of FSL-SAGE (l > 0 or l = 0, never averaging auxiliaries) or CSE-FSL."""

    build: Callable[[], nn.Sequential]
    parts: Sequence[Dataset]
    row: Sequence[int]
    num_classes: int
    optimizer: Callable[..., Optimizer]
    q: int = 2
    l: int = 2  # noqa: E741 - the method's name for it
    in_round: bool = False
    authors: bool = False
    cse: bool = False
    epochs: int = 100
    buffer_size: int = 1000
    auxiliary_lr: float = 1e-3
    batch_size: int = 4
    lr: float = LR

    def __post_init__(self) -> None:
        self.client_segment, self.server = halves(fresh(self.build))
        self.server_optimizer = self.optimizer(self.server.parameters(), lr=self.lr)
        self.clients = [self.new_client(str(i), part) for i, part in enumerate(self.parts)]
        self.losses: list[list[tuple[float, int]]] = []  # by round: of each step, and its rows
        self.auxiliaries: list[list[dict[str, Tensor]]] = []  # by round, at its end: by client

    def new_client(self, name: str, data: Dataset) -> Client:
        segment = copy.deepcopy(self.client_segment)
        auxiliary = linear_auxiliary(self.row, self.num_classes)
        auxiliary_lr = self.lr if self.cse else 0.0
        return Client(
            name=name,
            data=data,
            segment=segment,
            optimizer=self.optimizer(segment.parameters(), lr=self.lr),
            auxiliary=auxiliary,
            auxiliary_optimizer=self.optimizer(auxiliary.parameters(), lr=auxiliary_lr),
            batches=numbered_batches(data, name, self.batch_size),
            aligner=Adam(auxiliary.parameters(), lr=self.auxiliary_lr),
        )

    def train(self, rounds: int) -> dict[str, Tensor]:
        for t in range(rounds):
            self.round(t)
        return {**self.client_segment.state_dict(), **self.server.state_dict()}

    def round(self, t: int) -> None:
        self.losses.append([])
        planned = [
            [next(c.batches) for _ in range(-(-len(c.data) // self.batch_size))]
            for c in self.clients
        ]
        aligns = not self.cse and self.l > 0 and t % self.l == 0
        if self.authors:
            for client, batches in zip(self.clients, planned, strict=True):
                self.turn(client, batches, aligns)
            self.aggregate()
            return
        if aligns and not self.in_round:
            self.align_all()
        if aligns and self.in_round:
            for client, batches in zip(self.clients, planned, strict=True):
                self.take_upload(client, *client.peek(batches[0]))
            self.align_all()
        uploads = []
        for index, (client, batches) in enumerate(zip(self.clients, planned, strict=True)):
            for n, indices in enumerate(batches):
                smashed, labels = client.step(indices, self.cse)
                if n % self.q == 0 and not (n == 0 and aligns and self.in_round):
                    uploads.append((n, index, smashed, labels))
        for _, index, smashed, labels in sorted(uploads, key=lambda one: one[:2]):
            self.take_upload(self.clients[index], smashed, labels)
        self.aggregate()

    def turn(self, client: Client, batches: Sequence[Sequence[int]], aligns: bool) -> None:
        """All of a client's round, before the next client's: one loop, as the authors have it.

        The server's step on an upload comes at once, and in a round with an alignment the first
        upload is stepped on, then the model is aligned, then the client steps on that batch.
        """
        for n, indices in enumerate(batches):
            if n % self.q == 0:
                self.take_upload(client, *client.peek(indices))
            if aligns and n == 0:
                smashed, labels = (torch.stack(o) for o in zip(*client.buffer, strict=True))
                self.align(client, smashed, labels)
            client.step(indices, self.cse)

    def take_upload(self, client: Client, smashed: Tensor, labels: Tensor) -> None:
        """One step of the single server segment, and the sample queue of the client."""
        loss = cross_entropy(self.server(smashed), labels)
        self.server_optimizer.zero_grad()
        loss.backward()
        self.server_optimizer.step()
        self.losses[-1].append((loss.item(), len(labels)))
        client.buffer += list(zip(smashed, labels, strict=True))
        client.buffer = client.buffer[-self.buffer_size :]

    def align_all(self) -> None:
        for client in self.clients:
            if client.buffer:
                smashed, labels = (torch.stack(o) for o in zip(*client.buffer, strict=True))
                self.align(client, smashed, labels)

    def align(self, client: Client, smashed: Tensor, labels: Tensor) -> None:
        """Fit the auxiliary model's input gradient to the server's, on the whole buffer."""
        s = smashed.clone().requires_grad_()
        (targets,) = torch.autograd.grad(cross_entropy(self.server(s), labels), s)
        for _ in range(self.epochs):
            s = smashed.clone().requires_grad_()
            loss = cross_entropy(client.auxiliary(s), labels)
            (emulated,) = torch.autograd.grad(loss, s, create_graph=True)
            client.aligner.zero_grad()
            (emulated - targets).square().sum().backward()
            client.aligner.step()

    def aggregate(self) -> None:
        sizes = [len(client.data) for client in self.clients]
        averaged = average([c.segment.state_dict() for c in self.clients], sizes)
        self.client_segment.load_state_dict(averaged)
        for client in self.clients:
            client.segment.load_state_dict(averaged)
        if self.cse:
            averaged = average([c.auxiliary.state_dict() for c in self.clients], sizes)
            for client in self.clients:
                client.auxiliary.load_state_dict(averaged)
        self.auxiliaries.append([copy.deepcopy(c.auxiliary.state_dict()) for c in self.clients])
