# The template process: it imports the modules of `--preload` and forks ranks.
#
# `boot.py`, the text of `python -c`, reads this file, `imports.py` and `rank.py` from the control socket. `serve`
# returns in forked ranks only. A rank runs the user's program from the frame of `boot.py`, so that a
# single frame precedes the program's own.
#
# The launcher puts `RANK_VARIABLES` in front of this text.
import _socket
import errno
import gc
import os
import sys

# Modules that a DistributedDataParallel program imports by its first step. The constructors of
# optimizers and of DistributedDataParallel import torch._dynamo.
TORCH = ['torch', 'torch.distributed', 'torch.nn.parallel', 'torch.utils.data', 'torch._dynamo']
# Name of the process while it is a template; ranks get the name back that the kernel gave.
NAME = b'ice-template'
DEVICES = ('/dev/nvidia', '/dev/kfd', '/dev/dri/render')

control = _socket.socket(fileno=int(os.environ.pop('ICE_LINK_FD')))
# `script` or `module`, and which.
kind, program = sys.argv[1:3]
# The interpreter with its options: all before `-c`, the text of that, and what is in `sys.argv`.
with open('/proc/self/cmdline', 'rb') as file:
    interpreter = file.read().split(b'\0')[:-len(sys.argv) - 2]
# The standard streams as the interpreter has opened them: modules may replace them.
streams = (sys.stdin, sys.stdout, sys.stderr)
# Whether that is `python -u`.
unbuffered = sys.stdout.write_through
# Files that the preloaded modules came from, with their identities.
sources = {}


def serve(boot):
    """Preloads and forks; returns in a rank, with what `boot` is to run."""
    own_frames.append(boot)
    original = swap_name(NAME)
    folder = program_folder(program)
    if folder is not None:
        sys.path[0] = folder
    # Objects of the template are shared with its ranks, so a collection in a rank must not write to
    # them. One during the imports would take time, and leave holes that ranks write new objects into.
    gc.disable()
    preload(list(wanted(sys.argv[3:])))
    note_sources()
    gc.freeze()
    gc.enable()
    say('ready')
    while True:
        gate = next_request()
        problem = unfit()
        if problem:
            _socket.close(gate)
            say('refused ' + problem)
            continue
        flush()
        pid = fork_orphan(gate)
        if pid == 0:
            return become_rank(gate, original, folder)
        _socket.close(gate)
        say('forked %d' % pid if pid > 0 else 'refused it cannot fork: %s' % os.strerror(-pid))


def say(text):
    # A launcher that is gone reads nothing; the kernel kills this process with it.
    try:
        control.sendall(os.fsencode(text.replace('\0', ' ')) + b'\0')
    except OSError:
        os._exit(1)


def failed(problem):
    say('failed ' + problem)
    os._exit(1)


def misfit(name):
    """What reports that ranks have to import this module by themselves."""
    def report(problem):
        say('misfit %s %s' % (name.partition('.')[0], problem))
        os._exit(1)

    return report


def next_request():
    data, ancillary, _, _ = control.recvmsg(1, _socket.CMSG_SPACE(4))
    if not data:
        os._exit(0)
    return descriptors(ancillary)[0]


