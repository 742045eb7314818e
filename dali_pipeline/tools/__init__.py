"""Tools that examine a data set or a run: verify, inspect, the quality of the shuffle, doctor."""
