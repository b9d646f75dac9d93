"""What the attention kernels do about an fp8 cache: keys and values are multiplied as they lie there, and their scales
go to the scores and to the result.

Without such a cache nothing of it is compiled, since `kv_scales` is None then.
"""

import triton
import triton.language as tl


@triton.jit
def for_products(query, kv_scales):  # type: ignore[no-untyped-def]
    """Queries in the type in which tensor cores multiply them with keys: float16 holds each number of e4m3, and a GPU
    converts two of them to it in one instruction, which it does not to bfloat16.
    """
    if kv_scales is not None and query.dtype == tl.bfloat16:
        return query.to(tl.float16)
    else:
        return query


@triton.jit
def scale_at(kv_scales, index):  # type: ignore[no-untyped-def]
    """The scale there: of head h's keys at h, of its values at KV_HEADS + h."""
    if kv_scales is None:
        return 1.0
    else:
        return tl.load(kv_scales + index)
