"""The order of an epoch as a pure function of numbers: windowed shuffle, draws, batches per rank, budgets.

Imports NumPy alone and opens no file; a test checks it.
"""
