"""Conformer with CTC: Gulati et al. 2020 (arXiv 2005.08100).

- ``encoder.py``: :class:`~recipes.conformer.encoder.ConformerEncoder`, what a recipe's YAML names by ``_target_``
- ``subsampling.py``, ``attention.py``, ``convolution.py``: its parts, plain torch, each masked for itself
- ``nemo_weights.py``: weights and settings of NeMo's stock ``ConformerEncoder`` into ours and back
"""
