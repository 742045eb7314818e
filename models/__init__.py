"""Three detectors over sequences and graphs, in torch and PyG; independent of the source of the batches."""

from models.features import FeatureViews, set_statistics
from models.gnn_lstm import GNNLSTMDetector
from models.gvae_lstm import GVAELSTMDetector
from models.lstm import LSTMDetector, Output

__all__ = ["FeatureViews", "GNNLSTMDetector", "GVAELSTMDetector", "LSTMDetector", "Output", "set_statistics"]
