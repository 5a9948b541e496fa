"""Copies of models, in which TorchScript's modules can be watched, too."""

import copy
from typing import Any

import torch
from torch import nn

from flsplit.cut.cut_errors import CutError
from flsplit.cut.partial_forward import Stub
from flsplit.untrained import copied


def plain_copy(model: nn.Module, memo: dict[int, Any] | None = None) -> nn.Module:
    """Copy a model, with TorchScript modules in the shells that watching needs.

    With a ``memo``, as :func:`copy.deepcopy` takes it, the shells hold the model's own modules.
    """
    own, memo = memo is not None, memo if memo is not None else {}
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            if not name:
                raise CutError(
                    f"{type(model).__name__} is compiled by TorchScript: cut the model that it was "
                    "made of"
                )
            script = module if own else copy.deepcopy(module)
            memo.setdefault(id(module), Scripted(script, hold=True))
    return copied(model, memo)


class Scripted(nn.Module):
    """Calls a TorchScript module, which takes neither hooks nor another forward.

    It has the module's parameters and buffers under the module's names, or none of them.
    """

    def __init__(self, script: nn.Module, *, hold: bool) -> None:
        super().__init__()
        vars(self)["script"] = script
        self.training = script.training
        if hold:
            self._hold(self, script)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call it."""
        return vars(self)["script"](*args, **kwargs)

    def train(self, mode: bool = True) -> "Scripted":
        """Train it, too."""
        vars(self)["script"].train(mode)
        return super().train(mode)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Scripted":
        """Copy the script, too, and hold the copy's tensors."""
        script = memo.get(id(vars(self)["script"])) or copy.deepcopy(vars(self)["script"], memo)
        other = Scripted(script, hold=bool(self._parameters or self._buffers or self._modules))
        memo[id(self)] = other
        for mine, theirs in zip(self.modules(), other.modules(), strict=True):
            for kind in ("_parameters", "_buffers"):  # of one side there are not all
                for name in vars(theirs)[kind].keys() - vars(mine)[kind].keys():
                    del vars(theirs)[kind][name]
        other._forward_hooks = copy.deepcopy(self._forward_hooks, memo)
        if isinstance(stub := vars(self).get("forward"), Stub):
            vars(other)["forward"] = Stub(other, stub.name)
        return other

    @classmethod
    def _hold(cls, shell: nn.Module, script: nn.Module) -> None:
        for name, parameter in script.named_parameters(recurse=False):
            own = parameter
            if not isinstance(own, nn.Parameter):  # in a copied script: others would learn nothing
                own = nn.Parameter(parameter, parameter.requires_grad)
                setattr(script, name, own)
            shell.register_parameter(name, own)
        for name, buffer in script.named_buffers(recurse=False):
            shell.register_buffer(name, buffer)
        for name, child in script.named_children():
            shell.add_module(name, held := nn.Module())
            cls._hold(held, child)
