"""A plugin of coverage: a process that `multiprocessing` forks goes on with what is in place.

Coverage's own way begins anew in each fork: it reads its settings, and looks at every file again.
That costs eight times what the step itself does, and hundreds of tests fork steps. Here the fork
keeps the tracer that it has inherited, forgets what its parent has seen, and saves at its end.
"""

import os
from multiprocessing import util

from coverage import Coverage

BEGAN_IN = os.getpid()


def coverage_init(_registry, _options):
    """Be a plugin; what there is to do was done by the import, which happens once."""


def begin(_):
    cov = Coverage.current()
    # Or it was spawned, and has begun by itself, or nothing is measured now.
    if cov is not None and cov._started and os.getpid() != BEGAN_IN:
        cov._collector.data.clear()
        # The last of all that a process of multiprocessing does at its end.
        util.Finalize(None, save, (cov,), exitpriority=-100)


def save(cov):
    cov.stop()
    cov._collector.flush_data()
    cov._data.write()  # to a file of its own: that of the parent it has left


util.register_after_fork(Coverage, begin)
