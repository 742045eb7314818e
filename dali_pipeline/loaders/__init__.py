"""`SequenceLoader` and `GraphLoader`: make batches on the device from gathered rows, with DALI or torch."""
