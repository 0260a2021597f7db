"""torch's part of scripts/bench-rendezvous.

bench_rendezvous.py serve                  torch's store on a free port, printed; ends with its input
bench_rendezvous.py clients PORT PID N S   N of torch's clients for S seconds: microseconds of process PID per operation, and the
                                           operations' p50 and p99 in microseconds
bench_rendezvous.py client PORT            seconds until one of torch's clients is connected
bench_rendezvous.py join N                 seconds until N of torch's dynamic rendezvous handlers are in one round
bench_rendezvous.py names BENCH RUNS       what slow and dead name servers cost BENCH's server and torch's, see names()
"""

import contextlib
import multiprocessing
import os
import socket
import statistics
import subprocess
import sys
import threading
import time

from torch.distributed import TCPStore


def serve():
    import resource

    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, use_libuv=True)
    print(store.port, flush=True)
    sys.stdin.read(1)


def connect(port):
    return TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False)


def client(port):
    start = time.perf_counter()
    connect(port)
    print(f"{time.perf_counter() - start:.4f}")


def cpu_seconds(pid):
    with open(f"/proc/{pid}/stat") as file:
        fields = file.read().rsplit(") ", 1)[1].split(" ")
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def clients(port, pid, count, seconds):
    stores = [connect(port) for _ in range(count)]
    latencies = [[] for _ in stores]
    ready = threading.Barrier(count + 1)
    end = 0.0

    def work(index):
        store, mine, key = stores[index], latencies[index], f"key{index}"
        store.set(key, "0")
        ready.wait()
        while True:
            for operation in (lambda: store.add(key, 1), lambda: store.check([key]), lambda: store.num_keys()):
                start = time.perf_counter()
                operation()
                mine.append(time.perf_counter() - start)
            if time.perf_counter() >= end:
                return

    threads = [threading.Thread(target=work, args=(index,)) for index in range(count)]
    for thread in threads:
        thread.start()
    end = time.perf_counter() + seconds
    before = cpu_seconds(pid)
    ready.wait()
    for thread in threads:
        thread.join()
    used = cpu_seconds(pid) - before
    every = sorted(one for mine in latencies for one in mine)
    at = lambda share: every[int(share * (len(every) - 1))] * 1e6
    print(f"{used / len(every) * 1e6:.3f} {at(0.5):.0f} {at(0.99):.0f}")


# Every change of torch's rendezvous is a compare-and-set of the whole state; nine tenths of its computing are look-ups of the calling
# function's name, 2 ms each, for a log that is switched off. The threads of one process take turns at Python's lock so evenly that each
# finds the state changed by another: with 128 of them 1 write in 55 succeeded, and those that had joined were given up for dead before
# the others had. A process each is truer to life, but where cores are few most are stopped between reading and writing. With 8 to 64 a
# process, 256 handlers took 9 to 10 s on two cores; with a process each 22 s.
HANDLERS_OF_A_PROCESS = 32
# Of the 15 s after which a silent node is given up for dead by default, many would pass before the last has joined.
KEEP_ALIVE = 120
# Seconds until all clients are connected.
PATIENCE = 60


def join(count):
    """Each handler is as torchrun makes it, with its own client, and KEEP_ALIVE for its interval. The clients are connected beforehand."""
    fork = multiprocessing.get_context("fork")
    shares = [min(HANDLERS_OF_A_PROCESS, count - first) for first in range(0, count, HANDLERS_OF_A_PROCESS)]
    ports, ends, gate = fork.SimpleQueue(), fork.SimpleQueue(), fork.Barrier(len(shares) + 1)

    def host():
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, use_libuv=True)
        ports.put(store.port)
        threading.Event().wait()

    def agents(share, port):
        from torch.distributed.elastic.rendezvous.c10d_rendezvous_backend import C10dRendezvousBackend
        from torch.distributed.elastic.rendezvous.dynamic_rendezvous import DynamicRendezvousHandler

        handlers = []
        for _ in range(share):
            store = connect(port)
            backend = C10dRendezvousBackend(store, "bench")
            handlers.append(
                DynamicRendezvousHandler.from_backend(
                    "bench", store, backend, count, count, local_addr="127.0.0.1", keep_alive_interval=KEEP_ALIVE
                )
            )
        joined = []
        threads = [threading.Thread(target=lambda one=one: joined.append(one.next_rendezvous())) for one in handlers]
        gate.wait(PATIENCE)
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        ends.put((len(joined), time.perf_counter()))
        # Rank 0 hosts what the others still read.
        threading.Event().wait()

    # Daemons end with this process.
    fork.Process(target=host, daemon=True).start()
    port = ports.get()
    for share in shares:
        fork.Process(target=agents, args=(share, port), daemon=True).start()
    gate.wait(PATIENCE)
    start = time.perf_counter()
    joined, last = zip(*(ends.get() for _ in shares))
    assert sum(joined) == count, f"{sum(joined)} of {count} have joined"
    print(f"{max(last) - start:.4f}")


class NameServer:
    """A name server at 127.0.0.1 that knows no name, and says so after `delay` seconds, or never."""

    def __init__(self):
        self.delay = 0.0
        self.queries = 0
        self.socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.socket.bind(("127.0.0.1", 53))
        threading.Thread(target=self.serve, daemon=True).start()

    def serve(self):
        while True:
            query, client = self.socket.recvfrom(4096)
            self.queries += 1
            if self.delay is None:
                continue
            time.sleep(self.delay)
            # The same question, with the flags of an answer that there is no such name.
            question = query[12 : query.index(b"\0", 12) + 5]
            self.socket.sendto(query[:2] + b"\x81\x83" + query[4:6] + bytes(6) + question, client)


def names(bench, runs):
    """torch's servers, the one on libuv and the one without, look up the name of every client that connects, in the one thread that
    serves all; so do its clients with the server's. A name server that answers costs each connection the time of its answer. The first
    look-up that fails is the last of its process: a server that was started without a name server has that behind it, and where the
    name server dies later, who comes next pays for it, and all others wait as long.

    One line `WHAT<tab>OURS<tab>THEIRS` each, medians. Needs a network of its own, whose name server is 127.0.0.1.
    """
    name_server = NameServer()
    commands = {"ice": [bench, "serve"], "torch": [sys.executable, __file__, "serve"]}
    results = {}

    @contextlib.contextmanager
    def server(name):
        name_server.delay = 0.0
        with subprocess.Popen(commands[name], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
            yield process.stdout.readline().strip()
            process.stdin.close()

    def note(what, name, command):
        output = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True).stdout
        results.setdefault(what, {}).setdefault(name, []).append(float(output))

    for _ in range(runs):
        for name in commands:
            with server(name) as port:
                name_server.delay = 0.1
                before = name_server.queries
                note("20 connections, a name server that takes 0.1 s", name, [bench, "answers", port, "20"])
                asked = results.setdefault("look-ups of the server for them", {})
                asked.setdefault(name, []).append(name_server.queries - before)
                name_server.delay = None
                note("20 connections once the name server has died", name, [bench, "answers", port, "20"])
            with server(name) as port:
                name_server.delay = None
                what = "one of torch's clients once it has died"
                note(what, name, [sys.executable, __file__, "client", port])
    for what, values in results.items():
        print(what, *(f"{statistics.median(values[name]):g}" for name in commands), sep="\t")


what, *rest = sys.argv[1:]
{"serve": serve, "clients": clients, "client": client, "join": join, "names": names}[what](
    *(int(one) if one.isdigit() else one for one in rest)
)
