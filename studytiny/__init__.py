"""StudyTiny: a Chinese small-talk language model small enough to understand whole."""

from studytiny.checkpoint import save_checkpoint
from studytiny.errors import UserError
from studytiny.generator import Candidate, Generator, GeneratorBusy, GeneratorClosed, Step
from studytiny.hub import load_model
from studytiny.import_published import import_published
from studytiny.model import DialogueModel, ModelConfig
from studytiny.original import generate_response, load_checkpoint
from studytiny.sampling import SamplingConfig
from studytiny.tokenizer import Tokenizer

__all__ = [
    "Candidate",
    "DialogueModel",
    "Generator",
    "GeneratorBusy",
    "GeneratorClosed",
    "ModelConfig",
    "SamplingConfig",
    "Step",
    "Tokenizer",
    "UserError",
    "generate_response",
    "import_published",
    "load_checkpoint",
    "load_model",
    "save_checkpoint",
]
