"""Kills a rank of a running job again and again, and prints how long it took until the next step was applied.

usage: recovery.py ice|torchrun|torchft KILLS OUT -- COMMAND...

ice: COMMAND is an ice-launch with --events OUT/events.jsonl and --log-dir OUT/logs; what it wrote down of its rounds is printed.
torchrun: COMMAND's ranks print `step <n>`, and `pid <rank> <pid>` when they start; all of them are started again.
torchft: COMMAND runs one of two replica groups, and is run for each, with REPLICA_GROUP set; beside it is torchft_lighthouse.
"""

import json
import os
import pathlib
import queue
import re
import signal
import socket
import subprocess
import sys
import threading
import time

# A job that has not gone on after so many seconds counts as failed.
PATIENCE = 30


def lines_of(*streams):
    lines = queue.Queue()

    def read(stream):
        for line in stream:
            lines.put((time.time(), line))
        lines.put((time.time(), None))

    for stream in streams:
        threading.Thread(target=read, args=(stream,), daemon=True).start()
    return lines


def wait_for(lines, wanted):
    """The time of the next line that is wanted, and the line; none at the end."""
    deadline = time.time() + PATIENCE
    while True:
        if time.time() > deadline:
            return time.time(), None
        try:
            at, line = lines.get(timeout=max(0.1, deadline - time.time()))
        except queue.Empty:
            return time.time(), None
        if line is None or wanted(line):
            return at, line


def follow(path, process):
    """What is appended to a file, line by line."""
    while not path.exists():
        if process.poll() is not None:
            return
        time.sleep(0.01)
    with path.open() as file:
        rest = ""
        while True:
            part = file.readline()
            if part:
                rest += part
                if rest.endswith("\n"):
                    yield rest
                    rest = ""
            elif process.poll() is not None:
                return
            else:
                time.sleep(0.002)


def ice(kills, out, process):
    events = lines_of(follow(out / "events.jsonl", process))
    done = 0
    first = {}
    while done < kills:
        _, line = wait_for(events, lambda line: '"rank_started"' in line or '"first_step"' in line)
        if line is None:
            break
        event = json.loads(line)
        if event["event"] == "rank_started":
            first[event["rank"]] = event["pid"]
            continue
        # Where there are to be spares they have the time to become ready.
        time.sleep(float(os.environ.get("ICE_BENCH_PAUSE", "1.5")))
        os.kill(first[max(first)], signal.SIGKILL)
        done += 1
        wait_for(events, lambda line: '"round_started"' in line)
    wait_for(events, lambda line: '"first_step"' in line)
    process.send_signal(signal.SIGTERM)
    process.wait(timeout=PATIENCE)
    for path in out.glob("logs/*/rounds.jsonl"):
        for line in path.read_text().splitlines():
            after = json.loads(line)["recovered_after"]
            if after is not None:
                print(f"{after:.4f}")


def printing(kills, lines, ranks, all_again):
    """Kills the last of the ranks that say what they do, and prints the seconds until the next step of all."""

    def note(line):
        found = re.match(r"pid (\d+) (\d+)", line)
        if found:
            ranks[int(found[1])] = int(found[2])
        return line.startswith("step ")

    for _ in range(kills):
        for _ in range(20):
            _, line = wait_for(lines, note)
            if line is None:
                print("failed")
                return
        last = max(ranks)
        before = dict(ranks) if all_again else {last: ranks[last]}
        killed = time.time()
        os.kill(ranks[last], signal.SIGKILL)

        # Lines of the attempt that is over are still on their way; all ranks of the next one say who they are.
        def goes_on(line):
            is_step = note(line)
            return is_step and all(ranks[rank] != pid for rank, pid in before.items())

        at, line = wait_for(lines, goes_on)
        if line is None:
            print("failed")
            return
        print(f"{at - killed:.4f}")


def end(process):
    process.terminate()
    try:
        process.wait(timeout=40)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def main():
    kind, kills, out = sys.argv[1], int(sys.argv[2]), pathlib.Path(sys.argv[3])
    command = sys.argv[sys.argv.index("--") + 1 :]
    out.mkdir(parents=True, exist_ok=True)
    processes, ranks = [], {}
    with (out / "stderr").open("w") as errors:

        def start(command, stdout, **variables):
            processes.append(
                subprocess.Popen(
                    command, stdout=stdout, stderr=errors, text=True, start_new_session=True, env={**os.environ, **variables}
                )
            )
            return processes[-1]

        try:
            if kind == "ice":
                ice(kills, out, start(command, (out / "stdout").open("w")))
            elif kind == "torchrun":
                printing(kills, lines_of(start(command, subprocess.PIPE).stdout), ranks, True)
            else:
                port = free_port()
                lighthouse = pathlib.Path(command[0]).with_name("torchft_lighthouse")
                start([lighthouse, "--min_replicas", "1", "--join_timeout_ms", "10000", "--bind", f"[::]:{port}"], errors)
                to = {"TORCHFT_LIGHTHOUSE": f"http://127.0.0.1:{port}"}
                groups = [start(command, subprocess.PIPE, REPLICA_GROUP=str(group), **to) for group in range(2)]
                printing(kills, lines_of(*(group.stdout for group in groups)), ranks, False)
        finally:
            for process in reversed(processes):
                end(process)
            # Ranks of ice-launch end with it; those of others may not.
            for pid in ranks.values():
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    pass


main()
