"""Limits that kernels and models keep and that memory plans count on; imports nothing."""

FEED_FORWARD_ROWS = 8192  # tokens at once; enough for a matrix product to keep any card busy
WIDENED_AT_ONCE = 1 << 20  # numbers of an eight-bit weight that become plain, in fp32 on the way
PART_TOKENS = 8192  # that engines take at once where each token is computed by itself
SCORES = 1 << 26  # fp32 values that PyTorch's fp8 attention holds at a time
ATTENTION_AT_ONCE = 256 << 20  # bytes; some heads of a long video keep every card busy


def heads_at_once(queries: int, keys: int, head_dim: int, value_bytes: int) -> int:
    """Heads whose int8 q and k and whose v, of so many bytes a number, fill the limit."""
    return max(1, ATTENTION_AT_ONCE // (head_dim * (queries + keys * (1 + value_bytes))))
