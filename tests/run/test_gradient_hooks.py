"""Hooks of gradients: a client calls them, a server calls those of modules and refuses others."""

import pytest
import torch
from reference import CUT, make_parts, plain_net, run_split, weights_of
from torch.optim import SGD

from flsplit.errors import ConfigError, NotEnoughClientsError
from flsplit.strategies import PSL, SequentialSL, SplitFedV1


def hooked(layer, kind):
    """Return a function that makes a net one of whose weights has a hook that makes it stay."""

    def build():
        net = plain_net()
        getattr(net.get_submodule(layer).weight, kind)(hook_of(kind))
        return net

    return build


def hook_of(kind):
    if kind == "register_hook":
        return torch.zeros_like

    def stop(parameter):
        parameter.grad.zero_()

    return stop


def moved(build, layer, strategy=SequentialSL, **options):
    """Return whether a layer's weight is another one after a round."""
    start = {}

    def noting():
        net = build()
        start.setdefault("weight", net.get_submodule(layer).weight.detach().clone())
        return net

    found = run_split(strategy, noting, make_parts((8,)), rounds=1, **options)
    return not torch.equal(weights_of(found.arrays)[f"{layer}.weight"], start["weight"])


KINDS = pytest.mark.parametrize("kind", ["register_hook", "register_post_accumulate_grad_hook"])


@KINDS
@pytest.mark.parametrize("cache", [True, False])
def test_a_client_calls_the_hooks_of_its_weights(kind, cache):
    assert moved(plain_net, "front.0", cache=cache)
    assert not moved(hooked("front.0", kind), "front.0", cache=cache)


@KINDS
@pytest.mark.parametrize("strategy", [PSL, SequentialSL, SplitFedV1])
def test_hooks_of_the_servers_weights_are_refused_by_name(kind, strategy):
    with pytest.raises(ConfigError, match=rf"'head.weight', .*server segment.* \({kind}\)"):
        run_split(strategy, hooked("head", kind), make_parts((8,)))


def test_what_the_refusal_says_instead():
    """A hook of the server's optimizer sees the gradients before each step."""

    def masked(params, lr):
        optimizer = SGD(params, lr=lr)

        def stop(*args):
            optimizer.param_groups[0]["params"][-2].grad.zero_()

        optimizer.register_step_pre_hook(stop)
        return optimizer

    assert moved(plain_net, "head")
    assert not moved(plain_net, "head", server_optimizer=masked)


@pytest.mark.parametrize("layer", ["front.0", "head"])
def test_hooks_of_modules_are_called_on_both_sides(layer):
    called = []

    def build():
        net = plain_net()
        module = net.get_submodule(layer)
        module.register_forward_hook(lambda *args: called.append("forward"))
        module.register_full_backward_pre_hook(lambda *args: called.append("pre"))
        module.register_full_backward_hook(lambda *args: called.append("backward"))
        return net

    run_split(SequentialSL, build, make_parts((8,)), rounds=1)
    assert {*called} == {"forward", "pre", "backward"}


def test_of_two_cuts_a_hook_of_the_accumulated_gradient_is_refused():
    """The last layers' gradients are kept until the first layers' come, and put in their place."""
    options = {"cut": f"{CUT},middle"}
    with pytest.raises(NotEnoughClientsError, match=r"'head.weight' \(register_post_accumulate"):
        run_split(
            PSL, hooked("head", "register_post_accumulate_grad_hook"), make_parts((8,)),
            app_options=options, **options,
        )  # fmt: skip
    assert not moved(hooked("head", "register_hook"), "head", app_options=options, **options)
