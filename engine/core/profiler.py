"""A trace of some steps, for looking at where the time goes."""

import logging
import time
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity

from engine.errors import ModelLoadError

logger = logging.getLogger(__name__)

_LEFT_OUT = 20
"""Steps before those that are traced: the first ones are like no others."""


class StepProfiler:
    """Traces steps number 21 to 20 + `num_steps` with torch's profiler, and writes one file that Perfetto can show.

    Args:
        folder: of the file; made if it is not there.
        num_steps: to trace.
        device: whose work is traced beside the host's.
    """

    def __init__(self, folder: Path, num_steps: int, device: torch.device) -> None:
        self._folder = folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ModelLoadError(f"--profile-dir {folder} cannot be made: {error.strerror or error}") from error
        self._first, self._last = _LEFT_OUT, _LEFT_OUT + num_steps
        self._done = 0
        activities = [ProfilerActivity.CPU]
        if device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        self._profiler = torch.profiler.profile(activities=activities, acc_events=True)

    def step(self) -> None:
        """Tell that a step was launched."""
        self._done += 1
        try:
            if self._done == self._first:
                self._profiler.start()
            if self._done == self._last:
                self._write()
        except (OSError, RuntimeError):  # no reason to fail a request
            logger.exception("no trace could be made")

    def close(self) -> None:
        """Write what there is, if the last step has not come."""
        if self._done < self._first:
            logger.warning("no trace was made: it begins with step %d, and there were %d", self._first, self._done)
        elif self._done < self._last:
            self._last = self._done
            try:
                self._write()
            except (OSError, RuntimeError):
                logger.exception("no trace could be made")

    def _write(self) -> None:
        self._profiler.stop()
        file = self._folder / f"steps-{time.strftime('%Y%m%d-%H%M%S')}.json.gz"
        self._profiler.export_chrome_trace(str(file))
        logger.info("wrote a trace of %d steps to %s", self._last - self._first, file)
