"""What every other folder may use and nothing of it is about data sets: this process among others (`World`, container limits,
threads, worker processes, memory that is used again), what a run tells (trace, timing, progress), checked arguments."""
