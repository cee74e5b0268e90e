"""The networks: tensors in, tensors out. No I/O, no settings, no device moves."""
