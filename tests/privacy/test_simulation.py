"""SDAR: a simulated client by hand, labels by one that is near, and none from noise."""

import copy

import pytest
import torch
from reference import assert_close
from spots import images
from torch import nn
from torch.nn import functional

from flsplit.errors import ConfigError
from flsplit.privacy import reconstruct, simulate
from flsplit.privacy.hijack import build_critic
from flsplit.seeds import generator, seeded

CLASSES = 3


def data(n, seed):
    """Return pictures of spots, and how bright they are."""
    inputs = images(n, seed)
    return inputs, torch.bucketize(inputs.flatten(1).mean(1), torch.tensor([0.11, 0.16]))


def client():
    return nn.Sequential(nn.Conv2d(1, 4, 3, 2, 1), nn.ReLU())


def tail():
    return nn.Linear(8, CLASSES)


@pytest.fixture(scope="module")
def trained():
    """Client, server segment and tail of a U-shaped model that was trained."""
    with seeded(5):
        parts = [client(), nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.Tanh()), tail()]
    optimizer = torch.optim.Adam([p for one in parts for p in one.parameters()], 0.02)
    inputs, labels = data(300, 0)
    for _ in range(80):
        optimizer.zero_grad()
        functional.cross_entropy(nn.Sequential(*parts)(inputs), labels).backward()
        optimizer.step()
    return parts


def test_two_steps_by_hand(trained):
    """Rows of both are drawn; the critic learns first, then client and tail against it."""
    server, known = trained[1], data(50, 2)
    smashed = trained[0](images(40, 1)).detach()
    found = simulate(
        server, smashed, known, client=client, tail=tail, steps=2, batch_size=6, adversarial=0.3,
        lr=0.01, seed=3,
    )  # fmt: skip
    with seeded(3):
        fake, last, critic = client(), tail(), build_critic((4, 4, 4))
    rng, scale = generator(3, "simulate"), smashed.std()
    own = torch.optim.Adam([*fake.parameters(), *last.parameters()], 0.01)
    other = torch.optim.Adam(critic.parameters(), 0.01, betas=(0.5, 0.9))
    for _ in range(2):
        rows = torch.randint(50, (6,), generator=rng)
        real = smashed[torch.randint(40, (6,), generator=rng)]
        made = fake(known[0][rows])
        is_real, is_made = (torch.sigmoid(critic(one.detach() / scale)) for one in (real, made))
        other.zero_grad()
        (-(is_real.log().sum() + (1 - is_made).log().sum()) / 12).backward()
        other.step()
        own.zero_grad()
        loss = functional.cross_entropy(last(server(made)), known[1][rows])
        (loss - 0.3 * torch.sigmoid(critic(made / scale)).log().mean()).backward()
        own.step()
    assert_close(found.client.state_dict(), fake.state_dict(), 1e-4)
    assert_close(found.tail.state_dict(), last.state_dict(), 1e-4)


def test_labels_and_inputs_are_found_by_a_client_that_is_near(trained):
    """The tail is the attacker's own; where its client comes near enough, it reads real rows."""
    real, server, _ = trained
    before = [p.clone() for p in server.parameters()]
    (inputs, labels), own = data(200, 1), data(150, 2)
    smashed = real(inputs).detach()
    made = simulate(
        server, smashed, own, client=lambda: copy.deepcopy(real), tail=tail, steps=80, lr=3e-3
    )
    assert (made.labels(smashed) == labels).float().mean() > 0.8
    assert all(map(torch.equal, before, server.parameters()))
    decoded = reconstruct((made.smash(own[0]), own[0]), (smashed, inputs), epochs=0)
    assert decoded.explained > 0.5


def test_noise_gives_no_labels_away(trained):
    _, labels = data(200, 1)
    smashed = torch.randn(200, 4, 4, 4, generator=torch.Generator().manual_seed(4))
    made = simulate(trained[1], smashed, data(100, 2), client=client, tail=tail, steps=20)
    found = made.labels(smashed)
    says, are = (torch.bincount(one, minlength=CLASSES) / 200 for one in (found, labels))
    assert (found == labels).float().mean() == pytest.approx(float(says @ are), abs=0.1)


@pytest.mark.parametrize(
    ("labels", "shape", "error"),
    [
        (3, (5, 4, 4, 4), "4 inputs and 3 labels"),
        (4, (5, 4, 4, 5), r"rows of shape \(4, 4, 4\), smashed data has \(4, 4, 5\)"),
    ],
)
def test_what_is_refused(trained, labels, shape, error):
    known = images(4, 0), torch.zeros(labels)
    with pytest.raises(ConfigError, match=error):
        simulate(trained[1], torch.zeros(shape), known, client=client, tail=tail, steps=1)
