"""The command line, `python -m dali_pipeline COMMAND`. Heavy imports wait until a command needs them."""
