"""torch's own clients of the store that the launcher serves: each operation, one line `ok NAME` each."""

import os
import threading
from datetime import timedelta

import torch.distributed as dist

host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
cases = []


def case(function):
    cases.append(function)
    return function


def client(seconds=20.0):
    return dist.TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=seconds))


def raises(error, function, *arguments):
    try:
        function(*arguments)
    except error as problem:
        return str(problem)
    raise AssertionError(f"{function} did not raise {error}")


@case
def values():
    store = client()
    for key, value in [("a", b"1"), ("empty", b""), ("binary", bytes(range(256))), ("large", b"x" * ((8 << 20) - 1))]:
        store.set(key, value)
        assert store.get(key) == value, key
    for key in ["with space", "ключ", "a/b//c", "\n", "k" * 4000]:
        store.set(key, "v")
        assert store.get(key) == b"v", key


@case
def numbers():
    store = client()
    assert store.add("n", 5) == 5 and store.add("n", -7) == -2 and store.get("n") == b"-2"


@case
def compare_and_set():
    store = client()
    assert store.compare_set("cas", "", "first") == b"first"
    assert store.compare_set("cas", "other", "second") == b"first"
    assert store.compare_set("cas", "first", "second") == b"second"
    assert store.compare_set("missing", "expected", "new") == b"expected"
    assert not store.check(["missing"])


@case
def keys():
    store = client()
    before = store.num_keys()
    store.set("one", "1")
    assert store.num_keys() == before + 1 and store.check(["one"]) and not store.check(["one", "none"])
    assert "one" in {key.lstrip("/") for key in store.list_keys()} if hasattr(store, "list_keys") else True
    assert store.delete_key("one") and not store.delete_key("one")
    assert store.num_keys() == before


@case
def several_at_once():
    store = client()
    assert store.has_extended_api()
    store.multi_set(["m1", "m2"], ["1", ""])
    assert store.multi_get(["m2", "m1"]) == [b"", b"1"]
    store.append("log", "a")
    store.append("log", "b")
    assert store.get("log") == b"ab"


@case
def queues():
    store = client()
    store.queue_push("q", "1")
    store.queue_push("q", "2")
    assert store.queue_len("q") == 2
    assert store.queue_pop("q") == b"1" and store.queue_pop("q") == b"2" and store.queue_len("q") == 0
    taken = []
    thread = threading.Thread(target=lambda: taken.append(client().queue_pop("q")))
    thread.start()
    store.queue_push("q", "3")
    thread.join()
    assert taken == [b"3"]


@case
def waits_end():
    store = client()
    for _ in range(3):
        assert "never" in raises(dist.DistStoreError, store.wait, ["never"], timedelta(milliseconds=50))
        store.set("still", "useful")
        assert store.get("still") == b"useful"
    assert raises(dist.DistStoreError, client(0.1).get, "nowhere")


@case
def waits_are_woken():
    values = []
    threads = [threading.Thread(target=lambda: values.append(client().get("late"))) for _ in range(16)]
    for thread in threads:
        thread.start()
    client().set("late", "here")
    for thread in threads:
        thread.join()
    assert values == [b"here"] * 16


@case
def prefixes():
    store = client()
    outer = dist.PrefixStore("outer", store)
    inner = dist.PrefixStore("inner", outer)
    inner.set("k", "v")
    assert outer.get("inner/k") == b"v" and store.get("outer/inner/k") == b"v"
    assert inner.add("n", 1) == 1 and not outer.check(["n"]) and inner.delete_key("k") and not inner.check(["k"])
    assert "nothing" in raises(dist.DistStoreError, inner.wait, ["nothing"], timedelta(milliseconds=50))


@case
def many_threads():
    def work():
        store = client()
        for _ in range(100):
            store.add("shared", 1)

    threads = [threading.Thread(target=work) for _ in range(32)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert client().add("shared", 0) == 3200


@case
def barriers():
    def come(store, size, seconds=20.0):
        store.barrier("gate", size, timedelta(seconds=seconds))

    impatient, store = client(), client()
    store.set("beside", "v")
    raises(dist.DistStoreError, come, impatient, 2, 0.1)
    come(store, 2)
    # An answer to the wait that was given up would be taken for the value.
    assert impatient.get("beside") == b"v" and store.get("gate") == b"2"
    assert store.delete_key("gate")
    threads = [threading.Thread(target=lambda: come(client(), 4)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert store.get("gate") == b"4"


@case
def no_number_to_add_to():
    store = client()
    store.set("text", "abc")
    raises(dist.DistNetworkError, client().add, "text", 1)
    assert store.get("text") == b"abc"


@case
def copies():
    store = client()
    store.set("before", "1")
    assert store.clone().get("before") == b"1"


for function in cases:
    function()
    print("ok", function.__name__, flush=True)