def descriptors(ancillary):
    found = []
    for level, what, data in ancillary:
        if level == _socket.SOL_SOCKET and what == _socket.SCM_RIGHTS:
            found += [int.from_bytes(data[at:at + 4], sys.byteorder) for at in range(0, len(data) // 4 * 4, 4)]
    return found


def wanted(words):
    """The modules that words of `--preload` stand for, each with the names that are taken from it, and
    with whether ranks can do without it. A word that begins with `-` leaves a module out of `auto`."""
    left_out = {word[1:] for word in words if word[0] == '-'}
    for word in words:
        if word == 'torch':
            yield from ((name, [], False) for name in TORCH)
        elif word == 'auto':
            found = [one for one in found_imports() if one[0].partition('.')[0] not in left_out]
            if any(name.partition('.')[0] == 'torch' for name, _ in found):
                yield from ((name, [], True) for name in TORCH)
            yield from ((name, taken, True) for name, taken in found)
        elif word[0] != '-':
            yield word, [], False


def preload(modules):
    """Imports the modules, and fails if a rank would see that they were imported early."""
    reads = watch_rank_variables()
    for name, taken, is_optional in modules:
        fail = misfit(name) if is_optional else failed
        say('importing ' + name)
        try:
            __import__(name, None, None, taken)
        except ModuleNotFoundError as error:
            # PyTorch before 2.0.
            if name == 'torch._dynamo' and error.name == name:
                continue
            fail('`%s` cannot be imported: %s' % (name, one_line(error)))
        except BaseException as error:
            fail('`%s` cannot be imported: %s: %s' % (name, type(error).__name__, one_line(error)))
        threads = count_threads()
        if threads > 1:
            fail('importing `%s` starts %d threads, which a fork would lose' % (name, threads - 1))
        device = opened_device()
        if device:
            fail('importing `%s` opens %s, which cannot be used after a fork' % (name, device))
        if reads:
            module, variable = reads[0]
            fail('`%s` reads %s when it is imported, before it is a rank' % (module, variable))
    unwatch_rank_variables()


def one_line(error):
    return ' '.join(str(error).split())


environment_get = type(os.environ).__getitem__


def watch_rank_variables():
    """Collects which module reads a variable that differs from rank to rank."""
    reads = []

    def get(environment, name):
        text = os.fsdecode(name) if isinstance(name, bytes) else name
        if text in RANK_VARIABLES:
            reads.append((importer(), text))
        return environment_get(environment, name)

    type(os.environ).__getitem__ = get
    return reads


def unwatch_rank_variables():
    type(os.environ).__getitem__ = environment_get


def importer():
    frame = sys._getframe(2)
    while frame is not None and frame.f_globals.get('__name__') in ('os', 'collections.abc', '_collections_abc'):
        frame = frame.f_back
    return frame.f_globals.get('__name__', '?') if frame is not None else '?'


def count_threads():
    """Threads of this process, without those that end when it forks, like OpenBLAS's."""
    if len(os.listdir('/proc/self/task')) > 1:
        pid = os.fork()
        if pid == 0:
            os._exit(0)
        os.waitpid(pid, 0)
    return len(os.listdir('/proc/self/task'))


def opened_device():
    for number in os.listdir('/proc/self/fd'):
        try:
            path = os.readlink('/proc/self/fd/' + number)
        except OSError:
            continue
        if path.startswith(DEVICES):
            return path
    return None


def note_sources():
    """Notes the files of modules that are likely to change: the user's own, and each package's first."""
    installed = tuple({sys.prefix + os.sep, sys.base_prefix + os.sep, sys.exec_prefix + os.sep})
    for name, module in list(sys.modules.items()):
        file = getattr(module, '__file__', None)
        if isinstance(file, str) and ('.' not in name or not file.startswith(installed)):
            found = identity(file)
            if found:
                sources[file] = (name, found)


def identity(file):
    try:
        status = os.stat(file)
    except OSError:
        return None
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def unfit():
    """Why no rank can be forked now; None if one can."""
    threads = count_threads()
    if threads > 1:
        return '%d threads run in the template' % (threads - 1)
    return None


def stale():
    """Which preloaded module is not the one on disk any more; None if all are."""
    for file, (name, before) in sources.items():
        if identity(file) != before:
            return name
    return None


def flush():
    # Text that modules have printed and that is still in a buffer would come from each rank again.
    for stream in (sys.stdout, sys.stderr) + streams[1:]:
        if stream is not None:
            stream.flush()
    libc.fflush(None)


def fork_orphan(gate):
    """Forks a rank that the launcher, as the nearest subreaper, becomes the parent of.

    Returns its process id, 0 in the rank, and a negative errno if it cannot be forked.
    """
    reader, writer = os.pipe()
    try:
        middle = os.fork()
    except OSError as error:
        os.close(reader), os.close(writer)
        return -error.errno
    if middle == 0:
        try:
            pid = os.fork()
        except OSError as error:
            pid = -error.errno
        if pid == 0:
            os.setsid()
            os.write(writer, b'%d' % os.getpid())
            os.close(reader), os.close(writer)
            return 0
        if pid < 0:
            os.write(writer, b'%d' % pid)
        os._exit(0)
    os.close(writer)
    # Once the middle process is gone, the rank is the launcher's.
    os.waitpid(middle, 0)
    answer = os.read(reader, 32)
    os.close(reader)
    # A rank that was killed has written nothing.
    return int(answer or -errno.ESRCH)


