"""cuBLAS through ctypes: the one product that prefill needs, with a workspace of ours, so that it can be captured.

CuPy refuses to call cuBLAS while a stream is captured, and sets the stream before each call, which takes a workspace
away. Functions and numbers: NVIDIA's "cuBLAS" documentation (cublas_api.h, library_types.h).
"""

from __future__ import annotations

import ctypes
from typing import Any

from llorch.providers import ProviderError
from llorch_provider_cupy.runtime import Gemm, Plain

_TYPES: dict[Plain, int] = {"f32": 0, "f16": 2, "bf16": 14}  # cudaDataType_t: CUDA_R_32F, CUDA_R_16F, CUDA_R_16BF
_N, _T = 0, 1  # cublasOperation_t
_COMPUTE_32F, _DEFAULT = 68, -1  # cublasComputeType_t, cublasGemmAlgo_t
_ptr, _int = ctypes.c_void_p, ctypes.c_int
_SIGNATURES = {
    "cublasCreate_v2": (ctypes.POINTER(_ptr),),
    "cublasDestroy_v2": (_ptr,),
    "cublasSetStream_v2": (_ptr, _ptr),
    "cublasSetWorkspace_v2": (_ptr, _ptr, ctypes.c_size_t),
    "cublasGemmEx": (
        *(_ptr, _int, _int, _int, _int, _int, _ptr),  # handle, operations, sizes, alpha
        *(_ptr, _int, _int) * 2,  # matrix, type, stride
        *(_ptr, _ptr, _int, _int, _int, _int),  # beta, the result like a matrix, how to compute
    ),
}


def workspace_bytes(capability: tuple[int, int]) -> int:
    """NVIDIA's advice for cublasSetWorkspace: 32 MiB from Hopper on, 4 MiB before."""
    return (32 if capability >= (9, 0) else 4) << 20


class Cublas:
    """A handle on the current device, for one stream."""

    def __init__(self, path: str, stream: int, workspace: int, nbytes: int) -> None:
        self._library = ctypes.CDLL(path)
        for name, arguments in _SIGNATURES.items():
            getattr(self._library, name).argtypes = arguments
        self._handle = ctypes.c_void_p()
        self._one, self._zero = ctypes.c_float(1.0), ctypes.c_float(0.0)
        self._call("cublasCreate_v2", ctypes.byref(self._handle))
        self._call("cublasSetStream_v2", self._handle, stream)
        self._call("cublasSetWorkspace_v2", self._handle, workspace, nbytes)  # setting the stream takes it away

    def gemm(self, p: Gemm) -> None:
        """Its matrices lie by columns: it is asked for the transposed product, w times x, with w transposed."""
        kind = _TYPES[p.kind]
        self._call(
            "cublasGemmEx",
            *(self._handle, _T, _N, p.rows, p.tokens, p.cols, ctypes.byref(self._one)),
            *(p.w, kind, p.w_stride, p.x, kind, p.x_stride),
            *(ctypes.byref(self._zero), p.out, _TYPES["f32"], p.out_stride, _COMPUTE_32F, _DEFAULT),
        )

    def close(self) -> None:
        if self._handle:
            self._call("cublasDestroy_v2", self._handle)
            self._handle = ctypes.c_void_p()

    def _call(self, name: str, *arguments: Any) -> None:
        if status := getattr(self._library, name)(*arguments):
            raise ProviderError(f"cupy-cuda: {name} failed with cuBLAS status {status}")
