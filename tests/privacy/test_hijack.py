"""FSHA over a LocalGrid: what clients are sent, by hand; and that inputs come out."""

import pytest
import torch
from flwr.app import ArrayRecord
from reference import LR, SEED, assert_close, epoch_batches, fresh, make_parts, plain_net, whole_of
from spots import images
from torch import nn
from torch.nn import functional
from torch.utils.data import TensorDataset

from flsplit import LocalGrid, client_app
from flsplit.errors import ConfigError
from flsplit.privacy import Hijack
from flsplit.privacy.hijack import build_critic
from flsplit.seeds import seeded

PARTS = make_parts([8])
PUBLIC = torch.randn(40, 8, generator=torch.Generator().manual_seed(3))


def start(strategy, build, data, *, rounds=1, optimizer=torch.optim.SGD):
    app = client_app(
        model=build, cut=strategy.options.cut, device="cpu", optimizer=optimizer,
        data=lambda _: data,
    )  # fmt: skip
    grid = LocalGrid(app, 1, progress=False)
    return strategy.start(grid, ArrayRecord(build().state_dict()), rounds)


def small(**options):
    with seeded(4):
        pilot = nn.Linear(8, 6)
    arguments = {"public": PUBLIC, "pilot": pilot, "warm_up": 2, "attack_lr": 0.0}
    shared = {"model": fresh(plain_net), "cut": "front", "batch_size": 8, "seed": SEED}
    return Hijack(**(shared | arguments | {"device": "cpu", "server_lr": LR} | options))


def test_what_a_client_is_sent_by_hand():
    """The slope of a linear critic, over the scale and the rows; the server segment stays."""
    with seeded(0):
        critic, pilot = nn.Linear(6, 1), nn.Linear(8, 6)
    result = start(
        small(critic=critic, pilot=pilot, share_client_segments=True),
        lambda: fresh(plain_net), PARTS[0],
    )  # fmt: skip
    model = fresh(plain_net)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    (rows,) = next(epoch_batches(8, "0", 8))
    scale = pilot(PUBLIC).std().detach()
    model.front(PARTS[0].tensors[0][rows]).backward(
        (-critic.weight.detach() / scale / 8).expand(8, 6)
    )
    optimizer.step()
    assert_close(whole_of(result), model.state_dict(), 1e-6)


def test_a_critic_steps_as_wgan_gp_says():
    strategy = small(attack_lr=0.01, critic_steps=1, gradient_penalty=7.0)
    start(strategy, lambda: fresh(plain_net), PARTS[0])
    again = small(attack_lr=0.01)
    again.begin(ArrayRecord(fresh(plain_net).state_dict()))
    (rows,) = next(epoch_batches(8, "0", 8))
    real = fresh(plain_net).front(PARTS[0].tensors[0][rows]).detach()
    critic, scale = again._critic, again._scale  # as they were before the step
    made = again._pilot(PUBLIC[torch.randint(40, (8,), generator=again._rng)])
    share = torch.rand(8, 1, generator=again._rng)
    between = ((share * made + (1 - share) * real) / scale).requires_grad_()
    (slope,) = torch.autograd.grad(critic(between).sum(), between, create_graph=True)
    penalty = (slope.norm(dim=1) - 1).square().mean()
    loss = critic(real / scale).mean() - critic(made / scale).mean() + 7.0 * penalty
    found = {name: one.grad for name, one in strategy._critic.named_parameters()}
    loss.backward()
    assert_close(found, {name: one.grad for name, one in critic.named_parameters()}, 1e-5)
    moved = zip(strategy._critic.parameters(), critic.parameters(), strict=True)
    assert not all(torch.equal(*pair) for pair in moved)  # it has stepped, too


def segment():
    return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.LeakyReLU(0.2), nn.Conv2d(4, 4, 3, 2, 1))


def spots():
    with seeded(0):
        return nn.Sequential(segment(), nn.Sequential(nn.Flatten(), nn.Linear(64, 2)))


def mlp(size):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.LeakyReLU(0.2), nn.Linear(32, size))


def test_inputs_come_out():
    """Pictures of bright spots: from less than the mean to more than half of their variance."""
    public, private = images(300, 0), images(64, 1)
    with seeded(1):
        pilot, critic = segment(), mlp(1)
        decoder = nn.Sequential(
            *(nn.Conv2d(4, 16, 3, padding=1), nn.LeakyReLU(0.2)),
            *(nn.Upsample(scale_factor=2), nn.Conv2d(16, 1, 3, padding=1)),
        )
    found = []

    class Judged(Hijack):
        def step(self, step):
            (batch,) = step.batches
            truth = private[batch.labels]
            guess = functional.mse_loss(public.mean(0).expand_as(truth), truth)
            error = functional.mse_loss(self.reconstruct(batch.tensor), truth)
            found.append(float(1 - error / guess))
            super().step(step)

    strategy = Judged(
        model=spots(), cut="0", public=public, pilot=pilot, decoder=decoder, critic=critic,
        client_lr=2e-3, attack_lr=3e-3, warm_up=150, critic_steps=3, batch_size=32,
        local_steps=110, seed=SEED, device="cpu", fraction_evaluate=0.0,
    )  # fmt: skip
    data = TensorDataset(private, torch.arange(64))
    result = start(strategy, spots, data, optimizer=torch.optim.Adam)
    assert sum(found[:10]) / 10 < 0
    assert sum(found[-10:]) / 10 > 0.5
    assert result.history[0].metrics["critic-distance"] > 0


@pytest.mark.parametrize("shape", [(3, 7, 7), (2, 1, 5), (5,), (4, 6)])
def test_a_critic_fits_any_shape(shape):
    assert build_critic(shape)(torch.zeros(2, *shape)).shape == (2, 1)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"public": torch.zeros(4, 8, dtype=torch.int64)}, "public is no tensor of two inputs"),
        ({"warm_up": 0}, "warm_up is 0, expected a whole number of at least 1"),
        ({"critic_steps": 1.5}, "critic_steps is 1.5, expected a whole number"),
        ({"checkpoint_dir": "/tmp/never"}, "an attack keeps no checkpoints"),
        ({"cut": ("front", "middle")}, "can't do without them"),
    ],
)
def test_what_is_refused(options, error):
    with pytest.raises(ConfigError, match=error):
        small(**options)


def test_a_pilot_of_another_shape_is_refused():
    with pytest.raises(ConfigError, match=r"pilot returned shape \(8, 5\), smashed data has"):
        start(small(pilot=nn.Linear(8, 5)), lambda: fresh(plain_net), PARTS[0])
