"""Nestings of tensors: what is changed, what stays, what is where."""

from collections import UserDict, namedtuple

import pytest
import torch
from torch import nn

from flsplit.nested import as_arguments, leaves_of, map_tensors, tensors_of, to_device

Pair = namedtuple("Pair", "h c")
ONE, TWO, THREE = (torch.full((2,), float(value)) for value in (1, 2, 3))


def test_containers_stay_what_they_are_and_leaves_too():
    marker = object()
    tree = {"a": (ONE, [TWO, marker]), "b": Pair(THREE, None), "c": UserDict(d=ONE)}
    found = map_tensors(lambda tensor: tensor * 10, tree)
    assert list(found) == ["a", "b", "c"]
    assert torch.equal(found["a"][0], ONE * 10)
    assert torch.equal(found["a"][1][0], TWO * 10)
    assert found["a"][1][1] is marker
    assert type(found["a"]) is tuple
    assert type(found["a"][1]) is list
    assert type(found["b"]) is Pair
    assert torch.equal(found["b"].h, THREE * 10)
    assert found["b"].c is None
    assert type(found["c"]) is dict
    assert torch.equal(found["c"]["d"], ONE * 10)
    assert torch.equal(tree["a"][0], torch.ones(2))


def test_one_tensor_is_a_nesting():
    assert torch.equal(map_tensors(torch.neg, ONE), -ONE)
    assert tensors_of(ONE)[0] is ONE
    assert tensors_of("ONE") == []


def test_leaves_and_their_places():
    tree = {"a": (ONE, ["x"]), "b": Pair(TWO, ()), 3: UserDict(d=THREE)}
    places = ["['a'][0]", "['a'][1][0]", "['b'].h", "[3]['d']"]
    assert [place for place, _ in leaves_of(tree)] == places
    assert list(leaves_of(7)) == [("", 7)]
    for found, expected in zip(tensors_of(tree), (ONE, TWO, THREE), strict=True):
        assert found is expected


def test_a_packed_sequence_keeps_its_lengths():
    packed = nn.utils.rnn.pack_sequence([ONE, TWO[:1]])
    moved = map_tensors(lambda tensor: tensor.to(torch.float64), packed)
    assert moved.data.dtype == torch.float64
    assert torch.equal(moved.batch_sizes, torch.tensor([2, 1]))
    (same,) = to_device([packed], torch.device("cpu"))
    assert torch.equal(same.data, packed.data)
    assert as_arguments(packed)[0][0] is packed


@pytest.mark.parametrize(
    ("inputs", "args", "kwargs"),
    [
        (1, (1,), {}),
        ((1, 2), (1, 2), {}),
        ([1, 2], (1, 2), {}),
        (UserDict(a=1), (), {"a": 1}),
        (Pair(1, 2), (Pair(1, 2),), {}),
    ],
)
def test_inputs_as_arguments(inputs, args, kwargs):
    assert as_arguments(inputs) == (args, kwargs)
