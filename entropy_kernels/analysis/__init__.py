"""The entropy law, the predicted entropy change, logs and figures. Importing this needs torch and numpy only."""

from entropy_kernels.analysis.entropy_change import predicted_entropy_change
from entropy_kernels.analysis.entropy_law import EntropyLaw, LawError, fit_entropy_law

__all__ = ["EntropyLaw", "LawError", "fit_entropy_law", "predicted_entropy_change"]
