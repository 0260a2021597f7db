"""Random operations of torch's own clients on the store that the launcher serves and on torch's own, in step, with what they say compared.

store_differential.py [ROUNDS]. ICE_SEED repeats a run whose seed was printed.

A call that waits is made in threads, one for each store. After every step both stores are left to settle, so that it is known which calls
are still waiting: of both the same ones must have ended, with the same results.

Left out is where torch's server is wrong:
- A compare_set that stores nothing ends the waits for its key.
- Whom a push has woken stays in the queue's list, and further pushes count as keys of whatever it waits for next. Here it connects anew.
- A multi_set is carried out key by key, and the values of two keys may be seen before the third's.
- A wait for several keys counts a queue that holds something among what is missing.
"""

import os
import random
import reprlib
import sys
import threading
import time
from collections import Counter
from datetime import timedelta

# Connections that a store ends are warned of, with a backtrace each.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
import torch.distributed as dist

KEYS = ["a", "b", "p/a", "ключ", "", " \n", "k" * 4000]
QUEUES = ["q", "p/q"]
GATES = ["gate", "p/gate"]
LAST, MEMBERS = "last_member", "num_members"
PREFIXES = ["", "", "p", "p/p"]
VALUES = ["", "text", "5", "-7", " 8", "\v9x", "+1", "-", "0x10", "12\0003", "9" * 30, str(2**63 - 1), bytes(range(256)), b"x" * (1 << 20)]
UNANSWERED = ["set", "append", "multi_set", "queue_push"]
STEPS, CLIENTS, PATIENT = 120, 6, 4
SHORTENED = reprlib.Repr()
SHORTENED.maxstring, SHORTENED.maxother, SHORTENED.maxlist = 30, 60, 10
LONG, SHORT = timedelta(seconds=60), timedelta(milliseconds=10)
TOO_LONG, TOO_LARGE = "k" * ((8 << 10) + 1), bytes((8 << 20) + 1)


class Call(threading.Thread):
    """An operation on one store, and what came of it."""

    def __init__(self, store, name, arguments):
        super().__init__(daemon=True)
        self.entered, self.ended, self.outcome = threading.Event(), False, None
        self.operation = lambda: getattr(store, name)(*arguments)
        # After what has no answer, something that has one: then it is carried out, or the connection was ended.
        self.confirm = store.num_keys if name in UNANSWERED else lambda: None

    def run(self):
        self.entered.set()
        self.outcome = outcome(lambda: (self.operation(), self.confirm()))
        self.ended = True

    def state(self):
        """Equal to an earlier one if the thread has slept ever since."""
        if self.ended:
            return "ended"
        try:
            with open(f"/proc/self/task/{self.native_id}/status") as file:
                lines = [line for line in file if line.startswith("State:") or "ctxt_switches" in line]
        except (FileNotFoundError, ProcessLookupError):
            return object()
        return lines if "(sleeping)" in lines[0] else object()


def outcome(operation):
    try:
        return operation()
    except Exception as problem:
        return type(problem)


class Client:
    """A connection to each store."""

    def __init__(self, servers):
        self.stores = [dist.TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=LONG) for host, port in servers]
        # Calls that have not ended, the keys that they wait for, and what to say of them.
        self.calls, self.awaited, self.what = [], [], ""

    def under(self, prefix):
        views = self.stores
        for part in prefix.split("/") if prefix else []:
            views = [dist.PrefixStore(part, view) for view in views]
        return views


