"""`python -m server`: read the command line, then start both processes at once.

What takes seconds to import comes after that, so that `--help` and mistakes in the flags are answered at once, and the
engine process imports its libraries while this one imports its own.
"""

import signal
import sys

from engine.spawn import EngineProcess
from server.args import parse_args


def main() -> None:
    """Serve until told to stop; the exit status is 0 unless the engine died."""
    engine_args, args = parse_args(sys.argv[1:])
    for number in (signal.SIGINT, signal.SIGTERM):  # until the event loop takes care of them
        signal.signal(number, lambda *_: sys.exit(0))
    process = EngineProcess(args.log_level)
    try:
        from server.run import run

        run(engine_args, args, process)
    finally:
        process.kill_if_idle()


if __name__ == "__main__":
    main()
