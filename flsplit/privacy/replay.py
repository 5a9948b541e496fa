"""Attacks on a recorded run: what ``flsplit attack`` does."""

import math
import statistics
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flsplit.client_parts.chain import ClientStep, PartChain
from flsplit.cut import split
from flsplit.errors import ConfigError
from flsplit.log import logger
from flsplit.privacy.dependence import dcor_unbiased, mutual_information
from flsplit.privacy.label_inference import cluster_attack, cosine_attack, norm_attack
from flsplit.privacy.membership import nearest_membership
from flsplit.privacy.reconstruction import reconstruct, refuse_shared_rows
from flsplit.privacy.recording import RecordedRun, RecordedStep, read_recording
from flsplit.wireless.models import find_function, load_model

Findings = dict[str, float]
"""What came of attacks, by name: means over clients."""


def attack_run(
    folder: Path, *, model: str, classes: int | None, data: str, private: str, epochs: int
) -> Findings:
    """Return what all attacks find for which enough is given; see ``flsplit attack --help``.

    Raises
    ------
    ConfigError
        If the folder is no recording, or some of model, data and private are given and not all.
    """
    recording = read_recording(folder)
    if recording.client_parts:
        logger.info("%s: defended by %s", folder, recording.client_parts)
    given = {"--model": model, "--data": data, "--private": private}
    if any(given.values()) and not all(given.values()):
        missing = [name for name, value in given.items() if not value]
        raise ConfigError(
            f"{', '.join(missing)} missing: inputs are attacked with all of {[*given]}"
        )
    found = attack_labels(recording)
    if not model:
        return found
    own, secret = find_function(data, "data"), find_function(private, "private")
    network = load_model(model, classes)
    return found | attack_inputs(
        recording,
        network,
        _inputs(own(), data),
        lambda client: _inputs(secret(client), private),
        epochs=epochs,
    )


def _inputs(found: object, name: str) -> Tensor:
    if not (isinstance(found, Tensor) and found.is_floating_point() and len(found) > 1):
        raise ConfigError(f"{name} returned a {type(found).__name__}, expected a tensor of inputs")
    return found


def attack_labels(
    recording: RecordedRun, truth: Callable[[RecordedStep], Tensor] | None = None
) -> Findings:
    """Infer the recorded labels from the recorded gradients.

    Where labels go up, the server needs no attack; the numbers are those of somebody who sees
    gradients alone. Where they stay with the clients, the gradients are those at the second cut.

    Parameters
    ----------
    recording : RecordedRun
        From :func:`~flsplit.privacy.read_recording`.
    truth : callable, optional
        Returns the labels ``(b,)`` of a step, to judge by, where they stayed with the client.

    Raises
    ------
    ConfigError
        If no step has a gradient and labels that are classes.
    """
    found: dict[str, list[float]] = {}
    for client in recording.clients:
        steps = [_at_second_cut(one, truth) if truth else one for one in recording.of(client)]
        steps = [one for one in steps if _has_both(one)]
        for round_ in sorted({one.round for one in steps}):
            own = [one for one in steps if one.round == round_]
            gradients = torch.cat([_tensor(one.gradient) for one in own])
            labels = torch.cat([_tensor(one.labels) for one in own])
            classes, counts = torch.unique(labels, return_counts=True)
            if len(classes) < 2:
                continue
            share = cluster_attack(gradients, labels, num_classes=len(classes))
            _add(found, {"label-clusters": share, "label-guess": float(counts.max()) / len(labels)})
            rare = classes[counts.argmin()]
            for one in own:
                positive = _tensor(one.labels) == rare
                if 2 <= int(positive.sum()) < len(positive):
                    gradient = _tensor(one.gradient)
                    _add(found, {"label-norm-auc": norm_attack(gradient, positive)})
                    _add(found, {"label-cosine-auc": cosine_attack(gradient, positive)})
    if not found:
        raise ConfigError(
            f"{recording.folder}: no step has a gradient and labels of two classes; where labels "
            "stayed with the clients, attack_labels(truth=…) says them"
        )
    return _means(found)


