"""Loops compiled for this processor by numba, run on the threads that torch keeps for its own."""

import ctypes
import functools
import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
import numpy as np
import torch
from llvmlite import binding, ir
from numba import carray, cfunc, njit, types
from numba.extending import intrinsic

Task = Callable[..., None]

_WORTH_ALL_THREADS = 1 << 16
"""Numbers to be computed."""

STORED_AS = {torch.float32: np.float32, torch.bfloat16: np.uint16, torch.float16: np.int16}
"""What a compiled loop takes for the numbers of a torch type; `wide` reads them."""


@functools.cache
def _openmp() -> ctypes.CDLL:
    """The library of torch, through which the functions of the OpenMP runtime are found that it was linked with."""
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
    library.GOMP_parallel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    library.GOMP_parallel.restype = None
    for name in ("omp_get_thread_num", "omp_get_num_threads"):
        address = ctypes.cast(getattr(library, name), ctypes.c_void_p).value
        binding.add_symbol(name, address)
    return library


@functools.cache
def is_usable() -> bool:
    """Whether loops can run on torch's threads here; its builds for other systems have other runtimes."""
    try:
        _openmp()
    except (OSError, AttributeError):
        return False
    return True


thread_number = types.ExternalFunction("omp_get_thread_num", types.int32())
"""Of the thread that asks, from 0 on."""
thread_count = types.ExternalFunction("omp_get_num_threads", types.int32())


@intrinsic  # type: ignore[untyped-decorator]
def wide(context: Any, number: Any) -> Any:
    """A stored number as float32."""

    def generate(_: Any, builder: Any, __: Any, arguments: Any) -> Any:
        if number == types.float32:
            return arguments[0]
        if number == types.int16:
            return builder.fpext(builder.bitcast(arguments[0], ir.HalfType()), ir.FloatType())
        bits = builder.zext(arguments[0], ir.IntType(32))
        return builder.bitcast(builder.shl(bits, ir.Constant(ir.IntType(32), 16)), ir.FloatType())

    return types.float32(number), generate


@intrinsic  # type: ignore[untyped-decorator]
def narrow(context: Any, number: Any, stored: Any) -> Any:
    """A float32 as a number of this type is stored: the nearest, of two that are as near the even one."""
    kind = stored.dtype

    def generate(_: Any, builder: Any, __: Any, arguments: Any) -> Any:
        if kind == types.float32:
            return arguments[0]
        if kind == types.int16:
            return builder.bitcast(builder.fptrunc(arguments[0], ir.HalfType()), ir.IntType(16))
        word = ir.IntType(32)
        bits = builder.bitcast(arguments[0], word)
        odd = builder.and_(builder.lshr(bits, word(16)), word(1))
        rounded = builder.add(bits, builder.add(odd, word(0x7FFF)))
        return builder.trunc(builder.lshr(rounded, word(16)), ir.IntType(16))

    return kind(types.float32, stored), generate


@intrinsic  # type: ignore[untyped-decorator]
def float_of(context: Any, bits: Any) -> Any:
    """The float32 whose bits a whole number has."""

    def generate(_: Any, builder: Any, __: Any, arguments: Any) -> Any:
        bits_32 = arguments[0] if bits == types.int32 else builder.trunc(arguments[0], ir.IntType(32))
        return builder.bitcast(bits_32, ir.FloatType())

    return types.float32(bits), generate


@njit(fastmath=True)  # type: ignore[untyped-decorator]
def exp(x: Any) -> Any:
    """The exponential of a float32 that is not above 0, to 6 digits, in a form that compilers make many of at once."""
    x = max(x * np.float32(1.44269504), np.float32(-126))  # a power of 2: its whole part is the result's exponent
    whole = np.floor(x + np.float32(0.5))
    f = x - whole
    rest = np.float32(0.00133335581) + f * np.float32(0.000154035304)
    rest = np.float32(0.0555041087) + f * (np.float32(0.00961812911) + f * rest)
    rest = np.float32(1) + f * (np.float32(0.693147181) + f * (np.float32(0.240226507) + f * rest))
    return rest * float_of((np.int32(whole) + np.int32(127)) << np.int32(23))


@intrinsic  # type: ignore[untyped-decorator]
def _pointer(context: Any, address: Any, dtype: Any) -> Any:
    kind = types.CPointer(dtype.dtype)

    def generate(target: Any, builder: Any, _: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], target.get_value_type(kind))

    return kind(types.int64, dtype), generate


@njit  # type: ignore[untyped-decorator]
def array_at(address: int, shape: Any, dtype: Any) -> Any:
    """The array of this shape and numpy type that lies at an address."""
    return carray(_pointer(address, dtype), shape)


def compile_task(task: Callable[[Any], None]) -> Task:
    """A function of integers that runs `task`, which gets an array of them, on all threads at once; on the caller's
    alone where the work is that of so few numbers that waiting for the others would take longer.

    What was compiled is kept for the next start where there is a folder for it. Loops that divide are to be compiled
    with numpy's error model: nobody would learn of what they raise, and what is not a number divides like any other.
    """
    library = _openmp()
    numba.config.CACHE_DIR = _cache_folder(task.__code__.co_filename)
    signature = types.void(types.CPointer(types.int64))
    try:
        compiled = cfunc(signature, cache=True)(task)
    except (OSError, RuntimeError):  # of a folder that cannot be written to
        compiled = cfunc(signature)(task)

    alone = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(compiled.address)

    def run(*arguments: int, numbers: int = _WORTH_ALL_THREADS) -> None:
        array = (ctypes.c_int64 * len(arguments))(*arguments)
        if numbers < _WORTH_ALL_THREADS:  # a team of another size would end the threads of the last one
            alone(array)
        else:
            library.GOMP_parallel(compiled.address, array, torch.get_num_threads(), 0)

    return run


def _cache_folder(source: str) -> str:
    """Another one for each version of the code: numba looks at files' times only, which packages set as they like."""
    code = Path(source).read_bytes() + Path(__file__).read_bytes()
    version = hashlib.sha256(code + numba.__version__.encode()).hexdigest()
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return str(Path(home) / "vlm-server" / version[:16])
