"""Checks the package `ice_launch` within one process: its sampler, its states, and what it undoes."""

import collections
import datetime
import io
import os
import pathlib
import random
import sys
import tempfile
import threading
import types

import ice_launch

assert "torch" not in sys.modules, "the package imports torch"

import safetensors.torch
import torch
import torch.distributed as dist
from ice_launch import _group, _loop, _sampler, _tree
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


def commits_count_what_the_program_has_received():
    sampler = ice_launch.ElasticSampler(40, 2)
    loader = DataLoader(range(40), batch_sampler=sampler, num_workers=2)
    for _ in zip(range(5), loader):
        raises(ValueError, "only 1 batches were drawn", lambda: sampler._commit(2))
        assert sampler._commit(None) == 1
        # After an evaluation, for example. The workers have drawn further batches.
        assert len(sampler._drawn) > 1 and sampler._commit(None) == 0
    assert sampler.position == 10
    raises(ValueError, "call commit(batches=0)", lambda: sampler._commit(None))
    assert sampler._commit(0) == 0 and sampler._commit(1) == 1
    for _ in loader:
        sampler._commit(None)
    assert sampler.position == 40 and sampler._commit(None) == 0


def each_sampler_has_its_number_of_batches():
    state = ice_launch.State(a=ice_launch.ElasticSampler(40, 2), b=ice_launch.ElasticSampler(40, 2))
    first, second = iter(state.a), iter(state.b)
    next(first), next(first)
    state.commit(batches=2)
    assert (state.a.position, state.b.position) == (4, 0)
    next(first), next(first), next(second)
    raises(ValueError, 'b: commit(batches=2), but only 1', lambda: state.commit(batches=2))
    state = ice_launch.State(a=ice_launch.ElasticSampler(40, 2), b=ice_launch.ElasticSampler(40, 2))
    first, second = iter(state.a), iter(state.b)
    next(first), next(first), next(second)
    raises(ValueError, "names 'c', which is not a sampler", lambda: state.commit(batches={"c": 1}))
    state.commit(batches={"a": 2, "b": 1})
    next(second)
    state.commit(batches={"b": 1})
    assert (state.a.position, state.b.position) == (4, 4)


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


def buffers_are_copied_once_at_the_beginning_of_a_round():
    state = make()
    steps(state, 1)
    copied, clones = [], []
    in_place, whole = torch._foreach_copy_, state._undo._copy_buffers
    torch._foreach_copy_ = lambda *pair: copied.append(pair) or in_place(*pair)
    state._undo._copy_buffers = lambda: clones.append(1) or whole()
    state._undo.watch_modules(state)
    state._remember()
    assert (len(clones), len(copied)) == (1, 0), (clones, copied)
    state._remember()
    assert (len(clones), len(copied)) == (1, 1), (clones, copied)
    torch._foreach_copy_ = in_place


def lost_connection_is_not_waited_for_twice():
    """`leave_round` waits for the notice of the end, so nothing may wait for it before."""
    waits = []
    link = types.SimpleNamespace(is_over=lambda: False, wait_for_end=lambda seconds: waits.append(seconds))
    closed = RuntimeError("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer")
    assert isinstance(_loop._as_round_over(link, closed), ice_launch.RoundOver) and not waits
    assert _loop._as_round_over(link, RuntimeError("shapes differ")) is None and len(waits) == 1
    assert _loop._as_round_over(link, KeyError("x")) is None and len(waits) == 1


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


def checkpoints_on_disk_are_whole_or_absent():
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder, "checkpoints")
        state = make(mask=torch.tensor([True, False]), half=torch.ones(3, dtype=torch.bfloat16), empty=torch.zeros(0, 2))
        assert ice_launch.load_checkpoint(state, folder) is None
        steps(state, 4)
        path = ice_launch.save_checkpoint(state, folder)
        assert path == folder / "step-00000004"
        whole = bits(state)

        def load(at=folder):
            other = make(mask=torch.zeros(2, dtype=torch.bool), half=torch.zeros(3, dtype=torch.bfloat16), empty=torch.zeros(0, 2))
            return ice_launch.load_checkpoint(other, at), bits(other)

        assert load() == (path, whole) and load(path) == (path, whole)
        # Other programs read the files.
        model = safetensors.torch.load_file(path / "model.safetensors")
        assert model.keys() == state.model.state_dict().keys()
        assert all(torch.equal(model[key], value) for key, value in state.model.state_dict().items())
        optimizer = safetensors.torch.load_file(path / "optimizer.safetensors")
        assert torch.equal(optimizer["state.0.exp_avg"], state.optimizer.state_dict()["state"][0]["exp_avg"])
        values = safetensors.torch.load_file(path / "_values.safetensors")
        assert values["mask"].tolist() == [True, False] and values["half"].dtype == torch.bfloat16

        # What a killed process leaves does not count, and the next save removes it.
        (folder / ".step-00000005.1.partial").mkdir()
        assert load() == (path, whole)
        steps(state, 1)
        newest = ice_launch.save_checkpoint(state, folder)
        newest_whole = bits(state)
        assert sorted(os.listdir(folder)) == ["step-00000004", "step-00000005"]
        # The newest is the one that was saved last, after a training went back.
        assert load() == (newest, newest_whole)
        ice_launch.load_checkpoint(state, path)
        ice_launch.save_checkpoint(state, folder)
        assert load() == (path, whole)
        # A damaged one is passed over.
        content = bytearray((path / "model.safetensors").read_bytes())
        content[-1] ^= 1
        (path / "model.safetensors").write_bytes(content)
        assert load() == (newest, newest_whole)
        (newest / "state.json").write_text("{")
        raises(ValueError, "all checkpoints are damaged", load)
        for _ in range(4):
            steps(state, 1)
            ice_launch.save_checkpoint(state, folder, keep=2)
        assert sorted(os.listdir(folder)) == ["step-00000007", "step-00000008"]
        raises(ValueError, "other objects than the state: missing [], unknown ['model'", lambda: ice_launch.load_checkpoint(ice_launch.State(x=1), folder))
        raises(ValueError, "keep is 0", lambda: ice_launch.save_checkpoint(state, folder, keep=0))
        complex_state = ice_launch.State(x=torch.zeros(1, dtype=torch.complex64))
        raises(TypeError, "x is torch.complex64", lambda: ice_launch.save_checkpoint(complex_state, folder))
        assert sorted(os.listdir(folder)) == ["step-00000007", "step-00000008"]
        (folder / "file").write_text("")
        raises(OSError, "", lambda: ice_launch.save_checkpoint(state, folder / "file"))


