"""Refuses: the real module replaces torch.cuda in the whole process."""

raise ImportError(
    "npu_sim does not simulate torch_npu.contrib.transfer_to_npu, which replaces torch.cuda in "
    "the whole process; name the device instead, as in tensor.to('npu')."
)
