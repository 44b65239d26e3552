"""Checkpoints: all or nothing, verified, and free of any layout.

``saver`` saves behind a run, ``store`` at once, finds and loads; ``stored`` reads without ranks. What only looks at
folders and manifests (``folders``, ``retention``) needs no torch.
"""
