"""What the first GPU takes of power."""

import ctypes


class EnergyMeter:
    """NVML's counter of the first GPU."""

    def __init__(self) -> None:
        self._nvml = ctypes.CDLL("libnvidia-ml.so.1")
        self._device = ctypes.c_void_p()
        self._check(self._nvml.nvmlInit_v2())
        self._check(self._nvml.nvmlDeviceGetHandleByIndex_v2(0, ctypes.byref(self._device)))

    def joules(self) -> float:
        """Since the driver was loaded."""
        counted = ctypes.c_ulonglong()
        self._check(self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._device, ctypes.byref(counted)))
        return counted.value / 1000

    def megahertz(self) -> int:
        """Clock of the multiprocessors."""
        clock = ctypes.c_uint()
        self._check(self._nvml.nvmlDeviceGetClockInfo(self._device, 1, ctypes.byref(clock)))
        return clock.value

    def _check(self, status: int) -> None:
        if status:
            raise RuntimeError(f"NVML answered {status}")