class Trial:
    def __init__(self, servers, seed):
        self.random, self.servers, self.history = random.Random(seed), servers, []
        self.clients = [Client(servers) for _ in range(CLIENTS)]
        self.probe = Client(servers)
        self.counts = Counter()

    def check(self, what, ours, theirs):
        self.history.append(f"{what} -> {brief(theirs)}")
        if ours != theirs:
            print(*self.history[-STEPS:], f"the stores differ: ours says {brief(ours)}", sep="\n", file=sys.stderr, flush=True)
            # Threads that wait would be in the way of another end.
            os._exit(1)

    def ask(self, name, *arguments):
        """An operation that waits for nobody, on both."""
        calls = [Call(store, name, arguments) for store in self.probe.stores]
        answers = [outcome(lambda call=call: (call.operation(), call.confirm())[0]) for call in calls]
        answers = [sorted(one) if name == "list_keys" else one for one in answers]
        self.check(f"{name}{brief(arguments)}", *answers)
        return answers[1]

    def settle(self, pushed=False):
        """Once a server has answered a later request, it has handled the earlier ones; and who has slept meanwhile waits for others.
        Where the machine is busy what a server sends may be late: until it is there the stores seem to differ."""
        calls = [call for client in self.clients for call in client.calls]
        for call in calls:
            call.entered.wait()
        patience = time.monotonic() + 5
        while True:
            before = [call.state() for call in calls]
            for store in self.probe.stores * 2:
                store.num_keys()
            if before != [call.state() for call in calls]:
                continue
            if all(ours.ended == theirs.ended for ours, theirs in zip(calls[::2], calls[1::2])) or time.monotonic() > patience:
                break
        for number, client in enumerate(self.clients):
            if client.calls and any(call.ended for call in client.calls):
                ours, theirs = (call.outcome if call.ended else "still waiting" for call in client.calls)
                self.check(client.what, ours, theirs)
                # A connection that was ended, or that torch's server has kept in a queue's list.
                if theirs is dist.DistNetworkError or (pushed and client.awaited):
                    self.clients[number] = Client(self.servers)
                client.calls, client.awaited = [], []

    def step(self):
        number = self.random.choice([number for number, client in enumerate(self.clients) if not client.calls])
        client, prefix = self.clients[number], self.random.choice(PREFIXES)
        patient = sum(bool(client.calls) for client in self.clients) < PATIENT
        name, arguments, keys, waits = self.operation()
        full = [f"{prefix}/{key}" if prefix else key for key in keys]
        if name == "barrier" and prefix:
            # Made of other operations, with keys of its own.
            full = [f"{full[0]}/{LAST}"]
        awaited = [key for client in self.clients for key in client.awaited]
        if name == "compare_set" and full[0] in awaited or name == "multi_set" and len(full) > 1 and set(full) & set(awaited):
            return
        # Only where it will wait, since the answer might come too late else.
        impatient = waits and not (patient and self.random.random() < 0.7) and self.will_wait(name, full, arguments)
        if name == "barrier" and not patient and not impatient:
            return
        for store in client.stores:
            store.set_timeout(SHORT if impatient else LONG)
        if name == "barrier":
            arguments.append(SHORT if impatient else LONG)
        client.calls = [Call(view, name, arguments) for view in client.under(prefix)]
        client.awaited = full if waits else []
        self.counts[name] += 1
        client.what = f"client {number}: {name}{brief(arguments)} under {prefix!r}"
        self.history.append(f"{client.what} ...")
        for call in client.calls:
            call.start()
        for call in client.calls if impatient or not waits else []:
            call.join()
        self.settle(pushed=name == "queue_push")

    def will_wait(self, name, keys, arguments):
        if name == "barrier":
            counts = [keys[0], keys[0].removesuffix(LAST) + MEMBERS]
            return arguments[1] > 1 and not any(self.ask("check", [key]) for key in counts)
        return not self.ask("check", keys)

    def operation(self):
        """Its name, its arguments, the keys that it is about, and whether it may wait."""
        choice = self.random.choice
        key, value, queue, gate = choice(KEYS + QUEUES + GATES), choice(VALUES), choice(QUEUES), choice(GATES)
        some = [choice(KEYS) for _ in range(self.random.randint(0, 4))]
        return choice(
            [
                ("set", [key, value], [key], False),
                ("set", [choice(KEYS), value], [], False),
                ("add", [key, choice([0, 1, -3, 2**62, -(2**63)])], [key], False),
                ("append", [key, value], [key], False),
                ("compare_set", [key, choice(VALUES), value], [key], False),
                ("compare_set", [key, "", value], [key], False),
                ("check", [some + [key]], [], False),
                ("check", [some], [], False),
                ("delete_key", [key], [key], False),
                ("delete_key", [key], [key], False),
                ("num_keys", [], [], False),
                ("multi_set", [some, [choice(VALUES) for _ in some]], some, False),
                ("queue_push", [choice([queue, key]), value], [], False) if key not in KEYS else ("queue_len", [key], [], False),
                ("queue_push", [queue, value], [], False),
                ("queue_pop", [queue, False], [], False),
                ("queue_len", [choice([queue, key])], [], False),
                ("queue_pop", [queue], [queue], True),
                ("queue_pop", [queue], [queue], True),
                ("queue_pop", [queue], [queue], True),
                ("wait", [[key]], [key], True),
                ("wait", [some], some, True),
                ("get", [key], [key], True),
                ("multi_get", [some], some, True),
                ("barrier", [gate, self.random.randint(1, 4)], [gate], True),
                # Beyond the limits: the connection is ended.
                ("check", [[TOO_LONG if self.random.random() < 0.1 else key]], [], False),
                ("set", [key, TOO_LARGE if self.random.random() < 0.1 else value], [key], False),
            ]
        )

    def finish(self):
        """Ends what still waits, compares all there is, and leaves nothing."""
        gates = [f"{gate}/{key}" for gate in GATES for key in (LAST, MEMBERS)]
        full = [f"{prefix}/{key}" if prefix else key for prefix in PREFIXES for key in KEYS + QUEUES + GATES + gates]
        for key in sorted({key for client in self.clients for key in client.awaited}):
            self.ask("set", key, "the end")
            self.settle()
        waiting = [client.what for client in self.clients if client.calls]
        assert not waiting, f"still waiting on both: {waiting}"
        self.ask("list_keys")
        for key in dict.fromkeys(full):
            if self.ask("check", [key]) and self.ask("queue_len", key) == 0:
                self.ask("get", key)
            while self.ask("queue_len", key):
                self.ask("queue_pop", key, False)
            self.ask("delete_key", key)
        self.ask("num_keys")


def brief(what):
    return SHORTENED.repr(what)


rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 8
seed = int(os.environ.get("ICE_SEED") or random.SystemRandom().randrange(2**32))
print("seed", seed, flush=True)
theirs = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
servers = [(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])), ("127.0.0.1", theirs.port)]
counts = Counter()
for number in range(rounds):
    trial = Trial(servers, f"{seed} {number}")
    # What torch's own server keeps of its own client.
    assert trial.ask("num_keys") == 0
    for _ in range(STEPS):
        trial.step()
    trial.finish()
    counts += trial.counts
print(f"ok {sum(counts.values())} operations:", ", ".join(f"{count} {name}" for name, count in sorted(counts.items())), flush=True)
