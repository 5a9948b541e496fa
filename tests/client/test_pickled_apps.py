"""Ray pickles a ClientApp for each simulated client, functions with all that they refer to."""

import pickle

import torch
from flwr.clientapp.mod import fixedclipping_mod
from ray import cloudpickle
from reference import CUT, make_parts, plain_net

from flsplit import LocalGrid, client_app
from flsplit.strategies import PSL

PART = make_parts((8,))[0]


def test_a_pickled_app_is_an_app():
    def build():
        torch.manual_seed(0)
        return plain_net()

    def app_of(**options):
        return client_app(model=build, cut=CUT, data=lambda _: PART, device="cpu", **options)

    cloudpickle.dumps(app_of(mods=[fixedclipping_mod]))
    app = pickle.loads(cloudpickle.dumps(app_of()))
    strategy = PSL(model=build(), cut=CUT, batch_size=4, device="cpu")
    grid = LocalGrid(app, 1, progress=False)
    result = strategy.start(grid, build().state_dict(), num_rounds=1)
    assert result.history[0].left_out == []
