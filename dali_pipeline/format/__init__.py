"""The file format of docs/format.md: schema, records, encodings, shards with block hashes, manifest, epoch digest."""
