"""The fuzzer of whatever a file may hold: reader, model configuration, tensors, vocabulary. `make fuzz` runs it."""
