"""This process and its machine: `World`, container limits, threads, worker processes, buffers, timing, traces, checks.

Every other folder may use this one; nothing in it is about data sets.
"""
