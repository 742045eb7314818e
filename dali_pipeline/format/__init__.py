"""docs/format.md as code: schema, records and encodings, shards with headers and block hashes, the manifest, and the digest of
what was delivered."""
