# Ends in the way that its argument names.
import atexit
import os
import signal
import sys
import threading
import time

atexit.register(lambda: print('atexit', flush=True))


def deep():
    raise ValueError('deep')


class Last:
    def __del__(self):
        print('deleted', flush=True)


last = Last()
how = sys.argv[1]
if how == 'error':
    deep()
if how == 'chain':
    try:
        deep()
    except ValueError as error:
        raise RuntimeError('outer') from error
if how == 'interrupt':
    raise KeyboardInterrupt
if how == 'signal':
    os.kill(os.getpid(), signal.SIGTERM)
    signal.pause()
if how == 'code':
    sys.exit(3)
if how == 'text':
    sys.exit('a text')
if how == 'abort':
    os._exit(7)
if how == 'hook':
    old = sys.excepthook

    def hook(kind, error, trace):
        print(trace.tb_frame.f_code.co_name, sys.last_traceback is trace, sys.excepthook is hook)
        old(kind, error, trace)

    sys.excepthook = hook
    deep()
if how == 'thread':
    threading.Thread(target=lambda: (time.sleep(0.05), print('the thread has ended'))).start()
if how == 'partial':
    sys.stdout.write('no newline')
    sys.stderr.write('no newline')
