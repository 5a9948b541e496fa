"""Small models, small data, and trainers of the whole model that know nothing of messages.

The trainers state what split learning must compute. Of flsplit they use the seeds alone: the
random numbers of a step are part of the contract, like the order of the data.
"""

import warnings
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from flwr.app import ArrayRecord, Context, Message
from torch import Tensor, nn
from torch.ao import quantization
from torch.nn import functional
from torch.optim import SGD, Adam, Optimizer
from torch.utils.data import Dataset, TensorDataset, default_collate

from flsplit import LocalGrid, client_app
from flsplit.carry.carrier import Carrier
from flsplit.nested import to_device
from flsplit.seeds import derive_seed, seeded

CUT = "front"
NUM_CLASSES = 3
SEED = 2
LR = 0.05

MOMENTUM = partial(SGD, momentum=0.9)
OPTIMIZERS = {"momentum": MOMENTUM, "adam": Adam}

# --- models ----------------------------------------------------------------------------------


def plain_net() -> nn.Sequential:
    """Without BatchNorm and dropout: vectors of 8 in, smashed data of 6."""
    return nn.Sequential(
        OrderedDict(
            front=nn.Sequential(nn.Linear(8, 6), nn.Tanh()),
            middle=nn.Sequential(nn.Linear(6, 10), nn.Tanh()),
            head=nn.Linear(10, NUM_CLASSES),
        )
    )


def noisy_net(dropout: float = 0.3) -> nn.Sequential:
    """BatchNorm and dropout on both sides: images 1 x 6 x 6 in, smashed data 3 x 4 x 4.

    No convolution stands right before a BatchNorm: its bias would have a gradient of nothing but
    rounding errors, which Adam blows up.
    """
    return nn.Sequential(
        OrderedDict(
            front=nn.Sequential(
                nn.Conv2d(1, 3, 3), nn.Tanh(), nn.BatchNorm2d(3), nn.Dropout(dropout)
            ),
            middle=nn.Sequential(
                nn.ReLU(inplace=True),
                nn.Conv2d(3, 4, 2),
                nn.Tanh(),
                nn.BatchNorm2d(4),
                nn.Dropout(dropout),
            ),
            head=nn.Sequential(nn.Flatten(), nn.Linear(36, NUM_CLASSES)),
        )
    )


def normed_net() -> nn.Sequential:
    """The same without dropout."""
    return noisy_net(0.0)


class HalfBase(nn.Module):
    """A frozen layer in half precision, and beside it two small factors in float32, as LoRA has."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.randn(inputs, 2) * 0.1)
        self.b = nn.Parameter(torch.randn(2, outputs) * 0.1)
        self.base = nn.Linear(inputs, outputs).half().requires_grad_(False)

    def forward(self, x):
        return self.base(x) + (x.float() @ self.a @ self.b).to(x.dtype)


def half_base_net(inputs: int) -> nn.Sequential:
    """Three of them."""
    return nn.Sequential(HalfBase(inputs, 8), nn.ReLU(), HalfBase(8, 8), nn.ReLU(), HalfBase(8, 2))


def quantised_net() -> nn.Sequential:
    """Ready for quantisation-aware training: observers' buffers get their size in a forward."""
    net = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    net.qconfig = quantization.get_default_qat_qconfig("fbgemm")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return quantization.prepare_qat(net.train())


def fresh(build, seed: int = 0) -> nn.Sequential:
    """Return a model with weights that depend on ``seed`` alone."""
    with seeded(seed):
        return build()


# --- data ------------------------------------------------------------------------------------


def make_data(num_examples: int, seed: int, shape: Sequence[int] = (8,)) -> TensorDataset:
    """Return examples whose classes can be learned: the class shifts the inputs."""
    rng = torch.Generator().manual_seed(seed)
    labels = torch.randint(NUM_CLASSES, (num_examples,), generator=rng)
    inputs = torch.randn(num_examples, *shape, generator=rng)
    return TensorDataset(inputs + labels.view(-1, *[1] * len(shape)) - 1, labels)


