"""How a data set is written: `ShardWriter`, the split by group, shards as they fill, statistics on the way, the journal from
which a stopped writer goes on."""
