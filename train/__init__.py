"""What makes a model: corpora, training, evaluation. Start with ``python -m train --help``."""

from train.config import TrainConfig
from train.corpus import ConvDataset
from train.dataset import DialogueDataset
from train.trainer import TransformerTrainer

__all__ = ["ConvDataset", "DialogueDataset", "TrainConfig", "TransformerTrainer"]
