"""Corpora to NeMo JSON manifests. Imports none of the project's other packages, nor torch nor NeMo."""
