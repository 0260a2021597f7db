# The forked process: it takes on all that a rank started by the launcher would have.
try:
    import ctypes
    libc = ctypes.CDLL(None, use_errno=True)
except (ImportError, OSError) as error:
    failed('this Python has no ctypes: %s' % one_line(error))

PR_SET_PDEATHSIG, PR_SET_MM, PR_SET_MM_MAP = 1, 35, 14
SIGKILL = 9
# Globals of frames that tracebacks leave out.
own_frames = [globals()]
# Arguments of the call that runs the program. `boot.py` takes them out, so that nothing holds the
# program's variables when the interpreter ends.
program_words = []
# Process groups that live as long as the rank; see `keep_groups`.
kept = []


def become_rank(gate, name, folder):
    """Waits for what the rank is, and takes it on; returns what to run."""
    control.close()
    gate = _socket.socket(fileno=gate)
    fields, descriptors = receive(gate)
    changed = stale()
    gate.sendall(b'refused `%s` has changed since it was preloaded\0' % os.fsencode(changed) if changed else b'ready\0')
    gate.close()
    if changed:
        os._exit(0)
    fields = iter(fields)
    launcher, stdio, own_name = (next(fields) for _ in range(3))
    words, variables = listed(fields), listed(fields)
    libc.prctl(PR_SET_PDEATHSIG, ctypes.c_ulong(SIGKILL))
    # The launcher may have ended before the line above.
    if os.getppid() != int(launcher):
        os._exit(1)
    link = descriptors.pop()
    place_streams(stdio.decode(), descriptors)
    for variable in variables:
        key, _, value = variable.partition(b'=')
        os.environb[key] = value
    os.environ['ICE_LINK_FD'] = str(link)
    swap_name(own_name or name)
    line = interpreter + ([b'-m'] if kind == 'module' else []) + words
    show_command_line(line)
    if hasattr(sys, 'orig_argv'):
        sys.orig_argv[:] = [os.fsdecode(word) for word in line]
    words = [os.fsdecode(word) for word in words]
    sys.argv = ['-m' if kind == 'module' else words[0]] + words[1:]
    open_streams()
    draw_new_seeds()
    correct_thread()
    keep_groups()
    for finder in list(sys.path_importer_cache.values()):
        if hasattr(finder, 'invalidate_caches'):
            finder.invalidate_caches()
    return main_program(words[0], folder)


def receive(gate):
    """Receives the one message of the launcher with its descriptors."""
    data, ancillary, _, _ = gate.recvmsg(4, _socket.CMSG_SPACE(16))
    if len(data) < 4:
        os._exit(0)
    found = descriptors(ancillary)
    length, text = int.from_bytes(data, 'little'), b''
    while len(text) < length:
        part = gate.recv(length - len(text))
        if not part:
            os._exit(0)
        text += part
    return text.split(b'\0'), found


def listed(fields):
    return [next(fields) for _ in range(int(next(fields)))]


def place_streams(stdio, descriptors):
    """Makes the received descriptors the standard ones; `stdio` names those that are open."""
    # None of the received may be overwritten before it is used.
    for number in range(3):
        if str(number) in stdio:
            os.dup2(descriptors[0], number)
            os.close(descriptors.pop(0))
        else:
            os.close(number)


def open_streams():
    """Opens the standard streams as the interpreter does at its start."""
    for number, (attribute, old) in enumerate(zip(('stdin', 'stdout', 'stderr'), streams)):
        stream = standard_stream(number, '<%s>' % attribute, old)
        if old is not None and number > 0:
            # Modules may hold it. Text in its buffer would come later than that of the new one.
            old.reconfigure(line_buffering=True, write_through=True)
        setattr(sys, attribute, stream)
        setattr(sys, '__%s__' % attribute, stream)


def standard_stream(number, name, old):
    import io
    try:
        os.fstat(number)
    except OSError:
        return None
    mode = 'w' if number > 0 else 'r'
    is_raw = unbuffered and number > 0
    buffer = io.open(number, mode + 'b', 0 if is_raw else -1, closefd=False)
    raw = buffer if is_raw else buffer.raw
    raw.name = name
    by_line = not unbuffered and (raw.isatty() or number == 2)
    errors = old.errors if old is not None else 'strict'
    encoding = old.encoding if old is not None else 'utf-8'
    stream = io.TextIOWrapper(buffer, encoding, errors, '\n', by_line, unbuffered)
    stream.mode = mode
    return stream


def draw_new_seeds():
    """Draws for this process what modules have drawn once, when they were imported.

    `random` does so by itself after a fork. PyTorch's generators of other devices start with a fixed
    seed when they are first used.
    """
    numpy = sys.modules.get('numpy')
    if 'numpy.random' in sys.modules and numpy is not None:
        numpy.random.seed()
    if 'torch' in sys.modules:
        sys.modules['torch'].default_generator.seed()
    process = sys.modules.get('multiprocessing.process')
    if process is not None:
        process.current_process().authkey = os.urandom(32)


