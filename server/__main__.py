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
    engine_args, args = parse_args(sys.argv[1:])
    begun: list[EngineProcess] = []

    def leave(*_: object) -> None:
        # An exception could be lost in whatever runs at this moment: an import, a download's threads.
        for process in begun:
            process.kill_if_idle()
        os._exit(0)

    for number in (signal.SIGINT, signal.SIGTERM):  # until the event loop takes care of them
        signal.signal(number, leave)
    begun.append(EngineProcess(args.log_level))
    try:
        from server.run import run

        run(engine_args, args, begun[0])
    finally:
        begun[0].kill_if_idle()


if __name__ == "__main__":
    main()
