import os
own = {'__name__': '__ice_launch__'}
exec(compile(os.read(int(os.environ['ICE_LINK_FD']), 1 << 20), '<ice-launch>', 'exec'), own)
try:
    run, words = own['serve'](globals()), own['program_words']
    run(*[words.pop(0) for _ in words[:]])
except SystemExit:
    raise
except BaseException:
    own['hide_own_frames']()
    raise
