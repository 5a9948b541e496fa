"""One training step, of a whole model and of its two segments, compared bit for bit."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

from flsplit.cut import split
from flsplit.vision import load_torchvision


@pytest.fixture(autouse=True)
def one_thread():
    """Bit-equality holds for a fixed number of threads, and small tensors are faster on one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def torchvision_models():
    return load_torchvision().models


@pytest.fixture(scope="session")
def small_vit(torchvision_models):
    """vit_b_16 with patches as large but everything else smaller: 2 x 2 patches + class token."""

    def build(num_layers=3):
        torch.manual_seed(0)
        return torchvision_models.VisionTransformer(
            image_size=32,
            patch_size=16,
            num_layers=num_layers,
            num_heads=4,
            hidden_dim=64,
            mlp_dim=128,
            dropout=0.1,
            num_classes=10,
        )

    return build


def optimizer_of(module):
    return torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)


def whole_step(model, batch, labels):
    torch.manual_seed(1)
    output = model(batch)
    functional.cross_entropy(output, labels).backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    optimizer_of(model).step()
    return output, gradients, model.state_dict()


def split_step(halves, batch, labels):
    torch.manual_seed(1)
    smashed = halves.client(batch)
    received = smashed.detach().requires_grad_()
    output = halves.server(received)
    functional.cross_entropy(output, labels).backward()
    gradients = {}
    if smashed.requires_grad:
        smashed.backward(received.grad)
    for segment in (halves.client, halves.server):
        gradients |= {name: p.grad.clone() for name, p in segment.named_parameters()}
        if list(segment.parameters()):
            optimizer_of(segment).step()
    return output, gradients, halves.join(halves.client.state_dict(), halves.server.state_dict())


@pytest.fixture(scope="session")
def assert_same_step():
    """Compare one step of a model with one step of the same model, cut.

    It is the first step, or another one if ``known`` is given, which is called before it.
    """

    def check(
        model: nn.Module, cut: str, batch: torch.Tensor, labels: torch.Tensor, known=None
    ) -> None:
        model = copy.deepcopy(model)
        halves = split(model, cut)
        if known:
            halves.server(halves.client(batch))
            known()
        output, gradients, state = whole_step(copy.deepcopy(model), batch, labels)
        cut_output, cut_gradients, cut_state = split_step(halves, batch, labels)
        assert torch.equal(cut_output, output)
        assert list(cut_state) == list(state)
        for name, gradient in gradients.items():
            assert torch.equal(cut_gradients[name], gradient), name
        for name, tensor in state.items():
            assert torch.equal(cut_state[name], tensor), name

    return check
