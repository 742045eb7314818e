"""`python -m dali_pipeline`."""

from dali_pipeline.cli import main

main()
