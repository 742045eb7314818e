"""Three detectors over sequences and graphs. torch and PyG only: nothing here knows where batches come from."""

from models.gnn_lstm import GNNLSTMDetector
from models.gvae_lstm import GVAELSTMDetector
from models.lstm import LSTMDetector, Output

__all__ = ["GNNLSTMDetector", "GVAELSTMDetector", "LSTMDetector", "Output"]
