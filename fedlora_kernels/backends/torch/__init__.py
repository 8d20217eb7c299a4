"""Accurate mode composed of torch.linalg, on the device of the tensors; one file per family."""
