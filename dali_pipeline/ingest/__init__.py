"""What brings foreign data in: `convert` for files, in worker processes or on Ray; formats are in `readers`, language models in
`extract`."""
