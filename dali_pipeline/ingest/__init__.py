"""What brings foreign data in: a reader a format, `convert` for files, `extract` for language models."""
