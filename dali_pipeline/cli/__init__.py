"""The command line, `python -m dali_pipeline COMMAND`. Heavy modules are imported only when a command needs them."""
