"""torch's part of scripts/bench-rendezvous.

bench_rendezvous.py serve                  torch's store on a free port, printed; ends with its input
bench_rendezvous.py clients PORT PID N S   N of torch's clients for S seconds: microseconds of process PID per operation, and the
                                           operations' p50 and p99 in microseconds
bench_rendezvous.py join N                 seconds until N of torch's dynamic rendezvous handlers are in one round
"""

import os
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


def cpu_seconds(pid):
    with open(f"/proc/{pid}/stat") as file:
        fields = file.read().rsplit(") ", 1)[1].split(" ")
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def clients(port, pid, count, seconds):
    stores = [TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False) for _ in range(count)]
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


def join(count):
    from torch.distributed.elastic.rendezvous.c10d_rendezvous_backend import C10dRendezvousBackend
    from torch.distributed.elastic.rendezvous.dynamic_rendezvous import DynamicRendezvousHandler

    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, use_libuv=True)
    handlers = []
    for number in range(count):
        store = TCPStore("127.0.0.1", server.port, is_master=False, wait_for_workers=False)
        backend = C10dRendezvousBackend(store, "bench")
        handlers.append(DynamicRendezvousHandler.from_backend("bench", store, backend, count, count, local_addr="127.0.0.1"))
    threads = [threading.Thread(target=handler.next_rendezvous) for handler in handlers]
    start = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    print(f"{time.perf_counter() - start:.4f}", flush=True)
    # Their keep-alive threads need not be waited for.
    os._exit(0)


what, *rest = sys.argv[1:]
{"serve": serve, "clients": clients, "join": join}[what](*map(int, rest))
