"""What is asked about a data set or a run: verify, inspect, how well it shuffles, doctor."""