def make_parts(sizes: Sequence[int], build=plain_net) -> list[TensorDataset]:
    """Return one data set per client, of the given sizes, that fits the model."""
    takes_images = any(isinstance(module, nn.Conv2d) for module in fresh(build).modules())
    shape = (1, 6, 6) if takes_images else (8,)
    return [make_data(size, seed=100 + index, shape=shape) for index, size in enumerate(sizes)]


def epoch_batches(
    num_examples: int, name: str, batch_size: int, seed: int = SEED, *, drop_last: bool = False
) -> Iterator[list[list[int]]]:
    """Yield the mini-batches of one epoch after another: a new permutation for each."""
    epoch = 0
    while True:
        rng = torch.Generator().manual_seed(derive_seed(seed, "data", name, epoch))
        order = torch.randperm(num_examples, generator=rng).tolist()
        batches = [order[i : i + batch_size] for i in range(0, num_examples, batch_size)]
        yield [b for b in batches if len(b) == batch_size] if drop_last else batches
        epoch += 1


# --- running flsplit -------------------------------------------------------------------------


def split_app(build, parts: Sequence[Dataset], tests: Sequence[Dataset] | None = None, **options):
    """Return the ClientApp whose client ``i`` has ``parts[i]`` (and ``tests[i]``)."""

    def load(context: Context):
        index = int(context.node_config["partition-id"])
        return parts[index] if tests is None else (parts[index], tests[index])

    return client_app(**({"model": build, "cut": CUT, "data": load, "device": "cpu"} | options))


def run_split(
    strategy_class,
    build,
    parts: Sequence[Dataset],
    *,
    optimizer=SGD,
    rounds: int = 2,
    tests: Sequence[Dataset] | None = None,
    cache: bool = True,
    app_options: Mapping | None = None,
    start: Mapping | None = None,
    wrap=None,
    **options,
):
    """Train with a strategy over LocalGrid (in ``wrap``, if given) and return its result."""
    model = fresh(build)
    defaults = {"server_lr": LR, "seed": SEED, "batch_size": 4, "server_optimizer": optimizer}
    defaults |= {"cut": CUT, "device": "cpu"}
    strategy = strategy_class(model=model, **(defaults | options))
    app = split_app(build, parts, tests, optimizer=optimizer, **(app_options or {}))
    grid = LocalGrid(app, len(parts), cache=cache, progress=False)
    return strategy.start(
        grid=wrap(grid) if wrap else grid,
        initial_arrays=ArrayRecord(model.state_dict()),
        num_rounds=rounds,
        **(start or {}),
    )


def weights_of(record: ArrayRecord) -> dict[str, Tensor]:
    """Return the tensors in a result's ArrayRecord."""
    return {name: torch.from_numpy(array.numpy().copy()) for name, array in record.items()}


def whole_of(result, client: str = "0") -> dict[str, Tensor]:
    """Return the joined state dict of a result whose clients shared their segments."""
    return weights_of(result.arrays) | weights_of(result.client_segments[client])


class WrappedGrid(Carrier):
    """A grid that hands everything on to another; tests override one method."""

    def __init__(self, inner: LocalGrid) -> None:
        self.inner = inner
        self.in_process = inner.in_process

    @property
    def run(self):
        return self.inner.run

    def set_run(self, run):
        self.inner.set_run(run)

    def create_message(self, *args, **kwargs) -> Message:
        return self.inner.create_message(*args, **kwargs)

    def get_node_ids(self):
        return self.inner.get_node_ids()

    def push_messages(self, messages):
        return self.inner.push_messages(messages)

    def pull_messages(self, message_ids):
        return self.inner.pull_messages(message_ids)

    def send_and_receive(self, messages, *, timeout=None):
        return self.inner.send_and_receive(messages, timeout=timeout)


# --- comparing -------------------------------------------------------------------------------


