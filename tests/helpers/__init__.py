"""What several tests share: records, batches, folders of foreign files, servers, and scripts started by path."""
