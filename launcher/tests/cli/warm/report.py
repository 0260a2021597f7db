# Writes all that a program can see of how it was started, one fact per line.
import os
import sys


def fact(name, value):
    print('%s = %r' % (name, value))


main = sys.modules['__main__']
fact('argv', sys.argv)
fact('orig_argv', getattr(sys, 'orig_argv', None))
fact('path', sys.path)
fact('flags', sys.flags)
fact('executable', (sys.executable, getattr(sys, '_base_executable', None), sys.prefix))
fact('options', (sys.warnoptions, sys._xoptions, sys.dont_write_bytecode, sys.pycache_prefix))
fact('main', sorted((name, str(value).split(' at 0x')[0]) for name, value in vars(main).items()
                    if name.startswith('__') and name != '__builtins__'))
fact('builtins', main.__builtins__ is sys.modules['builtins'])
fact('is main', (vars(main) is globals(), __name__, __file__, __package__, type(__loader__).__name__))
fact('folder', os.getcwd())
mask = os.umask(0)
os.umask(mask)
fact('umask', mask)
different = ('ICE_LINK_FD', 'ICE_HEARTBEAT_FILE', 'MASTER_PORT', 'ICE_STORE', 'ICE_RUN_STAMP',
             'TORCHELASTIC_ERROR_FILE', 'ICE_TEST_MARK')
fact('environment', sorted((name, value) for name, value in os.environ.items() if name not in different))
fact('variables', sorted(os.environ))
fact('C environment', sorted(name for name in os.environ if os.getenv(name) is None))
for number, name in enumerate(('stdin', 'stdout', 'stderr')):
    stream = getattr(sys, name)
    if stream is None:
        fact(name, None)
        continue
    original = getattr(sys, '__%s__' % name)
    raw = getattr(stream.buffer, 'raw', stream.buffer)
    fact(name, (stream.name, stream.mode, stream.encoding, stream.errors, stream.line_buffering,
                getattr(stream, 'write_through', None), stream.newlines, stream.isatty(), stream.fileno(),
                type(stream.buffer).__name__, raw.name, raw.mode, raw.closefd, stream.seekable(),
                original is stream, os.readlink('/proc/self/fd/%d' % number).rpartition('/')[2].partition(':')[0]))
with open('/proc/self/status') as file:
    for line in file:
        if line.startswith(('SigBlk', 'SigIgn', 'SigCgt', 'Cpus_allowed_list', 'Threads', 'Umask', 'Name',
                            'NoNewPrivs', 'Groups', 'Uid')):
            fact('status', line.split())
with open('/proc/self/limits') as file:
    fact('limits', [line.split() for line in file if 'locks' not in line])
fact('command line', open('/proc/self/cmdline', 'rb').read())
shown = dict(entry.partition(b'=')[::2] for entry in open('/proc/self/environ', 'rb').read().split(b'\0') if entry)
fact('shown environment', shown == dict(os.environb))
fact('leads', (os.getsid(0) == os.getpid(), os.getpgid(0) == os.getpid()))
fact('parent', open('/proc/%d/comm' % os.getppid()).read())
fact('affinity', sorted(os.sched_getaffinity(0)))
fact('priority', os.getpriority(os.PRIO_PROCESS, 0))
fact('hooks', (sys.excepthook is sys.__excepthook__, sys.displayhook is sys.__displayhook__))

import ctypes  # noqa: E402
signal_number = ctypes.c_int()
ctypes.CDLL(None).prctl(2, ctypes.byref(signal_number))
fact('death signal', signal_number.value)

import faulthandler  # noqa: E402
import gc  # noqa: E402
import multiprocessing  # noqa: E402
import signal  # noqa: E402
import threading  # noqa: E402
fact('faulthandler', faulthandler.is_enabled())
fact('gc', (gc.isenabled(), gc.get_threshold()))
fact('signals', [(int(one), str(signal.getsignal(one))) for one in (2, 10, 13, 15, 25)])
thread = threading.main_thread()
fact('thread', (thread.name, thread.ident == threading.get_ident(), thread is threading.current_thread(),
                thread.native_id == os.getpid(), threading.active_count()))
fact('start method', multiprocessing.get_start_method())
