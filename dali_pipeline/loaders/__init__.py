"""`SequenceLoader` and `GraphLoader`: gathered rows to batches on the device, through DALI or torch; epochs and state; the way
to a GPU."""
