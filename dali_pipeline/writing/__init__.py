"""Writing of a data set: `ShardWriter`, the split by group, shards being filled, feature statistics, and the journal for a
restart.
"""
