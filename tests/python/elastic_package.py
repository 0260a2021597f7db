"""Checks the package `ice_launch` within one process: its sampler, its states, and what it undoes."""

import collections
import io
import os
import random
import sys
import types

import ice_launch

assert "torch" not in sys.modules, "the package imports torch"

import torch
import torch.distributed as dist
from ice_launch import _group, _sampler, _tree
from torch import nn
from torch.utils.data import DataLoader


def raises(kind, text, call):
    try:
        call()
    except kind as error:
        assert text in str(error), error
    else:
        raise AssertionError(f"no {kind.__name__}: {text}")


def each_sample_counts_once_while_ranks_come_and_go():
    chance = random.Random(4)
    for case in range(200):
        samples, batch = chance.randrange(1, 90), chance.randrange(1, 7)
        samplers = []
        seen = collections.Counter()
        repeats = 0
        state = {"epoch": 3, "position": 0, "seed": case}
        while state["position"] < samples:
            ranks = chance.randrange(1, 6)
            samplers = [_sampler.ElasticSampler(samples, batch) for _ in range(ranks)]
            iterations = []
            for rank, sampler in enumerate(samplers):
                sampler.load_state_dict(state)
                # Drawn at once, like by the workers of a loader.
                _sampler._place = lambda rank=rank, ranks=ranks: (rank, ranks)
                iterations.append(list(sampler))
            steps = {len(batches) for batches in iterations}
            assert len(steps) == 1, (samples, batch, ranks, iterations)
            for step in range(min(chance.randrange(1, 6), *steps)) if ranks > 1 else range(min(3, *steps)):
                drawn = [index for batches in iterations for index in batches[step]]
                repeats += max(0, len(drawn) - len(set(drawn)))
                seen.update(set(drawn))
                for sampler in samplers:
                    sampler._commit(None)
            assert len({str(sampler.state_dict()) for sampler in samplers}) == 1
            state = samplers[0].state_dict()
        assert seen == collections.Counter(range(samples)), (samples, batch, seen)
        assert repeats < 5
    _sampler._place = lambda: (0, 1)


def sampler_names_what_is_wrong():
    sampler = ice_launch.ElasticSampler(8, 2)
    list(sampler)
    raises(ValueError, "only 4 batches were drawn", lambda: sampler._commit(5))
    raises(RuntimeError, "4 batches of epoch 0 were not committed", lambda: sampler.set_epoch(1))
    sampler._commit(4)
    raises(RuntimeError, "call sampler.set_epoch(epoch)", lambda: list(sampler))
    sampler.set_epoch(1)
    assert len(sampler) == 4 and sampler._commit(None) == 0
    assert list(sampler) != list(ice_launch.ElasticSampler(8, 2, shuffle=False))
    assert len(ice_launch.ElasticSampler(range(9), 2, drop_last=True)) == 4


def prefetched_batches_are_drawn_again():
    sampler = ice_launch.ElasticSampler(40, 2, seed=7)
    whole = [batch.tolist() for batch in DataLoader(range(40), batch_sampler=ice_launch.ElasticSampler(40, 2, seed=7))]
    loader = DataLoader(range(40), batch_sampler=sampler, num_workers=2)
    seen = []
    for _ in range(3):
        for batch, _ in zip(loader, range(5)):
            seen.append(batch.tolist())
            sampler._commit(None)
    assert seen == whole[:15], (seen, whole)


def states_survive_the_way():
    value = {
        "a": [1, -2.5, None, True, "x"],
        3: (torch.ones(2, 2, dtype=torch.bfloat16), torch.tensor(True)),
        "c": collections.Counter({5: 2}),
        "nan": float("inf"),
        "empty": torch.zeros(0, 4),
    }
    text, tensors = _tree.flatten(value)
    assert [(tensor.dtype, list(tensor.shape)) for tensor in tensors] == _tree.shapes(text)
    again = _tree.unflatten(text, tensors)
    assert str(again) == str(value) and isinstance(again["c"], collections.Counter)
    raises(TypeError, "state['x'][0] is a object", lambda: _tree.flatten({"x": [object()]}))


class Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 2)
        self.norm = nn.BatchNorm1d(2)
        self.register_buffer("constant", torch.ones(4))

    def forward(self, inputs):
        return self.norm(self.layer(inputs))


def bits(state):
    text, tensors = _tree.flatten(state if isinstance(state, dict) else state.state_dict())
    return text, [(tensor.dtype, tensor.reshape(-1).tolist()) for tensor in tensors]


def make(**options):
    torch.manual_seed(5)
    model = Counting()
    optimizer = torch.optim.Adam(model.parameters())
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, 50)
    sampler = ice_launch.ElasticSampler(100, 4)
    state = ice_launch.State(
        model=model, optimizer=optimizer, scheduler=scheduler, sampler=sampler, losses=[], average=torch.zeros(2), **options
    )
    state._is_valid = True
    state._undo.watch_modules(state)
    state._remember()
    return state


def begin_step(state):
    """A step up to `optimizer.step()`."""
    state.optimizer.zero_grad()
    state.model(torch.randn(4, 3)).square().sum().backward()
    state.losses.append(1.5)
    state.average.add_(1)


def steps(state, number):
    for _ in range(number):
        next(iter(state.sampler))
        begin_step(state)
        state.optimizer.step()
        state.scheduler.step()
        state.commit()


