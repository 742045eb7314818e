"""What train.py is made of: configuration, one model's training, results, pictures. Above dali_pipeline and models."""