def correct_thread():
    """Corrects the number of the main thread, which CPython before 3.12 keeps over a fork."""
    threading = sys.modules.get('threading')
    if threading is not None:
        threading.main_thread()._set_native_id()


def keep_groups():
    """Keeps each default process group of PyTorch alive until the process ends.

    The destructor of a gloo group joins the group's threads. If the last reference is dropped with
    the interpreter's lock held, and one of the threads waits for that lock, both wait forever. Where
    torch._dynamo is imported after `init_process_group`, as in ordinary programs, default arguments
    of torch.distributed.nn.functional hold the group, and its destructor never runs.
    """
    c10d = sys.modules.get('torch.distributed.distributed_c10d')
    update = getattr(c10d, '_update_default_pg', None)
    if update is None:
        return

    def keep(group):
        if group is not None:
            kept.append(group)
        return update(group)

    # The package ice_launch drops groups in an order that is safe, and empties the list.
    keep.kept = kept
    c10d._update_default_pg = keep


def program_folder(target):
    """What stands first in `sys.path` of the program; None if nothing does."""
    if getattr(sys.flags, 'safe_path', False) or sys.flags.isolated:
        return None
    return os.getcwd() if kind == 'module' else os.path.dirname(os.path.realpath(target))


def main_program(target, folder):
    """Makes a `__main__` as the interpreter would, and returns what is called with `program_words`."""
    boot = sys.modules['__main__']
    main = type(sys)('__main__')
    # This interpreter's own set of attributes, without what `boot.py` has added.
    for name in ('__annotations__', '__builtins__', '__loader__'):
        if name in vars(boot):
            setattr(main, name, {} if name == '__annotations__' else getattr(boot, name))
    sys.modules['__main__'] = main
    now = program_folder(target)
    if folder is not None and now != folder and folder in sys.path:
        sys.path[sys.path.index(folder)] = now
    if kind == 'module':
        import runpy
        program_words.append(target)
        return runpy._run_module_as_main
    # The same path as the interpreter makes of it, without a look at the file system.
    path = target if os.path.isabs(target) or sys.version_info < (3, 9) else os.getcwd() + '/' + target
    loader = sys.modules['_frozen_importlib_external'].SourceFileLoader('__main__', path)
    main.__file__, main.__loader__, main.__cached__ = path, loader, None
    with open(target, 'rb') as file:
        text = file.read()
    program_words.extend((compile(text, path, 'exec', dont_inherit=True), vars(main)))
    return exec


def hide_own_frames():
    """Makes the report of the exception that is about to end the process leave out frames of this file."""
    hook = sys.excepthook

    def report(kind, error, trace):
        sys.excepthook = hook
        while trace is not None and any(trace.tb_frame.f_globals is own for own in own_frames):
            trace = trace.tb_next
        error.__traceback__ = sys.last_traceback = trace
        hook(kind, error, trace)

    sys.excepthook = report


def swap_name(name):
    """Sets the name of the process in process lists; returns the one before."""
    with open('/proc/self/comm', 'rb+', 0) as file:
        before = file.read().rstrip(b'\n')
        file.write(name)
    return before


def show_command_line(words):
    """Shows the command line and the environment of the rank in `/proc`, for `ps` and `pkill -f`.

    On a kernel without this call the template's stay.
    """
    arguments = b''.join(word + b'\0' for word in words)
    variables = b''.join(key + b'=' + value + b'\0' for key, value in os.environb.items())
    text = arguments + variables
    libc.mmap.restype = libc.sbrk.restype = ctypes.c_void_p
    private_anonymous, read_write = 0x22, 3
    place = libc.mmap(None, ctypes.c_size_t(len(text)), read_write, private_anonymous, -1, ctypes.c_long(0))
    if place in (None, ctypes.c_void_p(-1).value):
        return
    ctypes.memmove(place, text, len(text))
    with open('/proc/self/stat', 'rb') as file:
        fields = file.read().rpartition(b')')[2].split()
    # proc_pid_stat(5) counts from 1 and begins with the number and the name.
    start_code, end_code, start_stack, start_data, end_data, start_brk = (
        int(fields[at - 3]) for at in (26, 27, 28, 45, 46, 47))
    middle = place + len(arguments)
    addresses = [start_code, end_code, start_data, end_data, start_brk, libc.sbrk(0), start_stack,
                 place, middle, middle, place + len(text), 0]
    # struct prctl_mm_map: the addresses, then the size of the auxiliary vector and a descriptor, none of both.
    map_bytes = b''.join(number.to_bytes(8, sys.byteorder) for number in addresses)
    map_bytes += b'\0' * 4 + b'\xff' * 4
    libc.prctl(PR_SET_MM, PR_SET_MM_MAP, map_bytes, ctypes.c_ulong(len(map_bytes)), ctypes.c_ulong(0))