def step_in_progress_is_undone():
    for copies in [None, True]:
        state = make(copies=copies)
        steps(state, 3)
        before = bits(state)
        begin_step(state)
        next(iter(state.sampler))
        state.scheduler.step()
        if copies:
            state.optimizer.step()
        assert bits(state) != before
        assert state._interrupted()
        assert bits(state) == before, (bits(state), before)
        assert state.optimizer.param_groups[0]["lr"] == state.scheduler.get_last_lr()[0]
        steps(state, 2)
        undisturbed = make(copies=copies)
        steps(undisturbed, 5)
        assert bits(undisturbed) == bits(state)
    # Without copies a step that was applied cannot be undone.
    state = make()
    steps(state, 1)
    begin_step(state)
    state.optimizer.step()
    assert not state._interrupted()


def what_a_step_leaves_behind_is_dropped():
    model = Counting()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    scaler = torch.amp.GradScaler("cpu")
    state = ice_launch.State(model=model, optimizer=optimizer, scaler=scaler)
    scaler.scale(model(torch.randn(4, 3)).sum()).backward()
    scaler.unscale_(optimizer)
    raises(RuntimeError, "already been called", lambda: scaler.unscale_(optimizer))
    state._clear_step()
    assert all(parameter.grad is None for parameter in model.parameters())
    scaler.scale(model(torch.randn(4, 3)).sum()).backward()
    scaler.unscale_(optimizer)


def parameters_that_changed_outside_of_a_step_are_noticed():
    state = make()
    steps(state, 1)
    # Like the first half of sharpness-aware minimization, or a momentum encoder.
    with torch.no_grad():
        state.model.layer.weight.add_(0.1)
    assert not state._interrupted()


def buffers_that_were_replaced_are_put_back():
    for copies in [None, True]:
        state = make(copies=copies)
        model = state.model
        model.register_buffer("unsaved", torch.zeros(2), persistent=False)
        state._undo.watch_modules(state)
        steps(state, 1)
        model.constant = 0.9 * model.constant
        model.unsaved = model.unsaved + 1
        state.commit(batches=0)
        kept = model.constant
        model.constant = 0.9 * model.constant
        model.unsaved.add_(1)
        assert state._interrupted()
        assert model.constant is kept and model.constant.tolist() == torch.full((4,), 0.9).tolist()
        assert model.unsaved.tolist() == [1, 1]


def epoch_ends_with_the_commit_of_its_last_batch():
    events = []
    sampler = ice_launch.ElasticSampler(8, 2)
    sampler._on_begin, sampler._on_end = lambda: events.append("begin"), lambda: events.append("end")
    for _ in DataLoader(range(8), batch_sampler=sampler, num_workers=2):
        assert "end" not in events
        sampler._commit(None)
    assert events == ["begin", "end"], events
    # After other work than a step.
    sampler._commit(0)
    for _ in DataLoader(range(8), batch_sampler=ice_launch.ElasticSampler(8, 2)):
        pass
    sampler.set_epoch(3)
    raises(RuntimeError, "has reached epoch 3", lambda: sampler.set_epoch(2))
    for _ in sampler:
        sampler._commit(None)
    assert events == ["begin", "end"] * 2, events


def checkpoints_hold_the_state():
    state = make()
    steps(state, 4)
    file = io.BytesIO()
    torch.save(state.state_dict(), file)
    file.seek(0)
    other = make()
    other.load_state_dict(torch.load(file, weights_only=True))
    assert bits(other) == bits(state) and other.commits == 4
    steps(state, 3)
    steps(other, 3)
    assert bits(other) == bits(state)


def abandoned_group_does_not_count():
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)

    class Link:
        polls = 0

        def begin_round(self, place):
            self.polls = 0

        def join(self, place):
            pass

        def is_over(self):
            # The first time before the group is being formed.
            self.polls += 1
            return self.polls > 20

    def place(ranks):
        return types.SimpleNamespace(
            store_host="127.0.0.1", store_port=server.port, prefix=f"round of {ranks}", rank=0, world_size=ranks
        )

    link = Link()
    try:
        _group.form(link, place(2))
    except ice_launch.RoundOver as error:
        assert "while its process group was being formed" in str(error)
    else:
        raise AssertionError("rank 1 is missing")
    group = _group.form(link, place(1))
    # The name is part of the keys by which ranks find each other.
    assert dist.group.WORLD.group_name == "0", dist.group.WORLD.group_name
    group.close()


def states_name_what_is_wrong():
    state = make()
    raises(AttributeError, "state.epoch is not part of the state", lambda: setattr(state, "epoch", 1))
    raises(AttributeError, "state.model is an object of the state", lambda: setattr(state, "model", 1))
    raises(ValueError, "'commit' cannot be the name of a value", lambda: ice_launch.State(commit=1))
    raises(TypeError, "state['values']['x'] is a set", lambda: ice_launch.State(x={1}))
    raises(TypeError, "first argument must be a State", lambda: ice_launch.elastic(lambda state: None)(1))


each_sample_counts_once_while_ranks_come_and_go()
sampler_names_what_is_wrong()
prefetched_batches_are_drawn_again()
states_survive_the_way()
step_in_progress_is_undone()
what_a_step_leaves_behind_is_dropped()
parameters_that_changed_outside_of_a_step_are_noticed()
buffers_that_were_replaced_are_put_back()
epoch_ends_with_the_commit_of_its_last_batch()
checkpoints_hold_the_state()
states_name_what_is_wrong()
abandoned_group_does_not_count()
sys.stdout.write("checked\n")
sys.stdout.flush()
# The abandoned thread still waits for rank 1, since the test has no link that closes its connection.
os._exit(0)
