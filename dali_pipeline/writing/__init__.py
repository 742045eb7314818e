"""Writing of a data set: `ShardWriter`, split by group, shards being filled, feature statistics, and restart journal."""
