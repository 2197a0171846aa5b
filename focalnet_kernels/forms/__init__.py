"""Focal modulation as the summary's pseudo-code has it: other maths than the paper's, without published weights.

docs/forms.md tells the forms apart.
"""

from .similarity import SimilarityFocalModulation, similarity_focal_modulation

__all__ = ["SimilarityFocalModulation", "similarity_focal_modulation"]
