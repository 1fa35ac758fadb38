"""Names of torch_npu.contrib; nothing behind them is simulated."""
