"""Cases of the VAE's ops that one table row says; `tests/test_ops_conv.py` has what takes more."""

from wanrt.kernels.cases import BF16, FP16, FP32, Case, Limit, normal

_CONV = "the normalised input and the result are rounded, each once"
LIMITS = {
    "causal_conv3d": {
        FP32: Limit(0, 3e-6, "sums in another order"),
        BF16: Limit(0, 2**-7, _CONV),
        FP16: Limit(0, 2**-10, _CONV),
    },
}


CASES = [
    Case("rms_norm_channels", "3d", lambda: (normal(2, 5, 3, 7, 6), normal(5, 1, 1, 1))),
    Case("rms_norm_channels", "2d", lambda: (normal(3, 33, 7, 5), normal(33, 1, 1))),
]
