"""The client: trains its layers on its own data."""

from functools import partial

from torch.optim import SGD

from flsplit import client_app
from quickstart.data import load_partition
from quickstart.task import build_model, cut_of

app = client_app(
    model=build_model,
    cut=lambda context: cut_of(context.run_config),
    data=load_partition,
    optimizer=partial(SGD, momentum=0.9),
)
