"""The parts of train.py: configuration, training of a model, results, pictures. Uses dali_pipeline and models."""
