def install() -> int:
    """Replaces torch_npu's kernels; returns how many."""
