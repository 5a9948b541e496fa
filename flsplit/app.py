"""``client_app``: a ClientApp that does a client's part of split learning."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from flwr.clientapp.typing import ClientAppCallable, Mod
from torch import nn

from flsplit.auxiliary import BuildAuxiliary
from flsplit.carry.session.host import serve_session
from flsplit.client.hand_over import sort_mods
from flsplit.client.handlers import add_handlers, answering_errors
from flsplit.client.spec import ClientSpec, OptimizerFactory, Unpack
from flsplit.client_parts import ClientPart
from flsplit.cut.client_cuts import ClientCuts
from flsplit.losses import Loss
from flsplit.message.arrays import readable


def client_app(
    *,
    model: Callable[..., nn.Module],
    cut: ClientCuts,
    data: Callable[[Context], Any],
    optimizer: OptimizerFactory = torch.optim.SGD,
    device: str = "auto",
    autocast: torch.dtype | None = None,
    max_grad_norm: float | None = None,
    unpack: Unpack | None = None,
    share: Sequence[str] = (),
    auxiliary: BuildAuxiliary | None = None,
    loss: Loss | None = None,
    client_parts: Sequence[type[ClientPart]] = (),
    mods: list[Mod] | None = None,
) -> ClientApp:
    """Return a ClientApp that trains the client segment of ``model``.

    Parameters
    ----------
    model : callable
        Returns a new unsplit model. Called without arguments, or with ``context=`` if it has
        a parameter of that name.
    cut : str, (str, str), mapping or callable
        Name of the submodule after which the model is cut, as in ``model.named_modules()``. Two of
        them, of which the server has what lies between, keep the labels here: the client has the
        last layers, and the loss. Or such names by patterns of clients' names, or a function of a
        client's name, or of its ``context``.
    data : callable
        Takes the ``Context`` (``node_config`` holds ``partition-id`` and ``num-partitions`` in
        a simulation) and returns the client's data: a map-style ``Dataset`` or a ``DataLoader``
        for training, or a pair of them for training and test. Of a DataLoader the data set, the
        collate function and a sampler of one's own are used; batch size, and otherwise the
        order, come from the server.
    optimizer : callable, optional
        Called as ``optimizer(parameters, lr=…)``; the learning rate comes from the server every
        round. Default: ``torch.optim.SGD``.
    device : str, optional
        A torch device, or ``auto``: the GPU if there is one.
    autocast : torch.dtype, optional
        Run the client segment under ``torch.autocast`` with this dtype.
    max_grad_norm : float, optional
        Clip the client segment's gradients to this total norm.
    unpack : callable, optional
        Turns a batch into ``(inputs, labels)``, any nestings of tensors with one row per example
        in front, e.g. ``lambda batch: (batch["img"], batch["label"])``. Not needed where it is
        such a pair, or a dict with the key ``labels`` or ``label``. Inputs that are a dict become
        the model's keyword arguments, a tuple or list its positional ones.
    share : sequence of str, optional
        Inputs of the model that may be sent to the server as they are, such as
        ``"attention_mask"``, where layers after the cut need them. All others stay here.
    auxiliary : callable, optional
        Builds the auxiliary model of decoupled methods from the shape of one row of smashed
        data and the number of classes; the strategy gets the same function. Not needed for those
        that flsplit builds.
    loss : callable, optional
        The loss, where the client has the last layers; and that with which decoupled methods train
        here, on the auxiliary model's logits: the same as the strategy's, where that is another
        than plain cross-entropy. Otherwise the server computes the loss.
    client_parts : sequence of type, optional
        Classes of client parts that a strategy may ask for by name, beside those that are
        installed (entry-point group ``flsplit.client_parts``).
    mods : list of Mod, optional
        Flower mods around every handler, but for Flower's own that make updates private
        (``fixedclipping_mod``, ``adaptiveclipping_mod`` and ``LocalDpMod`` of
        ``flwr.clientapp.mod``): these edit the parameters of the client segment where it is handed
        over. Those that could not protect anything are refused. The others may read what is sent
        (``Array.numpy()``) and put other arrays in its place. What a mod changes is no part of
        training: the gradient that comes back is of what the server got, and goes on as if the mod
        hadn't been there.

    Returns
    -------
    flwr.clientapp.ClientApp
        It answers ``query.describe``, ``query.shape``, ``train.step``, ``train.finish``,
        ``train.local``, ``evaluate.step`` and ``train.session``; other handlers can be added as
        to any ClientApp. A run-config key ``torch-threads`` above 0 sets torch's number of threads.
    """
    around, privacy_mods = sort_mods(mods or ())
    spec = ClientSpec(
        model=model,
        cut=cut,
        data=data,
        optimizer=optimizer,
        device=device,
        autocast=autocast,
        max_grad_norm=max_grad_norm,
        unpack=unpack,
        share=share,
        auxiliary=auxiliary,
        loss=loss,
        client_parts=client_parts,
        privacy_mods=privacy_mods,
    )
    app = ClientApp(mods=[_readable, *around] if around else None)
    app.flsplit = spec  # type: ignore[attr-defined]  # for tools that look at somebody's app
    add_handlers(app, spec)

    @app.train("session")
    @answering_errors
    def session(message: Message, context: Context) -> Message:
        return serve_session(app, message, context)

    return app


def _readable(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
    """Be the outermost mod: the user's can read the raw arrays of a request."""
    if message.has_content():
        readable(message.content)
    return call_next(message, context)
