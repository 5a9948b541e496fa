"""One step, whole and split, compared bit for bit: outputs, gradients, buffers; train and eval."""

import copy
import json
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from flsplit.cut import Crossing, Trace, split


def tensors(tree):
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def loss_of(output):
    loss = getattr(output, "loss", None)
    if loss is not None:
        return loss
    return sum(t.abs().square().mean() for t in tensors(output) if t.requires_grad)


def assert_exact(model: nn.Module, cut, args=(), kwargs=None, *, share=(), modes=(True, False)):
    """Compare a step of `model` with one of its halves; the crossing goes through JSON."""
    kwargs, model = kwargs or {}, copy_of(model)
    for training in modes:
        model.train(training)
        example = dict(kwargs) if not args else tuple(args)
        halves = split(copy_of(model), cut, example, share=share)
        client, server = copy.deepcopy(halves.client), copy.deepcopy(halves.server)
        whole = copy_of(model)
        torch.manual_seed(5)
        expected = whole(*copy.deepcopy(args), **copy.deepcopy(kwargs))
        loss_of(expected).backward()
        torch.manual_seed(5)
        mine = client.crossing(*copy.deepcopy(args), **copy.deepcopy(kwargs))
        sent = mine.detached()
        trace = Trace.from_json(mine.trace.to_json())
        assert trace == mine.trace
        assert trace.numbers == mine.trace.numbers
        json.loads(trace.to_json())
        output = server(Crossing(sent.values, trace, sent.aliases))
        # Hooks get gradients as they come: `.grad` has the memory layout of its value, and sums of
        # another layout add in another order.
        gradients: dict[str, Tensor] = {}
        for name in mine.learning:
            sent.values[name].register_hook(partial(gradients.__setitem__, name))
        loss_of(output).backward()
        mine.backward({name: gradients.get(name) for name in mine.learning})
        compare(whole, client, server, expected, output)


def copy_of(model: nn.Module) -> nn.Module:
    """Copy a model; a copy that torch makes of TorchScript's modules has no parameters."""
    model = copy.deepcopy(model)
    for module in model.modules():
        for name, value in list(module.named_parameters(recurse=False)):
            if not isinstance(value, nn.Parameter):
                setattr(module, name, nn.Parameter(value))
    return model


def compare(whole, client, server, expected, output):
    for a, b in zip(tensors(expected), tensors(output), strict=True):
        assert same(a, b), f"an output differs by {float((a - b).abs().max()):.1e}"
    assert {*client.state_dict(), *server.state_dict()} == whole.state_dict().keys()
    sides = {**dict(client.named_parameters()), **dict(server.named_parameters())}
    for name, parameter in whole.named_parameters():
        theirs = sides[name].grad
        assert (parameter.grad is None) == (theirs is None), name
        assert theirs is None or same(parameter.grad, theirs), f"gradient of {name}"
    sides = {**dict(client.named_buffers()), **dict(server.named_buffers())}
    for name, buffer in whole.named_buffers():
        assert name not in sides or same(buffer, sides[name]), name


def same(a, b):
    return a.shape == b.shape and torch.equal(
        *tree_map(lambda t: t.detach().to_dense() if t.layout != torch.strided else t, (a, b))
    )