def gradients_that_are_not_finite_are_not_applied():
    state = make(check_finite=True)
    steps(state, 2)
    before = [parameter.tolist() for parameter in state.model.parameters()]
    begin_step(state)
    state.model.layer.weight.grad[0, 0] = float("inf")
    raises(ice_launch.NotFinite, "in step 3 are not finite, and were not applied", state.optimizer.step)
    assert before == [parameter.tolist() for parameter in state.model.parameters()]
    state._interrupted()
    state._clear_step()
    steps(state, 1)


class Link:
    """A link whose rounds end when `ends` says so."""

    def __init__(self, ends=lambda: False):
        self.ends = ends

    def begin_round(self, place):
        pass

    def join(self, place):
        pass

    def is_over(self):
        return self.ends()


SERVER = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def place(name, ranks=1):
    return types.SimpleNamespace(
        store_host="127.0.0.1", store_port=SERVER.port, prefix=name, rank=0, world_size=ranks
    )


def ends_while_formed(link, place):
    try:
        _group.form(link, place)
    except ice_launch.RoundOver as error:
        assert "while its process group was being formed" in str(error), error
    else:
        raise AssertionError("the round has not ended")
    assert not dist.is_initialized()


def abandoned_group_does_not_count():
    # Rank 1 is missing, so gloo waits for it. The first look is before the group is being formed.
    looks = iter(range(1000))
    ends_while_formed(Link(lambda: next(looks) > 20), place("abandoned", 2))
    group = _group.form(Link(), place("next"))
    # The name is part of the keys by which ranks find each other.
    assert dist.group.WORLD.group_name == "0", dist.group.WORLD.group_name
    world = dist.group.WORLD
    # Rank 1 appears after all, and gloo returns in the thread that was abandoned.
    store = dist.PrefixStore("cpu/", dist.PrefixStore("0/", dist.PrefixStore("abandoned", SERVER)))
    late = dist.ProcessGroupGloo(store, 1, 2, datetime.timedelta(seconds=60))
    for thread in threading.enumerate():
        if thread.name == "ice-form":
            thread.join()
    assert dist.group.WORLD is world
    dist.all_reduce(torch.ones(1))
    group.close()
    assert not dist.is_initialized()
    del late


def round_that_ends_with_its_group_formed_leaves_none():
    # The end comes when torch has just noted the group.
    noted = threading.Event()
    update = dist.distributed_c10d._update_default_pg

    def slow_update(group):
        update(group)
        if threading.current_thread() is not threading.main_thread():
            noted.wait()

    dist.distributed_c10d._update_default_pg = slow_update
    try:
        group = _group.form(Link(lambda: dist.is_initialized() and (noted.set() or True)), place("first"))
        group.close()
        # This one is not closed.
        _group.form(Link(), place("second"))
        group = _group.form(Link(), place("third"))
        dist.all_reduce(torch.ones(1))
        group.close()
    finally:
        noted.set()
        dist.distributed_c10d._update_default_pg = update
    # What torch makes of a failed attempt is gone.
    link = Link()
    link.join = lambda place: (_ for _ in ()).throw(ConnectionError("reset"))
    raises(ice_launch.RoundOver, "the store of the round is gone: reset", lambda: _group.form(link, place("fourth")))
    assert not dist.is_initialized()


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
commits_count_what_the_program_has_received()
each_sampler_has_its_number_of_batches()
states_survive_the_way()
step_in_progress_is_undone()
what_a_step_leaves_behind_is_dropped()
parameters_that_changed_outside_of_a_step_are_noticed()
buffers_that_were_replaced_are_put_back()
buffers_are_copied_once_at_the_beginning_of_a_round()
lost_connection_is_not_waited_for_twice()
epoch_ends_with_the_commit_of_its_last_batch()
checkpoints_hold_the_state()
checkpoints_on_disk_are_whole_or_absent()
gradients_that_are_not_finite_are_not_applied()
states_name_what_is_wrong()
abandoned_group_does_not_count()
round_that_ends_with_its_group_formed_leaves_none()
sys.stdout.write("checked\n")
