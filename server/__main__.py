"""`python -m server`: read the command line, then start both processes at once.

What takes seconds to import comes after that, so that `--help` and mistakes in the flags are answered at once, and the
engine process imports its libraries while this one imports its own.
"""

import os
import signal
import sys

from engine.spawn import EngineProcess
from server.args import parse_args


def main() -> None:
    """Serve until told to stop; the exit status is 0 unless the engine died."""
    _open_standard_streams()
    engine_args, args = parse_args(sys.argv[1:])
    begun: list[EngineProcess] = []
    told_to_leave = False

    def leave(*_: object) -> None:
        nonlocal told_to_leave
        told_to_leave = True
        if begun:  # sooner, the process would be left with half of what it is told at its start
            begun[0].kill_if_idle()
            # An exception could be lost in whatever runs at this moment: an import, a download's threads.
            os._exit(0)

    for number in (signal.SIGINT, signal.SIGTERM):  # until the event loop takes care of them
        signal.signal(number, leave)
    begun.append(EngineProcess(args.log_level, args.log_format))
    if told_to_leave:
        leave()
    try:
        from server.run import run

        run(engine_args, args, begun[0])
    finally:
        begun[0].kill_if_idle()


def _open_standard_streams() -> None:
    """Where one is closed, a socket would get its number, and what a library prints would go to a client."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest number that is free
            os.set_inheritable(number, True)


if __name__ == "__main__":
    main()
