"""Seeing the steps of a run, and comparing them with a twin's."""

import copy
from types import SimpleNamespace

import pytest
import torch
from reference import assert_close, run_split, weights_of, whole_of


def recording(strategy, results):
    """Return a class of strategies that notes every server step: what it found, did and told."""

    class Recording(strategy):
        def step(self, step):
            kept = SimpleNamespace(
                losses={}, cut_gradients={}, skipped=set(step.clients), metrics={},
                server_gradients=[], server_lr_factor=1.0, rows=-step._round.entry.rows,
            )  # fmt: skip
            gradients, update, reply, record = step.gradients, step.update, step.reply, step.record

            def noting_gradients(*args, **options):
                found = gradients(*args, **options)
                kept.losses |= found.losses
                kept.cut_gradients |= {name: g.clone() for name, g in found.cut_gradients.items()}
                return found

            def noting_update(found, *, lr_factor=1.0, **options):
                of_server = getattr(found, "server_gradients", found)
                kept.server_gradients = [None if g is None else g.clone() for g in of_server]
                kept.server_lr_factor = lr_factor
                update(found, lr_factor=lr_factor, **options)

            def noting_reply(cut_gradients, **options):
                kept.cut_gradients |= {name: g.clone() for name, g in cut_gradients.items()}
                kept.skipped -= cut_gradients.keys()
                reply(cut_gradients, **options)

            def noting_record(metrics):
                kept.metrics |= metrics
                record(metrics)

            step.gradients, step.update = noting_gradients, noting_update
            step.reply, step.record = noting_reply, noting_record
            super().step(step)
            kept.rows += step._round.entry.rows
            results.append(kept)

    Recording.__name__ = strategy.__name__
    return Recording


def recorded(strategy, build, parts, **options):
    """Run a strategy; return its result and the steps."""
    results = []
    return run_split(recording(strategy, results), build, parts, **options), results


def noting(strategy, auxiliaries):
    """Return a class of decoupled strategies that notes the auxiliary models of each round's end.

    They change once in a round at most, before the local steps (FSL-SAGE) or after them (CSE-FSL).
    """

    class Noting(strategy):
        def end_round(self, round_, finished):
            super().end_round(round_, finished)
            held = {name: self.auxiliary_of(name).tensors for name in finished}
            auxiliaries.append(copy.deepcopy(held))

    return Noting


def assert_same_run(strategy, twin, rounds, tolerance=1e-6, **options):
    """Compare a decoupled strategy with its twin; return the result.

    The loss of each server step is compared, the auxiliary models after each round, and the
    weights at the end.
    """
    auxiliaries = []
    result, steps = recorded(
        noting(strategy, auxiliaries), twin.build, twin.parts, rounds=rounds,
        optimizer=twin.optimizer, **options,
    )  # fmt: skip
    assert_close(weights_of(result.arrays), twin.train(rounds), tolerance)
    losses = [loss for of_round in twin.losses for loss, _ in of_round]
    found = [loss for step in steps for loss in step.losses.values()]
    assert found == pytest.approx(losses, abs=tolerance)
    for held, expected in zip(auxiliaries, twin.auxiliaries, strict=True):
        for client, state in enumerate(expected):
            assert_close(held[str(client)], state, tolerance)
    return result


def assert_same_steps(found, expected, prefix="", tolerance=1e-6):
    """Compare gradients to 1e-6, angles and the like (``notes``) to 1e-4."""
    assert len(found) == len(expected)
    for result, answer in zip(found, expected, strict=True):
        for gradient, other in zip(result.server_gradients, answer.server, strict=True):
            torch.testing.assert_close(gradient, other, rtol=1e-5, atol=tolerance)
        assert {int(name) for name in result.cut_gradients} == set(answer.cut)
        for name, gradient in result.cut_gradients.items():
            other = answer.cut[int(name)]
            assert (other is None) == (name in result.skipped)
            if other is not None:
                torch.testing.assert_close(gradient, other, rtol=1e-5, atol=tolerance)
        assert result.server_lr_factor == answer.lr_factor
        for key, value in answer.notes.items():
            own = result.rows if key == "rows" else result.metrics[prefix + key]
            assert abs(own - value) < 1e-4, key


def assert_same_weights(result, fronts, server, tolerance=1e-5):
    """Compare the weights at the end of a run whose clients shared their segments."""
    of_server = {
        f"{name}.{key}": value
        for name, part in (("middle", server[1]), ("head", server[2]))
        for key, value in part.state_dict().items()
    }
    for index, front in enumerate(fronts):
        whole = whole_of(result, str(index))
        expected = of_server | {f"front.{k}": v for k, v in front.state_dict().items()}
        assert whole.keys() == expected.keys()
        for key, value in expected.items():
            torch.testing.assert_close(whole[key], value, rtol=tolerance, atol=tolerance)
