"""`python -m dali_pipeline`."""

from dali_pipeline.cli.app import main

main()