def assert_bit_equal(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Compare state dicts bit for bit."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


def assert_close(
    found: Mapping[str, Tensor], expected: Mapping[str, Tensor], tolerance: float = 1e-5
) -> None:
    """Compare state dicts to a tolerance."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(
            found[name], tensor, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


# --- training the whole model ----------------------------------------------------------------


@contextmanager
def client_then_server_noise(
    model: nn.Module, client_seed: int, server_seed: int, device: torch.device | None = None
):
    """Let the layers up to the cut draw from one seed, those after it from another."""
    hook = model.get_submodule(CUT).register_forward_hook(
        lambda *_: torch.manual_seed(server_seed) and None
    )
    try:
        with seeded(client_seed, device):
            yield
    finally:
        hook.remove()


def whole_step(
    model: nn.Module,
    optimizers: Sequence[Optimizer],
    data: Dataset,
    indices: Sequence[int],
    *,
    name: str,
    server_round: int,
    step: int,
    seed: int = SEED,
) -> float:
    """Do one ordinary training step of the whole model and return the loss."""
    model.train()
    device = next(model.parameters()).device
    with client_then_server_noise(
        model,
        derive_seed(seed, "client", name, server_round, step),
        derive_seed(seed, "server", server_round, step, name),
        device,
    ):
        inputs, labels = to_device(default_collate([data[index] for index in indices]), device)
        if isinstance(inputs, dict):
            loss = functional.cross_entropy(model(**inputs), labels)
        else:
            loss = functional.cross_entropy(model(inputs), labels)
    for optimizer in optimizers:
        optimizer.zero_grad()
    loss.backward()
    for optimizer in optimizers:
        optimizer.step()
    return loss.item()


def train_in_turn(
    build,
    parts: Sequence[Dataset],
    *,
    optimizer,
    rounds: int,
    batch_size: int = 4,
    lr=LR,
    device: str = "cpu",
) -> tuple[dict[str, Tensor], list[list[float]]]:
    """Train one whole model on one client's epoch after the other's; with one client: as usual.

    ``lr`` is a number or a function of the round. Returns the state dict and the losses of each
    round's steps.
    """
    model = fresh(build).to(device)
    own = optimizer(model.parameters(), lr=0.0)
    streams = [epoch_batches(len(p), str(i), batch_size) for i, p in enumerate(parts)]
    losses = []
    for server_round in range(1, rounds + 1):
        for group in own.param_groups:
            group["lr"] = lr(server_round) if callable(lr) else lr
        losses.append(
            [
                whole_step(
                    model, [own], part, indices,
                    name=str(client), server_round=server_round, step=step,
                )
                for client, part in enumerate(parts)
                for step, indices in enumerate(next(streams[client]))
            ]
        )  # fmt: skip
    return {k: v.cpu().clone() for k, v in model.state_dict().items()}, losses


def train_together(sizes: Sequence[int], rounds: int) -> dict[str, Tensor]:
    """Train one plain whole model on a batch of 4 of each client at a time, weighed by size."""
    model = fresh(plain_net)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    parts = make_parts(sizes)
    streams = [numbered_batches(part, str(i), 4) for i, part in enumerate(parts)]
    for _ in range(rounds):
        loss = 0.0
        for part, stream, size in zip(parts, streams, sizes, strict=True):
            rows = next(stream)
            outputs = model(part.tensors[0][rows])
            loss += size / sum(sizes) * functional.cross_entropy(outputs, part.tensors[1][rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.state_dict()


def average(states: Sequence[Mapping[str, Tensor]], sizes: Sequence[int]) -> dict[str, Tensor]:
    """Return the average by ``sizes`` of what floats, and the maximum of what counts."""
    total, averaged = sum(sizes), {}
    for name, first in states[0].items():
        if first.is_floating_point():
            pairs = zip(states, sizes, strict=True)
            averaged[name] = sum(s[name].double() * (n / total) for s, n in pairs).to(first.dtype)
        else:
            averaged[name] = torch.stack([s[name] for s in states]).max(0).values
    return averaged


def numbered_batches(part: Dataset, name: str, batch_size: int) -> Iterator[list[int]]:
    """Yield mini-batches without end, one epoch after another."""
    for epoch in epoch_batches(len(part), name, batch_size):
        yield from epoch
