"""Three detectors over sequences and graphs. torch and PyG: nothing here knows where batches come from."""

from models.features import FeatureViews, set_statistics
from models.gnn_lstm import GNNLSTMDetector
from models.gvae_lstm import GVAELSTMDetector
from models.lstm import LSTMDetector, Output

__all__ = ["FeatureViews", "GNNLSTMDetector", "GVAELSTMDetector", "LSTMDetector", "Output", "set_statistics"]
