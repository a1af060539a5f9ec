"""Speed: ``vlprune bench kernels`` measures operations, ``vlprune bench model`` whole models; CSV, tables, pictures.

``docs/speed.md`` tells how it is measured and what the words mean.
"""
