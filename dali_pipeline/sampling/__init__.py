"""The order of an epoch, as a pure function of numbers: windowed shuffle, draws, batches per rank, budgets. NumPy alone, and no
file is opened (a test holds it)."""
