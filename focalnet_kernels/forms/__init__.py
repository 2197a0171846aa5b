"""Focal modulation as the summary's pseudo-code has it: other maths than the paper's, without published weights.

docs/forms.md tells the forms apart.
"""

from .sequence_focal_net import SequenceFocalNet
from .similarity import SimilarityFocalModulation, similarity_focal_modulation

__all__ = ["SequenceFocalNet", "SimilarityFocalModulation", "similarity_focal_modulation"]