def attack_inputs(
    recording: RecordedRun,
    model: nn.Module,
    own: Tensor,
    private: Callable[[str], Tensor],
    *,
    epochs: int = 30,
) -> Findings:
    """Reconstruct inputs by a decoder, and tell members, with the segments that were handed over.

    The attacker holds the client segments, and data of its own like the clients'.

    Parameters
    ----------
    recording : RecordedRun
        From :func:`~flsplit.privacy.read_recording`.
    model : nn.Module
        The whole model, of any weights.
    own : torch.Tensor
        The attacker's inputs ``(n, ...)``.
    private : callable
        Takes a client's name and returns its training inputs ``(m, ...)``.

    Raises
    ------
    ConfigError
        If no client handed over its segment, a private input is among the attacker's, or several
        values cross.
    """
    if not recording.segments:
        raise ConfigError(
            f"{recording.folder}: no client handed over its segment, and without it a decoder "
            "can't be trained; share_client_segments=True lets clients hand it over in the end"
        )
    found: dict[str, list[float]] = {}
    for client, tensors in recording.segments.items():
        truth = private(client)
        refuse_shared_rows(own, truth)
        segment = split(model, recording.cut, own[:2]).client
        segment.load_state_dict(tensors)
        smash = Smashing(segment, recording.client_parts, client)
        hidden, known = smash(truth), smash(own)
        made = reconstruct((known, own), (hidden, truth), epochs=epochs)
        _add(
            found,
            {
                "reconstruction-mse": made.mse,
                "reconstruction-explained": made.explained,
                "reconstruction-ssim": made.ssim,
                "reconstruction-cross-entropy": made.cross_entropy,
                "distance-correlation": dcor_unbiased(truth[:1000], hidden[:1000]),
                "mutual-information": mutual_information(truth, hidden),
            },
        )
        steps = [one.smashed for one in recording.of(client) if one.smashed is not None]
        if steps:
            _add(found, {"membership-auc": nearest_membership(hidden, known, torch.cat(steps))})
    return _means(found)


class Smashing:
    """A client segment with the client parts of a run: makes smashed data as it leaves there.

    ``client_parts`` describes the parts as a plan does, empty for none.
    """

    def __init__(
        self, segment: nn.Module, client_parts: str = "", client: str = "", *, seed: int = 0
    ) -> None:
        self._segment, self._client, self._seed = segment, client, seed
        self._parts = PartChain(client_parts, (), client)
        self._step = 0

    @torch.no_grad()
    def __call__(self, inputs: Tensor) -> Tensor:
        """Return smashed data ``(n, ...)`` of inputs ``(n, ...)``; parts draw anew each time."""
        self._segment.eval()
        smashed = self._segment(inputs)
        if not isinstance(smashed, Tensor):
            raise ConfigError("several values cross the cut; attacks take smashed data that is one")
        self._step += 1
        at = ClientStep(self._seed, self._client, 1, self._step, self._segment, {})
        found = self._parts.smashed(at, smashed)
        assert isinstance(found, Tensor)
        return found


def format_findings(found: Findings, undefended: Findings | None = None) -> str:
    """Return findings as a table, beside those of the run without defence, if there is one."""
    width = max(map(len, found))
    lines = [] if undefended is None else [f"{'':{width}}  {'this run':>10}  {'undefended':>10}"]
    for name, number in found.items():
        line = f"{name:{width}}  {number:10.4f}"
        if undefended is not None:
            line += f"  {undefended.get(name, math.nan):10.4f}"
        lines.append(line)
    return "\n".join(lines)


def _at_second_cut(step: RecordedStep, truth: Callable[[RecordedStep], Tensor]) -> RecordedStep:
    if step.output_gradient is None:
        return step
    return replace(step, gradient=step.output_gradient, labels=truth(step))


def _has_both(step: RecordedStep) -> bool:
    labels = step.labels
    classes = labels is not None and labels.ndim == 1 and not labels.is_floating_point()
    return classes and step.gradient is not None


def _tensor(found: Tensor | None) -> Tensor:
    assert found is not None
    return found


def _add(found: dict[str, list[float]], numbers: Mapping[str, Any]) -> None:
    for name, number in numbers.items():
        found.setdefault(name, []).append(float(number))


def _means(found: Mapping[str, list[float]]) -> Findings:
    return {name: statistics.fmean(numbers) for name, numbers in found.items()}
