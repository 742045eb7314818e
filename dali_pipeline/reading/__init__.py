"""Reading: gather the rows of positions in a split, checked block by block; read-ahead; handling of damaged records."""
